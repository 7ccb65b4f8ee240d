"""Shared helper models, the skip for a missing timm, and the settings of hypothesis."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

# The tests' tensors are tiny: threads would only fight over the cores, also in processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Derandomized, so that a failure on one machine is a failure on all; HYPOTHESIS_PROFILE=explore
# looks further.
_common: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("moderate", max_examples=40, derandomize=True, **_common)
# Where the same tests run again, with other packages.
settings.register_profile("few", max_examples=10, derandomize=True, **_common)
settings.register_profile("explore", max_examples=1000, print_blob=True, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "moderate"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--multipliers", action="store_true", help="list the penalty's measured multipliers"
    )
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="run every Nth test, for a shorter look"
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--multipliers"):
        return
    table: dict[str, dict[str, float]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for key, value in report.user_properties:
                if key == "multiplier":
                    case, mode, measured = value
                    table.setdefault(case, {})[mode] = measured
    terminalreporter.section("multiplier of the penalty")
    terminalreporter.line(f"{'case':<58}{'coupled':>10}{'decoupled':>11}")
    for case, of in sorted(table.items()):
        cells = (f"{of[m]:.3f}" if m in of else "-" for m in ("coupled", "decoupled"))
        terminalreporter.line("{:<58}{:>10}{:>11}".format(case, *cells))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_timm: skipped where timm cannot be imported")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[:: config.getoption("--every")]
    needing = [item for item in items if item.get_closest_marker("needs_timm")]
    if not needing:
        return
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        # RuntimeError: torchvision's compiled operators do not match a CPU-only build of torch.
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=f"timm cannot be imported: {error}"))


class Attention(nn.Module):
    """Fused qkv attention, as vision transformers have it."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.dropout = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.dropout((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads, qkv_bias)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyTransformer(nn.Module):
    """Tokens in, classes out; 2 blocks of 4 heads of width 4 and 24 neurons."""

    def __init__(
        self,
        depth: int = 2,
        dim: int = 16,
        num_heads: int = 4,
        hidden: int = 24,
        classes: int = 3,
        qkv_bias: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.Sequential(
                *(Block(dim, num_heads, hidden, qkv_bias) for _ in range(depth))
            )
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)).mean(1))


@pytest.fixture(scope="session")
def tiny_transformer() -> type[TinyTransformer]:
    """The class; each call makes a new model with the same weights for the same seed."""
    return TinyTransformer


def _bits(tensor: Tensor | None) -> Any:
    if tensor is None or isinstance(tensor, nn.parameter.UninitializedParameter):
        return None
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).tolist()


def _fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a call which fails, or only reads, must leave as it was."""
    state: list[Any] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        parameters = [(k, id(p), _bits(p)) for k, p in module._parameters.items()]
        gradients = [
            _bits(p.grad)
            for p in module._parameters.values()
            if p is not None and not isinstance(p, nn.parameter.UninitializedParameter)
        ]
        buffers = [(k, id(b), _bits(b)) for k, b in module._buffers.items()]
        products = [(k, id(v), _bits(v)) for k, v in vars(module).items() if isinstance(v, Tensor)]
        hooks = [
            [(key, id(hook)) for key, hook in registry.items()]
            for registry in (
                module._forward_pre_hooks,
                module._forward_hooks,
                module._backward_hooks,
                module._state_dict_hooks,
            )
        ]
        attributes = sorted(vars(module))
        state.append(
            (name, module.training, parameters, gradients, buffers, products, hooks, attributes)
        )
    return state


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[nn.Module], list[Any]]:
    """Bits, identities and order of all parameters, gradients, buffers and hooks; modes; the RNG."""
    return _fingerprint
