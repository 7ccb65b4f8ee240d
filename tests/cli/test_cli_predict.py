"""``torch-rsst predict``: from a run to labels of image files."""

from __future__ import annotations

import re

import pytest
import torch
from image_files import image_folder, picture
from runs import QUICK, TINY, exit_code

import torch_rsst

pytestmark = pytest.mark.needs_timm


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    stages = ["--dense-epochs", 4, "--epochs", 1, "--rounds", 1, "--finetune-epochs", 0]
    args = ["--method", "refill", "--batch-size", 64, "--distill", 0.5, "--device", "cpu"]
    assert exit_code("run", "--output", folder, *stages, *args) == 0
    assert exit_code("compact", folder) == 0
    return folder


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pets")
    data = image_folder(folder / "data")
    args = ["--output", folder / "run", "--data-dir", data, *TINY, *QUICK, "--method", "refill"]
    assert exit_code("run", *args) == 0
    assert exit_code("compact", folder / "run") == 0
    return folder


def digit_files(folder, count=60):
    """Held-out digits as PNG files, the tensors that a run evaluates, and labels."""
    from PIL import Image

    from torch_rsst.recipes import digits

    _, held_out = digits.datasets()
    images, labels = (part[:count] for part in held_out.tensors)
    form = digits.form()
    pixels = (images * form["std"][0] + form["mean"][0]) * 255
    files = [folder / f"{number:03}.png" for number in range(count)]
    for file, each in zip(files, pixels, strict=True):
        Image.fromarray(each[0].round().to(torch.uint8).numpy()).save(file)
    return files, images, labels


def test_the_transform_of_digits_gives_what_the_run_was_evaluated_on(digits_run, tmp_path):
    from PIL import Image

    files, images, _ = digit_files(tmp_path, 5)
    transform = torch_rsst.compact_info(digits_run / "compact").transform()
    for file, expected in zip(files, images, strict=True):
        # A pixel of 16 steps is one of 256 in the file.
        torch.testing.assert_close(transform(Image.open(file)), expected, rtol=0, atol=0.006)


def test_digits_in_files_are_told_apart_as_well_as_in_the_run(digits_run, tmp_path, capsys):
    files, images, labels = digit_files(tmp_path)
    capsys.readouterr()
    assert exit_code("predict", digits_run / "compact", *files) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in out] == [str(file) for file in files]
    found = [int(re.fullmatch(r".*: (\d) [\d.]+%", line)[1]) for line in out]
    model = torch_rsst.load_compact(digits_run / "compact").eval()
    assert found == model(images).argmax(1).tolist()
    right = sum(a == b for a, b in zip(found, labels.tolist(), strict=True))
    assert right > 0.5 * len(files)


def test_the_folder_of_a_run_tells_about_its_model(digits_run):
    info = torch_rsst.compact_info(digits_run / "compact")
    assert info.classes == tuple("0123456789")
    assert info.input_size == (1, 8, 8)
    assert info.metrics["accuracy"].keys() == {"dense", "compacted"}
    assert 50 < info.metrics["accuracy"]["compacted"] <= 100
    card = (digits_run / "compact" / "README.md").read_text()
    assert (
        "Trained on scikit-learn's digits: dense for 4 epochs from random weights, pruned by"
        in card
    )
    assert "what the dense model predicts has the weight 0.5 in the loss" in card
    assert "Accuracy is in percent, on 450 held-out images." in card
    assert "| heads | 16 | 8 |" in card


def test_classes_of_a_folder_are_named_likeliest_first(pets, capsys):
    from PIL import Image

    files = [pets / "one.png", pets / "two.jpg"]
    for label, file in enumerate(files):
        picture(label, 7, 30).save(file)
    compact = pets / "run" / "compact"
    capsys.readouterr()
    assert exit_code("predict", compact, *files, "--top", 2) == 0
    out = capsys.readouterr().out.splitlines()
    info, model = torch_rsst.compact_info(compact), torch_rsst.load_compact(compact).eval()
    assert info.classes == ("cat", "dog")
    for file, line in zip(files, out, strict=True):
        shares = model(info.transform()(Image.open(file))[None]).softmax(1)[0].tolist()
        ranked = sorted(zip(shares, info.classes, strict=True), reverse=True)
        assert line == f"{file}: " + ", ".join(f"{name} {share:.1%}" for share, name in ranked)


def test_compact_writes_onnx_and_says_how_far_it_is_off(pets, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    assert exit_code("compact", pets / "run", "--onnx", "--export") == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in ("model.pt2", "model.onnx"):
        assert re.search(
            rf"{name}: without masks, outputs differ by at most \d\.\de[-+]\d\d\.", out
        )
        assert (pets / "run" / "compact" / name).is_file()
    assert f"Use it: torch-rsst predict {pets / 'run/compact'} IMAGE" in out


def _broken(folder):
    path = folder / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return path


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (lambda f: [f / "run/compact"], "images: expected at least one file, got none"),
        (lambda f: [f / "run/compact", f / "no.png"], "no.png: expected an image, got no such file"),
        (lambda f: [f / "run/compact", _broken(f)], "broken.png: expected an image, got ("),
        (lambda f: [f / "run/compact", f], "expected an image, got ("),
        (lambda f: [f / "run", f / "one.png"], "expected a saved model, got no compact.json. Pass "),
        (lambda f: [f / "no", f / "one.png"], "expected a saved model, got no such folder. Save a"),
        (lambda f: [f / "run/compact", f / "one.png", "--top", 3], "at most 2, the number of cl"),
        (lambda f: [f / "run/compact", f / "one.png", "--top", 0], "top: expected an int >= 1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(pets, capsys, args, words):
    picture(0, 0, 30).save(pets / "one.png")
    capsys.readouterr()
    assert exit_code("predict", *args(pets)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("torch-rsst: ")
    assert words in error
    assert "\n" not in error


def test_a_model_with_other_outputs_than_classes_is_refused(tmp_path, capsys):
    import timm

    model = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    groups = torch_rsst.find_groups(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups)
    info = torch_rsst.CompactInfo(classes=("cat", "dog", "cow"))
    torch_rsst.save_compact(small, tmp_path / "small", info=info)
    picture(0, 0, 30).save(tmp_path / "one.png")
    assert exit_code("predict", tmp_path / "small", tmp_path / "one.png") == 2
    assert "expected a score for each of 3 classes, got outputs of" in capsys.readouterr().err
