"""What the recipes read: no row is swallowed, and what is wrong is said with the file, the row and the remedy."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from hf_sl2o.experiments.data.cifar import load_cifar
from hf_sl2o.experiments.data.e2e import load_rows
from hf_sl2o.experiments.levels import meta_training_steps
from recipes import evaluate_rules, figures, vit_imagenet

GOOD = [(f"name[{i}], food[Fast food]", f"Text {i}, and more.") for i in range(1, 22)]


def text(rows=GOOD, columns=("mr", "ref"), **style):
    out = io.StringIO(newline="")
    csv.writer(out, **style).writerows([columns, *rows])
    return out.getvalue()


def refused(folder, content, *parts):
    """Writes train.csv and returns the one sentence that refuses it; `parts` are in it."""
    (folder / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:
        load_rows(str(folder), "train")
    said = str(raised.value)
    assert "\n" not in said and "train.csv" in said and all(part in said for part in parts), said


@pytest.mark.parametrize(
    "content",
    [
        text(),
        text(lineterminator="\n"),
        text(quoting=csv.QUOTE_ALL),
        "\ufeff" + text(),
        text().replace("\r\n", "\r\n\r\n"),
        text([(ref, mr, "x") for mr, ref in GOOD], ("ref", "mr", "further")),
    ],
)
def test_good_files_are_read_whole(tmp_path, content):
    (tmp_path / "train.csv").write_bytes(content.encode())
    rows = load_rows(str(tmp_path), "train")
    assert rows == [{"mr": mr, "ref": ref} for mr, ref in GOOD] and len(load_rows(str(tmp_path), "train", 5)) == 5


def test_what_is_odd_within_a_cell_stays(tmp_path):
    odd = [("name[£, é\u2028, 日]", 'She said "yes".'), ("a", "two\nlines"), ("b", "it's 5\u0085 o'clock")]
    (tmp_path / "train.csv").write_bytes(text(odd).encode())
    assert [tuple(row.values()) for row in load_rows(str(tmp_path), "train")] == odd


@pytest.mark.parametrize("row", range(0, 20, 4))
@pytest.mark.parametrize("closed", [False, True])
def test_a_stray_quote_swallows_no_rows(tmp_path, row, closed):
    lines = [f"name {i},text {i}" for i in range(1, 22)]
    lines[row] = f'name {row + 1},"an open quote'
    lines[-1] += '"' * closed
    refused(tmp_path, "mr,ref\n" + "\n".join(lines) + "\n", f"row {row + 1} (line {row + 2})", "quote")
    lines[row] += '"'
    lines[-1] = "a,b"
    (tmp_path / "train.csv").write_text("mr,ref\n" + "\n".join(lines) + "\n")
    assert len(load_rows(str(tmp_path), "train")) == 21


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (text().replace("food", "caf\xe9").encode("latin-1"), ("row 1 (line 2)", "not UTF-8", "0xe9", "iconv")),
        (text().encode("utf-16"), ("is UTF-16", "save it")),
        (text().encode("utf-16-le"), ("NUL byte", "UTF-8")),
        (text().replace("Text 3", "Te\0xt 3"), ("row 3 (line 4)", "NUL byte", "restore")),
        ("", ("is empty", "header")),
        ("\n\n", ("is empty",)),
        (text([]), ("has no rows", "at least one")),
        (text(columns=("mr", "sentence")), ("['mr', 'sentence']", "lacks 'ref'")),
        (text(columns=("mr", "mr")), ("'mr' 2 times",)),
        (text([(*row, "x") for row in GOOD], ("mr", "ref", "ref")), ("'ref' 2 times",)),
        (text(delimiter=";"), ("lacks 'mr'", "divided by ';'", "commas")),
        (text(delimiter="\t"), ("divided by '\\t'", "commas")),
        (text([*GOOD, ("a", "")]), ("row 22 (line 23)", "nothing in 'ref'", "remove the row")),
        (text([*GOOD, ("  ", "b")]), ("row 22", "nothing in 'mr'")),
        (text() + "a,b,c\r\n", ("row 22 (line 23) has 3 cells and the header 2", "quotes")),
        (text() + "alone\r\n", ("row 22 (line 23) has 1 cells",)),
        (text() + 'a,"b" c\r\n', ("row 22 (line 23) cannot be read", "quote")),
    ],
)
def test_bad_files_are_refused(tmp_path, content, parts):
    refused(tmp_path, content, *parts)


@pytest.mark.parametrize("data", ["embedded", "csv"])
@pytest.mark.parametrize("limit", [0, -1, -5])
def test_no_rows_and_fewer_are_refused(tmp_path, data, limit):
    (tmp_path / "train.csv").write_text(text())
    data = str(tmp_path) if data == "csv" else data
    with pytest.raises(ValueError, match=f"the limit is {limit} rows, expected at least 1"):
        load_rows(data, "train", limit)
    assert len(load_rows(data, "train", 1)) == 1
    with pytest.raises(ValueError, match="the split is 'dev', expected one of train, validation, test"):
        load_rows(data, "dev")


@pytest.mark.skipif(not os.environ.get("HF_SL2O_DATA"), reason="needs the released E2E CSVs: HF_SL2O_DATA=FOLDER")
def test_the_released_csvs_are_read_whole():
    folder = Path(os.environ["HF_SL2O_DATA"]) / "e2e_nlg"
    for split, rows in (("train", 42061), ("validation", 4672), ("test", 4693)):
        assert len(load_rows(str(folder), split)) == rows


# Images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A split of CIFAR as bytes."""
    folder = tmp_path_factory.mktemp("cifar")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    encoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    parquet.write_table(
        pyarrow.table({"img": encoded, "label": [i % 10 for i in range(40)]}), folder / "train.parquet"
    )
    return (folder / "train.parquet").read_bytes()


def test_damaged_parquet_is_said_in_one_sentence(tmp_path, images):
    path, rng = tmp_path / "train.parquet", np.random.default_rng(1)
    path.write_bytes(images)
    good = load_cifar(str(tmp_path), "train")[0]
    assert len(good) == 40
    for trial in range(150):
        content = bytearray(images)
        if trial % 3 == 0:
            content = content[: rng.integers(len(content))]
        else:
            start = len(content) - 800 if trial % 3 == 1 else 0  # its description is at the end
            for place in rng.integers(start, len(content), 8):
                content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            load_cifar(str(tmp_path), "train")
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            assert "restore it from its source" in str(error) or "expected" in str(error), error


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"img": [1, 2], "label": [1, 2]}, "holds a int as the image of row 0"),
        ({"img": [b"x"], "label": [[1]]}, r"has the label \[1\] in row 0"),
        ({"img": [b"x"], "label": [True]}, "has the label True in row 0"),
        ({"img": [b"x"], "label": [1.0]}, "has the label 1.0 in row 0"),
        ({"label": [1]}, "lacks 'img'"),
    ],
)
def test_another_schema_is_refused(tmp_path, table, message):
    parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load_cifar(str(tmp_path), "train")


def test_an_image_folder_with_a_broken_image(tmp_path):
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / split / name / "0.png")
    rows = vit_imagenet.image_folder(str(tmp_path))["train"]
    assert vit_imagenet.Pictures(rows, 32, 0)[1]["labels"] == 1
    broken = tmp_path / "train" / "dog" / "0.png"
    whole = broken.read_bytes()
    for content in (whole[:60], b"no image"):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"dog/0.png cannot be read .*; restore or remove the file") as raised:
            vit_imagenet.Pictures(rows, 32, 0)[1]
        assert "\n" not in str(raised.value)
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match="dog/0.png is empty; restore or remove the file"):
        vit_imagenet.image_folder(str(tmp_path))
    broken.rename(broken.with_suffix(".txt"))
    with pytest.raises(ValueError, match="train holds no images of the class 'dog'"):
        vit_imagenet.image_folder(str(tmp_path))


# JSON


CURVES = {"accuracy_per_seed": [[[0, 0.1], [10, 0.5]]], "train_loss_per_seed": [[[1, 2.0], [10, 1.0]]]}


@pytest.mark.parametrize(
    "content", ["[]", "3", '"runs"', "{}", '{"runs": []}', '{"runs": {}}', '{"runs": {"a": 1}}', "{", "\xff",
                '{"runs": {"a": {"accuracy_per_seed": [[[0]]], "train_loss_per_seed": [[[0, 1]]]}}}',
                '{"runs": {"a": {"accuracy_per_seed": [[["a", "b"]]], "train_loss_per_seed": [[[0, 1]]]}}}',
                '{"runs": {"a": {"accuracy_per_seed": [[[0, 1]], [[5, 1]]], "train_loss_per_seed": [[[0, 1]]]}}}'],
)  # fmt: skip
def test_a_comparison_of_another_shape_is_refused(tmp_path, content):
    (tmp_path / "comparison.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="comparison.json") as raised:
        figures.main([str(tmp_path / "comparison.json")])
    assert "\n" not in str(raised.value)
    (tmp_path / "comparison.json").write_text(json.dumps({"runs": {"a": CURVES}}))
    assert figures.main([str(tmp_path / "comparison.json")])[0].is_file()


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"stages": 3}', '{"stages": [3]}', '{"settings": {"x": 1}}', '{"settings": []}', "{"]
)
def test_how_a_rule_was_made_in_another_shape_is_refused(tmp_path, content):
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(ValueError, match="provenance.json") as raised:
        meta_training_steps(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / "provenance.json").write_text('{"command": "x"}')
    assert meta_training_steps(tmp_path) is None and evaluate_rules.provenance(tmp_path) == {"command": "x"}
