"""``python -m benchmarks passes``: what calls take that pass over a whole model. See README.md beside this file."""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

import torch_rsst
from benchmarks.contenders import yardstick_of
from benchmarks.meter import Meter

Size: TypeAlias = Literal["22M", "86M", "304M", "754M"]

MEGA = 1e6


@dataclass(frozen=True)
class Options:
    """Time and memory of every call that passes over a whole model.

    Attributes:
        sizes: ViT-S, ViT-B, ViT-L, and a Llama of width 2048 with 16 layers; random weights.
        device: where to measure.
        repeats: turns to take the median of; one more is used for memory.
        calls: those whose names hold one of these words; all if there are none.
    """

    sizes: tuple[Size, ...] = ("86M", "304M", "754M")
    device: str = "cpu"
    repeats: int = 5
    calls: tuple[str, ...] = ()


def build(size: Size) -> nn.Module:
    """A model of this size, on the CPU."""
    torch.manual_seed(0)
    if size == "754M":
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=8000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
        llama: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        return llama.eval()
    import timm

    names = {"22M": "small", "86M": "base", "304M": "large"}
    model: nn.Module = timm.create_model(f"vit_{names[size]}_patch16_224")
    return model.eval()


@dataclass
class Case:
    """A model and what its calls need of each other; each call leaves it as the next one expects it."""

    model: nn.Module
    groups: torch_rsst.Groups
    refill: torch_rsst.Masks = field(default_factory=dict)
    rounds: Any = None

    def calls(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The names of the calls and what they do, in order."""
        model, groups = self.model, self.groups
        yield "find_groups", lambda: torch_rsst.find_groups(model)
        yield "regroup, dense", lambda: torch_rsst.regroup(model, groups, amount=0.5)
        self.refill = torch_rsst.regroup(model, groups, amount=0.5)
        yield "apply_mask, first", lambda: torch_rsst.apply_mask(model, self.refill)
        yield "apply_mask, again", lambda: torch_rsst.apply_mask(model, self.refill)
        yield "extract_mask", lambda: torch_rsst.extract_mask(model)
        yield "regroup, masked", lambda: torch_rsst.regroup(model, groups, amount=0.5)
        yield "sparsity_report", lambda: torch_rsst.sparsity_report(model, groups)
        yield "compact", lambda: torch_rsst.compact(model, groups)
        self._draw_anew()
        rounds = torch_rsst.RSST(model, groups, steps_per_round=1, rounds=3)
        yield "next round", lambda: next(rounds)
        yield "round.report", rounds.report
        yield "rounds.state_dict", rounds.state_dict
        yield "next round, second", lambda: next(rounds)
        yield "finalize", lambda: rounds.finalize(force=True)
        self._draw_anew()

    def _draw_anew(self) -> None:
        torch_rsst.remove_all(self.model, freeze_zeros=False)
        for parameter in self.model.parameters():  # nothing may stay zero
            parameter.detach().normal_(std=0.02)


@torch.no_grad()
def main(options: Options) -> None:
    """Print a table per size."""
    console, meter = Console(width=100), Meter(torch.device(options.device))
    console.print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; "
        f"median of {options.repeats}"
    )
    warnings.simplefilter("ignore", torch_rsst.RoundWarning)
    for size in options.sizes:
        model = build(size).to(meter.device)
        case = Case(model, torch_rsst.find_groups(model))
        console.print(table(size, case, meter, options))


def table(size: Size, case: Case, meter: Meter, options: Options) -> Table:
    """A line per call."""
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(options.repeats):
        for name, call in case.calls():
            multiply = yardstick_of(case.model.parameters())
            multiply()
            passed = meter.seconds(multiply)
            del multiply
            seconds[name].append((meter.seconds(call), passed))
    beyond = {name: meter.beyond(call) for name, call in case.calls()}
    weights = sum(parameter.numel() for parameter in case.model.parameters())
    made = Table(title=f"{size}: {weights / MEGA:.1f} M weights, {4 * weights / MEGA:.0f} MB")
    for heading in ("call", "ms", "ns a weight", "yardsticks", "beyond MB", "of weights"):
        made.add_column(heading, justify="left" if heading == "call" else "right")
    for name, took in seconds.items():
        if options.calls and not any(word in name for word in options.calls):
            continue
        time = statistics.median(own for own, _ in took)
        made.add_row(
            name,
            f"{1e3 * time:.1f}",
            f"{1e9 * time / weights:.2f}",
            f"{time / statistics.median(passed for _, passed in took):.1f}",
            f"{beyond[name] / MEGA:.0f}",
            f"{beyond[name] / (4 * weights):.2f}",
        )
    return made


if __name__ == "__main__":
    main(tyro.cli(Options))
