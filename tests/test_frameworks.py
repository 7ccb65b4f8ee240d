"""Programs written for ``torch.nn.utils.prune`` run on this library: a callback, a tutorial."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock
from torch.utils.data import DataLoader, TensorDataset

import torch_rsst as prune
from torch_rsst.testing import assert_mask_invariants

# Lightning's ModelPruning


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def classifier(lightning: Any) -> Any:
    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 1))
            self.masked: list[int] = []

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            loss: Tensor = nn.functional.mse_loss(self.net(x), y)
            return loss

        def on_train_epoch_start(self) -> None:
            self.masked.append(zeros(self.net))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier()


def zeros(net: nn.Module) -> int:
    return sum(int((layer.weight == 0).sum()) for layer in net if isinstance(layer, nn.Linear))


def fit(
    model: Any, tmp_path: Any, *, before: Callable[[Any], None] | None = None, **options: Any
) -> Any:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelPruning

    options.setdefault("parameters_to_prune", [(model.net[0], "weight"), (model.net[2], "weight")])
    callback = ModelPruning(amount=0.4, verbose=1, **options)
    if before is not None:
        before(model)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data())
    return callback


lightning_warns = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


@lightning_warns
@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("lottery", [True, False])
@pytest.mark.parametrize(
    ("method", "globally"),
    [
        (prune.GlobalL1, True),
        (prune.L1Unstructured, True),
        (prune.RandomUnstructured, True),
        ("l1_unstructured", True),
        ("l1_unstructured", False),
    ],
)
def test_lightnings_pruning_callback_trains(
    method: Any, globally: bool, lottery: bool, permanent: bool, tmp_path: Any
) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    model = classifier(lightning)
    first = {key: value.clone() for key, value in model.net.state_dict().items()}
    fit(
        model,
        tmp_path,
        pruning_fn=method,
        use_global_unstructured=globally,
        use_lottery_ticket_hypothesis=lottery,
        make_pruning_permanent=permanent,
    )
    # 50 weights, of which 40 % go after each of two epochs
    assert model.masked == [0, 20]
    assert zeros(model.net) == 32
    assert prune.is_pruned(model) is not permanent
    assert type(model.net[0]) is nn.Linear or not permanent
    if permanent:
        assert model.net.state_dict().keys() == first.keys()
    else:
        assert_mask_invariants(model)
        prune.remove_all(model, freeze_zeros=False)
    assert zeros(model.net) == 32
    assert not torch.equal(model.net[0].bias, first["0.bias"])


@lightning_warns
@pytest.mark.parametrize("lottery", [True, False])
def test_the_callback_trains_with_our_method_exactly_as_with_the_stock_one(
    lottery: bool, tmp_path: Any
) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    trained = []
    for method in (stock.L1Unstructured, prune.GlobalL1):
        model = classifier(lightning)
        fit(
            model,
            tmp_path,
            pruning_fn=method,
            use_global_unstructured=True,
            use_lottery_ticket_hypothesis=lottery,
        )
        trained.append(model.net.state_dict())
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())


@lightning_warns
@pytest.mark.parametrize("permanent", [True, False])
def test_lightnings_callback_goes_on_from_our_masks(permanent: bool, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    model = classifier(lightning)

    def mask(model: Any) -> None:
        pairs = [(model.net[0], "weight"), (model.net[2], "weight")]
        prune.global_unstructured(pairs, prune.GlobalL1, amount=10)

    fit(
        model,
        tmp_path,
        before=mask,
        pruning_fn=prune.GlobalL1,
        use_global_unstructured=True,
        make_pruning_permanent=permanent,
    )
    assert model.masked == [10, 26]  # 40 % of 40, then 40 % of 24
    assert zeros(model.net) == 36
    assert prune.is_pruned(model) is not permanent
    assert_mask_invariants(model)


@lightning_warns
def test_our_calls_go_on_from_lightnings_masks(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    model = classifier(lightning)
    fit(
        model,
        tmp_path,
        pruning_fn="l1_unstructured",
        use_global_unstructured=False,
        make_pruning_permanent=False,
    )
    pairs = [(model.net[0], "weight"), (model.net[2], "weight")]
    prune.global_unstructured(pairs, prune.GlobalL1, amount=3)
    assert zeros(model.net) == 35
    assert_mask_invariants(model)
    prune.fillback(model.net[0], "weight", 1.0)
    assert not bool((model.net[0].weight == 0).any())


@lightning_warns
def test_a_lightning_trainer_trains_a_model_that_we_have_pruned(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    model = classifier(lightning)
    prune.global_unstructured([(model.net[0], "weight")], prune.GlobalL1, amount=0.5)
    mask = model.net[0].weight_mask.clone()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data())
    assert torch.equal(model.net[0].weight_mask, mask)
    (stored,) = tmp_path.rglob("*.ckpt")
    fresh = classifier(lightning)
    state = torch.load(stored, weights_only=False)["state_dict"]
    prune.prepare_from_state_dict(fresh, state)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.net[0].weight, model.net[0].weight)


# A script in the manner of PyTorch's tutorial


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())


def images() -> Tensor:
    return torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def fraction(tensor: Tensor) -> float:
    return float((tensor == 0).double().mean())


def test_a_module_is_pruned_inspected_pruned_again_and_made_permanent() -> None:
    model = LeNet()
    module = model.conv1
    assert {key for key, _ in module.named_parameters()} == {"weight", "bias"}
    assert not list(module.named_buffers())
    prune.random_unstructured(module, name="weight", amount=0.3)
    assert {key for key, _ in module.named_parameters()} == {"weight_orig", "bias"}
    assert {key for key, _ in module.named_buffers()} == {"weight_mask"}
    assert fraction(module.weight) == pytest.approx(45 / 150)
    assert isinstance(next(iter(module._forward_pre_hooks.values())), prune.RandomUnstructured)

    prune.l1_unstructured(module, name="bias", amount=3)
    assert int((module.bias == 0).sum()) == 3
    assert len(module._forward_pre_hooks) == 2

    prune.ln_structured(module, name="weight", amount=0.5, n=2, dim=0)
    channels = (module.weight == 0).flatten(1).all(1)
    assert int(channels.sum()) == 3
    history = next(
        hook for hook in module._forward_pre_hooks.values() if hook._tensor_name == "weight"
    )
    assert [type(method) for method in history] == [prune.RandomUnstructured, prune.LnStructured]

    for name in ("weight", "bias"):
        value = getattr(module, name).detach().clone()
        prune.remove(module, name, freeze_zeros=False)
        assert torch.equal(getattr(module, name), value)
    assert {key for key, _ in module.named_parameters()} == {"weight", "bias"}
    assert not list(module.named_buffers())
    assert not module._forward_pre_hooks
    assert model(images()).shape == (2, 10)


def test_a_pruned_model_is_serialized_as_weights_and_masks() -> None:
    model = LeNet()
    prune.l1_unstructured(model.conv1, name="weight", amount=0.3)
    prune.l1_unstructured(model.conv1, name="bias", amount=2)
    state = model.state_dict()
    expected = {f"conv1.{n}_{part}" for n in ("weight", "bias") for part in ("orig", "mask")}
    assert {key for key in state if key.startswith("conv1")} == expected
    stored = io.BytesIO()
    torch.save(state, stored)
    stored.seek(0)
    fresh = prune.prepare_from_state_dict(LeNet(), state)
    fresh.load_state_dict(torch.load(stored))
    assert torch.equal(fresh(images()), model(images()))


def test_several_parameters_are_pruned_at_their_own_rates() -> None:
    model = LeNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, name="weight", amount=0.2)
        elif isinstance(module, nn.Linear):
            prune.l1_unstructured(module, name="weight", amount=0.4)
    assert {key for key, _ in model.named_buffers()} == {
        f"{name}.weight_mask" for name in ("conv1", "conv2", "fc1", "fc2", "fc3")
    }
    assert fraction(model.conv2.weight) == pytest.approx(0.2)
    assert fraction(model.fc1.weight) == pytest.approx(0.4)


@pytest.mark.parametrize("method", [prune.L1Unstructured, prune.GlobalL1])
def test_several_parameters_are_pruned_at_one_rate_as_stock_prunes_them(method: Any) -> None:
    model = LeNet()
    twin = copy.deepcopy(model)

    def parameters(net: LeNet) -> Any:
        layers = (net.conv1, net.conv2, net.fc1, net.fc2, net.fc3)
        return tuple((layer, "weight") for layer in layers)

    prune.global_unstructured(parameters(model), pruning_method=method, amount=0.2)
    stock.global_unstructured(parameters(twin), pruning_method=stock.L1Unstructured, amount=0.2)
    sizes = [layer.weight.numel() for layer, _ in parameters(model)]
    gone = [int((layer.weight == 0).sum()) for layer, _ in parameters(model)]
    assert sum(gone) == round(0.2 * sum(sizes))
    assert gone == [int((layer.weight == 0).sum()) for layer, _ in parameters(twin)]
    torch.testing.assert_close(model(images()), twin(images()))


class EveryOther(prune.BasePruningMethod):
    """Mask every other entry of what is alive."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def every_other_unstructured(module: nn.Module, name: str) -> nn.Module:
    EveryOther.apply(module, name)
    return module


def test_a_method_of_ones_own_is_applied_alone_behind_others_and_globally() -> None:
    model = LeNet()
    every_other_unstructured(model.fc3, name="bias")
    assert model.fc3.bias_mask.tolist() == [0, 1] * 5
    prune.l1_unstructured(model.fc2, name="bias", amount=4)
    alive = model.fc2.bias_mask != 0
    every_other_unstructured(model.fc2, name="bias")
    assert model.fc2.bias_mask[alive].tolist() == [0, 1] * 40
    pairs = [(model.conv1, "bias"), (model.conv2, "bias")]
    prune.global_unstructured(pairs, pruning_method=EveryOther)
    masks = torch.cat([layer.bias_mask for layer, _ in pairs])
    assert masks.tolist() == [0, 1] * 11
    model(images()).sum().backward()
    assert bool((model.fc3.bias_orig.grad[::2] == 0).all())
    assert_mask_invariants(model)
    prune.remove(model.fc3, "bias", freeze_zeros=False)
    assert fraction(model.fc3.bias) == 0.5
