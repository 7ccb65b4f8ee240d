"""The options of each command: frozen dataclasses, from the command line or ``config.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from torch_rsst.recipes.data_options import DataOptions
from torch_rsst.recipes.pruning_options import PruningOptions
from torch_rsst.recipes.training_options import TrainingOptions
from torch_rsst.utils.errors import listing, message, refuse, unknown_choice

# Options that a resumed run may change: they do not change what it computes.
_FREE_ON_RESUME = ("output", "device", "workers", "data_dir")
# Data sets whose images come in an order that depends on how many processes read them.
_STREAMS = ("wds/", "hfids/", "tfds/")
# Options that say what to do now; config.yaml leaves them out.
_ORDERS = ("resume", "config", "dry_run", "write_config")
_ONLY_WITH = {
    "rsst": ("schedule", "shrink_to", "strength", "mode", "kept_units"),
    "refill": ("fillback_rate",),
}
_NOT_OF_DIGITS = (
    "crop_scale",
    "flip",
    "color_jitter",
    "auto_augment",
    "random_erasing",
    "download",
)


@dataclass(frozen=True)
class RunConfig(TrainingOptions, DataOptions, PruningOptions):
    """Train an image classifier, prune it over rounds, and report.

    The default trains a small timm ViT on scikit-learn's handwritten digits and removes half of its
    heads and MLP neurons with RSST.
    """

    output: Path = field(default=Path("runs/latest"))
    """Folder for config, metrics, weights, report and pictures; must not hold another run."""
    log: bool = False
    """Also write the metrics for TensorBoard, to the folder log in that of the run."""
    resume: bool = False
    """Continue the run in the output folder where it stopped, with its own options."""
    config: str | None = None
    """Start from the options in this YAML file, or of this recipe: digits, vit-cifar10, vit-cifar100,
    resnet18-channels or deit-imagenet. Options beside it win."""
    dry_run: bool = False
    """Show what would be done, and train nothing."""
    write_config: Path | None = None
    """Write all options to this YAML file, and train nothing."""

    def check(self) -> None:
        """Raise unless every option is in its range.

        Not at construction: defaults and files are read before they are checked.

        Raises:
            TypeError, ValueError: with the option, what is expected and the remedy.
        """
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(unknown_choice(name, getattr(self, name), get_args(kind)))
        for part in (PruningOptions, DataOptions, TrainingOptions):
            part.check(self)

    def without_effect(self) -> dict[str, str]:
        """Options that differ from their defaults but have no effect → the option that is the reason."""
        other = "refill" if self.method == "rsst" else "rsst"
        idle = dict.fromkeys(_ONLY_WITH[other], f"--method {self.method}")
        if self.source == "digits":
            idle |= dict.fromkeys(_NOT_OF_DIGITS, "the digits")
        if self.model in ("auto", "vit_digits"):
            idle |= dict.fromkeys(("pretrained", "drop_path"), "--model vit_digits")
        if self.budget:
            idle["regroup_amount"] = "a target"
        if not self.measures:
            idle["importance_batches"] = f"--importance {self.importance}"
        if not self.distill:
            idle["distill_temperature"] = "--distill 0"
        defaults = {f.name: f.default for f in fields(self)}
        return {name: why for name, why in idle.items() if getattr(self, name) != defaults[name]}

    def to_yaml(self) -> str:
        """The options that the results depend on, and where they are written, as YAML."""
        kept = {key: value for key, value in asdict(self).items() if key not in _ORDERS}
        plain = TypeAdapter(dict[str, Any]).dump_python(kept, mode="json")
        text: str = yaml.safe_dump(plain, sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, text: str, source: Path) -> RunConfig:
        """Read options; those that are missing have their defaults.

        Raises:
            TypeError, ValueError: for a file that is not a mapping of known options, or has wrong values.
        """
        try:
            options: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(_bad_file(source, str(error).splitlines()[0])) from error
        if not isinstance(options, Mapping):
            raise ValueError(_bad_file(source, f"a {type(options).__name__}"))
        known = {f.name for f in fields(cls)} - set(_ORDERS)
        if unknown := [str(key) for key in options if key not in known]:
            raise ValueError(_bad_file(source, f"unknown {listing(unknown)}"))
        try:
            config = TypeAdapter(cls).validate_python(dict(options))
            config.check()
        except ValidationError as error:  # lists everything that is wrong
            first = error.errors()[0]
            got = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}"
            raise ValueError(_bad_file(source, got)) from error
        except (TypeError, ValueError) as error:
            raise ValueError(_bad_file(source, str(error))) from error
        return config

    @classmethod
    def named(cls, name: str) -> RunConfig:
        """The options of a YAML file, or of a recipe that comes with the package.

        Raises:
            FileNotFoundError: where there is neither.
            TypeError, ValueError: for wrong options.
        """
        if Path(name).is_file():
            return cls.from_yaml(Path(name).read_text(errors="replace"), Path(name))
        shipped = {path.name.removesuffix(".yaml"): path for path in _configs()}
        if name not in shipped:
            remedy = f"Pass a YAML file, or one of {', '.join(sorted(shipped))}."
            expected = "a file of options, or a recipe"
            refuse(FileNotFoundError, "--config", expected, repr(name), remedy)
        return cls.from_yaml(shipped[name].read_text(), Path(f"{name}.yaml"))

    def differences(self, other: RunConfig) -> dict[str, tuple[object, object]]:
        """Option → (own, other's) value, where a resumed run may not differ."""
        free = {*_FREE_ON_RESUME, *_ORDERS}
        if self.source.startswith(_STREAMS):
            free.discard("workers")
        if self.source != other.source:  # digits in one, a folder in the other
            free.discard("data_dir")
        return {
            f.name: (getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)
            if f.name not in free and getattr(self, f.name) != getattr(other, f.name)
        }


def _configs() -> list[Any]:
    folder = resources.files("torch_rsst.recipes") / "configs"
    return [path for path in folder.iterdir() if path.name.endswith(".yaml")]


@dataclass(frozen=True)
class ReportConfig:
    """Show the results of a finished run; those of several side by side."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Output folders of one or more runs."""
    output: Path | None = None
    """Folder for comparison.html, of several runs; by default the one that the first run is in."""

    def __post_init__(self) -> None:
        """Raise a ValueError unless a folder is given, and --output only with several."""
        if not self.folders:
            refuse(ValueError, "report", "the folder of a run", "none", "Try runs/latest.")
        if self.output is not None and len(self.folders) == 1:
            got, remedy = "one run", "Name several, or leave --output away."
            refuse(ValueError, "--output", "several runs to compare", got, remedy)


@dataclass(frozen=True)
class CompactConfig:
    """Cut units that are gone out of the model of a finished run, and measure what that saves."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The run's output folder."""
    output: Path | None = None
    """Folder for the smaller model; by default the folder "compact" in that of the run."""
    round_to: int = 1
    """Keep a number of units in each layer that is a multiple of this."""
    keep_masks: bool = False
    """Keep masks of single weights: zeros stay 0 in training, at the cost of time and memory."""
    export: bool = False
    """Also write model.pt2, a program of torch.export, which runs without this library."""
    onnx: bool = False
    """Also write model.onnx; needs the extra onnx."""
    images: int = 512
    """Largest number of held-out images on which outputs are compared and times measured."""
    data_dir: Path | None = None
    """Folder of the images, if they have been moved since the run."""


@dataclass(frozen=True)
class PredictConfig:
    """Classify images with the smaller model that torch-rsst compact, or save_compact, has written."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The folder of the smaller model."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The files of the images."""
    top: int = 1
    """How many classes are printed for each image, the likeliest first."""


def _bad_file(source: Path, got: str) -> str:
    return message(
        str(source),
        expected="the options of a run",
        got=got,
        remedy="Correct or restore the file.",
    )
