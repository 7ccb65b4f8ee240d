"""Compacted models in folders: saved, and loaded in another process without any pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torch_rsst.compaction.compaction import is_rounding
from torch_rsst.compaction.cut_record import of_kind, stages_of
from torch_rsst.compaction.plain import check_keep_masks, make_plain
from torch_rsst.discovery.probe import output_error
from torch_rsst.groups.groups import Group, GroupLayer, Groups, as_groups
from torch_rsst.masking.names import unwrap, without_wrappers
from torch_rsst.masking.parameter_ref import masked_refs
from torch_rsst.saving.builders import Build, as_build, build_model, guess_builds, shown_build
from torch_rsst.saving.description import (
    INDEX,
    Description,
    Tensors,
    installed,
    put_together,
    read_description,
    take_apart,
)
from torch_rsst.saving.exported import check_onnx, export_onnx, export_program
from torch_rsst.saving.info import CompactInfo, as_info, info_in
from torch_rsst.saving.likeness import compare, differing_counts, set_all
from torch_rsst.saving.model_card import model_card
from torch_rsst.saving.receipt import Receipt, measure
from torch_rsst.utils.errors import CompactionWarning, missing_package, one_line, refuse, shown
from torch_rsst.utils.files import (
    alone_in,
    as_folder,
    check_links,
    check_writable,
    digest,
    digest_of_file,
    find_written,
    write_together,
)
from torch_rsst.utils.module_state import deep_copy

WEIGHTS, BUFFERS, CARD = "model.safetensors", "buffers.safetensors", "README.md"
PROGRAM, ONNX = "model.pt2", "model.onnx"
_OWN = (WEIGHTS, BUFFERS, PROGRAM, ONNX)


def save_compact(
    small: nn.Module,
    folder: str | Path,
    *,
    masked: nn.Module | None = None,
    groups: Groups | Iterable[Group] | Iterable[GroupLayer] | None = None,
    example_inputs: Any = None,
    build: Build | None = None,
    export: bool = False,
    onnx: bool = False,
    info: CompactInfo | None = None,
    notes: Mapping[str, Any] | None = None,
    keep_masks: bool | None = None,
) -> Receipt:
    """Save what :func:`torch_rsst.compact` returned to a folder that :func:`torch_rsst.load_compact` reads.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> torch_rsst.apply_mask(mlp, torch_rsst.regroup(mlp, groups, amount=0.5))
        >>> small = torch_rsst.compact(mlp, groups)
        >>> receipt = torch_rsst.save_compact(small, folder, masked=mlp)
        >>> receipt["parameters"]
        {'before': 76, 'after': 40}

    The folder gets ``model.safetensors``, ``compact.json`` (how to build the dense model, what was
    cut, the receipt, what :func:`torch_rsst.compact_info` returns), the model card ``README.md`` and, if asked
    for, ``model.pt2`` and ``model.onnx``. A folder that was saved to before is replaced: whatever interrupts
    it, the old or the new model can be loaded.

    Args:
        small: compacted; not changed. Wrappers are left out.
        folder: new, or saved to before; other files in it are left alone.
        masked: what ``small`` was made of, for the receipt.
        groups: of ``masked``: the receipt counts their units.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments on the model's
            device. Given, outputs are compared, multiply-adds counted and latency measured.
        build: how to build the dense model, ``{"name": …, "args": […], "kwargs": {…}}``, with a name
            of ``timm.create_model``, ``timm.models.VisionTransformer``,
            ``torchvision.models.get_model``, ``transformers.AutoModel….from_config`` or a model
            class of transformers. Left out, it is found for models of timm and transformers; where
            it is not, :func:`torch_rsst.load_compact` needs the dense model. It is tried before anything is
            written.
        export: also write ``model.pt2``, a program of :mod:`torch.export`, which runs without this library.
        onnx: also write ``model.onnx``; needs the extra ``onnx``. Both are without masks, and compared with the
            model.
        info: classes, images and metrics. What it leaves out is found for models of timm (its data
            configuration) and transformers (the names of its classes), see :meth:`torch_rsst.CompactInfo.of`.
        notes: plain values of your own for the receipt, such as accuracies.
        keep_masks: True saves masks that are left as masks; otherwise they are made permanent in what
            is saved, exported and measured. Pass True or False to do so without a warning.

    Returns:
        the receipt, see :func:`torch_rsst.saving.receipt.measure`.

    Raises:
        ValueError: for a model that :func:`torch_rsst.compact` did not return, a ``build`` that makes another
            model, ``export`` or ``onnx`` without ``example_inputs``, or a folder with links out of it.
        TypeError: for a state dict that holds more than tensors, a folder that is no path, notes that are not plain, or
            another ``keep_masks``.
        FileExistsError, NotADirectoryError: where one of its files has a name that is written here.
        OSError: where the folder cannot be written to, before anything else is done.
        ModuleNotFoundError: where a package is missing that writes one of the files.
        RuntimeError: where an exported file cannot be made, or puts out something else.

    Warns:
        CompactionWarning: where the folder cannot say how to build the dense model, or holds a ``README.md``
            of yours, which stays.
        UnfrozenZerosWarning: for ``keep_masks=None``, where masked weights are saved as zeros.
    """
    check_keep_masks(keep_masks)
    path, bare = check_target(folder), unwrap(small)
    stages = stages_of(bare)
    if stages is None:
        remedy = "Call compact first, and save its very result or a copy of it."
        got = f"a {type(bare).__name__} that does not say what was cut"
        refuse(ValueError, "save_compact", "what compact() returned", got, remedy)
    if (export or onnx) and example_inputs is None:
        remedy = "Pass an example, such as torch.randn(1, 3, 224, 224)."
        refuse(ValueError, "export", "example_inputs to trace", "none", remedy)
    if onnx:
        check_onnx()
    _check_notes(notes)
    info = as_info(info).completed(bare, example_inputs)
    if masked_refs(bare.modules()) and not keep_masks:
        bare = deep_copy(bare)
        make_plain(bare, "save_compact", keep_masks)
    description, tensors = take_apart(bare, stages)
    description = _with_build(build, bare, description, tensors, example_inputs)
    if description.not_built:
        text = (
            "The folder does not say how to build the dense model, so that load_compact needs model= "
            f"({description.not_built}). Pass build= to save_compact to change that."
        )
        warnings.warn(text, CompactionWarning, stacklevel=2)
    receipt = measure(bare, None if masked is None else unwrap(masked), example_inputs)
    if groups is not None:
        receipt["units"] = of_kind(stages, as_groups(groups))
    contents = {WEIGHTS: _packed(tensors.state)}
    if tensors.buffers:
        contents[BUFFERS] = _packed(tensors.buffers)
    exporters = {PROGRAM: export_program} if export else {}
    exporters |= {ONNX: export_onnx} if onnx else {}
    exported = {name: make(bare, example_inputs) for name, make in exporters.items()}
    contents |= {name: file.content for name, file in exported.items()}
    receipt["exported"] = {name: file.max_error for name, file in exported.items()}
    receipt |= notes or {}
    description = replace(description, info=info.to_dict(), receipt=receipt)
    path.mkdir(parents=True, exist_ok=True)
    with alone_in(path):
        if _may_write_card(path):
            contents[CARD] = model_card(description).encode()
        files = {name: digest(content) for name, content in contents.items()}
        write_together(path, contents, INDEX, replace(description, files=files).to_json())
        for name in {*_OWN} - contents.keys():
            (path / name).unlink(missing_ok=True)
    return receipt


def load_compact(
    folder: str | Path, model: nn.Module | None = None, *, keep_masks: bool | None = None
) -> nn.Module:
    """Load a model that :func:`torch_rsst.save_compact` saved, bit for bit, in any process.

    Example:
        >>> dense = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> torch_rsst.load_compact(folder, model=dense)[0]
        Linear(in_features=4, out_features=4, bias=True)

    Where each layer has lost the same share, ``timm.create_model`` or ``from_pretrained`` may make the model with
    other arguments: see :doc:`/saving`. This function makes any of them.

    No pickle is read, and of what the folder names only a few well-known builders are called, with
    plain values; nothing is downloaded.

    Args:
        folder: of :func:`torch_rsst.save_compact`.
        model: the dense model, built as the one was that was compacted; a copy of it is cut, its
            weights and masks do not matter. None: built as the folder says.
        keep_masks: True gives masks that were saved as masks; otherwise they are made permanent. Pass
            True or False to do so without a warning.

    Returns:
        the compacted model on the CPU, or on the device of ``model``; in the mode and of the types
        that it was saved in. Its attribute ``compact_info`` is what :func:`torch_rsst.compact_info` returns.

    Raises:
        FileNotFoundError: where the folder was not saved to.
        TypeError: for a folder that is no path, or another ``keep_masks``.
        ValueError: for files that are damaged, for a model that does not fit, for a folder that does
            not say how to build it (or in a way that is not allowed), or with links out of it.
        ModuleNotFoundError: where the package is missing that the model comes from.

    Warns:
        UnfrozenZerosWarning: for ``keep_masks=None``, where saved masks became zeros.
    """
    check_keep_masks(keep_masks)
    path = as_folder(folder, "Pass a folder of save_compact: load_compact(folder, model=…).")
    dense = None if model is None else unwrap(model)
    description = read_description(path)
    info, tensors = info_in(description, path), _read_tensors(path, description)
    remedy = "Pass the dense model: load_compact(folder, model=…)."
    if dense is not None and description.build is not None:
        remedy = (
            f"Leave model= out: the folder builds {shown_build(description.build)[:300]} itself."
        )
    if dense is None and description.build is None:
        reason = f" ({description.not_built})" if description.not_built else ""
        got = f"a folder that does not say how to build it{reason}"
        refuse(ValueError, str(path), f"the dense {description.model_class}", got, remedy)
    if dense is not None and any(t.is_meta for t in (*dense.parameters(), *dense.buffers())):
        got, remedy = "one on the meta device", "Build it on a real device."
        refuse(ValueError, "model", "values", got, remedy)
    try:
        whole = build_model(description.build) if dense is None else _without_masks(dense)
        small = put_together(whole, description, tensors)
    except ModuleNotFoundError as error:
        raise missing_package(error, str(path), f"Install it. {remedy}") from error
    except Exception as error:  # whatever builders raise
        expected = f"{description.model_class}, built as the one that was compacted"
        built = () if dense is None else map(without_wrappers, dense.state_dict())
        counts = differing_counts(tensors.state, built)
        got = f"another one ({counts}: {one_line(error)})" if counts else f"({one_line(error)})"
        if dense is not None and stages_of(dense) is not None:
            remedy = "Pass the model before it was compacted, or one that is built alike."
        remedy = f"{_other_versions(description)}{remedy}"
        refuse(ValueError, str(path), expected, got, remedy)
    make_plain(small, "load_compact", keep_masks)
    vars(small)["compact_info"] = info
    return small


def _without_masks(dense: nn.Module) -> nn.Module:
    """A copy; its masks matter as little as its weights."""
    made = deep_copy(dense)
    make_plain(made, "load_compact", keep_masks=False)
    return made


def check_target(target: str | Path) -> Path:
    """The path of a folder that a model can be saved to without harm to what it holds.

    Raises:
        TypeError, ValueError, OSError, ModuleNotFoundError: where it cannot.
    """
    folder = as_folder(target, "Pass where to save it: save_compact(small, folder).")
    _safetensors()
    if folder.is_symlink() or folder.exists():
        if not folder.is_dir():
            got, remedy = "a file or a broken link", "Pass a new folder."
            refuse(NotADirectoryError, str(folder), "a folder", got, remedy)
        check_links(folder)
        taken = [name for name in _OWN if (folder / name).exists()]
        if taken and not (folder / INDEX).is_file():
            got, remedy = f"one with a {taken[0]} of another kind", "Pass a new folder."
            expected = "a new folder, or one of save_compact"
            refuse(FileExistsError, str(folder), expected, got, remedy)
    check_writable(folder)
    return folder


def _check_notes(notes: object) -> None:
    """Raise a TypeError unless notes are a mapping of what JSON can hold."""
    expected, remedy = "a dict of numbers, texts, lists and dicts", "Pass notes={'accuracy': 0.98}."
    if notes is not None and not isinstance(notes, Mapping):
        refuse(TypeError, "notes", expected, shown(notes), remedy)
    for name, value in (notes or {}).items():
        try:
            json.dumps({name: value})
        except (TypeError, ValueError) as error:
            refuse(TypeError, f"notes: {name!r}", expected, f"{shown(value)} ({error})", remedy)


def _may_write_card(folder: Path) -> bool:
    """Whether the model card may be written: not over one that somebody else has written or edited."""
    card = folder / CARD
    if not card.exists():
        return True
    try:
        known = read_description(folder).files[CARD]
        if digest_of_file(find_written(folder, CARD, known)) == known:
            return True
    except (KeyError, OSError, ValueError):  # not saved to before, or damaged
        pass
    text = f"{card} was written or edited by hand: it stays. Delete it to get one of this model."
    warnings.warn(text, CompactionWarning, stacklevel=3)
    return False


def _with_build(
    build: Build | None, bare: nn.Module, description: Description, tensors: Tensors, inputs: Any
) -> Description:
    """With a build that has been tried: the given one, or the first that makes the model."""
    reason = ""
    for each in guess_builds(bare) if build is None else [as_build(build)]:
        found, reason = _tried(each, bare, description, tensors, inputs)
        if not reason:
            return found
    if build is not None:
        expected = f"one that makes this {type(bare).__name__}"
        remedy = "Correct it, or leave build out and pass model= to load_compact."
        refuse(ValueError, "build", expected, reason, remedy)
    if not reason and type(bare).__module__.startswith("torchvision."):
        reason = "models of torchvision do not know their name"
    return replace(description, not_built=reason)


def _tried(
    build: Build, bare: nn.Module, description: Description, tensors: Tensors, inputs: Any
) -> tuple[Description, str]:
    """The description with a build, and why that does not lead to the model, "" where it does."""
    try:
        description = replace(description, build=as_build(build))
        built = put_together(build_model(build), description, tensors)
    except Exception as error:  # whatever builders raise
        return description, one_line(error)
    settings, text = compare(bare, built)
    if text:
        return description, f"{build['name']} makes another {text}"
    set_all(built, settings)
    if inputs is not None:
        devices = {tensor.device for tensor in (*bare.parameters(), *bare.buffers())}
        if len(devices) == 1:
            built = built.to(devices.pop())
        off, scale = output_error(bare, built, inputs)
        if not is_rounding(off, scale, bare):
            return description, f"{build['name']} makes outputs that differ by {off:.3g}"
    return replace(description, settings=settings), ""


def _other_versions(description: Description) -> str:
    here = installed()
    other = [
        f"{name} {version} instead of {here[name]}"
        for name, version in description.versions.items()
        if here.get(name, version) != version
    ]
    return f"It was saved with {', '.join(other)}. " if other else ""


def _read_tensors(folder: Path, description: Description) -> Tensors:
    if WEIGHTS not in description.files:
        got, remedy = f"no {WEIGHTS}", "Save the model again with save_compact."
        refuse(ValueError, str(folder / INDEX), "its files", got, remedy)
    weights, buffers = (
        _read(folder, name, description.files[name]) if name in description.files else {}
        for name in (WEIGHTS, BUFFERS)
    )
    return Tensors(weights, buffers)


def _read(folder: Path, name: str, expected: str) -> dict[str, Tensor]:
    path = find_written(folder, name, expected)
    remedy = "Copy the folder again, or save the model again with save_compact."
    if not path.is_file():
        refuse(ValueError, str(path), "the weights", "no file", remedy)
    if (found := digest_of_file(path)) != expected:
        got = f"another one ({found[:12]}…)"
        wanted = f"the file whose SHA-256 is {expected[:12]}…"
        refuse(ValueError, str(path), wanted, got, remedy)
    try:
        tensors: dict[str, Tensor] = _safetensors().load_file(str(path))
    except Exception as error:  # of its own kind
        refuse(ValueError, str(path), "tensors", one_line(error), remedy)
    return tensors


def _packed(tensors: dict[str, Tensor]) -> bytes:
    content: bytes = _safetensors().save(tensors)
    return content


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        remedy = "pip install 'torch-rsst[saving]'"
        raise missing_package(error, "saved models", remedy) from error
    return safetensors.torch
