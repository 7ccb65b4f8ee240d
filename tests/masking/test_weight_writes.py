"""Writing to the weight of a masked module acts, or is an error that says where to write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.ao.quantization as quantization
import torch.ao.quantization.quantize_fx as quantize_fx
from tiny_models import linear, same, tokens
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as stock
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import torch_rsst
from torch_rsst.testing import assert_mask_invariants

MASK = torch.tensor(
    [[True, False, True, True], [False, False, True, True], [True, True, True, False]]
)
REMEDY = (
    r"within `with torch_rsst.dense_weights\(model\):`, or after torch_rsst.remove_all\(model\)"
)


def masked_layer() -> nn.Linear:
    layer = linear()
    torch_rsst.apply_mask(layer, {"weight": MASK})
    return layer


def pruned_by_a_stock_function() -> nn.Module:
    return torch_rsst.l1_unstructured(linear(), "weight", amount=0.5)


def pruned_by_both() -> nn.Module:
    layer = pruned_by_a_stock_function()
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=2)
    return layer


def _parameter(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.full((3, 4), 7.0))


def _tensor(layer: nn.Module) -> None:
    layer.weight = torch.full((3, 4), 7.0)


def _sparse(layer: nn.Module) -> None:
    layer.weight = layer.weight.detach().to_sparse()


def _nothing(layer: nn.Module) -> None:
    layer.weight = None


def _ties(layer: nn.Module) -> None:
    layer.weight = nn.Embedding(3, 4).weight


def _deletes(layer: nn.Module) -> None:
    del layer.weight


def _registers(layer: nn.Module) -> None:
    layer.register_parameter("weight", nn.Parameter(torch.zeros(3, 4)))


def _fuses(layer: nn.Module) -> None:
    fuse_linear_bn_eval(layer.eval(), nn.BatchNorm1d(3).eval())


def _calls_with_a_weight(layer: nn.Module) -> None:
    functional_call(layer, {"weight": torch.zeros(3, 4)}, (tokens(0, 2, 4),))


WRITES = [_parameter, _tensor, _sparse, _nothing, _ties, _deletes, _registers, _fuses]


@pytest.mark.parametrize("make", [masked_layer, pruned_by_a_stock_function, pruned_by_both])
@pytest.mark.parametrize("write", [*WRITES, _calls_with_a_weight])
def test_a_write_is_an_error_that_names_the_remedy_and_changes_nothing(
    make: Callable[[], nn.Module], write: Callable[[nn.Module], None]
) -> None:
    layer = make()
    before, masks = copy.deepcopy(layer.state_dict()), torch_rsst.extract_mask(layer)
    text = (
        rf"'weight' of Linear: expected no change of what is computed .*, got .*\. Do it {REMEDY}"
    )
    with pytest.raises(RuntimeError, match=text):
        write(layer)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert_mask_invariants(layer, masks)


@pytest.mark.parametrize("write", WRITES)
def test_the_remedies_work(write: Callable[[nn.Module], None]) -> None:
    layer = masked_layer()
    torch_rsst.remove_all(layer, freeze_zeros=False)
    if write not in (_tensor, _sparse, _registers):  # errors of PyTorch for plain modules too
        write(layer)
    layer = masked_layer()
    if write in (_parameter, _ties):
        with torch_rsst.dense_weights(layer, masked_writes="drop"):
            write(layer)
        assert_mask_invariants(layer, {"weight": MASK})


def test_stock_hooks_go_on_storing_and_removing_their_products() -> None:
    layer = pruned_by_a_stock_function()
    expected = layer.weight.detach().clone()
    layer(tokens(0, 2, 4))
    stock.l1_unstructured(layer, "weight", amount=1)
    layer(tokens(0, 2, 4))
    assert same(layer.weight, layer.weight_orig * layer.weight_mask)
    assert not same(layer.weight, expected)
    stock.remove(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight = nn.Parameter(torch.zeros(3, 4))


def test_other_attributes_are_assigned_as_before() -> None:
    layer = masked_layer()
    layer.bias = nn.Parameter(torch.zeros(3))
    layer.extra = nn.Parameter(torch.zeros(2))
    layer.note = "kept"
    del layer.extra
    assert layer.note == "kept"
    assert_mask_invariants(layer, {"weight": MASK})


def _linear() -> nn.Module:
    return linear()


def _convolution() -> nn.Module:
    return nn.Conv2d(2, 3, 2)


def _norm() -> nn.Module:
    return nn.BatchNorm2d(4)


def _attention() -> nn.Module:
    return nn.MultiheadAttention(4, 2)


def _lstm() -> nn.Module:
    return nn.LSTM(3, 4)


class Scaled(nn.Linear):
    """Resets its parameters by way of its base class."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.weight.mul_(2.0)


def _subclass() -> nn.Module:
    return Scaled(4, 3)


@pytest.mark.parametrize("make", [_linear, _convolution, _norm, _attention, _lstm, _subclass])
def test_resetting_parameters_draws_what_a_dense_module_draws_under_the_same_masks(
    make: Callable[[], nn.Module],
) -> None:
    module, dense = make(), make()
    names = [name for name, p in module.named_parameters(recurse=False)]
    sizes = {name: module.get_parameter(name).shape for name in names}
    masks = {n: torch.arange(size.numel()).reshape(size) % 2 == 0 for n, size in sizes.items()}
    torch_rsst.apply_mask(module, masks)
    originals = dict(module.named_parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(9.0)
    for each in (module, dense):
        torch.manual_seed(0)
        (each.reset_parameters if hasattr(each, "reset_parameters") else each._reset_parameters)()
    assert_mask_invariants(module, masks)
    assert all(p is originals[name] for name, p in module.named_parameters())
    for name in names:
        assert same(getattr(module, f"{name}_orig"), dense.get_parameter(name))


def test_a_reset_that_raises_leaves_the_masks() -> None:
    class Failing(nn.Linear):
        fails = False

        def reset_parameters(self) -> None:
            if self.fails:
                raise MemoryError
            super().reset_parameters()

    layer = Failing(4, 3)
    torch_rsst.apply_mask(layer, {"weight": MASK})
    layer.fails = True
    with pytest.raises(MemoryError):
        layer.reset_parameters()
    assert_mask_invariants(layer, {"weight": MASK})


def test_a_reset_that_assigns_parameters_is_an_error() -> None:
    class Assigning(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight = nn.Parameter(torch.zeros(3, 4))
            self.bias = nn.Parameter(torch.zeros(3))

    layer = Assigning(4, 3)
    torch_rsst.apply_mask(layer, {"weight": MASK})
    with pytest.raises(RuntimeError, match=r"got another parameter from reset_parameters\(\)"):
        layer.reset_parameters()
    assert_mask_invariants(layer, {"weight": MASK})


# Tables with max_norm

TABLE_MASK = torch.arange(24).reshape(6, 4) % 3 > 0


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_masked_table_with_max_norm_trains_as_a_dense_one_with_zeros(
    make: Any, compiled: bool
) -> None:
    masked, dense = (make(6, 4, max_norm=0.8, norm_type=1.0) for _ in range(2))
    dense.load_state_dict(masked.state_dict())
    with torch.no_grad():
        dense.weight.mul_(TABLE_MASK)
    torch_rsst.apply_mask(masked, {"weight": TABLE_MASK})
    latent = masked.weight_orig.detach().clone()
    lookup = torch.compile(masked, backend="eager", fullgraph=True) if compiled else masked
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (masked, dense)]
    for step in range(6):
        rows = torch.tensor([[step % 6, 2, 3, 3], [0, 1, step % 4, 0]])
        outputs = [lookup(rows), dense(input=rows)]
        torch.testing.assert_close(outputs[0], outputs[1])
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (output - 1).square().sum().backward()
        dense.weight.grad.mul_(TABLE_MASK)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(masked.weight, dense.weight)
    assert same(masked.weight_orig[~TABLE_MASK], latent[~TABLE_MASK])
    assert_mask_invariants(masked, {"weight": TABLE_MASK})


def test_a_lookup_shortens_the_rows_it_reads_and_no_others() -> None:
    table = nn.Embedding(6, 4, max_norm=1.0)
    nn.init.constant_(table.weight, 2.0)
    torch_rsst.apply_mask(table, {"weight": torch.tensor([1, 0, 0, 0]).expand(6, 4)})
    table.eval()(torch.tensor([1, 4]))
    assert table.weight_orig[:, 0].tolist() == pytest.approx([2.0, 1.0, 2.0, 2.0, 1.0, 2.0])
    assert bool((table.weight_orig[:, 1:] == 2.0).all())


class Shifted(nn.Embedding):
    """Looks up other rows than it is given."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows + 1)


def test_a_table_with_max_norm_and_a_forward_of_its_own_is_not_masked() -> None:
    table = Shifted(6, 4, max_norm=1.0)
    before = dict(vars(table))
    text = r"'weight' of Shifted: .* got max_norm=1.0 in a table with a forward of its own. Set max_norm to None"
    with pytest.raises(ValueError, match=text):
        torch_rsst.apply_mask(table, {"weight": TABLE_MASK})
    assert vars(table) == before
    table.max_norm = None
    torch_rsst.apply_mask(table, {"weight": TABLE_MASK})
    assert same(table(torch.tensor([1])), (table.weight_orig * TABLE_MASK)[[2]])


# Conversions


def normed() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))
    alive = torch.tensor([True, False, True])
    torch_rsst.apply_mask(model, {"1.weight": alive, "1.bias": alive})
    return model


def test_converting_masked_batch_norms_names_the_remedy() -> None:
    text = rf"of BatchNorm2d: .* got convert_sync_batchnorm\(\), which needs .* Do it {REMEDY}"
    with pytest.raises(RuntimeError, match=text):
        nn.SyncBatchNorm.convert_sync_batchnorm(normed())


def test_fusing_a_masked_batch_norm_into_a_dense_convolution_reads_its_present_weight() -> None:
    model = normed().eval()
    x = tokens(0, 1, 2, 4, 4)
    torch.testing.assert_close(fuse_conv_bn_eval(model[0], model[1])(x), model(x))


def test_merging_an_adapter_into_a_masked_base_names_the_remedy() -> None:
    # As peft merges: the sum goes to a tensor that is computed, and is lost.
    source = "def merge(base_layer, delta):\n    base_layer.weight.data += delta\n"
    peft: dict[str, Any] = {"__name__": "peft.tuners.lora.layer"}
    mine: dict[str, Any] = {"__name__": "mine"}
    for scope in (peft, mine):
        exec(source, scope)
    layer, delta = masked_layer(), torch.ones(3, 4)
    with pytest.raises(
        RuntimeError, match=rf"got merge\(\), which needs a parameter. Do it {REMEDY}"
    ):
        peft["merge"](layer, delta)
    mine["merge"](layer, delta)  # cannot be told from reading
    expected = layer.weight.detach() + MASK
    with torch_rsst.dense_weights(layer, masked_writes="drop"):
        peft["merge"](layer, delta)
    torch.testing.assert_close(layer.weight.detach(), expected)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def _registers_on(name: str) -> Callable[[nn.Module], object]:
    return lambda layer: parametrize.register_parametrization(layer, name, Doubled())


PARAMETRIZING = [
    *map(_registers_on, ("weight", "weight_orig", "weight_mask")),
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    nn.utils.weight_norm,
]


@pytest.mark.parametrize("make", [masked_layer, pruned_by_a_stock_function, pruned_by_both])
@pytest.mark.parametrize("work", PARAMETRIZING)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_parametrizing_a_masked_weight_is_an_error_that_names_the_remedy(
    make: Callable[[], nn.Module], work: Callable[[nn.Module], object]
) -> None:
    layer = make()
    before, masks = copy.deepcopy(layer.state_dict()), torch_rsst.extract_mask(layer)
    text = (
        r"of Linear: expected a plain parameter to parametrize, got a part of a masked one. "
        r"Parametrize it first, then mask .* 'parametrizations.weight.original'; or call"
    )
    with pytest.raises(RuntimeError, match=text):
        work(layer)
    assert not parametrize.is_parametrized(layer)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert_mask_invariants(layer, masks)
    torch_rsst.remove_all(layer, freeze_zeros=False)
    parametrize.register_parametrization(layer, "weight", Doubled())


def test_another_parameter_of_a_masked_layer_is_parametrized_and_back() -> None:
    layer, x = masked_layer(), tokens(0, 2, 4)
    plain = layer(x)
    parametrize.register_parametrization(layer, "bias", Doubled())
    parametrize.register_parametrization(layer, "bias", Doubled())
    torch.testing.assert_close(layer(x), plain + 3.0 * layer.parametrizations.bias.original)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    parametrize.remove_parametrizations(layer, "bias", leave_parametrized=False)
    assert same(layer(x), plain)
    assert not hasattr(layer, "parametrizations")
    assert_mask_invariants(layer, {"weight": MASK})


def test_what_a_parametrization_computes_from_can_be_masked() -> None:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Doubled())
    text = "got a parametrized one. .* or mask .*'parametrizations.weight.original'"
    with pytest.raises(ValueError, match=text):
        torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=1)
    torch_rsst.apply_mask(layer, {"parametrizations.weight.original": MASK})
    assert same(layer.weight, 2.0 * layer.parametrizations.weight.original_orig * MASK)


def language_model(*, tied: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=tied,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def _resizes(model: Any, tokens: int = 24) -> None:
    model.resize_token_embeddings(tokens, mean_resizing=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("part", ["transformer.wte", "lm_head"])
def test_resizing_masked_embeddings_of_transformers_is_an_error_that_names_the_remedy(
    tied: bool, part: str
) -> None:
    model = language_model(tied=tied)
    torch_rsst.l1_unstructured(model.get_submodule(part), "weight", amount=0.5)
    before, masks = copy.deepcopy(model.state_dict()), torch_rsst.extract_mask(model)
    text = r"expected 20 tokens, as its mask has, got a resize to 24. Resize after torch_rsst.remove_all"
    with pytest.raises(RuntimeError, match=text):
        _resizes(model)
    head_alone = part == "lm_head" and not tied  # the embeddings come first
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) or (head_alone and key == "transformer.wte.weight")
    assert_mask_invariants(model, masks)
    torch_rsst.remove_all(model, freeze_zeros=False)
    _resizes(model)
    assert model(torch.tensor([[22]])).logits.shape == (1, 1, 24)


def test_resizing_masked_embeddings_to_the_size_they_have_changes_nothing() -> None:
    model = language_model(tied=False)
    for part in (model.transformer.wte, model.lm_head):
        torch_rsst.l1_unstructured(part, "weight", amount=0.5)
    masks = torch_rsst.extract_mask(model)
    _resizes(model, 20)
    assert_mask_invariants(model, masks)


def test_tying_masked_embeddings_of_transformers_is_an_error_that_names_the_remedy() -> None:
    model = language_model(tied=True)
    torch_rsst.l1_unstructured(model.lm_head, "weight", amount=0.5)
    masks = torch_rsst.extract_mask(model)
    with pytest.raises(
        RuntimeError, match=rf"got tie_weights\(\), which needs a parameter. Do it {REMEDY}"
    ):
        model.tie_weights()
    assert_mask_invariants(model, masks)
    with torch_rsst.dense_weights(model):
        model.tie_weights()
    assert model.lm_head.weight_orig is model.transformer.wte.weight_orig
    assert_mask_invariants(model, masks)


class Quantizable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.fc = linear()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.fc(self.quant(x)))
        return y


def quantizable() -> Quantizable:
    model = Quantizable()
    torch_rsst.apply_mask(model, {"fc.weight": MASK})
    return model


def _dynamic(model: nn.Module) -> None:
    quantization.quantize_dynamic(model, {nn.Linear})


def _prepares(model: nn.Module) -> None:
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    quantization.prepare(model.eval())


def _prepares_training(model: nn.Module) -> None:
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model.train(), inplace=True)


def _masks_while_training(model: nn.Module) -> None:
    torch_rsst.remove_all(model, freeze_zeros=False)
    _prepares_training(model)
    torch_rsst.apply_mask(model, {"fc.weight": MASK})
    model(tokens(0, 2, 4)).sum().backward()
    copy.deepcopy(model)
    quantization.convert(model.eval())


def _prepares_by_fx(model: nn.Module) -> None:
    mapping = quantization.get_default_qconfig_mapping("fbgemm")
    quantize_fx.prepare_fx(model.eval(), mapping, (tokens(0, 2, 4),))


def _prepares_training_by_fx(model: nn.Module) -> None:
    mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
    quantize_fx.prepare_qat_fx(model.train(), mapping, (tokens(0, 2, 4),))


FX = [_prepares_by_fx, _prepares_training_by_fx]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "work", [_dynamic, _prepares, _prepares_training, _masks_while_training, *FX]
)
def test_quantizing_masked_layers_is_an_error_where_pytorch_would_leave_them_out(
    work: Callable[[nn.Module], None],
) -> None:
    text = r"Linear with masks: expected a plain module to quantize.*remove_all\(model, freeze_zeros=True\)"
    with pytest.raises(RuntimeError, match=text):
        work(quantizable())


@pytest.mark.filterwarnings("ignore")
def test_preparing_for_quantization_inside_a_block_keeps_the_masks_in_the_new_modules() -> None:
    model = quantizable()
    with torch_rsst.dense_weights(model):
        _prepares_training(model)
    assert_mask_invariants(model, {"fc.weight": MASK})
    model(tokens(0, 2, 4)).sum().backward()
    assert bool((model.fc.weight_orig.grad[~MASK] == 0).all())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", ["0.weight", "1.bias"])
@pytest.mark.parametrize("inplace", [False, True])
def test_fusing_masked_layers_is_an_error_that_names_the_remedy_and_changes_nothing(
    masked: str, inplace: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU()).eval()
    torch_rsst.apply_mask(model, {masked: torch.arange(2).view(model.get_parameter(masked).shape)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"got fuse_modules\(\), .* Do it {REMEDY}"):
        quantization.fuse_modules(model, [["0", "1", "2"]], inplace=inplace)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(same(after[name], value) for name, value in before.items())


@pytest.mark.filterwarnings("ignore")
def test_layers_that_are_fused_inside_a_block_stay_masked() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    mask = torch.arange(2).view(2, 1, 1, 1)
    torch_rsst.apply_mask(model, {"0.weight": mask})
    given = torch.ones(1, 1, 2, 2)
    expected = model(given)
    with torch_rsst.dense_weights(model):
        quantization.fuse_modules(model, [["0", "1"]], inplace=True)
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(given), expected)
    assert_mask_invariants(model, {"0.weight": mask.bool()})


class Registered(nn.Linear):
    """As registries of classes are written."""

    known: ClassVar[dict[str, type[nn.Module]]] = {}

    def __init_subclass__(cls, *, kind: str) -> None:
        super().__init_subclass__()
        assert kind not in cls.known
        cls.known[kind] = cls


class Layer(Registered, kind="layer"):
    pass


def test_a_class_that_hears_of_its_subclasses_hears_of_no_masks() -> None:
    layer = Layer(4, 3)
    torch_rsst.apply_mask(layer, {"weight": MASK})
    assert isinstance(layer, Layer)
    assert isinstance(copy.deepcopy(layer), Layer)
    torch_rsst.remove_all(layer, freeze_zeros=False)
    assert Registered.known == {"layer": Layer}


class Slotted(nn.Linear):
    __slots__ = ("note",)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()


def test_a_class_with_slots_is_masked() -> None:
    layer = Slotted(4, 3)
    layer.note = 1
    torch_rsst.apply_mask(layer, {"weight": MASK})
    assert layer.note == 1
    assert_mask_invariants(layer, {"weight": MASK})
