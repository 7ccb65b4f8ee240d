"""The run behind ``torch-rsst run``: results, files, resume."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from torch_rsst.utils.errors import RSSTWarning

pytestmark = pytest.mark.needs_timm

QUICK = {
    "method": "rsst",
    "dense_epochs": 1,
    "epochs": 2,
    "rounds": 2,
    "finetune_epochs": 1,
    "batch_size": 256,
}


class Silent:
    """An observer that only counts."""

    def __init__(self):
        self.steps = 0
        self.records = []

    def stage(self, stage, steps, done):
        pass

    def step(self):
        self.steps += 1

    def record(self, record):
        self.records.append(record)


def quick_config(folder, **options):
    from torch_rsst.recipes.config import RunConfig

    return RunConfig(output=folder, device="cpu", **{**QUICK, **options})


def run(config, stop_after=None):
    from torch_rsst.recipes.experiment import Experiment

    observer = Silent()
    experiment = Experiment(
        config, observer, lambda: stop_after is not None and observer.steps >= stop_after
    )
    return experiment.run(), observer


def saved_tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def rsst_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rsst") / "run"
    results, observer = run(quick_config(folder))
    return folder, results, observer


def test_report_has_every_promised_number(rsst_run):
    folder, results, _ = rsst_run
    assert json.loads((folder / "report.json").read_text()) == results
    fractions = {"element_sparsity", "head_sparsity", "neuron_sparsity"}
    percents = {"dense_accuracy", "accuracy_before_cut", "accuracy_after_cut", "accuracy"}
    assert fractions | percents | {"method", "accuracy_first_zero", "seconds"} <= results.keys()
    assert all(0.0 <= results[name] <= 1.0 for name in fractions)
    assert all(0.0 <= results[name] <= 100.0 for name in percents)


def test_half_of_heads_and_neurons_are_gone_in_the_saved_weights(rsst_run):
    """Counted by hand on the file: no mask or report of ours in between."""
    folder, results, _ = rsst_run
    tensors = saved_tensors(folder)
    effective = {
        name.removesuffix("_orig"): value * tensors[name.removesuffix("_orig") + "_mask"]
        if name.endswith("_orig")
        else value
        for name, value in tensors.items()
        if not name.endswith("_mask")
    }
    heads_gone = neurons_gone = 0
    for block in range(4):
        qkv = effective[f"blocks.{block}.attn.qkv.weight"].reshape(3, 4, 12, 48)
        bias = effective[f"blocks.{block}.attn.qkv.bias"].reshape(3, 4, 12)
        proj = effective[f"blocks.{block}.attn.proj.weight"].reshape(48, 4, 12)
        for head in range(4):
            parts = (qkv[:, head], bias[:, head], proj[:, head])
            heads_gone += all(bool((part == 0).all()) for part in parts)
        fc1 = effective[f"blocks.{block}.mlp.fc1.weight"]
        fc1_bias = effective[f"blocks.{block}.mlp.fc1.bias"]
        fc2 = effective[f"blocks.{block}.mlp.fc2.weight"]
        for neuron in range(192):
            parts = (fc1[neuron], fc1_bias[neuron], fc2[:, neuron])
            neurons_gone += all(bool((part == 0).all()) for part in parts)
    assert heads_gone == 8 == results["head_sparsity"] * 16
    assert neurons_gone == 384 == results["neuron_sparsity"] * 768


def test_metrics_have_a_line_per_epoch_and_per_round(rsst_run):
    folder, _, observer = rsst_run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == observer.records
    assert [line["event"] for line in lines].count("epoch") == 1 + 2 * 2 + 1
    rounds = [line for line in lines if line["event"] == "round"]
    assert [line["round"] for line in rounds] == [0, 1]
    # The units that the first round has shrunk are masked when the second one opens.
    assert rounds[0]["element_sparsity"] == 0.0
    assert 0.3 < rounds[1]["element_sparsity"] <= 0.5
    assert rounds[1]["share_to_go"] == {"heads": 0.5, "neurons": 0.5}


def test_folder_holds_config_and_pictures_and_no_checkpoint(rsst_run):
    from torch_rsst.recipes.run_folder import RunFolder

    folder, _, _ = rsst_run
    assert RunFolder(folder).read_config() == quick_config(folder)
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert pictures == {"accuracy_and_sparsity.png", "heads.png", "mask.png", "strength.png"}
    assert not (folder / "checkpoint.pt").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_saved_weights_load_strictly_into_a_fresh_model(rsst_run):
    import torch_rsst
    from torch_rsst.recipes import digits

    folder, results, _ = rsst_run
    model, tensors = digits.model(), saved_tensors(folder)
    torch_rsst.prepare_from_state_dict(model, tensors)
    model.load_state_dict(tensors, strict=True)
    _, test = digits.datasets()
    images, labels = test.tensors
    model.eval()
    accuracy = (model(images).argmax(1) == labels).double().mean().item() * 100
    assert accuracy == pytest.approx(results["accuracy"], abs=1e-3)


@pytest.fixture(scope="module")
def refill_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refill") / "run"
    results, observer = run(quick_config(folder, method="refill"))
    return folder, results, observer


def stop_and_resume(config, stop_after):
    from torch_rsst.recipes.training import Interrupted

    with pytest.raises(Interrupted):
        run(config, stop_after)
    run(replace(config, resume=True))


def assert_same_bits(one, other):
    expected, found = saved_tensors(one), saved_tensors(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("method", ["rsst", "refill"])
@pytest.mark.parametrize("stop_after", [3, 5, 8, 12, 19, 28])
def test_resumed_run_ends_bit_identical(tmp_path, rsst_run, refill_run, method, stop_after):
    """5 steps an epoch: in the dense stage, at an epoch's end, in both rounds, in fine-tuning."""
    stop_and_resume(quick_config(tmp_path / "run", method=method), stop_after)
    assert_same_bits((rsst_run if method == "rsst" else refill_run)[0], tmp_path / "run")


def test_a_run_that_distils_resumes_to_the_same_bits(tmp_path, rsst_run):
    """The teacher is read again; its predictions, softened, change the weights."""
    options = {"distill": 0.5, "rounds": 1, "epochs": 1}
    run(quick_config(tmp_path / "whole", **options))
    stop_and_resume(quick_config(tmp_path / "parts", **options), 7)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts" / "teacher.safetensors").exists()
    run(quick_config(tmp_path / "warm", distill_temperature=3.0, **options))
    run(quick_config(tmp_path / "alone", **{**options, "distill": 0.0}))
    ends = [saved_tensors(tmp_path / name)["head.weight"] for name in ("whole", "warm", "alone")]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(ends, 2))


def test_a_dense_model_near_chance_is_told(tmp_path):
    options = {"dense_epochs": 0, "epochs": 1, "rounds": 1}
    with pytest.warns(RSSTWarning, match=r"accuracy is .* %, where chance .* pass --distill 0\."):
        run(quick_config(tmp_path / "run", **options))
    with pytest.warns(RSSTWarning, match=r"chance gives 10\.0 %.*--learning-rate\.$"):
        run(quick_config(tmp_path / "alone", distill=0.0, **options))


def test_resumed_run_repeats_no_metrics(tmp_path):
    from torch_rsst.recipes.training import Interrupted

    with pytest.raises(Interrupted):
        run(quick_config(tmp_path / "run"), stop_after=15)
    run(replace(quick_config(tmp_path / "run"), resume=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    epochs = [r["epoch"] for r in map(json.loads, lines) if r["event"] == "epoch"]
    assert epochs == [0, 1, 2, 3, 4, 5]


def test_refill_is_exact_after_every_round(refill_run):
    folder, results, observer = refill_run
    rounds = [r for r in observer.records if r["event"] == "round"]
    assert all(r["share_gone"] == {"heads": 0.5, "neurons": 0.5} for r in rounds)
    assert all(r["element_sparsity"] == 0.5 for r in rounds)
    assert results["accuracy_before_cut"] == results["accuracy_after_cut"]
    assert results["accuracy_first_zero"] is None
    assert not (folder / "pictures" / "strength.png").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"rewind": "init"},
        {"kept_units": "sparse", "shrink_to": 0.1},
        {"reconstruct": "least_squares", "distill": 0.5},
        {"scope": "global"},
        {"scope": "type", "importance": "remain"},
        {"mode": "coupled", "schedule": "linear", "strength": 0.1},
        {"method": "refill", "fillback_rate": 0.25},
    ],
)
def test_every_way_to_prune_runs_to_its_end(tmp_path, options):
    results, _ = run(quick_config(tmp_path / "run", epochs=1, **options))
    expected = 0.5 if "fillback_rate" not in options else 0.375
    total = (16 * results["head_sparsity"] + 768 * results["neuron_sparsity"]) / 784
    assert total == pytest.approx(expected, abs=0.01)


def test_a_different_run_in_the_folder_is_refused_and_kept(rsst_run):
    folder, _, _ = rsst_run
    before = (folder / "report.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds|a finished run.*--output"):
        run(quick_config(folder, seed=1))
    assert (folder / "report.json").read_bytes() == before


def test_resume_with_other_options_names_them(tmp_path):
    from torch_rsst.recipes.training import Interrupted

    with pytest.raises(Interrupted):
        run(quick_config(tmp_path / "run"), stop_after=2)
    with pytest.raises(ValueError, match=r"seed=0, got seed=7"):
        run(replace(quick_config(tmp_path / "run"), seed=7, resume=True))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_broken_checkpoint_is_a_clear_error(tmp_path, content):
    from torch_rsst.recipes.training import Interrupted

    with pytest.raises(Interrupted):
        run(quick_config(tmp_path / "run"), stop_after=2)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: expected the checkpoint of this run"):
        run(replace(quick_config(tmp_path / "run"), resume=True))


class _Attack:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    from torch_rsst.recipes.training import Interrupted

    with pytest.raises(Interrupted):
        run(quick_config(tmp_path / "run"), stop_after=2)
    torch.save({"step": _Attack(tmp_path / "owned")}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: expected the checkpoint of this run"):
        run(replace(quick_config(tmp_path / "run"), resume=True))
    assert not (tmp_path / "owned").exists()


def test_a_run_folder_cannot_lead_out_of_itself(tmp_path):
    from torch_rsst.recipes.training import Interrupted

    with pytest.raises(Interrupted):
        run(quick_config(tmp_path / "run"), stop_after=2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "pictures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"pictures: expected files of its own, got a link to .*elsewhere"
    ):
        run(replace(quick_config(tmp_path / "run"), resume=True))
    assert not any((tmp_path / "elsewhere").iterdir())


def test_failing_write_leaves_the_old_file(tmp_path):
    from torch_rsst.utils.files import write_atomically

    path = tmp_path / "file"
    path.write_text("old")

    def half(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 0}, "rounds: expected an int >= 1"),
        ({"amount": 1.5}, "amount: expected"),
        ({"regroup_amount": -0.1}, "regroup_amount: expected a fraction"),
        ({"schedule": "liner"}, "Did you mean 'linear'"),
        ({"strength": float("nan")}, "strength: expected a number >= 0"),
        ({"batch_size": 0}, "batch_size: expected an int >= 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number > 0"),
        ({"seed": -1}, "seed: expected an int >= 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        run(quick_config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_batch_larger_than_the_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="batch_size: expected at most 1347 images, got 5000"):
        run(quick_config(tmp_path / "run", batch_size=5000))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [("rounds: [", "expected the options"), ("- 1", "a list"), ("colour: red", "unknown 'colour'")],
)
def test_unreadable_config_says_what_is_wrong(tmp_path, text, words):
    from torch_rsst.recipes.config import RunConfig

    with pytest.raises(ValueError, match=words):
        RunConfig.from_yaml(text, tmp_path / "config.yaml")


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path):
    from torch_rsst.recipes.run_folder import RunFolder

    first = RunFolder(tmp_path / "run")
    first.open(quick_config(tmp_path / "run"))
    with pytest.raises(FileExistsError, match="another process is writing to"):
        RunFolder(tmp_path / "run").open(replace(quick_config(tmp_path / "run"), resume=True))
    first.close()
    RunFolder(tmp_path / "run").open(replace(quick_config(tmp_path / "run"), resume=True))


@pytest.mark.parametrize(
    "damage",
    [{"model": {}}, {"stage": "bogus"}, {"stage": "rounds"}, {"records": None}, {"losses": None}],
)
def test_a_checkpoint_of_another_run_is_a_clear_error(tmp_path, damage):
    from torch_rsst.recipes.training import Interrupted

    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(quick_config(folder), stop_after=2)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**state, **damage}, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match="expected the checkpoint of this run"):
        run(replace(quick_config(folder), resume=True))


def test_a_diverged_training_names_the_learning_rate(tmp_path):
    from torch_rsst.recipes.training import Diverged

    with pytest.raises(Diverged, match=r"Lower --learning-rate; it is 1e\+20"):
        run(quick_config(tmp_path / "run", learning_rate=1e20))


def test_options_of_the_other_method_are_named(tmp_path):
    soft = quick_config(tmp_path, fillback_rate=0.1)
    assert soft.without_effect() == {"fillback_rate": "--method rsst"}
    refill = quick_config(tmp_path, method="refill", strength=0.1, mode="coupled")
    assert refill.without_effect() == dict.fromkeys(["strength", "mode"], "--method refill")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 4, "batch_size": 64}, "the cut removed almost nothing"),
        ({"strength": 1e-4}, "The penalty did not finish"),
        ({"method": "refill"}, "has nothing left to do"),
    ],
)
@pytest.mark.filterwarnings("ignore::torch_rsst.utils.errors.InertPenaltyWarning")
def test_the_page_says_what_was_measured(tmp_path, options, sentence):
    run(quick_config(tmp_path / "run", rounds=1, **{"epochs": 1, **options}))
    page = " ".join((tmp_path / "run" / "report.html").read_text().split())
    assert sentence in page
    assert page.count('<img src="data:image/png;base64,') == (3 if options.get("method") else 4)
    assert page.count("src=") == page.count("<img")  # nothing else is needed to show it


@pytest.mark.parametrize("line", ["method: foo", "device: tpu", "scope: foo", "learning_rate: a"])
def test_a_config_edited_by_hand_is_checked(tmp_path, line):
    from torch_rsst.recipes.config import RunConfig

    with pytest.raises(ValueError, match=line.split(":")[0]):
        RunConfig.from_yaml(line, tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["[]", "null", "{}", "{"])
def test_a_file_that_is_no_report_is_a_clear_error(tmp_path, text):
    from torch_rsst.recipes.run_folder import RunFolder

    folder = RunFolder(tmp_path)
    folder.config.write_text(quick_config(tmp_path).to_yaml())
    folder.report.write_text(text)
    with pytest.raises(ValueError, match=r"report\.json: expected"):
        folder.read_report()


def test_a_warm_up_leaves_half_of_the_dense_stage(tmp_path):
    """As it would end before the learning rate has risen, in a recipe that is made shorter."""
    _, observer = run(quick_config(tmp_path / "run", dense_epochs=2, warmup_epochs=5.0))
    rates = [r["learning_rate"] for r in observer.records if r.get("stage") == "dense"]
    assert rates[0] > 0.8 * 3e-3
    assert rates[1] < 0.3 * 3e-3
