"""Every option has its effect in a run; what is written to YAML is read back."""

from __future__ import annotations

import ast
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import image_folder
from runs import exit_code, settings_restored, tensors

pytestmark = pytest.mark.needs_timm

# Option → a value that is not its default, and the tests that see its effect. A new option needs a line here.
MIXED, SOFT = "test_options_of_data_and_training", "test_options_of_rounds_and_penalty"
READ = "test_each_option_of_augmentation_changes_images"
RUN = {
    "method": ("refill", MIXED),
    "kinds": (("heads",), SOFT),
    "rounds": (2, SOFT),
    "amount": (0.3, SOFT),
    "regroup_amount": (0.25, SOFT),
    # One of them, and not beside fillback_rate.
    "target_parameters": (None, "test_a_target_is_met_by_the_compacted_model"),
    "target_macs": (None, "test_a_target_is_met_by_the_compacted_model"),
    "target_latency": (None, "test_a_target_of_latency_is_measured_and_kept"),
    "round_to": (2, MIXED),
    "importance": ("taylor", MIXED),
    "importance_batches": (2, MIXED),
    "scope": ("layer", SOFT),
    "schedule": ("linear", SOFT),
    "strength": (0.3, SOFT),
    "shrink_to": (None, "test_every_way_to_prune_runs_to_its_end"),  # not beside strength
    "kept_units": ("sparse", SOFT),
    "reconstruct": ("mean", SOFT),
    "distill": (0.25, "test_a_run_that_distils_resumes_to_the_same_bits"),
    "distill_temperature": (3.0, "test_a_run_that_distils_resumes_to_the_same_bits"),
    "mode": ("coupled", SOFT),
    "fillback_rate": (0.25, MIXED),
    "rewind": ("init", MIXED),
    "dataset": ("folder", MIXED),
    "data_dir": (Path("data"), MIXED),
    "train_split": ("studied", MIXED),
    "val_split": ("held", MIXED),
    "download": (True, "test_download_is_asked_for_and_only_then"),
    "num_classes": (2, "test_labels_that_no_class_has_leave_nothing_behind"),
    "image_size": (32, MIXED),
    "workers": (1, MIXED),
    "crop_scale": (0.5, READ),
    "flip": (1.0, READ),
    "color_jitter": (0.1, READ),
    "auto_augment": ("rand-m9-mstd0.5-inc1", READ),
    "random_erasing": (0.5, READ),
    "mixup": (0.4, MIXED),
    "cutmix": (0.6, MIXED),
    "label_smoothing": (0.1, MIXED),
    "model": ("test_vit", MIXED),
    "pretrained": (True, "test_a_mistake_is_one_line"),
    "drop_path": (0.25, MIXED),
    "dense_epochs": (3, MIXED),
    "epochs": (2, SOFT),
    "finetune_epochs": (0, SOFT),
    "batch_size": (4, MIXED),
    "accumulation": (2, MIXED),
    "optimizer": ("sgd", MIXED),
    "learning_rate": (0.02, MIXED),
    "round_learning_rate": (0.5, MIXED),
    "finetune_learning_rate": (0.25, MIXED),
    "weight_decay": (0.01, MIXED),
    "momentum": (0.8, MIXED),
    "lr_schedule": ("step", MIXED),
    "warmup_epochs": (0.5, SOFT),
    "clip_grad": (0.05, MIXED),
    "ema": (0.5, MIXED),
    "precision": ("bf16", MIXED),
    "compile": (True, MIXED),
    "deterministic": (True, MIXED),
    "seed": (3, "test_the_seed_makes_weights_and_order"),
    "device": ("cpu", MIXED),
    "output": (Path("elsewhere"), MIXED),
    "log": (True, MIXED),
    "resume": (None, "test_an_interrupted_run_ends_with_the_same_bits"),
    "config": (None, "test_a_recipe_runs_to_its_end_on_the_data_that_it_names"),
    "dry_run": (None, "test_a_dry_run_tells_what_the_run_comes_to"),
    "write_config": (None, "test_what_is_written_is_read_back"),
}
REPORT = {
    "folders": "test_report_shows_the_results_of_a_run",
    "output": "test_several_runs_are_compared_on_one_page",
}
COMPACT = {
    "folder": "test_compact_prints_before_and_after_and_report_repeats_it",
    "output": "test_the_smaller_model_loads_in_a_process_of_its_own",
    "round_to": "test_the_smaller_model_loads_in_a_process_of_its_own",
    "keep_masks": "test_masks_of_single_weights_are_made_permanent_and_counted",
    "export": "test_the_smaller_model_loads_in_a_process_of_its_own",
    "onnx": "test_compact_writes_onnx_and_says_how_far_it_is_off",
    "images": "test_fewer_images_are_compared_and_counted",
    "data_dir": "test_a_folder_is_run_compacted_and_found_again_where_it_was_moved",
}
PREDICT = {
    "folder": "test_digits_in_files_are_told_apart_as_well_as_in_the_run",
    "images": "test_digits_in_files_are_told_apart_as_well_as_in_the_run",
    "top": "test_classes_of_a_folder_are_named_likeliest_first",
}


@pytest.fixture(autouse=True)
def restored():
    with settings_restored():
        yield


def flag(name):
    return f"--{name.replace('_', '-')}"


def arguments(options):
    """Options as they are typed."""
    args = []
    for name, value in options.items():
        if isinstance(value, bool):
            args.append(flag(name) if value else f"--no-{name.replace('_', '-')}")
        elif value is None:
            args += [flag(name), "None"]
        else:
            args += [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
    return args


def chosen(*names, **others):
    return {name: RUN[name][0] for name in names} | others


def test_every_option_has_a_test():
    from torch_rsst.recipes import config

    others = {"ReportConfig": REPORT, "CompactConfig": COMPACT, "PredictConfig": PREDICT}
    for name, tests in {"RunConfig": RUN, **others}.items():
        assert {f.name for f in fields(getattr(config, name))} == tests.keys()
    named = {test for _, test in RUN.values()}.union(*(tests.values() for tests in others.values()))
    found = set()
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert named <= found


@pytest.mark.parametrize(
    ("command", "names"),
    [("run", RUN), ("report", REPORT), ("compact", COMPACT), ("predict", PREDICT)],
)
def test_help_shows_every_option(command, names, capsys):
    assert exit_code(command, "--help") == 0
    out = capsys.readouterr().out
    positional = {"report": ["folders"], "compact": ["folder"], "predict": ["folder", "images"]}
    typed = set(names) - set(positional.get(command, ()))
    assert all(flag(name) in out for name in typed)
    assert out.count("PATH") >= len(names) - len(typed)


def test_every_option_reaches_the_run(tmp_path):
    from torch_rsst.recipes.config import RunConfig

    options = {name: value for name, (value, _) in RUN.items() if value is not None}
    written = tmp_path / "own.yaml"
    assert exit_code("run", *arguments(options), "--write-config", written) == 0
    found, default = RunConfig.named(str(written)), RunConfig()
    assert found == RunConfig(**options)
    same = {n for n in options if getattr(found, n) == getattr(default, n)}
    assert not same, "values that say nothing"


class Watch:
    """What a run does, seen from inside."""

    def __init__(self, monkeypatch):
        from torch_rsst.cli import main as cli
        from torch_rsst.recipes import experiment

        self.rates, self.norms, self.labels, self.strengths, self.made = [], [], [], [], {}
        self.dtypes = set()
        init, train, after = (
            getattr(experiment.Experiment, name) for name in ("__init__", "_train", "_after_step")
        )

        def built(own, *args):
            init(own, *args)
            self.experiment, self.trainer = own, own.trainer
            own.trainer.optimizer.register_step_pre_hook(self._before_step)
            own.trainer.bare.get_classifier().register_forward_hook(
                lambda module, inputs, output: self.dtypes.add(output.dtype)
            )
            loss = own.trainer.loss
            own.trainer.loss = lambda outputs, labels: (
                self.labels.append(labels) or loss(outputs, labels)
            )

        def staged(own, stage, rnd=None):
            self.rates.append([])
            self.strengths.append([])
            self.rnd = rnd
            train(own, stage, rnd)

        def stepped(own, done):
            if self.rnd is not None and own.config.method == "rsst":
                self.strengths[-1].append(self.rnd.pruner.strength)
            after(own, done)

        def made(name):
            kind = getattr(experiment.torch_rsst, name)

            def make(*args, **options):
                self.made = options
                return kind(*args, **options)

            monkeypatch.setattr(experiment.torch_rsst, name, make)

        made("RSST")
        made("Refill")
        monkeypatch.setattr(experiment.Experiment, "__init__", built)
        monkeypatch.setattr(experiment.Experiment, "_train", staged)
        monkeypatch.setattr(experiment.Experiment, "_after_step", stepped)
        assert cli  # which takes Experiment when it runs

    def _before_step(self, optimizer, args, options):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms = [gradient.norm() for gradient in gradients if gradient is not None]
        self.norms.append(float(torch.stack(norms).norm()))
        self.rates[-1].append(optimizer.param_groups[0]["lr"])


@pytest.mark.filterwarnings("ignore::torch_rsst.utils.errors.RSSTWarning")
def test_options_of_data_and_training(tmp_path, monkeypatch, capsys):
    """One run with all of them: 24 images in batches of 4, two of which make a step: 3 steps an epoch."""
    image_folder(tmp_path / "data", parts=("studied", "held"))
    compiled = []
    real = torch.compile

    def compile_without_compiler(model, **options):  # traced as ever, without the minute in C++
        compiled.append(options["backend"])
        return real(model, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    watch = Watch(monkeypatch)
    options = {name: value for name, (value, test) in RUN.items() if test == MIXED}
    output = tmp_path / "run"
    options |= {"data_dir": tmp_path / "data", "output": output}
    options |= {
        "rounds": 1,
        "epochs": 1,
        "finetune_epochs": 1,
        "warmup_epochs": 0,
        "scope": "layer",
    }
    assert exit_code("run", *arguments(options)) == 0, capsys.readouterr().err
    trainer, optimizer = watch.trainer, watch.trainer.optimizer

    # Steps, their sizes, their learning rates: dense, round, fine-tuning.
    assert list(map(len, watch.rates)) == [9, 3, 3]
    assert watch.rates[0] == pytest.approx([0.02] * 3 + [0.002] * 3 + [0.0002] * 3)
    assert [rates[0] for rates in watch.rates] == pytest.approx([0.02, 0.01, 0.005])
    assert max(watch.norms) == pytest.approx(0.05, rel=1e-3)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.01}

    # Data: 30 batches in 15 steps, mixed and smoothed.
    assert [len(labels) for labels in watch.labels] == [4] * 30
    labels = torch.stack(watch.labels)
    assert labels.shape == (30, 4, 2)
    assert float(labels.min()) == pytest.approx(0.05)
    assert bool(((labels > 0.06) & (labels < 0.94)).any())
    assert (trainer._mixup.mixup_alpha, trainer._mixup.cutmix_alpha) == (0.4, 0.6)
    assert trainer.loaders._train.num_workers == trainer.loaders._held_out.num_workers == 1
    assert trainer.images.train.reader.filename(0, absolute=True).startswith(
        str(tmp_path / "data" / "studied")
    )
    assert len(trainer.images.held_out) == 12

    # The model: small images, stochastic depth, compiled, in bfloat16, averaged.
    assert trainer.example.shape == (2, 3, 32, 32)
    assert trainer.bare.patch_embed.img_size == (32, 32)
    rates = [block.drop_path1.drop_prob for block in trainer.bare.blocks[1:]]
    assert max(rates) == 0.25
    assert compiled == ["inductor"]
    assert watch.dtypes == {torch.bfloat16}
    assert torch.are_deterministic_algorithms_enabled()
    assert trainer.accelerator.device.type == "cpu"
    kept, trained = tensors(output), trainer.bare.state_dict()
    averages = trainer.average.module.state_dict()
    assert all(torch.equal(kept[name], averages[name]) for name in kept)
    assert not torch.equal(kept["head.weight"], trained["head.weight"])

    # Pruning: half of 12 heads and 1152 neurons, of which a quarter is given back.
    report = json.loads((output / "report.json").read_text())
    assert (report["method"], report["model"]) == ("refill", "test_vit")
    assert report["neuron_sparsity"] == pytest.approx(0.375)
    assert watch.made["round_to"] == 2
    assert watch.made["importance"] == "taylor"
    assert watch.made["rewind"] == "init"
    assert len(list(watch.made["batches"]())) == 2

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "log"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"epoch/loss", "epoch/accuracy", "epoch/learning_rate", "round/accuracy"} <= tags
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    logged = [scalar.value for scalar in events.Scalars("epoch/loss")]
    assert logged == pytest.approx([x["loss"] for x in lines if x["event"] == "epoch"])


@pytest.mark.filterwarnings("ignore::torch_rsst.utils.errors.RSSTWarning")
def test_options_of_rounds_and_penalty(tmp_path, monkeypatch, capsys):
    watch = Watch(monkeypatch)
    options = {name: value for name, (value, test) in RUN.items() if test == SOFT}
    options |= {"dense_epochs": 1, "batch_size": 256, "device": "cpu", "output": tmp_path / "run"}
    assert exit_code("run", *arguments(options)) == 0, capsys.readouterr().err
    dense, first, second, fine = watch.rates
    assert list(map(len, watch.rates)) == [5, 10, 10, 0]
    assert dense[0] == pytest.approx(1e-5)  # half an epoch of warm-up
    assert dense[0] < dense[1] < dense[2]
    assert dense[3] > dense[4]
    assert max(first) == max(second) == pytest.approx(3e-3 * 0.7)
    assert fine == []
    # After a step, the strength is that of the next one.
    expected = [0.3 * min(step + 1, 10) / 10 for step in range(1, 11)]
    assert watch.strengths[1] == watch.strengths[2] == pytest.approx(expected)
    assert watch.rnd is None
    assert watch.made["mode"] == "coupled"
    assert watch.made["kept_units"] == "sparse"
    assert watch.made["reconstruct"] == "mean"
    assert watch.made["scope"] == "layer"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rounds = [r for r in map(json.loads, lines) if r["event"] == "round"]
    masked = [round(record["element_sparsity"], 3) for record in rounds]
    assert masked == pytest.approx([0.3, 0.51], abs=2e-3)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["head_sparsity"] == 0.25
    assert "neuron_sparsity" not in report


def test_the_seed_makes_weights_and_order():
    from torch_rsst.recipes.config import RunConfig
    from torch_rsst.recipes.training import Trainer

    def begin(seed):
        trainer = Trainer(RunConfig(seed=seed, device="cpu"))
        weight = trainer.bare.blocks[0].attn.qkv.weight.detach().clone()
        return weight, next(iter(trainer.loaders.epoch(0)))[1]

    (weight, labels), (again, order), (other, shuffled) = begin(0), begin(0), begin(1)
    assert torch.equal(weight, again)
    assert torch.equal(labels, order)
    assert not torch.equal(weight, other)
    assert not torch.equal(labels, shuffled)


def test_labels_are_smoothed_without_mixing():
    from torch_rsst.recipes.config import RunConfig
    from torch_rsst.recipes.training import Trainer

    outputs, labels = torch.randn(4, 10), torch.tensor([1, 0, 9, 3])
    trainer = Trainer(RunConfig(label_smoothing=0.2, device="cpu"))
    shares = torch.full((4, 10), 0.02).scatter(1, labels[:, None], 0.82)
    expected = -(shares * outputs.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(trainer.loss(outputs, labels), expected)
    torch.testing.assert_close(trainer.loss(outputs, shares), expected)  # mixed ones are smooth


# YAML

_options = st.fixed_dictionaries(
    {},
    optional={
        "kinds": st.lists(
            st.sampled_from(["heads", "neurons", "channels"]), min_size=1, unique=True
        ).map(tuple),
        "amount": st.floats(0.0, 1.0),
        "learning_rate": st.floats(1e-12, 1e6),
        "data_dir": st.text(
            st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12
        ).map(Path),
        "train_split": st.text(st.characters(codec="utf-8"), max_size=12),
        "clip_grad": st.none() | st.floats(1e-6, 1e6),
        "auto_augment": st.none() | st.text(st.characters(codec="utf-8"), max_size=8),
        "num_classes": st.none() | st.integers(2, 10**6),
        "seed": st.integers(0, 2**31 - 1),
        "log": st.booleans(),
        "importance": st.sampled_from(["magnitude", "taylor"]),
    },
)


@given(_options)
def test_any_options_survive_yaml(options):
    from torch_rsst.recipes.config import RunConfig

    own = RunConfig(**options)
    assert RunConfig.from_yaml(own.to_yaml(), Path("own.yaml")) == own


def test_an_old_file_with_aliases_describes_the_same_run():
    from torch_rsst.recipes.config import RunConfig

    old = "schedule: exp_custom_exponents\nimportance: l1\n"
    own, named = (
        RunConfig.from_yaml(old, Path("config.yaml")),
        RunConfig(importance="activation_l1"),
    )
    assert own == named == RunConfig(schedule="exp_custom_exponents", importance="l1")
    assert own.differences(named) == {}
    assert "schedule: late_exponential\n" in own.to_yaml()
    assert "importance: activation_l1\n" in own.to_yaml()


def test_what_is_written_is_read_back(tmp_path, capsys):
    """``--config`` gives what ``--write-config`` wrote, options beside it win, and nothing is written over."""
    from torch_rsst.cli.main import _parse

    written = tmp_path / "new" / "own.yaml"
    options = {name: value for name, (value, _) in RUN.items() if value is not None}
    args = ["run", *arguments(options)]
    asked = [*args, "--write-config", str(written)]
    assert exit_code(*asked) == 0
    assert f"torch-rsst run --config {written}" in capsys.readouterr().out
    assert not Path("elsewhere").exists()
    # ``partial(_run, config)``
    whole, again = (
        _parse(command).args[0] for command in (args, ["run", "--config", str(written)])
    )
    assert replace(again, config=None) == whole
    beside = _parse(["run", "--config", str(written), "--seed", "4", "--no-log"]).args[0]
    assert replace(beside, config=None) == replace(whole, seed=4, log=False)
    before = written.read_bytes()
    assert exit_code(*asked, "--seed", "5") == 2
    assert "expected a new file, got an old one. Pass another name." in capsys.readouterr().err
    assert written.read_bytes() == before
