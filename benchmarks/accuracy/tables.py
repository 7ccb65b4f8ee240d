"""The CSV file → tables in Markdown and pictures: means, deviations, paired differences."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

BASE = "one-shot magnitude"
CELL = ["task", "amount", "budget"]
PART_NAMES = {
    "main": "Methods",
    "quick": "A first look",
    "ablation": "RSST with one setting changed",
    "repetition": "Three cells again, with other seeds",
}
TASK_NAMES = {
    "language": "language model, bits per character (lower is better)",
    "signal-transformer": "MNIST-1D, transformer, accuracy in %",
    "signal-resnet": "MNIST-1D, residual network, accuracy in %",
}

SHORT_NAMES = {
    "language": "language model, bits per character",
    "signal-transformer": "MNIST-1D, transformer, points",
    "signal-resnet": "MNIST-1D, residual network, points",
}
SUMMARY = {
    "RSST + distillation": "RSST with distillation: `torch-rsst run`",
    "RSST": "RSST without: `RSST(batches=…)`",
    "Refill auto + least squares + distillation": "Refill, the same scores, least squares, distillation: `torch-rsst run --method refill`",
    "Refill auto + least squares": "Refill without distillation",
    "one-shot obs + least squares + scope=size": 'one-shot, the same scores, `scope="size"`, least squares',
    "one-shot variance + least squares": "one-shot variance, least squares",
    "RSST + scope=layer": 'RSST without distillation, `scope="layer"`',
    "gradual": "gradual magnitude",
    "torch-pruning-magnitude": "Torch-Pruning, magnitude",
    "random": "random units",
    "dense": "dense, nothing removed",
}
"""Arms of the short tables, by their labels."""


def label(arm: str, options: str) -> str:
    """How tables call an arm with its options.

    >>> label("one-shot", '{"importance": "variance", "reconstruct": "least_squares"}')
    'one-shot variance + least squares'
    """
    left = json.loads(options)
    importance, aids = left.pop("importance", ""), []
    if method := left.pop("reconstruct", None):
        aids.append(method.replace("_", " "))
    if left.pop("distill", False):
        aids.append("distillation")
    aids += [f"{key}={value}" for key, value in sorted(left.items())]
    name = {"rsst": "RSST", "refill": "Refill"}.get(arm, arm)
    return " + ".join([f"{name} {importance}".strip(), *aids])


def read(path: Path) -> pd.DataFrame:
    """The runs of a file, with ``label`` and ``lost``: how much worse than the dense model, in the metric."""
    runs = pd.read_csv(path)
    runs["label"] = [label(*row) for row in zip(runs["arm"], runs["options"], strict=True)]
    sign = runs["task"].map(lambda task: 1 if task == "language" else -1)
    runs["lost"] = sign * (runs["test"] - runs["dense_test"])
    return runs


def compared(runs: pd.DataFrame, base: str = BASE) -> pd.DataFrame:
    """A line for each cell and arm: mean, deviation, and the gain over ``base`` on the same seeds.

    ``gain`` is positive where the arm is better; ``error`` is its standard error, from the differences
    of runs with the same seed.
    """
    reference = runs[runs["label"] == base].set_index([*CELL, "seed"])["lost"]
    runs = runs.join(reference.rename("base"), on=[*CELL, "seed"])
    runs["gain"] = runs["base"] - runs["lost"]
    by = runs.groupby([*CELL, "label"], sort=False)
    table = by.agg(
        seeds=("seed", "nunique"),
        parameters=("parameters", "mean"),
        test=("test", "mean"),
        deviation=("test", "std"),
        lost=("lost", "mean"),
        gain=("gain", "mean"),
        error=("gain", "sem"),
    )
    return table.reset_index()


def markdown(table: pd.DataFrame) -> str:
    """One table for each cell, the best arm first."""
    parts = []
    for (task, amount, budget), cell in table.groupby(CELL):
        digits = 3 if task == "language" else 2
        parts.append(
            f"### {TASK_NAMES[task]}: {amount:.1%} of the units, {budget:.0%} of the steps\n"
        )
        parts.append(
            f"| method | seeds | parameters | test | gain over {BASE} |\n|---|---|---|---|---|"
        )
        for row in cell.sort_values("lost").itertuples():
            spread = "" if pd.isna(row.deviation) else f" ± {row.deviation:.{digits}f}"
            error = "" if pd.isna(row.error) else f" ± {row.error:.{digits}f}"
            gain = (
                "" if pd.isna(row.gain) or row.label == BASE else f"{row.gain:+.{digits}f}{error}"
            )
            parts.append(
                f"| {row.label} | {row.seeds} | {row.parameters:,.0f} "
                f"| {row.test:.{digits}f}{spread} | {gain} |"
            )
        parts.append("")
    return "\n".join(parts)


def summary(table: pd.DataFrame) -> str:
    """Short tables: a row for each of the :data:`SUMMARY`, a column for each task; gains over ``BASE``.

    Bold are gains of more than twice their standard error.
    """
    parts = []
    for (budget, amount), cell in table.groupby(["budget", "amount"]):
        parts += [
            f"### {amount:.1%} of the units gone, {budget:.0%} of the steps".replace(".0%", "%"),
            "",
            f"| | {' | '.join(SHORT_NAMES.values())} | seeds |",
            "|---|" + "---|" * (len(SHORT_NAMES) + 1),
        ]
        for name, text in SUMMARY.items():
            rows = cell[cell["label"] == name].set_index("task")
            if len(rows):
                seeds = ", ".join(map(str, dict.fromkeys(rows["seeds"])))
                gains = " | ".join(_gain(rows, task) for task in SHORT_NAMES)
                parts.append(f"| {text} | {gains} | {seeds} |")
        parts.append("")
    return "\n".join(parts)


def _gain(rows: pd.DataFrame, task: str) -> str:
    if task not in rows.index or pd.isna(rows.loc[task, "error"]):
        return ""
    digits = 3 if task == "language" else 2
    gain, error = rows.loc[task, ["gain", "error"]]
    text = f"{gain:.{digits}f} ± {error:.{digits}f}".replace("-", "\u2212")
    return f"**{text}**" if gain > 2 * error else text


def draw(table: pd.DataFrame, path: Path) -> None:
    """For each task, what each arm loses against the dense model at half of the units and the small budget."""
    import matplotlib.pyplot as plt

    shown = table[(table["amount"] == 0.5) & (table["budget"] == 0.06)]
    tasks = [task for task in TASK_NAMES if task in set(shown["task"])]
    size = (8, 6 * len(tasks))
    figure, axes = plt.subplots(len(tasks), figsize=size, squeeze=False, layout="constrained")
    for axis, task in zip(axes[:, 0], tasks, strict=True):
        rows = shown[shown["task"] == task].sort_values("lost", ascending=False)
        ours = rows["label"].str.startswith(("RSST", "Refill"))
        axis.barh(rows["label"], rows["lost"], color=ours.map({True: "C0", False: "C7"}))
        axis.errorbar(rows["lost"], rows["label"], xerr=rows["error"], fmt="none", ecolor="black")
        axis.set_title(TASK_NAMES[task], fontsize=10, loc="right")
        axis.set_xlabel("lost against the dense model")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(results: Path) -> str:
    """Write tables, ``results.md`` and ``summary.md``, and ``results.png`` beside the CSV file; returns what to tell the user."""
    if not results.exists():
        return f"{results} does not exist: nothing was run"
    runs = read(results)
    parts = []
    for part, rows in runs[runs["part"] != "tuning"].groupby("part", sort=False):
        base = BASE if part != "ablation" else "RSST"
        parts.append(
            f"## {PART_NAMES[part]}\n\n{markdown(compared(rows, base)).replace(BASE, base)}"
        )
    path = results.with_suffix(".md")
    path.write_text("# Results of the study\n\n" + "\n".join(parts), encoding="utf-8")
    main = runs[runs["part"].isin(["main", "quick"])]
    if len(main):
        text = f"# Gains over {BASE}\n\n{summary(compared(main))}"
        results.with_name("summary.md").write_text(text, encoding="utf-8")
        draw(compared(main), results.with_suffix(".png"))
    return f"tables are in {path}"
