"""Networks and CIFAR: sizes and shapes, generated and stored images, batches, bad data."""

import io

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_sl2o.experiments.data.cifar import ImageSet, as_is, batches, crop_and_flip, load_cifar, normalize
from hf_sl2o.experiments.tasks.networks import mobilenet_v2, resnet8, resnet18, resnet20, small_vit, vgg16


def encoded(pixels, kind="PNG"):
    """The bytes of an image file; `pixels` of shape (H, W, 3) or (H, W), uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pictures(count, size=32):
    """Images of shape (count, size, size, 3), uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write(folder, images, labels, split="train"):
    """Writes a split as datasets stores it: a struct of bytes and path."""
    rows = {"img": [{"bytes": image, "path": None} for image in images], "label": labels}
    parquet.write_table(pyarrow.table(rows), folder / f"{split}.parquet")
    return str(folder)


# Networks


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (resnet8, 75_290),
        (resnet20, 269_722),
        (resnet18, 11_173_962),
        (vgg16, 14_728_266),
        (mobilenet_v2, 2_236_682),
        (small_vit, 142_026),
    ],
)
def test_networks_have_the_published_sizes_and_shapes(build, parameters):
    network = build()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    logits = build(num_classes=7)(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 7) and logits.dtype == torch.float32
    F.cross_entropy(network(torch.randn(2, 3, 32, 32)), torch.tensor([0, 9])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(
    ("build", "size", "published"),  # millions of multiplications and additions of one image
    [(resnet20, 32, 41), (resnet18, 32, 556), (vgg16, 32, 313), (lambda: mobilenet_v2(1000, 224), 224, 300)],
)
def test_networks_cost_what_was_published(build, size, published):
    network = build().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(1, 3, size, size))
    assert counter.get_total_flops() / 2e6 == pytest.approx(published, rel=0.015)
    if size == 224:
        assert sum(p.numel() for p in network.parameters()) == 3_504_872  # of ImageNet's


def test_small_vit_takes_its_sizes_and_has_no_dropout():
    network = small_vit(width=32, layers=2, heads=2).train()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(x), network(x))
    config = network.vit.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)


# Generated images


def test_embedded_images_are_deterministic_and_splits_differ():
    images, labels = load_cifar("embedded", "train", rows=1200)
    again, same_labels = load_cifar("embedded", "train", rows=1500)
    assert images.shape == (1200, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, again[:1200]) and torch.equal(labels, same_labels[:1200])
    assert labels.bincount(minlength=10).min() > 80
    test, _ = load_cifar("embedded", "test", rows=1200)
    assert not torch.equal(images, test)
    assert not torch.equal(images[:200], images[1000:])  # nor does a block repeat


def test_embedded_classes_keep_their_numbers():
    images, labels = load_cifar("embedded", "test", rows=300, classes=[7, 2])
    assert len(images) == len(labels) == 300 and set(labels.tolist()) == {2, 7}


def test_a_linear_probe_learns_the_embedded_images():
    images, labels = load_cifar("embedded", "train", rows=4000)
    probe = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3)
    stream = batches(images, labels, 64, seed=0)
    for _ in range(200):
        x, y = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(probe(x), y).backward()
        optimizer.step()
    x, y = load_cifar("embedded", "test", rows=1000)
    accuracy = (probe(normalize(x)).argmax(1) == y).float().mean()
    assert accuracy > 0.25  # by chance 0.1


# Stored images


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_stored_images_come_back_as_they_are(tmp_path, monkeypatch, source):
    pixels, labels = pictures(20), [index % 10 for index in range(20)]
    data = write(tmp_path, [encoded(image) for image in pixels], labels, "test")
    if source == "hub":
        stored = datasets.Dataset.from_parquet(f"{data}/test.parquet", cache_dir=str(tmp_path))
        stored = stored.cast_column("img", datasets.Image())

        def load_dataset(name, split):
            assert (name, split) == ("uoft-cs/cifar10", "test")
            return stored

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        data = "hub"
    images, found = load_cifar(data, "test")
    assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2)) and found.tolist() == labels
    assert images.is_contiguous() and images.dtype == torch.uint8 and found.dtype == torch.int64
    some, found = load_cifar(data, "test", rows=3, classes=[4, 5])
    assert found.tolist() == [4, 5, 4] and torch.equal(some, images[[4, 5, 14]])


def test_jpeg_files_are_read(tmp_path):
    flat = np.full((32, 32, 3), (200, 100, 50), dtype=np.uint8)
    images, _ = load_cifar(write(tmp_path, [encoded(flat, "JPEG")], [3]), "train")
    assert (images[0].float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 4


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([], [], r"train.parquet has no rows with a label in \[0, 1.* expected at least one"),
        ([encoded(pictures(1, 28)[0])], [1], "28 x 28 pixels in mode RGB in row 0, expected 32 x 32 in mode RGB"),
        ([encoded(pictures(1)[0, :, :, 0])], [1], "32 x 32 pixels in mode L in row 0, expected .* convert"),
        ([b"no image"], [1], r"an image in row 0 that cannot be read \(cannot identify .* restore it"),
        ([encoded(pictures(1)[0])[:900]], [1], r"an image in row 0 that cannot be read \(.*truncated.* restore it"),
        ([None], [1], "holds a NoneType as the image of row 0, expected the bytes of a PNG or JPEG"),
        ([encoded(pictures(1)[0])], [10], "has the label 10 in row 0, expected an integer from 0 to 9; give CIFAR-10"),
        ([encoded(pictures(1)[0])], [-1], "has the label -1 in row 0"),
        ([encoded(pictures(1)[0])], ["cat"], "has the label 'cat' in row 0, expected an integer"),
        ([encoded(pictures(1)[0])], [None], "has the label None in row 0"),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(tmp_path, images, labels, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_cifar(write(tmp_path, images, labels), "train")
    assert "\n" not in str(raised.value)


def test_bad_files_and_arguments_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for .*train.parquet .* no such file; give embedded, hub, or"):
        load_cifar(str(tmp_path / "missing"), "train")
    data = write(tmp_path, [encoded(pictures(1)[0])], [1])
    with pytest.raises(FileNotFoundError, match="test.parquet and found no such file"):
        load_cifar(data, "test")
    with pytest.raises(ValueError, match="has no rows with a label in \\[2\\]"):
        load_cifar(data, "train", classes=[2])
    with pytest.raises(ValueError, match="the split is 'validation', expected one of train, test"):
        load_cifar(data, "validation")
    with pytest.raises(ValueError, match="rows is 0, expected at least 1"):
        load_cifar("embedded", "train", rows=0)
    for classes in ([], [3, 10]):
        with pytest.raises(ValueError, match="classes are .* expected some of 0 to 9"):
            load_cifar("embedded", "train", classes=classes)
    parquet.write_table(pyarrow.table({"image": [b""], "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"has the columns \['image', 'label'\], and lacks 'img'; expected"):
        load_cifar(data, "train")
    (tmp_path / "train.parquet").write_bytes(b"img,label\n")
    with pytest.raises(ValueError, match="train.parquet is not a parquet file .* restore it from its source"):
        load_cifar(data, "train")


# Batches


def test_batches_are_shuffled_endless_and_depend_on_the_seed():
    images, labels = load_cifar("embedded", "train", rows=50)
    stream = batches(images, labels, 20, seed=3, augment=False)
    drawn = [next(stream) for _ in range(5)]
    assert all(x.shape == (20, 3, 32, 32) and x.dtype == torch.float32 and y.shape == (20,) for x, y in drawn)
    whole = normalize(images)
    for x, y in drawn:
        index = torch.tensor([int((whole == image).flatten(1).all(1).nonzero()) for image in x])
        assert len(set(index.tolist())) == 20 and torch.equal(labels[index], y)
    for same, augment in ((3, False), (3, True), (4, False)):
        x, _ = next(batches(images, labels, 20, seed=same, augment=augment))
        assert torch.equal(x, drawn[0][0]) == (same == 3 and not augment)
    with pytest.raises(ValueError, match="the batch size is 51 and there are 50 images; give 1 to 50"):
        next(batches(images, labels, 51, seed=0))


def test_normalize_uses_the_statistics_of_cifar():
    images = torch.tensor([0.4914, 0.4822, 0.4465]).mul(255).round().to(torch.uint8).view(1, 3, 1, 1)
    x = normalize(images.expand(1, 3, 32, 32))
    assert x.abs().max() < 0.01
    step = normalize(images.expand(1, 3, 32, 32) + 51) - x  # 51 of 255 are 0.2
    assert torch.allclose(step[0, :, 0, 0], 0.2 / torch.tensor([0.2470, 0.2435, 0.2616]), atol=1e-5)


def test_crops_are_windows_of_the_padded_image_or_of_its_mirror_image():
    images, _ = load_cifar("embedded", "train", rows=64)
    moved = crop_and_flip(images, torch.Generator().manual_seed(0))
    found = []
    for before, after in zip(images, moved, strict=True):
        for flipped in (False, True):
            padded = F.pad(before, (4, 4, 4, 4))
            windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
            windows = windows.flip(-1) if flipped else windows
            same = (windows == after[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
            found += [(flipped, top, left) for top, left in same]
    assert len(found) == 64
    flips, tops, lefts = zip(*found, strict=True)
    assert 16 < sum(flips) < 48 and set(tops) == set(lefts) == set(range(9))


# Whole batches for a Trainer


def windows(image):
    """All 81 crops of a padded image, plain and mirrored, by loops."""
    padded = F.pad(image, (4, 4, 4, 4))
    crops = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    return [*crops, *(crop.flip(2) for crop in crops)]


def test_an_image_set_gives_crops_and_mirrors_that_follow_from_seed_and_epoch():
    images, labels = load_cifar("embedded", "train", rows=600)
    train = ImageSet(images, labels, augment=True, seed=3)
    rows = [5, 17, 599]
    batch = train.__getitems__(rows)
    for value, row in zip(batch["pixel_values"], rows, strict=True):
        assert sum(torch.equal(value, normalize(window)) for window in windows(images[row])) >= 1
    assert torch.equal(batch["labels"], labels[rows])
    alone = torch.stack([train[row]["pixel_values"] for row in rows])
    assert torch.equal(alone, batch["pixel_values"])  # whatever else is in the batch
    first = train.__getitems__(range(600))["pixel_values"]
    train.epoch = 1
    second = train.__getitems__(range(600))["pixel_values"]
    other = ImageSet(images, labels, augment=True, seed=4).__getitems__(range(600))["pixel_values"]
    for changed in (second, other):
        same = (first == changed).flatten(1).all(dim=1).float().mean()
        assert same < 0.03  # 1 in 162
    mirrored = torch.tensor(
        [
            any(torch.equal(value, normalize(window)) for window in windows(image)[81:])
            for value, image in zip(first[:100], images[:100], strict=True)
        ]
    )
    assert 0.3 < mirrored.float().mean() < 0.7
    plain = ImageSet(images, labels, augment=False)
    assert torch.equal(plain.__getitems__(rows)["pixel_values"], normalize(images[rows]))
    loader = torch.utils.data.DataLoader(plain, batch_size=64, collate_fn=as_is)
    assert [len(batch["labels"]) for batch in loader] == [64] * 9 + [24]
    with pytest.raises(ValueError, match="the split is empty"):
        ImageSet(images[:0], labels[:0], augment=True)


def test_cifar_100(tmp_path):
    rows = {"img": [{"bytes": encoded(picture), "path": None} for picture in pictures(3)], "fine_label": [99, 0, 5]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet")
    assert load_cifar(str(tmp_path), "train", num_classes=100)[1].tolist() == [99, 0, 5]
    with pytest.raises(ValueError, match="lacks 'label'"):
        load_cifar(str(tmp_path), "train")
    with pytest.raises(ValueError, match="embedded images have 10 classes"):
        load_cifar("embedded", "train", num_classes=100)
    with pytest.raises(ValueError, match="expected 10 .* or 100"):
        load_cifar("embedded", "train", num_classes=7)
    rows["fine_label"][0] = 100
    parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="label 100 in row 0, expected an integer from 0 to 99"):
        load_cifar(str(tmp_path), "train", num_classes=100)
