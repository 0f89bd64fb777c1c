"""Folds by concept and by designer keep what is drawn alike together, and write the same bytes again."""

from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from crafted_shards import config, opened, write_tar
from PIL import Image

from modstruct.data.shards.reader import ShardReader

TOOL = str(Path(__file__).parents[2] / "tools" / "experiments" / "emoji_folds.py")
STYLES = ("noto", "oak", "fir3d", "fir-flat")
CONCEPTS = [f"thing {number}" for number in range(30)]
RELATED = ["man running", "woman running: facing right", "runner", "jogger"]
"""The first two by name; the last three are drawn alike, by one designer or by another."""


def image(number: int) -> bytes:
    """An image of blocks, unlike that of any other number."""
    blocks = np.random.default_rng(number).integers(0, 2, (6, 6, 3)) * 255
    content = io.BytesIO()
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1).astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


def drawn() -> dict[tuple[str, str], bytes]:
    pairs = [(concept, style) for concept in CONCEPTS + RELATED for style in STYLES]
    made = {pair: image(number) for number, pair in enumerate(pairs)}
    made["runner", "noto"] = made["woman running: facing right", "noto"]
    made["jogger", "oak"] = made["runner", "oak"]
    made["thing 3", "oak"] = made["thing 3", "noto"]  # one designer's copied by another
    return made


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    members = []
    for number, ((concept, style), content) in enumerate(drawn().items()):
        about = {"key": "old", "concept": concept, "style": style, "group": "g"}
        members += [(f"{number:04d}.png", content), (f"{number:04d}.txt", f"{concept}: word".encode())]
        members += [(f"{number:04d}.json", json.dumps(about).encode())]
    members += [("x.png", image(999)), ("x.txt", b"x"), ("x.json", b'{"concept": "c"}')]
    members += [("y.png", b"no image"), ("y.txt", b"y"), ("y.json", b'{"concept": "c", "style": "noto"}')]
    return write_tar(folder / "all.tar", members)


@pytest.fixture
def cut(monkeypatch, tmp_path, shards):
    def run(name: str, *options: str) -> int:
        line = [TOOL, str(shards), "--out", str(tmp_path / name), "--cache", str(tmp_path / "cache"), *options]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(TOOL, run_name="__main__")
        return end.value.code

    return run


def read_all(folder: Path) -> dict[tuple[str, str], bytes]:
    data = config(folder.parent)
    samples = opened(folder / "*.tar", data)
    reader = ShardReader(samples, data)
    raws = [reader.read(number) for number in range(len(samples))]
    assert all(raw.caption == f"{raw.metadata['concept']}: word" for raw in raws)
    assert all(raw.metadata["source"].startswith("all.tar: ") and raw.metadata["group"] == "g" for raw in raws)
    return {(raw.metadata["concept"], raw.metadata["style"]): raw.image for raw in raws}


def folds_of(folder: Path) -> list[dict[str, dict[tuple[str, str], bytes]]]:
    paths = sorted(folder.glob("fold-*"))
    return [{name: read_all(path / name) for name in ("eval", "tuning", "train")} for path in paths]


def test_concepts_are_judged_once_each_and_families_stay_together(cut, tmp_path, capsys):
    assert cut("folds", "--folds", "3") == 0
    said = capsys.readouterr().out
    assert "1 left out: no style in KEY.json (" in said
    assert "1 left out: undecodable image (" in said
    folds = folds_of(tmp_path / "folds")
    assert len(folds) == 3
    tuning = {concept for concept, _ in folds[0]["tuning"]}
    judged = [{concept for concept, _ in fold["eval"]} for fold in folds]
    assert sum(map(len, judged)) + len(tuning) == len(CONCEPTS + RELATED) == len(tuning.union(*judged))
    for fold, concepts in zip(folds, judged, strict=True):
        assert {c for c, _ in fold["tuning"]} == tuning
        assert fold["eval"] | fold["tuning"] | fold["train"] == drawn()
        assert not concepts & ({c for c, _ in fold["train"]} | tuning)
        assert not set(fold["eval"].values()) & set(fold["train"].values())
        for split in fold.values():
            assert len({concept for concept, _ in split} & set(RELATED)) in (0, 4)
    about = json.loads((tmp_path / "folds" / "folds.json").read_text())
    assert about["folds"][1]["eval"]["concepts"] == sorted(judged[1])
    assert about["bad samples"] == {"no style in KEY.json": 1, "undecodable image": 1}


def test_designers_rotate_and_copies_are_left_out(cut, tmp_path):
    assert cut("folds", "--by", "style") == 0
    folds, about = folds_of(tmp_path / "folds"), json.loads((tmp_path / "folds" / "folds.json").read_text())["folds"]
    judged = [{style for _, style in fold["eval"]} for fold in folds]
    assert judged == [{"fir3d", "fir-flat"}, {"noto"}, {"oak"}]
    tuning = set.union(*({concept for concept, _ in fold["tuning"]} for fold in folds))
    for fold, styles, told in zip(folds, judged, about, strict=True):
        assert {style for _, style in fold["train"] | fold["tuning"]} == set(STYLES) - styles
        assert {concept for concept, _ in fold["tuning"]} == tuning
        assert not tuning & {concept for concept, _ in fold["train"] | fold["eval"]}
        assert not set(fold["eval"].values()) & set(fold["train"].values())
        assert sum(told[name]["samples"] for name in told) == len(drawn())
    assert "thing 3" not in tuning  # or this says nothing
    assert [("thing 3" in told["left out"]["concepts"]) for told in about] == [False, True, True]
    assert ("thing 3", "oak") in folds[0]["train"]


def test_the_same_again(cut, tmp_path):
    for name, seed in (("one", "0"), ("two", "0"), ("other", "1")):
        assert cut(name, "--folds", "2", "--seed", seed) == 0
    one, two, other = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two", "other")
    )
    assert one == two
    assert one != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", "1"], "--folds = 1: at least 2"),
        (["--by", "style", "--folds", "4"], "--folds = 4: from 2 to the number of designers"),
        (["--folds", "40"], "--folds = 40: fold "),
    ],
)
def test_folds_that_cannot_be_cut_are_refused(cut, tmp_path, capsys, options, message):
    assert cut("never", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("never*"))
