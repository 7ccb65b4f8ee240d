"""Discovery: units are found by structure, checked by running, refused with a reason."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_rsst
from torch_rsst import Groups, UnsupportedModuleWarning, discovery, find_groups
from torch_rsst.discovery import ADAPTERS, Unsupported, probe
from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.testing import assert_mask_invariants
from torch_rsst.utils.errors import MissingNameError

Fingerprint = Callable[[nn.Module], list[Any]]


def mlp(width: int = 4, hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Beside(nn.Sequential):
    """Modules that do not feed each other."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self]


def table(groups: Groups) -> list[tuple[str, str, int]]:
    return [(layer.name, layer.kind, layer.units) for layer in groups.layers]


def refusals(model: nn.Module, **options: Any) -> str:
    with pytest.raises(ValueError, match="No groups for") as caught:
        find_groups(model, on_unsupported="raise", **options)
    return str(caught.value)


def test_a_transformer_literally(tiny_transformer: Any) -> None:
    groups = find_groups(tiny_transformer())
    assert table(groups) == [
        ("blocks.0.attn", "heads", 4),
        ("blocks.0.mlp", "neurons", 24),
        ("blocks.1.attn", "heads", 4),
        ("blocks.1.mlp", "neurons", 24),
    ]
    heads, neurons = groups.layers[:2]
    assert [(m.parameter, m.dim, m.ranked) for m in heads.members] == [
        ("blocks.0.attn.qkv.weight", 0, True),
        ("blocks.0.attn.qkv.bias", 0, False),
        ("blocks.0.attn.proj.weight", 1, True),
    ]
    assert [(m.parameter, m.dim, m.ranked) for m in neurons.members] == [
        ("blocks.0.mlp.fc1.weight", 0, True),
        ("blocks.0.mlp.fc1.bias", 0, False),
        ("blocks.0.mlp.fc2.weight", 1, True),
    ]
    assert heads.group(1).members[0].index == (4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39)
    assert heads.group(1).members[2].index == (4, 5, 6, 7)


def test_without_biases_there_are_no_followers(tiny_transformer: Any) -> None:
    groups = find_groups(tiny_transformer(qkv_bias=False), kinds=["heads"])
    assert all(member.ranked for layer in groups.layers for member in layer.members)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_a_dropped_unit_cannot_be_heard(tiny_transformer: Any, kind: str) -> None:
    # Exact removal: with its unit masked, nothing that the unit's producer puts out matters.
    model = tiny_transformer().eval()
    groups = find_groups(model, kinds=(kind,))
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=1))
    inputs = torch.randn(2, 5, 16)
    expected = model(inputs)
    refill = torch_rsst.extract_mask(model)
    with torch.no_grad():
        for layer in groups.layers:
            consumer = layer.members[-1]
            producer = layer.members[0].parameter
            dead = ~refill[producer].any(1)
            module = model.get_submodule(producer.removesuffix(".weight"))
            assert int(dead.sum()) == len(layer.group(0).members[0].index)
            module.register_forward_hook(lambda _, __, out, dead=dead: out.masked_fill(dead, 9.0))
            assert consumer.dim == 1
    assert torch.allclose(model(inputs), expected)


@pytest.mark.parametrize("kinds", ["heads", ["heads"], ("heads",)])
def test_kinds_may_be_a_name_or_several(tiny_transformer: Any, kinds: Any) -> None:
    assert {layer.kind for layer in find_groups(tiny_transformer(), kinds).layers} == {"heads"}


def test_kinds_are_known_names(tiny_transformer: Any) -> None:
    with pytest.raises(ValueError, match=r"kinds: .*got 'head'. Did you mean 'heads'"):
        find_groups(tiny_transformer(), kinds=["head"])
    with pytest.raises(TypeError, match="kinds: expected names of kinds, got 3"):
        find_groups(tiny_transformer(), kinds=3)


def test_kinds_that_were_named_must_be_found(tiny_transformer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"of kind channels, got none.*It has units of kind heads, neurons\."
    ):
        find_groups(tiny_transformer(), kinds=["heads", "channels"])
    with pytest.raises(ValueError, match="units of kind heads, got none"):
        find_groups(mlp(), kinds=["heads"])
    with pytest.raises(
        ValueError, match=r"units of kind heads, neurons, channels.*Adapters exist for"
    ):
        find_groups(nn.Linear(2, 2))


@pytest.mark.parametrize("model", [None, "model", {}, [nn.Linear(1, 1)]])
def test_only_modules_are_searched(model: Any) -> None:
    with pytest.raises(TypeError, match="model: expected a module, got"):
        find_groups(model)


@pytest.mark.parametrize("state", ["train", "eval", "mixed", "pruned", "half"])
def test_the_model_is_left_bit_identical(
    tiny_transformer: Any, fingerprint: Fingerprint, state: str
) -> None:
    model = tiny_transformer()
    model.train(state != "eval")
    if state == "mixed":
        model.blocks[0].eval()
    if state == "pruned":
        name = "blocks.0.mlp.fc1.weight"
        torch_rsst.apply_mask(model, {name: torch.rand(24, 16) > 0.5})
        model(torch.randn(1, 3, 16)).sum().backward()
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight_orig.mul_(2.0)  # leaves the product stale
    if state == "half":
        model.bfloat16()
    before = fingerprint(model)
    assert len(find_groups(model)) == 56
    dtype = next(model.parameters()).dtype
    assert len(find_groups(model, example_inputs=torch.randn(2, 3, 16).to(dtype))) == 56
    after = fingerprint(model)
    # The second call drew its own inputs.
    assert after[1:] == before[1:]


def test_random_numbers_are_left_alone(tiny_transformer: Any) -> None:
    model = tiny_transformer()
    before = torch.get_rng_state()
    find_groups(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_fails_on_its_example_is_left_bit_identical(
    tiny_transformer: Any, fingerprint: Fingerprint
) -> None:
    model = tiny_transformer()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="example_inputs: expected inputs that the model runs on"):
        find_groups(model, example_inputs=torch.ones(2, 3, 7))
    assert fingerprint(model) == before


def test_pruned_and_wrapped_models_have_the_same_groups(tiny_transformer: Any) -> None:
    expected = table(find_groups(tiny_transformer()))
    model = tiny_transformer()
    refill = torch_rsst.regroup(model, find_groups(model), amount=0.5)
    torch_rsst.apply_mask(model, refill)
    assert table(find_groups(model)) == expected
    assert table(find_groups(nn.DataParallel(model))) == expected
    assert table(find_groups(torch.compile(model))) == expected
    for part in (0, 1):
        model.blocks[part].mlp = torch.compile(model.blocks[part].mlp)
        model.blocks[part].attn = torch.compile(model.blocks[part].attn)
    groups = find_groups(model)
    assert table(groups) == expected
    assert torch_rsst.regroup(model, groups, amount=0.5).keys() == refill.keys()


class TwoInputs(nn.Module):
    """An MLP that random tokens alone cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.second((self.first(x) + shift).relu())


@pytest.mark.parametrize(
    "example",
    [
        (torch.randn(3, 4), torch.randn(3, 1)),
        {"x": torch.randn(3, 4), "shift": torch.randn(3, 1)},
        {"shift": torch.randn(1), "x": torch.randn(4)},
    ],
)
def test_example_inputs_reach_what_random_tokens_do_not(example: Any) -> None:
    assert "pass example_inputs" in refusals(TwoInputs())
    assert table(find_groups(TwoInputs(), example_inputs=example)) == [("", "neurons", 6)]


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_example_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    assert len(find_groups(mlp(), example_inputs=torch.randn(shape))) == 6


def normed_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))


class Lift(nn.Module):
    """A module of parameters between two layers, of which nothing is known."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=self.low)


class MixingMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).softmax(-1))


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (normed_mlp(), r"1 (LayerNorm) may join"),
        (nn.Sequential(nn.Linear(4, 6), Lift(6), nn.Linear(6, 4)), r"1 (Lift) may join"),
        # As ConvNeXt V2 of transformers stores the scales of its norm.
        (nn.Sequential(nn.Linear(4, 6), Lift(1, 1, 1, 6), nn.Linear(6, 4)), r"1 (Lift) may join"),
        (MixingMLP(), "its units mix before the output layer"),
        (Siblings(), "its input layer does not feed its output layer"),
        (mlp().to("meta"), "its weights are on the meta device"),
    ],
)
def test_mlps_that_cannot_be_cut_exactly(
    model: nn.Module, reason: str, fingerprint: Fingerprint
) -> None:
    before = None if next(model.parameters()).is_meta else fingerprint(model)
    text = refusals(model)
    assert "1 module(s): the model (neurons): " in text
    assert reason in text
    assert before is None or fingerprint(model) == before


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 6), nn.Linear(5, 4)),  # two layers that do not fit: no MLP
        nn.Sequential(nn.Linear(4, 6), nn.ReLU()),
    ],
)
def test_what_is_no_mlp_is_passed_over_in_silence(model: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"got none in this model\. It stays whole: 0 .*Adapters exist"
    ):
        find_groups(model, on_unsupported="raise")


def attention_with(tiny_transformer: Any, change: Callable[[nn.Module], None]) -> nn.Module:
    attention = tiny_transformer(depth=1).blocks[0].attn
    change(attention)
    return attention


def _norm_over_all_heads(attention: nn.Module) -> None:
    attention.proj = nn.Sequential(nn.LayerNorm(16), attention.proj)


def _own_parameter(attention: nn.Module) -> None:
    attention.relative_bias = nn.Parameter(torch.zeros(4))


def _other_widths(attention: nn.Module) -> None:
    attention.qkv = nn.Linear(16, 24)


def _uneven_heads(attention: nn.Module) -> None:
    attention.num_heads = 5


def _narrow_gate(attention: nn.Module) -> None:
    attention.gate = nn.Linear(16, 4)


def _interleaved(attention: nn.Module) -> None:
    # Heads split as (head_dim, heads): a head owns every fourth row, not four in a row.
    def forward(x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = attention.qkv(x).reshape(b, n, 3, 4, 4).permute(2, 0, 4, 1, 3)
        return attention.proj(((q @ k.mT).softmax(-1) @ v).permute(0, 2, 3, 1).reshape(b, n, c))

    attention.forward = forward


def _talking_heads(attention: nn.Module) -> None:
    def forward(x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = attention.qkv(x).reshape(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT).softmax(-1)
        weights = weights + weights.mean(1, keepdim=True)
        return attention.proj((weights @ v).transpose(1, 2).reshape(b, n, c))

    attention.forward = forward


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_norm_over_all_heads, "its units mix before the output layer"),
        (_other_widths, "no adapter knows the attention of Attention: it cannot be run alone"),
        (_uneven_heads, "no adapter knows the attention of Attention: it cannot be run alone"),
        (_interleaved, "its units mix"),
        (_talking_heads, "its units mix"),
    ],
)
def test_attention_that_cannot_be_cut_exactly(
    tiny_transformer: Any, change: Callable[[nn.Module], None], reason: str
) -> None:
    text = refusals(attention_with(tiny_transformer, change))
    assert "the model (heads): " in text
    assert reason in text


@pytest.mark.parametrize("change", [_own_parameter, _narrow_gate])
def test_what_a_forward_does_not_use_is_no_reason_to_refuse(
    tiny_transformer: Any, change: Callable[[nn.Module], None]
) -> None:
    (layer,) = find_groups(attention_with(tiny_transformer, change)).layers
    names = [member.parameter for member in layer.members]
    assert names == ["qkv.weight", "qkv.bias", "proj.weight"]
    assert (layer.units, layer.fixed) == (4, "")


def test_norms_over_the_width_of_one_head_are_shared_by_all(tiny_transformer: Any) -> None:
    attention = tiny_transformer(depth=1).blocks[0].attn
    attention.q_norm = nn.LayerNorm(4)
    groups = find_groups(attention)
    assert table(groups) == [("", "heads", 4)]
    assert all("norm" not in m.parameter for m in groups.layers[0].members)


def test_a_gate_belongs_to_its_heads(tiny_transformer: Any) -> None:
    attention = tiny_transformer(depth=1).blocks[0].attn
    attention.gate = nn.Linear(16, 16)
    names = [(m.parameter, m.ranked) for m in find_groups(attention).layers[0].members]
    assert ("gate.weight", True) in names
    assert ("gate.bias", False) in names


def test_tied_weights_cannot_be_cut(tiny_transformer: Any) -> None:
    model = tiny_transformer()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    text = refusals(model)
    assert "2 module(s)" in text
    for block in (0, 1):
        name = f"blocks.{block}.mlp"
        assert f"{name} (neurons): its {name}.fc1.weight is tied to a parameter" in text


def test_what_is_not_understood_is_warned_of_and_stays_whole(tiny_transformer: Any) -> None:
    model = tiny_transformer()
    _norm_over_all_heads(model.blocks[1].attn)
    with pytest.warns(UnsupportedModuleWarning, match=r"blocks.1.attn.*units mix.* They stay"):
        groups = find_groups(model)
    assert "blocks.1.attn" not in [layer.name for layer in groups.layers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_groups(model, on_unsupported="ignore")) == len(groups) == 52
    with pytest.raises(ValueError, match=r"blocks\.1\.attn"):
        find_groups(model, on_unsupported="raise")
    with pytest.raises(ValueError, match=r"on_unsupported: .*Did you mean 'warn'"):
        find_groups(model, on_unsupported="warm")


def test_the_reason_is_given_where_a_named_kind_is_missing() -> None:
    with pytest.raises(ValueError, match=r"units of kind neurons.*Not understood.*may join"):
        find_groups(normed_mlp(), kinds=["neurons"], on_unsupported="ignore")


def test_reasons_are_said_once_where_nothing_is_found() -> None:
    model = Beside(*(normed_mlp() for _ in range(5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="units of kind") as caught:
            find_groups(model)
    text = str(caught.value)
    assert text.count("may join its hidden neurons") == 3
    assert text.endswith(
        "; and 2 more. If such units can be cut, Extending in the documentation shows how to add a family."
    )
    assert "No groups for 5 module(s): 0 (neurons)" in refusals(model)


def test_a_full_stop_in_a_reason_is_not_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sentence(discovery.Adapter):
        kind = "neurons"

        def find(self, module: nn.Module) -> Any:
            return Unsupported("They are mine.") if isinstance(module, nn.Sequential) else None

    monkeypatch.setattr("torch_rsst.discovery.adapter.ADAPTERS", ADAPTERS)
    monkeypatch.setattr("torch_rsst.discovery.finder.ADAPTERS", [Sentence(), *ADAPTERS])
    assert "(neurons): They are mine. They stay whole" in refusals(mlp())
    with pytest.raises(ValueError, match=r"\(neurons\): They are mine\. If such units"):
        find_groups(mlp())


def test_an_example_that_does_not_reach_a_module_is_not_asked_for_again() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = mlp(), mlp()

        def forward(self, x: Tensor, spare: bool = False) -> Tensor:
            return self.spare(self.used(x)) if spare else self.used(x)

    model, x = Detour(), torch.randn(2, 4)
    assert "spare (neurons): it is not called when the model runs on example_inputs; pass some" in (
        refusals(model, example_inputs=x)
    )
    assert len(find_groups(model, example_inputs=(x, True))) == 6 + 6 + 4


def test_a_missing_name_is_shown_as_it_was_written() -> None:
    with pytest.raises(KeyError) as caught:
        discovery.family("TwoLayerMPL")
    text = str(caught.value)
    assert text.startswith("family of groups: expected one of '")
    assert text.endswith("got 'TwoLayerMPL'. Did you mean 'TwoLayerMLP'?")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == text
    assert (str(MissingNameError()), str(MissingNameError("a", "b"))) == ("", "('a', 'b')")


def test_the_warning_lists_the_first_few() -> None:
    model = Beside(*(normed_mlp() for _ in range(5)), mlp())
    with pytest.warns(UnsupportedModuleWarning, match=r"No groups for 5 module.*; and 2 more"):
        assert len(find_groups(model)) == 6


class Factorized(nn.Module):
    """An embedding in two factors, as large vocabularies have them."""

    def __init__(self, rank: int = 3, **options: Any) -> None:
        super().__init__()
        self.low, self.high = nn.Embedding(5, rank, **options), nn.Linear(rank, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.high(self.low(tokens))


def test_a_family_is_added_with_one_object() -> None:
    class Ranks(discovery.Adapter):
        kind = "channels"

        def find(self, module: nn.Module) -> Any:
            if not isinstance(module, Factorized):
                return None
            if module.low.padding_idx is not None:
                return Unsupported("its padding row is special")
            rank = torch.arange(module.low.embedding_dim)
            members = (
                Member("low.weight", 1, rank, ranked=True),
                Member("high.weight", 1, rank, ranked=True, consumes=True),
            )
            return GroupLayer("", self.kind, len(rank), members)

    adapter, tokens = Ranks(), torch.arange(5)
    assert discovery.register(adapter) is adapter
    try:
        model = nn.Sequential(Factorized(), mlp(4))
        groups = find_groups(model, example_inputs=tokens)
        assert table(groups) == [
            *(("0", "channels", 3), ("1", "neurons", 6)),
            ("0.high", "neurons", 4),
        ]
        assert groups.layers[0].family == "Ranks"
        assert "padding row" in refusals(nn.Sequential(Factorized(padding_idx=0)))
    finally:
        ADAPTERS.remove(adapter)


@pytest.mark.needs_timm
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
def test_a_timm_vit(fingerprint: Fingerprint, options: dict[str, Any]) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=3, **options
    )
    before = fingerprint(model)
    groups = find_groups(model)
    assert fingerprint(model) == before
    assert table(groups) == [
        ("blocks.0.attn", "heads", 3),
        ("blocks.0.mlp", "neurons", 48),
        ("blocks.1.attn", "heads", 3),
        ("blocks.1.mlp", "neurons", 48),
    ]
    followers = [m.parameter for layer in groups.layers for m in layer.members if not m.ranked]
    assert followers == [
        f"blocks.{b}.{name}.bias" for b in (0, 1) for name in ("attn.qkv", "mlp.fc1")
    ]
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    assert_mask_invariants(model)
    assert bool(model(torch.randn(1, 3, 8, 8)).isfinite().all())


@pytest.mark.needs_timm
def test_timms_normed_mlps_are_refused() -> None:
    from timm.layers import Mlp

    assert "may join" in refusals(Mlp(8, hidden_features=16, norm_layer=nn.LayerNorm))
    assert table(find_groups(Mlp(8, hidden_features=16))) == [("", "neurons", 16)]


class Bypassed(nn.Module):
    """Hidden features that also leave the module around its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden.relu()) + hidden


def test_units_that_bypass_the_output_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="around the output layer"):
        torch_rsst.find_groups(nn.Sequential(Bypassed()), on_unsupported="ignore")


def test_weights_that_are_not_finite_are_the_reason_given() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        mlp[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"its 0\.weight holds NaN or infinity"):
        torch_rsst.find_groups(mlp, on_unsupported="ignore")


class _Overflow(nn.Module):
    def forward(self, x):
        return x / 0.0


def test_activations_that_are_not_finite_are_the_reason_given() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), _Overflow(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="its outputs are not finite with the random weights"):
        torch_rsst.find_groups(mlp, on_unsupported="ignore")


class _Claims(discovery.Adapter):
    """An adapter that answers for every two-layer MLP."""

    kind = "neurons"

    def find(self, module):
        return Unsupported("mine") if isinstance(module, nn.Sequential) else None


def test_the_first_adapter_that_knows_a_module_answers_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    adapters = torch_rsst.discovery.ADAPTERS
    monkeypatch.setattr("torch_rsst.discovery.finder.ADAPTERS", [_Claims(), *adapters])
    with pytest.raises(ValueError, match="mine"):
        torch_rsst.find_groups(mlp, on_unsupported="ignore")
    monkeypatch.setattr("torch_rsst.discovery.finder.ADAPTERS", [*adapters, _Claims()])
    assert len(torch_rsst.find_groups(mlp)) == 8


def test_an_adapter_of_an_unknown_kind_is_refused() -> None:
    adapter = _Claims()
    adapter.kind = "neuron"
    with pytest.raises(ValueError, match="Did you mean 'neurons'"):
        torch_rsst.discovery.register(adapter)
    assert adapter not in torch_rsst.discovery.ADAPTERS


class SharesAModule(nn.Module):
    """Two MLPs with one first layer: cutting a neuron of one cuts it from the other."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(4, 8)
        self.a = nn.Sequential(first, nn.GELU(), nn.Linear(8, 4))
        self.b = nn.Sequential(first, nn.Sigmoid(), nn.Linear(8, 4))


def test_a_module_that_also_stands_elsewhere_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"a \(neurons\): the module of its a.0.weight also stands"
    ):
        torch_rsst.find_groups(SharesAModule(), on_unsupported="ignore")


def test_a_layer_that_stands_twice_as_a_whole_is_found_once() -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    assert len(torch_rsst.find_groups(nn.ModuleList([block, block]))) == 8


class OddAttention(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


def test_attention_that_no_adapter_knows_is_named() -> None:
    with pytest.raises(ValueError, match="no adapter knows the attention of OddAttention"):
        torch_rsst.find_groups(OddAttention(), ("heads",), on_unsupported="ignore")


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.down(self.up(x).relu())


def test_buffers_are_put_back_after_probing() -> None:
    model = CountsCalls()
    torch_rsst.find_groups(model)
    assert model.calls == 0


class _Numbered(nn.Module):
    """An MLP that knows its place among the blocks, as those of transformers do."""

    def __init__(self, layer_idx: int, hidden: int = 6) -> None:
        super().__init__()
        self.layer_idx, self.hidden = layer_idx, hidden
        self.up, self.down = nn.Linear(4, hidden), nn.Linear(hidden, 4)

    def forward(self, x):
        # No features between two of them; no neuron is inactive, for which weights are drawn again.
        return self.down(nn.functional.gelu(self.up(x.softmax(-1))))


@pytest.mark.parametrize(
    ("numbers", "hidden", "tries"),
    [
        ((0, 1, 2, 3), (6, 6, 6, 6), 1),
        ((0, 1, 2, 3), (6, 8, 6, 8), 2),
        ((3, 1, 2, 3), (6, 6, 6, 6), 3),  # no numbers of blocks, but settings
        ((0, 1), (6, 6), 2),  # too few to tell
    ],
)
def test_blocks_that_differ_in_nothing_but_their_number_are_tried_once(
    numbers, hidden, tries, monkeypatch
):
    tried, check = [], probe._check
    monkeypatch.setattr(probe, "_check", lambda *given: tried.append(given[0]) or check(*given))
    run, failure = [], probe._failure
    monkeypatch.setattr(probe, "_failure", lambda *given: run.append(given[0]) or failure(*given))
    model = nn.Sequential(*map(_Numbered, numbers, hidden))
    groups = find_groups(model)
    assert [layer.name for layer in groups.layers] == [str(i) for i in range(len(numbers))]
    assert len(tried) == len(run) == tries


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))


def test_a_lazy_module_is_named_and_left_as_it_is() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.GELU(), nn.Linear(6, 4))
    text = r"find_groups: expected modules that know their sizes, got lazy 0 \(LazyLinear\). Run the model once"
    for example in (None, torch.randn(2, 4)):
        with pytest.raises(ValueError, match=text):
            find_groups(model, example_inputs=example)
        assert type(model[0]) is nn.LazyLinear
    model(torch.randn(2, 4))
    assert len(find_groups(model)) == 6


@pytest.mark.parametrize("part", ["whole", "inside"])
def test_a_scripted_module_is_named(part: str) -> None:
    scripted = torch.jit.script(_mlp())
    model = scripted if part == "whole" else nn.Sequential(scripted, _mlp())
    with pytest.raises(ValueError, match=r"got scripted .*before it is scripted or traced"):
        find_groups(model)


def test_a_compiled_module_within_a_model_is_found_and_cut() -> None:
    model, x = nn.Sequential(_mlp(), _mlp()).eval(), torch.randn(3, 4)
    model[0] = torch.compile(model[0], backend="eager")
    model(x)
    groups = find_groups(model, example_inputs=x)
    assert len(groups) == 16
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups))
    small = torch_rsst.compact(model, groups, example_inputs=x)
    torch.testing.assert_close(small(x), model(x))


def test_what_is_found_and_cut_in_inference_mode_is_as_outside() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 4, batch_first=True), nn.Identity())[0].eval()
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        groups = find_groups(model, example_inputs=(x, x, x))
    assert str(groups) == str(find_groups(model, example_inputs=(x, x, x)))
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups))
    with torch.inference_mode():
        small = torch_rsst.compact(model, groups)
    assert not any(parameter.is_inference() for parameter in small.parameters())
    small(x, x, x)[0].sum().backward()


@pytest.mark.parametrize(
    "example", [torch.randn(2, 5), {"y": torch.randn(2, 4)}, "text", (torch.randn(2, 4),) * 2]
)
def test_inputs_that_the_model_does_not_run_on_are_named(example: object) -> None:
    text = r"example_inputs: expected inputs that the model runs on, got .*Pass inputs of the size"
    with pytest.raises(ValueError, match=text):
        find_groups(_mlp(), example_inputs=example)
