"""recipes/vit_imagenet.py on an image folder made from CIFAR's classes; figures of vision runs; bad folders."""

import json
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image

from hf_sl2o.experiments.data import image_folder
from hf_sl2o.experiments.data.cifar import load_cifar
from recipes import figures, vit_imagenet

SMALL = """--model small --image_size 32 --trajectory_steps 12 --snapshots 8 --dim 3 --meta_epochs 1 --inner_steps 10
--max_steps 4 --eval_steps 2 --logging_steps 2 --save_steps 2 --quick_grid --per_device_train_batch_size 8 --use_cpu
--seeds 1 --eval_rows 20""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, rows in (("train", 60), ("validation", 60)):
        images, labels = load_cifar("embedded", "train" if split == "train" else "test", rows)
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            (root / split / f"class{label}").mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            if index % 7 == 0:
                picture = picture.convert("L")  # ImageNet has grey ones
            picture.resize((40 + index % 5, 36)).save(root / split / f"class{label}" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, vit_imagenet.main([*SMALL, "--data", str(folder), "--output_dir", str(out)])


def test_all_stages(finished):
    out, result = finished
    assert set(result["runs"]) == {*vit_imagenet.ARMS, "sl2o_default"}
    assert set(result["steps_to"]) == {"subspace_momentum_at_4", "adamw_at_4"}
    recipe = vit_imagenet.Recipe.__new__(vit_imagenet.Recipe)  # at the defaults one of AdamW's evaluations is at 2,000
    recipe.args = SimpleNamespace(max_steps=2000, eval_steps=100)
    recipe.recipe = SimpleNamespace(trajectory_steps=100_000)
    recipe.arguments = lambda folder, optim, **changes: changes
    recipe.args.seed = 0
    assert recipe.full_space("adamw", out, 1e-3, 0)["eval_steps"] == 2000
    assert recipe.targets({"adamw": {"eval": [[0, 3.0], [1666, 2.0], [3332, 1.0]]}}) == {"adamw_at_1666": 2.0}
    assert result["data"]["classes"] == 10 and result["data"]["train"]["rows"] == 60
    assert (out / "sl2o" / "checkpoint-4" / "model.safetensors").is_file()


def test_a_folder_with_another_picture_is_other_data(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert image_folder.listing(str(copy)) == image_folder.listing(str(folder))
    picture = min((copy / "train").rglob("*.png"))
    picture.rename(picture.with_name("other.png"))  # as many as before
    assert image_folder.listing(str(copy)) != image_folder.listing(str(folder))


def test_a_stream_in_place_of_the_folder(folder, tmp_path, monkeypatch):
    """What `--data hub` reads, with the Hub's dataset replaced by a stream of the folder's files."""
    load = datasets.load_dataset

    def stream(name, split, streaming):
        assert name == "ILSVRC/imagenet-1k" and streaming
        return load("imagefolder", data_dir=str(folder), split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", stream)
    flags = ["--data", "hub", "--shuffle_buffer", "16", "--output_dir", str(tmp_path)]
    result = vit_imagenet.main([*SMALL, *flags, "--arms", "sl2o", "adamw"])
    assert result["data"] == {"train": {"rows": None}, "validation": {"rows": 20}, "classes": 10}
    for run in result["runs"].values():
        assert all(0 < loss < 10 for _, loss in run["eval"]) and len(run["accuracy_per_seed"][0]) == len(run["eval"])


def test_a_file_and_its_picture_give_the_same_pixels(folder):
    path = next((folder / "train").rglob("*.png"))
    files = {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}, Image.open(path)
    rows = [{"image": image, "label": 3} for image in files]
    one, other, third = (image_folder.Pictures(rows, 32, None)[index]["pixel_values"] for index in range(3))
    assert torch.equal(one, other) and torch.equal(one, third)


def test_crops_stay_inside_and_follow_from_seed_epoch_and_row(folder):
    rows = image_folder.image_folder(str(folder))["train"]
    train, again, other = (image_folder.Pictures(rows, 32, seed) for seed in (0, 0, 1))
    middle = image_folder.Pictures(rows, 32, None)
    for index in (0, 7, 33):
        value = train[index]["pixel_values"]
        assert value.shape == (3, 32, 32) and -1 <= value.min() < value.max() <= 1
        assert torch.equal(value, again[index]["pixel_values"])
        assert not torch.equal(value, other[index]["pixel_values"])
        again.epoch = 1
        assert not torch.equal(value, again[index]["pixel_values"])
        again.epoch = 0
        assert torch.equal(middle[index]["pixel_values"], middle[index]["pixel_values"])
    flat = Image.new("RGB", (50, 40), (255, 0, 127))
    assert image_folder.pixels(flat, 16, None)[:, 3, 3].tolist() == pytest.approx([1.0, -1.0, 127 / 127.5 - 1])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda root: None, "looked for the folder .*train"),
        (lambda root: (root / "train").mkdir(), "train has no folders, and so no classes"),
        (lambda root: (root / "train" / "cat").mkdir(parents=True), "train holds no images"),
    ],
)
def test_bad_folders(tmp_path, broken, message):
    broken(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        vit_imagenet.main([*SMALL, "--data", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_splits_with_other_classes(folder, tmp_path):
    for split, name in (("train", "cat"), ("validation", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(ValueError, match="only one of train and validation has the class 'cat'"):
        image_folder.image_folder(str(tmp_path))
    with pytest.raises(ValueError, match="there is no --demo here"):
        vit_imagenet.main([*SMALL, "--data", str(folder), "--demo"])
    with pytest.raises(ValueError, match="expected a multiple of the patch"):
        vit_imagenet.main([*SMALL, "--data", str(folder), "--image_size", "30"])


def test_figures_from_the_json(finished, tmp_path):
    out, _ = finished
    (written,) = figures.main([str(out / "comparison.json"), "--output_dir", str(tmp_path)])
    with Image.open(written) as image:
        assert image.size[0] > 1000 and image.size[1] > 400
    result = json.loads((out / "comparison.json").read_text())
    for run in result["runs"].values():
        run["accuracy_per_seed"] = [[]]
    (tmp_path / "comparison.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="has no accuracies"):
        figures.main([str(tmp_path / "comparison.json")])
