"""Small models, batches and training steps that several test files share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def linear(rows: int = 3, columns: int = 4, *, seed: int = 0, **kwargs: object) -> nn.Linear:
    """A layer whose weights depend on nothing but the seed; none of them is 0."""
    layer = nn.Linear(columns, rows, **kwargs)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.25
            signs = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.where(signs, -values, values))
    return layer


def mlp(width: int = 4, hidden: int = 8, *, seed: int = 0) -> nn.Sequential:
    """Two linear layers with hidden neurons between."""
    first, second = linear(hidden, width, seed=seed), linear(2, hidden, seed=seed + 1)
    return nn.Sequential(first, nn.Tanh(), second)


def tokens(number: int, *shape: int) -> Tensor:
    """Batch number ``number``; the same whenever it is asked for."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + number))


def gradient_step(
    model: nn.Module, optimizer: Optimizer, number: int, shape: tuple[int, ...] = (5, 4)
) -> None:
    """One ordinary training step on batch ``number``."""
    optimizer.zero_grad()
    model(tokens(number, *shape)).square().mean().backward()
    optimizer.step()


def zero_gradient_step(model: nn.Module, optimizer: Optimizer) -> None:
    """A step on which the loss has no say: what changes is the penalty's work."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit."""
    return torch.equal(a.detach(), b.detach())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, masked latents included, by dense name."""
    return {
        name.removesuffix("_orig"): parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }


def wholly_alive(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights_of(model).items()}
