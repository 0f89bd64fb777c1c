"""From shards to the result: hashing is resumed, results are whole, commands that are wrong say so."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from drawn_images import COPIES, drawn
from PIL import Image

from modstruct.config import DataConfig, Source
from modstruct.data.faults import TooManyBadSamples
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.leakage.duplicates import of_images, thumbnail_set
from modstruct.evaluation.leakage.result import read_keys
from modstruct.evaluation.result import Result

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import find_leakage
from crafted_shards import write_tar


def write_images(path: Path, images: dict[str, Image.Image | bytes]) -> None:
    members = []
    for key, image in images.items():
        content = image
        if not isinstance(image, bytes):
            file = io.BytesIO()
            image.save(file, "PNG")
            content = file.getvalue()
        members += [(f"{key}.png", content), (f"{key}.txt", b"a thing")]
    write_tar(path, members)


@pytest.fixture
def shards(tmp_path):
    """Of six evaluation images e1 and e4 lie in the training source, one of whose twelve is damaged."""
    train = {f"t{n}": drawn(n) for n in range(12)}
    write_images(tmp_path / "train-0.tar", {**train, "t5": b"no image"})
    copies = {1: COPIES["JPEG 50"](drawn(1)), 4: COPIES["a crop of 5 % from the middle"](drawn(4))}
    write_images(tmp_path / "test.tar", {f"e{n}": copies.get(n, drawn(100 + n)) for n in range(6)})
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    train, test = str(folder / "train-*.tar"), str(folder / "test.tar")
    known = ["--cache", str(folder / "cache"), "--out", str(folder / "results" / "test"), "--workers", "0"]
    return ["--train", train, "--evaluation", test, *known, *more]


def samples_of(folder: Path, **fields) -> EvaluationSamples:
    data = DataConfig(cache=str(folder / "cache"), workers=0, **fields)
    return EvaluationSamples([Source(str(folder / "train-0.tar"))], data, "train")


def test_the_result_names_what_was_planted(shards):
    assert find_leakage.main(command(shards)) == 0
    out = shards / "results" / "test"
    assert read_keys(out / "leaked_keys.jsonl") == ["e1", "e4"]
    result = Result.load(out / "leakage.json")
    assert (result.metric, result.set) == ("leakage", "test")
    assert {way: (value.value, value.rows) for way, value in result.values.items()} == {
        way: (2 / 6, 6) for way in ("any", "by_hash")
    }
    assert {(value.unit, value.higher_is_better) for value in result.values.values()} == {("share", None)}
    assert result.rows == {"image": 6, "leaked": 2, "train": 11, "unreadable": 0, "unreadable_train": 1}
    assert result.outcomes["any"].tolist() == [False, True, False, False, True, False]
    pairs = [json.loads(line) for line in (out / "leaked_pairs.jsonl").read_text().splitlines()]
    assert [(pair["evaluation"], pair["train"], pair["by"]) for pair in pairs] == [
        ("e1", "t1", ["hash"]),
        ("e4", "t4", ["hash"]),
    ]
    examples = json.loads((out / "examples" / "leakage.json").read_text())["examples"]
    assert [example["query"]["key"] for example in examples] == ["e1", "e4"]
    for example in examples:
        names = [example["query"]["image"], *(item["image"] for item in example["results"])]
        assert all(Image.open(out / "examples" / name).size[0] > 60 for name in names)


def test_embeddings_add_their_own_metrics(shards):
    rows = np.eye(12, dtype=np.float32)
    model = {"name": "m", "fingerprint": "f"}
    kept = [n for n in range(12) if n != 5]
    EmbeddedSet("train", model, {"image": rows[kept]}, keys=[f"t{n}" for n in kept]).save(shards / "T")
    EmbeddedSet("test", model, {"image": rows[:6]}, keys=[f"e{n}" for n in range(6)]).save(shards / "E")
    more = ["--train_embeddings", str(shards / "T"), "--evaluation_embeddings", str(shards / "E")]
    assert find_leakage.main(command(shards, *more)) == 0
    result = Result.load(shards / "results" / "test" / "leakage.json")
    shares = {way: value.value * 6 for way, value in result.values.items()}
    assert shares == pytest.approx({"any": 5, "by_hash": 2, "by_embedding": 5, "both": 2})


def test_thumbnails_are_those_of_the_images_and_are_made_once(shards):
    made = thumbnail_set(samples_of(shards), "train", shards / "thumbnails")
    kept = [n for n in range(12) if n != 5]
    assert list(made.keys) == [f"t{n}" for n in kept]
    assert made.indices.tolist() == kept
    assert sum(made.skipped.values()) == 1
    expected = of_images([drawn(n) for n in kept])
    assert np.array_equal(made.rows("image_features"), expected.rows("image_features"))
    assert np.array_equal(made.rows("image") > 0, expected.rows("image") > 0)
    before = (shards / "thumbnails" / "image.npy").stat().st_ino
    thumbnail_set(samples_of(shards), "train", shards / "thumbnails")
    assert (shards / "thumbnails" / "image.npy").stat().st_ino == before


def test_too_many_bad_images_end_it(shards):
    with pytest.raises(TooManyBadSamples, match="1 of 12"):
        thumbnail_set(samples_of(shards, max_bad_share=0.05), "train", shards / "thumbnails")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train", "nothing-*.tar"], "train = 'nothing-*.tar'"),
        (["--hamming", "999"], "hamming = 999"),
        (["--train_embeddings", "somewhere"], "evaluation_embeddings: missing"),
        (["--train_embeddings", "nowhere", "--evaluation_embeddings", "nowhere"], "manifest.json"),
    ],
)
def test_a_wrong_command_ends_with_one_line(shards, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        find_leakage.main(command(shards, *more))
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (shards / "results").exists()
