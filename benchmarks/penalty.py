"""``python -m benchmarks.penalty``: what the penalty adds to a training step. See README.md beside this file."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torch_rsst
from benchmarks.meter import Meter
from torch_rsst.masking.mask_sets import penalty_mask
from torch_rsst.penalty.penalized_set import PenalizedSet

Step = Callable[[], None]
PENALTIES: dict[str, dict[str, object]] = {
    "plain": {},
    "coupled, gradient hooks": {"mode": "coupled"},
    "coupled, in the optimizer's step": {"mode": "coupled", "in_step": True},
    "decoupled, in the optimizer's step": {"mode": "decoupled", "in_step": True},
}
"""Row → how the penalty acts; the first is without."""


@dataclass(frozen=True)
class Options:
    """Time of a training step with the penalty, relative to one without.

    Attributes:
        width: of the tokens; 384 is that of ViT-S.
        depth: blocks.
        heads: in each of them.
        tokens: 197 is a picture of 224 by 224 in patches of 16.
        batch: sequences in a step.
        amount: share of the heads and neurons that the penalty shrinks.
        device: where to measure.
        repeats: steps to take the median of, all models in turns.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    tokens: int = 197
    batch: int = 64
    amount: float = 0.5
    device: str = "cpu"
    repeats: int = 3


class Attention(nn.Module):
    """A fused attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """What a vision transformer consists of."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def main(options: Options) -> None:
    """Print a line per way in which the penalty can act."""
    device = torch.device(options.device)
    meter, console = Meter(device), Console(width=110)
    steps = {row: training_step(row, options, device) for row in PENALTIES}
    for step in steps.values():
        step()  # the optimizer's state is made in the first
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    for _ in range(options.repeats):
        for row, step in steps.items():
            seconds[row].append(meter.seconds(step))
    weights = 12 * options.depth * options.width**2
    table = Table(title=f"{weights / 1e6:.1f} M weights, batch {options.batch}, AdamW")
    for heading in ("what", "ms a step", "more than plain"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row, times in seconds.items():
        # Turn by turn, so that what slows a whole turn cancels.
        ratios = [time / plain for time, plain in zip(times, seconds["plain"], strict=True)]
        more = f"{statistics.median(ratios) - 1:+.1%}"
        table.add_row(row, f"{1e3 * statistics.median(times):.0f}", more)
    console.print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; "
        f"median of {options.repeats} steps in turns"
    )
    console.print(table)
    console.print(passes(options, device, step=statistics.median(seconds["plain"])))


def passes(options: Options, device: torch.device, *, step: float) -> Table:
    """The penalty alone, decoupled, on the weights of the same model: time and memory of a step.

    Args:
        options: of the benchmark.
        device: where to measure.
        step: seconds of a training step without penalty.
    """
    meter = Meter(device)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options.width, options.heads) for _ in range(options.depth)))
    groups = torch_rsst.find_groups(model)
    model.to(device)
    refill = torch_rsst.regroup(model, groups, amount=options.amount)
    whole = {name: torch.ones_like(mask) for name, mask in refill.items()}
    # By the unit, then with a fifth of the entries of each unit masked.
    holes = {
        n: m if m.dim() < 2 else torch.rand_like(m, dtype=torch.float32) < 0.8
        for n, m in whole.items()
    }
    weights = [model.get_parameter(name).detach() for name in refill]
    rows: dict[str, Callable[[], object]] = {
        "plain update, all weights": lambda: [w.mul_(0.999) for w in weights],
    }
    memory: dict[str, float] = {}
    for units, current in (("units alive", whole), ("units with holes", holes)):
        before = meter.held()
        penalized = PenalizedSet(model, penalty_mask(current, refill))
        shrink = partial(penalized.shrink, list(penalized), 0.001, None)
        shrink()  # makes what all steps use
        memory[f"penalty, {units}"] = meter.held() - before
        rows[f"penalty, {units}"] = shrink
        lists = [
            (w.view(-1), (current[n] & ~refill[n]).view(-1).nonzero()[:, 0])
            for n, w in zip(refill, weights, strict=True)
        ]
        listed = sum(8.0 * index.numel() for _, index in lists)
        rows[f"index lists, {units}"] = partial(_shrink_listed, lists)
        memory[f"index lists, {units}"] = listed
        parts = [
            Part(w, torch.zeros_like(w), current[n].to(w), refill[n].to(w), torch.zeros_like(w))
            for n, w in zip(refill, weights, strict=True)
        ]
        rows[f"as published, {units}"] = partial(_add_as_published, parts)
        memory[f"as published, {units}"] = listed + sum(4.0 * w.numel() for w in weights)
    penalized_weights = sum(int((~m).sum()) for m in refill.values())
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    for turn in range(-2, 5 * options.repeats):
        for row, work in rows.items():
            took = meter.seconds(work)
            if turn >= 0:
                seconds[row].append(took)
    plain = seconds["plain update, all weights"]
    table = Table(title="the penalty of a step alone, decoupled")
    for heading in ("what", "ms", "of plain", "of ours", "of a step", "bytes a weight to go"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row, times in seconds.items():
        ours = seconds.get(f"penalty, {row.partition(', ')[2]}", times)
        of_plain, of_ours = (
            statistics.median(a / b for a, b in zip(times, others, strict=True))
            for others in (plain, ours)
        )
        took = statistics.median(times)
        held = f"{memory[row] / penalized_weights:.2f}" if row in memory else ""
        ratios = (f"{of_plain:.2f} x", f"{of_ours:.1f} x")
        table.add_row(row, f"{1e3 * took:.2f}", *ratios, f"{took / step:.2%}", held)
    return table


def _shrink_listed(lists: list[tuple[Tensor, Tensor]]) -> None:
    for weight, index in lists:
        weight.index_put_((index,), weight[index] * 0.999)


class Part(NamedTuple):
    """A parameter in the research code's step; all of one shape and dtype."""

    weight: Tensor
    gradient: Tensor
    current: Tensor
    refill: Tensor
    strengths: Tensor


def _add_as_published(parts: list[Part]) -> None:
    """The operations of the research code: list P, write λ there, add it times all weights to gradients."""
    for part in parts:
        in_p = (part.refill == 0) & (part.current == 1)
        (index,) = torch.where(in_p.flatten())
        part.strengths.view(-1)[index.cpu().numpy()] = 0.001
        part.gradient.add_(part.strengths * part.weight)


def training_step(row: str, options: Options, device: torch.device) -> Step:
    """One step of a model of its own: forward, backward, optimizer."""
    torch.manual_seed(0)
    blocks = (Block(options.width, options.heads) for _ in range(options.depth))
    model = nn.Sequential(*blocks)
    groups = torch_rsst.find_groups(model)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(options.batch, options.tokens, options.width, device=device)
    pruner = None
    how = PENALTIES[row]
    if how:
        pruner = torch_rsst.RegularizedPruner(
            model,
            torch_rsst.regroup(model, groups, amount=options.amount),
            total_steps=10 * options.repeats,
            mode=how["mode"],  # type: ignore[arg-type]
            optimizer=optimizer if "in_step" in how else None,
        )

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        if pruner is not None and "in_step" not in how:
            pruner.step()

    return step


if __name__ == "__main__":
    main(tyro.cli(Options))
