"""Compacted models saved and loaded: bit for bit, in another process, from damaged and hostile folders."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import randomize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_rsst
from torch_rsst.compaction.cut_record import pack, stages_of, unpack

pytest.importorskip("safetensors")


class Net(nn.Module):
    """Two MLPs, a norm, a table that is no part of the state dict, and two tied weights."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Linear(4, hidden), nn.GELU(), nn.Linear(hidden, 6, bias=False)
        )
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 4))
        self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.head(self.second(self.norm(self.first(x))) + self.table))


def example() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def compacted(**options: Any) -> tuple[nn.Module, nn.Module, torch_rsst.Groups]:
    """A masked net, what it is compacted to, and its groups."""
    torch.manual_seed(0)
    masked = randomize(Net(**options)).eval()
    groups = torch_rsst.find_groups(masked, on_unsupported="ignore")
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=0.5))
    return masked, torch_rsst.compact(masked, groups), groups


def assert_same(loaded: nn.Module, saved: nn.Module, inputs: Any = None) -> None:
    """Equal bit for bit: names, order, types, values, modes, gradients wanted, outputs."""
    one, other = loaded.state_dict(), saved.state_dict()
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
        assert tensor.stride() == other[name].stride(), name
    named = dict(saved.named_parameters())
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in named.items()
    }
    assert loaded.training == saved.training
    x = example() if inputs is None else inputs
    assert torch.equal(loaded(x), saved(x))


# What compact leaves on the model


def test_a_compacted_model_says_what_was_cut_in_plain_values() -> None:
    _, small, groups = compacted()
    (stage,) = stages_of(small)
    assert json.loads(json.dumps(stage)) == stage
    assert [(la["name"], la["units"]) for la in stage["layers"]] == [("first", 8), ("second", 8)]
    gone = stage["layers"][0]["gone"]
    assert sum(count for _, count, _ in gone) == 4
    assert stage["layers"][0]["members"][0] == {
        "parameter": "first.0.weight",
        "dim": 0,
        "unit_of": [[0, 8, 1]],
        "ranked": True,
        "consumes": False,
    }
    assert str(groups) == "16 neurons in 2 layers"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_what_was_cut_is_copied_and_pickled_along(copied: Any, tmp_path: Path) -> None:
    _, small, _ = compacted()
    twin = copied(small)
    assert stages_of(twin) == stages_of(small)
    torch_rsst.save_compact(twin, tmp_path / "small")
    assert_same(torch_rsst.load_compact(tmp_path / "small", model=Net().eval()), small)


def test_compacting_again_adds_a_stage_and_both_are_loaded(tmp_path: Path) -> None:
    _, small, _ = compacted()
    groups = torch_rsst.find_groups(small, on_unsupported="ignore")
    torch_rsst.apply_mask(small, torch_rsst.regroup(small, groups, amount=0.5))
    smaller = torch_rsst.compact(small, groups)
    assert [la["units"] for stage in stages_of(smaller) for la in stage["layers"]] == [8, 8, 4, 4]
    assert len(stages_of(small)) == 1
    torch_rsst.save_compact(smaller, tmp_path)
    loaded = torch_rsst.load_compact(tmp_path, model=Net())
    assert loaded.first[0].out_features == 2
    assert_same(loaded, smaller)
    assert stages_of(loaded) == stages_of(smaller)


def test_a_bias_made_for_constants_is_made_again(tmp_path: Path) -> None:
    masked = randomize(Net()).eval()
    groups = torch_rsst.find_groups(masked, on_unsupported="ignore")
    keep = torch.arange(8) >= 4
    torch_rsst.apply_mask(masked, {"first.0.weight": keep[:, None].expand(8, 4)})
    small = torch_rsst.compact(masked, groups)
    assert small.first[2].bias is not None
    assert stages_of(small)[0]["new_biases"] == ["first.2"]
    torch_rsst.save_compact(small, tmp_path)
    assert_same(torch_rsst.load_compact(tmp_path, model=Net()), small)


def test_a_new_bias_is_cut_with_the_units_that_its_layer_puts_out(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1, bias=False)
        layers = (nn.Conv2d(3, 3, 1), first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(6, 4, 1))
        return nn.Sequential(*layers)

    masked, x = randomize(make()).eval(), torch.randn(2, 3, 5, 5)
    groups = torch_rsst.find_groups(masked, ("channels",), example_inputs=x)
    dead = {"1.weight": torch.arange(8) >= 3, "3.weight": torch.arange(6) >= 2}
    shapes = {name: masked.get_parameter(name).shape for name in dead}
    torch_rsst.apply_mask(
        masked, {n: alive[:, None, None, None].expand(shapes[n]) for n, alive in dead.items()}
    )
    small = torch_rsst.compact(masked, groups, example_inputs=x)
    assert small[3].bias.shape == (4,)
    torch.testing.assert_close(small(x), masked(x), rtol=0, atol=1e-5)
    torch_rsst.save_compact(small, tmp_path)
    assert_same(torch_rsst.load_compact(tmp_path, model=make()), small, x)


@given(st.lists(st.integers(-1, 6), max_size=30))
def test_runs_give_back_what_was_packed(values: list[int]) -> None:
    runs = pack(torch.tensor(values, dtype=torch.int64))
    assert unpack(runs, size=len(values), at_most=7, low=-1).tolist() == values
    assert len(runs) <= len(values)


# Round trips


def test_a_loaded_model_is_the_saved_one(tmp_path: Path) -> None:
    masked, small, groups = compacted()
    small.head.weight.requires_grad_(False)
    receipt = torch_rsst.save_compact(
        small, tmp_path, masked=masked, groups=groups, example_inputs=example()
    )
    dense = Net()
    before = copy.deepcopy(dense.state_dict())
    rng = torch.get_rng_state()
    loaded = torch_rsst.load_compact(tmp_path, model=dense)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(loaded, small)
    assert loaded.tied.weight is loaded.head.weight
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert dense.first[0].out_features == 8
    assert receipt["parameters"] == {"before": 216, "after": 128}
    assert receipt["units"] == {"neurons": {"before": 16, "after": 8}}
    assert receipt["multiply_adds"]["before"] == 5 * (32 + 48 + 48 + 32 + 16 + 16)
    assert receipt["multiply_adds"]["after"] == 5 * (16 + 24 + 24 + 16 + 16 + 16)
    assert receipt["max_error"] <= 1e-6 < receipt["largest_output"]
    assert receipt["latency_ms"]["before"] > 0 < receipt["latency_ms"]["after"]
    assert receipt["measured_on"]["inputs"] == [[5, 4]]
    assert json.loads((tmp_path / "compact.json").read_text())["receipt"] == receipt


def test_a_model_that_holds_tensors_of_a_graph_is_measured(tmp_path: Path) -> None:
    masked, small, _ = compacted()
    masked.seen = [masked.head.weight * 2]
    receipt = torch_rsst.save_compact(small, tmp_path, masked=masked, example_inputs=example())
    assert receipt["parameters"] == {"before": 216, "after": 128}


def test_the_receipt_hashes_the_masks(tmp_path: Path) -> None:
    masked, small, _ = compacted()
    receipt = torch_rsst.save_compact(small, tmp_path, masked=masked)
    by_hand = hashlib.sha256()
    for name, mask in sorted(torch_rsst.extract_mask(masked).items()):
        by_hand.update(f"{name} {tuple(mask.shape)}\n".encode())
        by_hand.update(bytes(mask.flatten().int().tolist()))
    assert receipt["masks_sha256"] == by_hand.hexdigest()
    assert receipt["max_error"] is None
    assert receipt["latency_ms"] == {"before": None, "after": None}


def test_a_trained_model_is_compared_with_what_it_was_made_of(tmp_path: Path) -> None:
    masked, small, _ = compacted()
    with torch.no_grad():
        small.tied.bias.add_(0.5)
    receipt = torch_rsst.save_compact(small, tmp_path, masked=masked, example_inputs=example())
    assert receipt["max_error"] == pytest.approx(0.5, abs=1e-5)


def with_masks_left() -> tuple[nn.Module, nn.Module]:
    """A masked net, and what it is compacted to with masks that still have zeros."""
    masked, _, groups = compacted()
    masks = torch_rsst.extract_mask(masked)
    masks["first.0.weight"][:, 1] = False
    torch_rsst.apply_mask(masked, masks | {"head.weight": torch.eye(4, dtype=torch.bool)})
    return masked, torch_rsst.compact(masked, groups, keep_masks=True)


def test_masks_are_saved_and_loaded_where_they_are_asked_for(tmp_path: Path) -> None:
    _, small = with_masks_left()
    left = torch_rsst.extract_mask(small)
    assert set(left) == {"first.0.weight", "head.weight"}
    torch_rsst.save_compact(small, tmp_path, keep_masks=True)
    loaded = torch_rsst.load_compact(tmp_path, model=Net(), keep_masks=True)
    assert_same(loaded, small)
    found = torch_rsst.extract_mask(loaded)
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in left.items()}
    assert loaded.tied.weight_orig is loaded.head.weight_orig


ZEROS = r": 16 masked weights that were not cut out are ordinary zeros now.*Pass keep_masks=True"


def test_what_is_saved_and_loaded_is_plain_and_as_small_as_can_be(tmp_path: Path) -> None:
    masked, small = with_masks_left()
    before = copy.deepcopy(small.state_dict())
    with pytest.warns(torch_rsst.UnfrozenZerosWarning, match="^save_compact" + ZEROS):
        receipt = torch_rsst.save_compact(small, tmp_path / "plain", masked=masked)
    assert receipt["timed"] == {"before": None, "after": None}
    assert all(torch.equal(small.state_dict()[name], value) for name, value in before.items())
    plain = torch_rsst.load_compact(tmp_path / "plain", model=Net())
    torch_rsst.save_compact(small, tmp_path / "masked", keep_masks=True)
    with pytest.warns(torch_rsst.UnfrozenZerosWarning, match="^load_compact" + ZEROS):
        other = torch_rsst.load_compact(tmp_path / "masked", model=Net())
    for loaded in (plain, other):
        assert torch_rsst.extract_mask(loaded) == {}
        assert loaded.tied.weight is loaded.head.weight
        assert torch.equal(loaded(example()), small(example()))
    assert_same(plain, other)


def test_the_receipt_says_what_was_timed(tmp_path: Path) -> None:
    masked, small = with_masks_left()
    timed = {
        keep: torch_rsst.save_compact(
            small, tmp_path, masked=masked, example_inputs=example(), keep_masks=keep
        )["timed"]
        for keep in (True, False)
    }
    permanent = "masks made permanent"
    assert timed[False] == {"before": permanent, "after": permanent}
    assert timed[True] == {"before": permanent, "after": "masks applied in each forward pass"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_and_hidden_buffers_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    _, small, _ = compacted()
    small = small.to(dtype).train()
    small.norm.double()
    small.table += 1
    torch_rsst.save_compact(small, tmp_path)
    loaded = torch_rsst.load_compact(tmp_path, model=Net())
    assert loaded.training
    assert torch.equal(loaded.table, small.table)
    assert loaded.table.dtype == dtype
    for net in (loaded, small):
        net.norm.to(dtype)
    assert_same(loaded.eval(), small.eval(), example().to(dtype))


def test_layers_without_units_and_memory_formats_come_back(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2))
        )  # fmt: skip

    masked = randomize(make()).eval()
    groups = torch_rsst.find_groups(masked, ("neurons",), on_unsupported="ignore")
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=1.0, min_keep=0))
    small = torch_rsst.compact(masked, groups).to(memory_format=torch.channels_last)
    assert isinstance(small[2], torch_rsst.discovery.BiasOnly)
    torch_rsst.save_compact(small, tmp_path)
    x = torch.randn(2, 3, 4, 4)
    assert_same(torch_rsst.load_compact(tmp_path, model=make()), small, x)


def test_a_model_that_is_one_layer_is_replaced_as_a_whole(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    masked = make()
    groups = torch_rsst.find_groups(masked)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=1.0, min_keep=0))
    small = torch_rsst.compact(masked, groups)
    torch_rsst.save_compact(small, tmp_path)
    loaded = torch_rsst.load_compact(tmp_path, model=make())
    assert type(loaded) is torch_rsst.discovery.BiasOnly
    assert_same(loaded, small)


def test_wrappers_are_left_out(tmp_path: Path) -> None:
    _, small, _ = compacted()
    torch_rsst.save_compact(nn.DataParallel(small), tmp_path)
    assert_same(torch_rsst.load_compact(tmp_path, model=nn.DataParallel(Net())), small)


# Built as the folder says


@pytest.mark.needs_timm
def test_a_timm_model_is_built_in_a_process_of_its_own(tmp_path: Path) -> None:
    import timm

    options = {"img_size": 32, "num_classes": 3, "depth": 2, "global_pool": "avg"}
    masked = randomize(timm.create_model("vit_tiny_patch16_224", **options)).eval()
    groups = torch_rsst.find_groups(masked)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=0.5))
    small = torch_rsst.compact(masked, groups)
    x = torch.randn(2, 3, 32, 32)
    build = {"name": "timm.create_model", "args": ["vit_tiny_patch16_224"], "kwargs": options}
    receipt = torch_rsst.save_compact(small, tmp_path, masked=masked, build=build, example_inputs=x)
    assert receipt["max_error"] <= 1e-5
    torch.save({"x": x, "y": small(x).detach()}, tmp_path / "expected.pt")
    code = (
        # Sums are rounded as the number of threads says, which is 1 in tests.
        "import sys, torch, torch_rsst; p = sys.argv[1]; e = torch.load(p + '/expected.pt'); "
        f"torch.set_num_threads({torch.get_num_threads()}); "
        "m = torch_rsst.load_compact(p); assert torch.equal(m(e['x']), e['y']); print(m.blocks[0].attn)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "proj): Linear(in_features=64" in run.stdout


@pytest.mark.needs_timm
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "num_classes": 3}),
        ("vit_tiny_patch16_224", {"img_size": 48, "num_classes": 0, "in_chans": 1, "global_pool": "avg"}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)  # fmt: skip
def test_how_a_timm_model_was_built_is_found(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    import timm

    masked = timm.create_model(name, **options).eval()
    groups = torch_rsst.find_groups(masked)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=0.5))
    small = torch_rsst.compact(masked, groups)
    torch_rsst.save_compact(small, tmp_path)
    size = options.get("img_size", 224)
    x = torch.randn(1, options.get("in_chans", 3), size, size)
    loaded = torch_rsst.load_compact(tmp_path)
    assert_same(loaded, small, x)
    if options:  # a second round needs no build either
        torch_rsst.save_compact(loaded, tmp_path)
        assert_same(torch_rsst.load_compact(tmp_path), small, x)


@pytest.mark.needs_timm
def test_a_timm_model_of_another_depth_is_built_and_a_wrong_one_is_told_the_argument(
    tmp_path: Path,
) -> None:
    import timm

    options = {"img_size": 32, "num_classes": 2}
    masked = timm.create_model("vit_tiny_patch16_224", depth=2, **options).eval()
    groups = torch_rsst.find_groups(masked)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=0.5))
    small = torch_rsst.compact(masked, groups)
    torch_rsst.save_compact(small, tmp_path)
    assert_same(torch_rsst.load_compact(tmp_path), small, torch.randn(1, 3, 32, 32))
    for depth in (1, 3):
        wrong = timm.create_model("vit_tiny_patch16_224", depth=depth, **options)
        with pytest.raises(
            ValueError, match=rf"blocks: 2 modules saved, {depth} built: .*"
        ) as told:
            torch_rsst.load_compact(tmp_path, model=wrong)
        assert "Leave model= out: the folder builds timm.create_model(" in str(told.value)
        assert "depth=2) itself." in str(told.value)


@pytest.mark.needs_timm
@pytest.mark.parametrize("options", [{"num_heads": 6}, {"qkv_bias": False}, {"act_layer": nn.ReLU}])
def test_what_a_timm_model_does_not_say_is_not_guessed(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Six heads have the same shapes as three: rebuilt by shapes alone, the model would be another."""
    import timm

    def make(**options: Any) -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, **options)

    masked = make(**options).eval()
    groups = torch_rsst.find_groups(masked)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=0.5))
    small = torch_rsst.compact(masked, groups)
    torch_rsst.save_compact(small, tmp_path)
    with pytest.raises(
        ValueError, match=r"expected the dense timm.*VisionTransformer, got a folder"
    ):
        torch_rsst.load_compact(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    assert_same(torch_rsst.load_compact(tmp_path, model=make(**options)), small, x)
    if "num_heads" in options:
        with pytest.raises(ValueError, match=r"expected the 6 heads that it was cut in, got 3"):
            torch_rsst.load_compact(tmp_path, model=make())
        wrong = {"name": "timm.create_model", "args": ["vit_tiny_patch16_224"],
                 "kwargs": {"img_size": 32, "num_classes": 2}}  # fmt: skip
        with pytest.raises(ValueError, match=r"build: expected one that makes this VisionTransf"):
            torch_rsst.save_compact(small, tmp_path / "other", build=wrong)
        assert not (tmp_path / "other").exists()


@pytest.mark.needs_timm
def test_numbers_set_after_building_come_back(tmp_path: Path) -> None:
    import timm

    masked = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2).eval()
    masked.head_drop.p = 0.125
    masked.norm.eps = 1e-4
    groups = torch_rsst.find_groups(masked)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=0.5))
    small = torch_rsst.compact(masked, groups)
    torch_rsst.save_compact(small, tmp_path)
    loaded = torch_rsst.load_compact(tmp_path)
    assert (loaded.head_drop.p, loaded.norm.eps) == (0.125, 1e-4)
    assert_same(loaded, small, torch.randn(1, 3, 32, 32))
    damaged(tmp_path, lambda d: d.update(settings={"norm": {"forward": 1.0}}))
    with pytest.raises(ValueError, match=r"expected numbers that the model has, got norm\.forward"):
        torch_rsst.load_compact(tmp_path)


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 10, "vocab_size": 11,
        "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def half_of(model: nn.Module, inputs: Any) -> nn.Module:
    groups = torch_rsst.find_groups(model, "neurons", example_inputs=inputs)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    return torch_rsst.compact(model, groups)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_that_hugging_faces_trainer_had_is_built_again(
    tmp_path: Path, implementation: str
) -> None:
    """It sets use_cache=False, so that another generation_config comes of the configuration."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**TINY, attn_implementation=implementation)
    model = transformers.LlamaForCausalLM(config).eval()
    model.config.use_cache = False
    inputs = {"input_ids": torch.arange(8).view(2, 4)}
    small = half_of(model, inputs)
    torch_rsst.save_compact(small, tmp_path, example_inputs=inputs)
    loaded = torch_rsst.load_compact(tmp_path)
    assert loaded.config.use_cache is False
    assert loaded.config._attn_implementation == implementation
    assert torch.equal(loaded(**inputs).logits, small(**inputs).logits)


@pytest.mark.needs_timm
def test_a_detr_with_a_backbone_of_timm_is_built_again(tmp_path: Path) -> None:
    """Its backbone refuses to be told an implementation of attention."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(
        backbone="resnet10t", out_indices=[1, 2, 3, 4], use_pretrained_backbone=False
    )
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers",)}
    widths = {f"{part}_ffn_dim": 8 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    config = transformers.DetrConfig(
        **sizes, **widths, **heads, d_model=8, num_queries=2, backbone_config=backbone
    )
    model = transformers.DetrForObjectDetection(config).eval()
    model.config.backbone_config.use_pretrained_backbone = True  # as pretrained ones have it
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64)}
    small = half_of(model, inputs)
    torch_rsst.save_compact(small, tmp_path, example_inputs=inputs)
    loaded = torch_rsst.load_compact(tmp_path)
    assert torch.equal(loaded(**inputs).logits, small(**inputs).logits)


def test_what_differs_of_a_configuration_is_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    small = half_of(model, {"input_ids": torch.arange(8).view(2, 4)})
    config = transformers.LlamaConfig(**{**TINY, "rms_norm_eps": 1e-5})
    build = {"name": "transformers.LlamaForCausalLM", "args": [config]}
    words = r"makes another 'config\.rms_norm_eps' \(1e-05, not 1e-06\) of the model"
    with pytest.raises(ValueError, match=words):
        torch_rsst.save_compact(small, tmp_path, build=build)


@pytest.mark.needs_timm
@pytest.mark.filterwarnings("default:The folder does not say")
def test_why_a_folder_cannot_say_how_to_build_its_model_is_said_twice(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, qkv_bias=False)
    small = half_of(model.eval(), torch.randn(1, 3, 32, 32))
    reason = r"timm\.create_model: |timm\.create_model makes another 'bias'|unexpected|Missing|bias"
    with pytest.warns(
        torch_rsst.CompactionWarning, match=f"load_compact needs model= .*({reason})"
    ):
        torch_rsst.save_compact(small, tmp_path)
    with pytest.raises(
        ValueError, match=f"does not say how to build it .*({reason}).*Pass the dense"
    ):
        torch_rsst.load_compact(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_model_of_ones_own_is_not_told_to_pass_a_build(tmp_path: Path) -> None:
    """None of the builders can make it: there is nothing to do."""
    _, small, _ = compacted()
    torch_rsst.save_compact(small, tmp_path)
    with pytest.raises(
        ValueError, match=r"build it\. Pass the dense model: load_compact\(folder, mod"
    ):
        torch_rsst.load_compact(tmp_path)


# Programs, ONNX, compilation


def test_an_exported_program_runs_where_this_library_is_not_installed(tmp_path: Path) -> None:
    masked, _, groups = compacted()
    torch_rsst.apply_mask(masked, {"head.weight": torch.eye(4, dtype=torch.bool)})
    small = torch_rsst.compact(masked, groups, keep_masks=True)
    torch_rsst.save_compact(
        small, tmp_path, example_inputs=example()[:1], export=True, keep_masks=False
    )
    program = torch.export.load(tmp_path / "model.pt2")
    assert not any("mask" in name for name in program.state_dict)
    x = example()
    torch.save({"x": x, "y": small(x).detach()}, tmp_path / "expected.pt")
    code = (
        "import sys; sys.modules['torch_rsst'] = None; import torch; p = sys.argv[1]; "
        "e = torch.load(p + '/expected.pt'); m = torch.export.load(p + '/model.pt2').module(); "
        "torch.testing.assert_close(m(e['x']), e['y'], rtol=0, atol=1e-6); "
        "assert not [n for n in sys.modules if n.startswith('torch_rsst.')]"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    torch_rsst.save_compact(small, tmp_path, keep_masks=False)
    assert not (tmp_path / "model.pt2").exists()


def test_a_program_for_one_batch_is_exported_where_no_other_can_be(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.mlp(x.reshape(1, 5, 4)) + y

    masked = Fixed().eval()
    groups = torch_rsst.find_groups(masked)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=0.5))
    small = torch_rsst.compact(masked, groups)
    inputs = (example(), torch.ones(4))
    torch_rsst.save_compact(small, tmp_path, example_inputs=inputs, export=True)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(*inputs), small(*inputs))


def test_a_loaded_model_compiles_and_exports_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    _, small, _ = compacted()
    torch_rsst.save_compact(small, tmp_path)
    loaded, x = torch_rsst.load_compact(tmp_path, model=Net()), example()
    torch._dynamo.reset()
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), small(x))
    torch._dynamo.reset()
    program = torch.onnx.export(loaded, (x,), dynamo=True, verbose=False)
    stored = io.BytesIO()
    program.save(stored)
    session = runtime.InferenceSession(stored.getvalue())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), small(x).detach(), rtol=1e-5, atol=1e-6)


# Folders of earlier versions. Never written again: what was saved once can be loaded from then on.

FOLDERS = Path(__file__).parent / "folders"


class Earlier(nn.Module):
    """The class whose compacted instance the folder ``masked`` holds."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
        self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.head(self.mlp(x) + self.table))


def outputs(folder: Path) -> dict[str, Tensor]:
    """An input and the output of the model when the folder was saved."""
    from safetensors.torch import load_file

    return load_file(folder / "outputs.safetensors")


def test_a_folder_of_version_1_with_masks_is_loaded() -> None:
    folder = FOLDERS / "masked"
    expected = outputs(folder)
    loaded = torch_rsst.load_compact(folder, Earlier(), keep_masks=True)
    assert set(torch_rsst.extract_mask(loaded)) == {"mlp.0.weight", "head.weight"}
    assert loaded.tied.weight_orig is loaded.head.weight_orig
    with pytest.warns(torch_rsst.UnfrozenZerosWarning):
        plain = torch_rsst.load_compact(folder, Earlier())
    for model in (loaded, plain):
        torch.testing.assert_close(model(expected["x"]), expected["y"])
        assert not model.head.bias.requires_grad
        assert not model.training


@pytest.mark.needs_timm
def test_a_folder_of_version_1_is_built_and_loaded() -> None:
    expected = outputs(FOLDERS / "vit")
    loaded = torch_rsst.load_compact(FOLDERS / "vit")
    assert (loaded.blocks[0].attn.num_heads, loaded.blocks[0].mlp.fc1.out_features) == (2, 8)
    torch.testing.assert_close(loaded(expected["x"]), expected["y"])


@pytest.mark.parametrize(
    "name",
    ["build", "tied", "settings", "frozen", "channels_last", "receipt", "versions"],
)
def test_a_folder_that_lacks_what_was_added_later_is_loaded(tmp_path: Path, name: str) -> None:
    """A setting that is not there means what it meant before there was one."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    groups = torch_rsst.find_groups(net)
    torch_rsst.apply_mask(net, torch_rsst.regroup(net, groups, amount=0.5))
    small = torch_rsst.compact(net, groups)
    torch_rsst.save_compact(small, tmp_path)
    damaged(tmp_path, lambda d: d.pop(name))
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    assert_same(torch_rsst.load_compact(tmp_path, dense), small)


def test_a_folder_names_public_paths_only(tmp_path: Path) -> None:
    """Whatever the modules of this library are called later, the folder can be read."""
    layer = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    groups = torch_rsst.find_groups(layer)
    torch_rsst.apply_mask(layer, torch_rsst.regroup(layer, groups, amount=1.0, min_keep=0))
    gone = torch_rsst.compact(layer, groups)  # a module of this library
    torch_rsst.save_compact(gone, tmp_path / "gone")
    torch_rsst.save_compact(with_masks_left()[1], tmp_path / "masked", keep_masks=True)
    for folder in (tmp_path / "gone", tmp_path / "masked"):
        text = (folder / "compact.json").read_text()
        named = set(re.findall(r"torch_rsst(?:\.\w+)+", text)) - {"torch_rsst.compact"}
        assert not named, "none is needed today; a public one would be fine"


# Wrong calls


@pytest.mark.parametrize("name", ["Llama", "T5", "Bert"])
def test_a_model_that_keeps_a_cache_is_exported_without_it(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 10, "vocab_size": 11}
    heads = {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    t5 = {"d_model": 12, "d_kv": 4, "num_heads": 3, "d_ff": 10, "num_layers": 1, "vocab_size": 11}
    options = t5 if name == "T5" else sizes | heads
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**options)
    ).eval()
    inputs = {"input_ids": torch.arange(8).view(2, 4)}
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if name == "T5" else {}
    groups = torch_rsst.find_groups(model, "neurons", example_inputs=inputs)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups)
    torch_rsst.save_compact(small, tmp_path, example_inputs=inputs, export=True)
    program = torch.export.load(tmp_path / "model.pt2").module()
    one = {key: ids[:1] for key, ids in inputs.items()}
    with torch.no_grad():
        got, expected = program(**one), small(**one)
    assert expected.get("past_key_values") is None or "past_key_values" not in got
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state)
    if name == "Llama":
        assert small.config.use_cache
        with pytest.raises(
            ValueError, match=r"ask for no cache.*got use_cache=True\. Leave it out"
        ):
            torch_rsst.save_compact(
                small, tmp_path, example_inputs={**inputs, "use_cache": True}, export=True
            )


def test_what_cannot_be_exported_is_said_with_the_way_out(tmp_path: Path) -> None:
    class Decides(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > -1e9 else x

    _, small, _ = compacted()
    small.__class__ = Decides
    with pytest.raises(RuntimeError, match=r"expected a model that torch\.export traces") as e:
        torch_rsst.save_compact(small, tmp_path, example_inputs=example(), export=True)
    assert str(e.value).endswith(" Leave export out: the folder can be loaded without it.")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_build_that_makes_another_model_is_said_in_one_sentence(tmp_path: Path) -> None:
    _, small, _ = compacted()
    build = {"name": "torchvision.models.get_model", "args": ["nothing"]}
    with pytest.raises(ValueError, match="build: expected one that makes this Net, got ") as caught:
        torch_rsst.save_compact(small, tmp_path, build=build)
    assert str(caught.value).endswith(
        "load_compact(folder, model=…). Correct it, or leave build out and pass model= to load_compact."
    )


def test_only_what_compact_returned_is_saved(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected what compact\(\) returned, got a Net that does"
    ):
        torch_rsst.save_compact(Net(), tmp_path)
    _, small, _ = compacted()
    with pytest.raises(ValueError, match="export: expected example_inputs to trace, got none"):
        torch_rsst.save_compact(small, tmp_path, export=True)
    assert not list(tmp_path.iterdir())


def test_a_state_dict_with_more_than_tensors_is_refused(tmp_path: Path) -> None:
    _, small, _ = compacted()
    small.head.__class__ = type("Counts", (nn.Linear,), {"get_extra_state": lambda _: {"steps": 3}})
    with pytest.raises(TypeError, match=r"'head\._extra_state': expected a tensor, got dict"):
        torch_rsst.save_compact(small, tmp_path)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    _, small, _ = compacted()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a folder, got a file"):
        torch_rsst.save_compact(small, tmp_path / "file")
    (tmp_path / "model.safetensors").write_text("theirs")
    with pytest.raises(FileExistsError, match=r"got one with a model\.safetensors of another kind"):
        torch_rsst.save_compact(small, tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "theirs"


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, small, _ = compacted()
    (tmp_path / "file").touch()
    monkeypatch.setattr("torch_rsst.saving.compact_folder.measure", None)  # not called
    words = (
        r"small: expected a folder that can be written to, got .* at .*file\. Pass another folder"
    )
    with pytest.raises(NotADirectoryError, match=words):
        torch_rsst.save_compact(
            small, tmp_path / "file" / "new" / "small", example_inputs=example()
        )
    if Path("/proc/self").exists():  # where rights say yes, and the file system says no
        with pytest.raises(
            OSError, match=r"expected a folder that can be written to, got .* at /proc"
        ):
            torch_rsst.save_compact(small, "/proc/small")


def test_a_folder_is_a_path(tmp_path: Path) -> None:
    _, small, _ = compacted()
    words = r"folder: expected the path of a folder, got a Net\. Pass "
    for call in (
        lambda: torch_rsst.load_compact(small),
        lambda: torch_rsst.compact_info(small),
        lambda: torch_rsst.save_compact(tmp_path, small),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    assert not list(tmp_path.iterdir())


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    _, small, _ = compacted()
    folder, outside = tmp_path / "small", tmp_path / "outside"
    torch_rsst.save_compact(small, folder)
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    for call in (
        lambda: torch_rsst.load_compact(folder, model=Net()),
        lambda: torch_rsst.save_compact(small, folder),
    ):
        with pytest.raises(ValueError, match=r"expected files of its own, got a link to .*outside"):
            call()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Net(hidden=6), "shape (6, 4), dimension 0: stages: expected 6 indices, got 8"),
        (lambda: nn.Linear(2, 2), "expected a parameter 'first.0.weight' with a dimension 0, got none"),
        (lambda: compacted()[1], "expected 4 indices, got 8"),
        (lambda: compacted()[1], "Pass the model before it was compacted, or one that is built alike"),
        (lambda: nn.ModuleDict({"first": Net().first, "second": Net().second}), "Unexpected key(s) in"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, model: Any, words: str) -> None:
    _, small, _ = compacted()
    torch_rsst.save_compact(small, tmp_path)
    with pytest.raises(ValueError, match="Net, built as the one that was compacted, got") as caught:
        torch_rsst.load_compact(tmp_path, model=model())
    assert words in str(caught.value)
    with pytest.raises(ValueError, match="expected values, got one on the meta device"):
        torch_rsst.load_compact(tmp_path, model=Net().to("meta"))


def test_a_masked_model_serves_as_the_dense_one_and_stays_masked(tmp_path: Path) -> None:
    masked, small, _ = compacted()
    torch_rsst.save_compact(small, tmp_path)
    before = torch_rsst.extract_mask(masked)
    assert_same(torch_rsst.load_compact(tmp_path, model=masked), small)
    after = torch_rsst.extract_mask(masked)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("keep", ["no", 1, "keep"])
def test_whether_masks_are_kept_is_said_by_true_or_false(tmp_path: Path, keep: Any) -> None:
    _, small = with_masks_left()
    text = rf"keep_masks: expected True, False or None, got {keep!r}"
    with pytest.raises(TypeError, match=text):
        torch_rsst.save_compact(small, tmp_path / "new", keep_masks=keep)
    assert not (tmp_path / "new").exists()
    torch_rsst.save_compact(small, tmp_path, keep_masks=True)
    with pytest.raises(TypeError, match=text):
        torch_rsst.load_compact(tmp_path, model=Net(), keep_masks=keep)


def test_a_folder_that_was_not_saved_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"expected a saved model, got no such folder\. Save"
    ):
        torch_rsst.load_compact(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"got no compact\.json\. Save a compacted model"):
        torch_rsst.load_compact(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"the folder of a run: torch-rsst compact "):
        torch_rsst.load_compact(tmp_path)
    (tmp_path / "compact").mkdir()
    (tmp_path / "compact" / "compact.json").touch()
    with pytest.raises(FileNotFoundError, match=r"got no compact\.json\. Pass .*/compact\."):
        torch_rsst.load_compact(tmp_path)


# Damage


def damaged(folder: Path, change: Any) -> None:
    data = json.loads((folder / "compact.json").read_text())
    change(data)
    (folder / "compact.json").write_text(json.dumps(data))


def _cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _cut_index(folder: Path) -> None:
    (folder / "compact.json").write_text((folder / "compact.json").read_text()[:-200])


def _foreign(folder: Path) -> None:
    (folder / "compact.json").write_text('{"model": 3}')


def _pickle_as_weights(folder: Path) -> None:
    content = pickle.dumps(os.getcwd)
    (folder / "model.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    damaged(folder, lambda d: d["files"].update({"model.safetensors": digest}))


def _with(change: Any) -> Any:
    return lambda folder: damaged(folder, change)


def _first(d: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = d["stages"][0]["layers"][0]
    return found


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut_weights, "expected the file whose SHA-256 is"),
        (_flip_a_bit, "expected the file whose SHA-256 is"),
        (lambda f: (f / "model.safetensors").unlink(), "expected the weights, got no file"),
        (_pickle_as_weights, "expected tensors, got"),
        (_cut_index, "expected a description, got broken JSON"),
        (_foreign, "expected the format 'torch_rsst.compact', got format None"),
        (lambda f: (f / "compact.json").write_text("[]"), "got another file"),
        (lambda f: (f / "compact.json").write_bytes(b"\xff\x00"), "got broken JSON"),
        (lambda f: (f / "compact.json").write_text("[" * 100_000), "got broken JSON"),
        (_with(lambda d: d.update(version=2)), "expected version 1, got 2. Load it with a newer"),
        (_with(lambda d: d.pop("stages")), "expected 'stages' in it, got None"),
        (_with(lambda d: d.update(stages=[3])), "expected 'stages' in it, got [3]"),
        (_with(lambda d: d.update(files={})), "expected its files, got no model.safetensors"),
        (_with(lambda d: d["files"].update({"model.safetensors": "../x"})),
         "expected the SHA-256 of 'model.safetensors', 64 hexadecimal digits, got '../x'. Save the"),
        (_with(lambda d: d["files"].update({"model.pt2": "A" * 64})), "64 hexadecimal digits, got 'AA"),
        (_with(lambda d: d["files"].update({"model.pt2": "0" * 64 + "\n"})), "64 hexadecimal digits"),
        (_with(lambda d: d.update(stages=[])), "size mismatch for first.0.weight"),
        (_with(lambda d: d["stages"].append({})), "expected 'new_biases', a list, got None"),
        (_with(lambda d: _first(d).update(units=-1)), "expected 'units' of at least 0, got -1"),
        (_with(lambda d: _first(d).update(units=True)), "expected 'units', a int, got True"),
        (_with(lambda d: _first(d).update(units=10**12)), "expected fewer units of first"),
        (_with(lambda d: _first(d).update(gone=[[0, 99, 1]])), "expected units from 0 to 7"),
        (_with(lambda d: _first(d).update(gone=[["a", 1, 1]])), "expected runs of three numbers"),
        (_with(lambda d: _first(d).update(gone=[[0, 1, 10**15]])), "expected 8 indices"),
        (_with(lambda d: _first(d).update(family="os.system")), "family of groups: expected one of"),
        (_with(lambda d: _first(d).update(name="nowhere")), "expected a module 'nowhere', got no"),
        (_with(lambda d: _first(d)["members"][0].update(dim=7)), "with a dimension 7"),
        (_with(lambda d: _first(d)["members"][0].update(unit_of=[[0, 1, 10**12]])), "8 indices"),
        (_with(lambda d: _first(d).update(members=[])), "expected fewer units of first"),
        (_with(lambda d: d["stages"][0].update(new_biases=["norm"])), "norm: expected a layer without"),
        (_with(lambda d: d["stages"][0].update(new_biases=[3])), "expected names of modules"),
        (_with(lambda d: d["stages"][0].update(new_biases=["x"])), "expected a module 'x', got no such"),
        (_with(lambda d: d["tied"].update({"head.weight": "nothing"})), "expected names of tied tensors"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_folders_are_clear_errors(
    tmp_path: Path, damage: Any, words: str
) -> None:
    _, small, _ = compacted()
    torch_rsst.save_compact(small, tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words follow
        torch_rsst.load_compact(tmp_path, model=Net())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ".." not in str(caught.value).replace("../x", "")
    assert ".)" not in str(caught.value)


@pytest.mark.parametrize("kill_at", range(13))
def test_whatever_kills_a_save_the_old_or_the_new_model_can_be_loaded(
    tmp_path: Path, kill_at: int
) -> None:
    _, old, _ = compacted()
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.tied.bias.add_(1.0)
        new.table += 1
    torch_rsst.save_compact(old, tmp_path)
    killed = _fork_and_kill(lambda: torch_rsst.save_compact(new, tmp_path), kill_at)
    assert killed == (kill_at < 11), "cover every step and one more"
    loaded = torch_rsst.load_compact(tmp_path, model=Net())
    which = new if torch.equal(loaded.tied.bias, new.tied.bias) else old
    assert_same(loaded, which)
    assert torch.equal(loaded.table, which.table)
    torch_rsst.save_compact(new, tmp_path)
    assert_same(torch_rsst.load_compact(tmp_path, model=Net()), new)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"compact.json", "model.safetensors", "buffers.safetensors", "README.md"}


def _fork_and_kill(work: Any, at: int) -> bool:
    """Run in a child that dies at its n-th write or move, as by kill -9."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    steps = 0

    def counted(function: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            if steps == at:
                os._exit(9)
            steps += 1
            return function(*args, **kwargs)

        return step

    try:
        os.fsync, Path.replace = counted(os.fsync), counted(Path.replace)
        work()
    finally:
        os._exit(0)


def test_a_masked_model_of_other_outputs_is_no_model_that_was_cut(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    groups, other = torch_rsst.find_groups(model), nn.Sequential(nn.Linear(4, 5))
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups)
    with pytest.raises(
        ValueError,
        match="masked: expected the model that this one was cut from, got one with outputs of other shapes",
    ):
        torch_rsst.save_compact(
            small, tmp_path / "small", masked=other, example_inputs=torch.ones(2, 4)
        )
    assert not (tmp_path / "small").exists()


def test_models_that_are_saved_to_one_folder_at_a_time_take_turns(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    from safetensors.torch import load_file

    models = [compacted(hidden=hidden)[1] for hidden in (8, 16)]
    for _ in range(10):
        with ThreadPoolExecutor() as pool:
            for made in [pool.submit(torch_rsst.save_compact, m, tmp_path) for m in models]:
                made.result()
        kept = load_file(tmp_path / "model.safetensors")["first.0.weight"]
        loaded = torch_rsst.load_compact(tmp_path, Net(hidden=2 * len(kept)))
        assert_same(loaded, models[len(kept) == 8])
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize(
    ("notes", "text"),
    [
        ("good", "notes: expected a dict of numbers, texts, lists and dicts, got 'good'"),
        (
            {"a": torch.ones(1)},
            "notes: 'a': expected a dict of .*, got a Tensor of shape .1,. .Object",
        ),
    ],
)
def test_notes_that_json_cannot_hold_are_named_before_a_folder_is_made(
    tmp_path: Path, notes: Any, text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        torch_rsst.save_compact(compacted()[1], tmp_path / "new", notes=notes)
    assert not (tmp_path / "new").exists()


def test_an_empty_path_is_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder: expected the path of a folder, got ''"):
        torch_rsst.save_compact(compacted()[1], "")
    assert not list(tmp_path.iterdir())
