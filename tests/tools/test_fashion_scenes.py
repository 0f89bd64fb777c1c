"""Fashion-MNIST's files become shards whose images show, and whose captions name, exactly what KEY.json says."""

from __future__ import annotations

import gzip
import io
import json
import math
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from crafted_shards import config, opened
from PIL import Image, ImageColor

from modstruct.data.classification.class_files import load_classes
from modstruct.data.shards.reader import ShardReader
from modstruct.data.synthetic.information import mutual_information

TOOL = str(Path(__file__).parents[2] / "tools" / "experiments" / "fashion_scenes.py")
COUNTS = {"train": 220, "validation": 20, "eval": 30}


def packed(values: np.ndarray) -> bytes:
    shape = b"".join(length.to_bytes(4, "big") for length in values.shape)
    return gzip.compress(bytes((0, 0, 8, values.ndim)) + shape + values.astype(np.uint8).tobytes())


@pytest.fixture
def source(tmp_path):
    """A folder with files in the package's format."""
    folder, generator = tmp_path / "package", np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("train", 240), ("t10k", 30)):
        images = generator.integers(0, 256, (count, 28, 28))
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(packed(images))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(packed(np.arange(count) * 7 % 10))
    return folder


@pytest.fixture
def make(monkeypatch, tmp_path, source):
    def run(name: str, *options: str) -> Path:
        out = tmp_path / name
        monkeypatch.setattr(sys, "argv", [TOOL, "--source", str(source), "--out", str(out), *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(TOOL, run_name="__main__")
        assert end.value.code == (0 if out.exists() else 2)
        return out

    return run


def read_all(folder: Path):
    data = config(folder.parent)
    samples = opened(folder / "*.tar", data)
    reader = ShardReader(samples, data)
    return [reader.read(number) for number in range(len(samples))]


def seen(raw) -> dict[str, str]:
    """The factors as the pixels have them."""
    pixels = np.asarray(Image.open(io.BytesIO(raw.image)).convert("RGB")).astype(int)
    grey = Counter(map(tuple, pixels.reshape(-1, 3))).most_common(1)[0][0]
    rows, columns = np.nonzero((pixels != grey).any(axis=2))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height == width
    across, down = (columns.min() + columns.max() - 63) / 2, (rows.min() + rows.max() - 63) / 2
    lying = ("left", "right")[int(across > 0)] if abs(across) > abs(down) else ("top", "bottom")[int(down > 0)]
    brightest = pixels[rows, columns][pixels[rows, columns].sum(axis=1).argmax()]
    colours = ("red", "green", "blue", "yellow", "purple", "pink", "cyan", "white")

    def apart(colour: str) -> float:
        shade = np.array(ImageColor.getrgb(colour)) / 255
        return float(np.abs(brightest / brightest.max() - shade / shade.max()).sum())

    scale = {20: "small", 28: "medium", 38: "large"}[int(width)]
    return {"colour": min(colours, key=apart), "scale": scale, "side": lying}


SAID = {
    "small": ("small", "little"),
    "medium": ("medium", "mid-sized"),
    "large": ("large", "big"),
    "left": ("left",),
    "right": ("right",),
    "top": ("top", "upper"),
    "bottom": ("bottom", "lower"),
}


def says(text: str, value: str) -> bool:
    return bool(set(text.split()) & set(SAID.get(value, (value,))))


def test_images_show_and_captions_name_what_the_records_say(make):
    out = make("half", "--told", "0.5")
    named = []
    for split, expected in COUNTS.items():
        raws = read_all(out / split)
        assert len(raws) == expected
        for raw in raws:
            record = raw.metadata
            assert seen(raw) == {factor: record[factor] for factor in ("colour", "scale", "side")}
            assert record["caption"] == raw.caption != record["reworded"]
            for text in (raw.caption, record["reworded"]):
                told = [factor for factor in ("colour", "scale", "side") if says(text, record[factor])]
                assert told == record["named"]
            named += [len(record["named"])]
    assert 1.2 < sum(named) / len(named) < 1.8  # of three, a half; its standard error is 0.05


def test_classes_are_the_labels_and_zero_shot_files_fit(make):
    out = make("whole")
    raws = read_all(out / "eval")
    classes, colours = load_classes(out / "zero_shot.yaml"), load_classes(out / "zero_shot_colour.yaml")
    assert classes.rows_of([raw.metadata for raw in raws]).tolist() == [index * 7 % 10 for index in range(30)]
    assert (colours.rows_of([raw.metadata for raw in raws]) >= 0).all()
    assert classes.templates[0].format(classes.classes["ankle boot"]) == "a photo of an ankle boot"
    assert all(raw.metadata["named"] == ["colour", "scale", "side"] for raw in raws)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_again_and_other_captions_of_the_same_images(make):
    once, again, other = make("one"), make("two"), make("three", "--told", "0")
    assert bytes_of(once) == bytes_of(again)
    for split in COUNTS:
        pairs = list(zip(read_all(once / split), read_all(other / split), strict=True))
        assert all(one.image == two.image for one, two in pairs)
        assert all(two.metadata["named"] == [] for _, two in pairs)
    assert bytes_of(once) != bytes_of(make("seed", "--seed", "1"))


@pytest.mark.parametrize("told", [0.0, 0.25, 1.0])
def test_information_is_that_of_the_enumerated_probabilities(make, told):
    known = json.loads((make("known", "--told", str(told)) / "information.json").read_text())
    assert known["told"] == told
    for factor, values in (("colour", 8), ("scale", 3), ("side", 4)):
        # Rows: no mention, or of which value; columns: the value.
        joint = np.vstack([np.full(values, 1 - told), told * np.eye(values)]) / values
        found, text = known["splits"]["eval"][factor], mutual_information(joint)
        assert found["text"] == pytest.approx(text, abs=1e-12)
        assert found["image"] == found["joint"] == found["entropy"] == pytest.approx(math.log(values))
        assert found["delta_p"] == pytest.approx(math.log(values) - text, abs=1e-12)
        assert found["aligned"] == (found["entropy"] if told == 1 else 0)
    assert known["splits"]["eval"]["class"]["text"] == pytest.approx(math.log(10))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "has no t10k-images-idx3-ubyte.gz: apt install dataset-fashion-mnist"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged, or not in MNIST's format: apt install"),
        (lambda path: path.write_bytes(b"not packed"), "damaged, or not in MNIST's format: apt install"),
        (lambda path: path.write_bytes(packed(np.zeros(30))), "damaged, or not in MNIST's format: apt install"),
        (lambda path: path.write_bytes(packed(np.zeros((29, 28, 28)))), "t10k: 29 photographs, 30 labels"),
    ],
)
def test_missing_or_damaged_files_are_named_with_the_remedy(make, source, capsys, damage, message):
    damage(source / "t10k-images-idx3-ubyte.gz")
    assert not make("never").exists()
    assert message in capsys.readouterr().err


def test_wrong_options_are_refused(make, capsys, tmp_path):
    assert not make("never", "--told", "1.5").exists()
    assert "--told = 1.5: from 0 to 1" in capsys.readouterr().err
    out = make("once")
    capsys.readouterr()
    with pytest.raises(AssertionError):  # exit status 2, while the folder is there
        make("once")
    assert f"--out = {str(out)!r}: is there already; choose another folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.part"))
