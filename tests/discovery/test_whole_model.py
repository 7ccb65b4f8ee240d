"""Units that a module alone would lose exactly, but for what stands outside it: told by the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 # as PyTorch calls it
from contract import assert_compacts, difference, randomize
from torch import Tensor, nn

import torch_rsst
from torch_rsst import UnsupportedModuleWarning, find_groups
from torch_rsst.groups.groups import Groups

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
DIFFERS = "the model's output differs without some of them"


def assert_halves(model: nn.Module, groups: Groups) -> None:
    model.double()
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    assert_compacts(model, groups, X.double(), tolerance=1e-10, train=True)


class Mlp(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        vars(self).update(settings)

    def inner(self, hidden: Tensor) -> Tensor:
        return F.gelu(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(self.up(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Around(nn.Module):
    """Holds one part, and a sound MLP behind what is done with it."""

    def __init__(self, part: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.behind, self.run = part, Mlp(), run

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.part, x)
        return x + self.behind(x)


class Moded(Mlp):
    joined = False

    def inner(self, hidden: Tensor) -> Tensor:
        return hidden.softmax(-1) if self.joined else F.gelu(hidden)


def in_both_modes(part: nn.Module, x: Tensor) -> Tensor:
    for part.joined in (False, True):
        x = x + part(x)
    part.joined = False
    return x


class Kept(Mlp):
    def inner(self, hidden: Tensor) -> Tensor:
        self.mean = hidden.mean()
        return F.gelu(hidden)


def queries_again(part: nn.Module, x: Tensor) -> Tensor:
    return part(x) + part.qkv(x).unflatten(-1, (3, part.num_heads, -1))[:, :, 0].mean(2).mean()


OUTSIDE: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "its size scales": (Mlp, lambda m, x: x + m(x) / m.up.out_features**0.5),
    "its number of heads scales": (Attention, lambda m, x: x + m(x) / m.num_heads),
    "a layer of it runs again": (
        Mlp,
        lambda m, x: m(x) + F.gelu(m.up(x)).softmax(-1).amax(-1, True),
    ),
    "its queries are averaged over heads": (Attention, queries_again),
    "its weight is a codebook": (
        Mlp,
        lambda m, x: m(x) + (x @ m.up.weight.T).softmax(-1).amax(-1, True),
    ),
    "statistics of its weight": (Mlp, lambda m, x: m(x) + m.up.weight.mean()),
    "it is called in two modes": (Moded, in_both_modes),
    "it keeps a mean that is used": (Kept, lambda m, x: m(x) + m.mean),
    "its size scales what tells rounding": (
        Mlp,
        lambda m, x: torch.sin(3000.0 * m(x) / m.up.out_features**0.5),
    ),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_units_that_code_outside_their_module_reads_are_refused(case: str) -> None:
    make, run = OUTSIDE[case]
    model = randomize(Around(make(), run))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UnsupportedModuleWarning, match=f"part .*{DIFFERS}"):
        groups = find_groups(model, example_inputs=X)
    assert [layer.name for layer in groups.layers] == ["behind"]
    assert DIFFERS in {w.reason for w in groups.whole if w.name.startswith("part.")}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert_halves(model, groups)


def test_a_layer_that_another_one_reads_as_well_is_refused_with_what_the_model_raises() -> None:
    class Reads(Around):
        def __init__(self) -> None:
            super().__init__(Mlp(), lambda part, x: part(x))
            self.more = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.more(F.gelu(self.part.up(x)))

    with pytest.warns(
        UnsupportedModuleWarning, match=r"part \(neurons\): its forward fixes how many"
    ):
        groups = find_groups(Reads(), example_inputs=X)
    assert [layer.name for layer in groups.layers] == ["behind"]


class OnlyInTraining(Mlp):
    def inner(self, hidden: Tensor) -> Tensor:
        hidden = F.gelu(hidden)
        return hidden - hidden.mean(-1, keepdim=True) if self.training else hidden


def test_units_that_are_joined_in_training_alone_are_refused() -> None:
    model = Around(OnlyInTraining(), lambda part, x: part(x))
    with pytest.warns(UnsupportedModuleWarning, match="output in training mode differs without"):
        groups = find_groups(model, example_inputs=X)
    assert [layer.name for layer in groups.layers] == ["behind"]


class FixedDropout(Mlp):
    def inner(self, hidden: Tensor) -> Tensor:
        kept = F.dropout(torch.ones(32), 0.5, self.training)
        return F.gelu(hidden) * kept if self.training else F.gelu(hidden)


def refusing(part: nn.Module, x: Tensor) -> Tensor:
    if part.training and part.up.out_features != 32:
        raise ValueError("wrong size")
    return part(x)


def hinge(part: nn.Module, x: Tensor) -> Tensor:
    return part(x) + (max(0, 32 - part.up.out_features) if part.training else 0)


class Attended(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.path(self.attention(x, x, x, need_weights=False)[0])
        return x + super().forward(x) * (self.up.out_features if self.training else 1)


class DropPath(nn.Module):
    drop_prob: float

    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        return x * (torch.rand(len(x), 1, 1) > self.drop_prob)


def test_what_is_dropped_at_random_hides_nothing_in_training_mode() -> None:
    with pytest.warns(UnsupportedModuleWarning, match="output in training mode differs without"):
        groups = find_groups(Attended(), example_inputs=X)
    assert [layer.name for layer in groups.layers] == ["attention"]


@pytest.mark.parametrize(
    ("part", "run"),
    [
        (FixedDropout, lambda part, x: part(x)),
        (Mlp, refusing),
        (Mlp, hinge),
    ],
)
def test_training_is_tried_where_the_dense_model_puts_out_the_same_in_both_modes(
    part: type[nn.Module], run: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    with pytest.warns(UnsupportedModuleWarning, match=r"part \(neurons\)"):
        groups = find_groups(Around(part(), run), example_inputs=X)
    assert [layer.name for layer in groups.layers] == ["behind"]


def scaled_by_size(part: nn.Module, x: Tensor) -> Tensor:
    return part(x) * part.up.weight.shape[0]


class Typed(Around):
    """Runs with weights of one type alone, or of certain values."""

    def __init__(self, kind: str) -> None:
        super().__init__(Mlp(), scaled_by_size)
        self.kind = kind
        if kind == "complex":
            self.filter = nn.Parameter(torch.ones(9, dtype=torch.complex64))
            self.register_module("last", self._modules.pop("part"))  # not the first parameter
            self.part = self._modules.pop("last")
        if kind == "checked":
            self.share = nn.Parameter(torch.tensor([0.25, 0.75]))
        self.to({"half": torch.bfloat16, "double": torch.float64}.get(kind, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "complex":
            x = torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=16)
        if self.kind in ("half", "double"):
            x = x.to(torch.bfloat16 if self.kind == "half" else torch.float64)
        if self.kind == "checked" and abs(float(self.share.sum()) - 1) > 1e-3:
            raise ValueError("shares must have the sum 1")
        return super().forward(x)


@pytest.mark.parametrize("kind", ["complex", "half", "double", "checked"])
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_models_that_run_with_few_types_or_values_are_tried_too(kind: str) -> None:
    torch.manual_seed(0)  # half precision may leave it open, and refuse more
    with pytest.warns(UnsupportedModuleWarning, match=f"part .*{DIFFERS}"):
        groups = find_groups(Typed(kind), example_inputs=X)
    assert [layer.name for layer in groups.layers] == ["behind"]


class RatioOfSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.a(x) + self.b(x)) * (self.a.up.out_features / self.b.up.out_features)


class Listed(Mlp):
    def forward(self, x: Tensor) -> list[float]:
        return (super().forward(x) * self.up.out_features).flatten().tolist()


class InArrays(Mlp):
    def forward(self, x: Tensor) -> dict[str, object]:
        out = super().forward(x) * self.up.out_features
        return {"scores": out.detach().numpy(), "best": out.detach().numpy().max()}


@pytest.mark.parametrize("model", [RatioOfSizes, Listed, InArrays])
def test_ratios_of_sizes_and_numbers_that_are_no_tensors_tell_of_units(
    model: type[nn.Module],
) -> None:
    differs = "output (differs without some of them|without some of its units differs)"
    with pytest.raises(ValueError, match=f"got none in this model.*{differs}"):
        find_groups(model(), example_inputs=X)


def test_complex_weights_which_cannot_be_masked_are_no_units() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, dtype=torch.complex64) for _ in range(2)))
    with pytest.raises(ValueError, match=r"is torch\.complex64, which cannot be masked"):
        find_groups(model, example_inputs=torch.randn(2, 8, dtype=torch.complex64))


def test_a_model_with_dropout_loses_nothing_by_being_tried_in_training() -> None:
    model = nn.Sequential(Mlp(), nn.Dropout(0.5), Around(Mlp(), lambda part, x: part(x)))
    assert len(find_groups(model, example_inputs=X).layers) == 4

    class Functional(Mlp):
        def inner(self, hidden: Tensor) -> Tensor:
            return F.dropout(F.gelu(hidden), 0.5, self.training)

    assert len(find_groups(nn.Sequential(Functional(), Mlp()), example_inputs=X).layers) == 3


class Flagged(Mlp):
    """Joins its neurons where a setting says so, which is kept where settings are not looked for."""

    def __init__(self, kind: str, joined: bool) -> None:
        super().__init__()
        self._joined = joined and kind == "a private attribute"
        self.register_buffer("flag", torch.tensor(joined and kind == "a buffer"))
        if joined and kind == "a hook":
            self.down.register_forward_pre_hook(lambda _, given: (given[0].softmax(-1),))

    def inner(self, hidden: Tensor) -> Tensor:
        return hidden.softmax(-1) if self._joined or bool(self.flag) else F.gelu(hidden)


@pytest.mark.parametrize("kind", ["a private attribute", "a buffer", "a hook"])
@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_what_is_known_of_a_module_is_not_said_of_one_with_other_settings(
    kind: str, order: tuple[bool, bool]
) -> None:
    model = nn.Sequential(*(Flagged(kind, joined) for joined in order))
    groups = find_groups(model, on_unsupported="ignore")
    hidden = [layer.name for layer in groups.layers if "." not in layer.name]
    assert hidden == [str(order.index(False))]


class Windowed(nn.Module):
    """Sees the last few tokens; the length of this window is a multiple of the number of heads."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.h, self.window = 4, window
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.h, 16)).permute(2, 0, 3, 1, 4)
        tokens = torch.arange(x.shape[1])
        far = tokens[:, None] - tokens >= self.window
        weights = (q @ k.mT).masked_fill(far | far.T, -torch.inf).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def test_numbers_that_a_module_runs_without_changing_stay() -> None:
    model = randomize(Windowed(32)).double()
    groups = find_groups(model)
    assert [number.parameter for number in groups.layers[0].buffers] == ["h"]
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups, keep_masks=False)
    longer = torch.randn(2, 50, 64, dtype=torch.float64)
    assert (small.h, small.window) == (2, 32)
    assert difference(model, small, longer) <= 1e-12


class Frozen(nn.Linear):
    """A layer that all copies share."""

    def __deepcopy__(self, memo: object) -> Frozen:
        return self


def test_a_layer_that_copies_share_is_refused_and_left_as_it_was() -> None:
    model = nn.Sequential(Frozen(16, 32), nn.GELU(), nn.Linear(32, 16))
    before = model[0].weight.detach().clone()
    text = r"0\.weight: expected a tensor that copy\.deepcopy copies, got one that a __deepcopy__ shares"
    with pytest.raises(ValueError, match=text):
        find_groups(model)
    assert model[0].out_features == 32
    assert torch.equal(model[0].weight, before)


class CachedBias(nn.Module):
    """Keeps what it makes of a table for eval mode, until the mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.table = 4, nn.Parameter(torch.randn(4, 5))
        self.queries, self.keys, self.values = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> CachedBias:
        self.cache = {}
        return super().train(mode)

    def bias(self) -> Tensor:
        tokens = torch.arange(5)
        if self.training:
            return self.table[:, (tokens[:, None] - tokens).abs()]
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.table[:, (tokens[:, None] - tokens).abs()]
        return self.cache["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.n, 4)).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        weights = (q @ k.mT + self.bias()).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_heads_are_found_where_a_bias_is_cached_in_eval_mode() -> None:
    model = randomize(CachedBias())
    groups = find_groups(model, example_inputs=X)
    assert str(groups) == "4 heads in 1 layer"
    assert_halves(model, groups)


class InSingle(Attention):
    """Its last product is made in single precision, whatever the model's, as routers of experts are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 3 * 52), nn.Linear(52, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        products = mixed.float()[..., None, :] * self.proj.weight.float()
        return x + (products.sum(-1) + self.proj.bias.float()).to(x.dtype)


def test_rounding_within_a_model_refuses_no_heads() -> None:
    model = randomize(nn.Sequential(InSingle(), InSingle()))
    groups = find_groups(model, example_inputs=X)
    assert str(groups) == "8 heads in 2 layers"
