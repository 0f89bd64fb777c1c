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
from modstruct.evaluation.embeddings.embedded_set import SetContents, write_embedded_set
from modstruct.evaluation.leakage import prints
from modstruct.evaluation.leakage.perceptual_hash import image_hashes, thumbnail
from modstruct.evaluation.leakage.prints import Prints, make_prints
from modstruct.evaluation.leakage.result import read_keys

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
    result = json.loads((out / "leakage.json").read_text())
    assert (result["metric"], result["set"]) == ("leakage", "test")
    assert result["figures"] == {way: {"value": 2 / 6, "rows": 6} for way in ("any", "by_hash")}
    assert [(pair["evaluation"], pair["train"], pair["by"]) for pair in result["pairs"]] == [
        ("e1", "t1", ["hash"]),
        ("e4", "t4", ["hash"]),
    ]
    assert result["rows"] == {"image": 6, "leaked": 2, "train": 11}
    assert result["skipped"] == {"evaluation": 0, "train": 1}
    assert np.load(out / "leakage.npz")["any"].tolist() == [False, True, False, False, True, False]
    examples = json.loads((out / "examples" / "leakage.json").read_text())["examples"]
    assert [example["query"]["key"] for example in examples] == ["e1", "e4"]
    for example in examples:
        names = [example["query"]["image"], *(item["image"] for item in example["results"])]
        assert all(Image.open(out / "examples" / name).size[0] > 60 for name in names)


def test_embeddings_add_their_own_metrics(shards):
    rows = np.eye(12, dtype=np.float32)
    model = {"name": "m", "fingerprint": "f"}
    kept = [n for n in range(12) if n != 5]
    write_embedded_set(shards / "T", SetContents("train", model, {"image": rows[kept]}, keys=[f"t{n}" for n in kept]))
    write_embedded_set(shards / "E", SetContents("test", model, {"image": rows[:6]}, keys=[f"e{n}" for n in range(6)]))
    more = ["--train_embeddings", str(shards / "T"), "--evaluation_embeddings", str(shards / "E")]
    assert find_leakage.main(command(shards, *more)) == 0
    result = json.loads((shards / "results" / "test" / "leakage.json").read_text())
    shares = {way: metric["value"] * 6 for way, metric in result["figures"].items()}
    assert shares == pytest.approx({"any": 5, "by_hash": 2, "by_embedding": 5, "both": 2})


def test_hashes_are_made_once_and_go_on_where_they_stopped(shards, monkeypatch):
    monkeypatch.setattr(prints, "PART_SAMPLES", 4)
    monkeypatch.setattr(prints, "BATCH", 2)
    samples, read = samples_of(shards), []

    class Counted:
        fingerprint = samples.samples.fingerprint
        config = samples.config

        def __len__(self):
            return len(samples)

        def __getitem__(self, number):
            read.append(number)
            if number == 9 and len(read) < 11:
                raise KeyboardInterrupt
            return samples[number]

    folder = shards / "prints"
    with pytest.raises(KeyboardInterrupt):
        make_prints(Counted(), folder, "train")
    assert not (folder / "manifest.json").exists()
    (folder / "part-000001.npz").write_bytes(b"PK cut off")
    read.clear()
    read.extend([-1] * 20)
    made = make_prints(Counted(), folder, "train")
    assert read[20:] == [4, 5, 6, 7, 8, 9, 10, 11]
    assert made.keys == [f"t{n}" for n in range(12) if n != 5]
    assert made.indices.tolist() == [n for n in range(12) if n != 5]
    assert made.skipped == 1
    expected = np.stack([thumbnail(drawn(n)) for n in made.indices])
    assert np.array_equal(made.thumbnails, expected)
    assert np.array_equal(made.hashes, image_hashes(expected))
    make_prints(Counted(), folder, "train")
    assert len(read) == 28
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", "hashes.npy", "thumbnails.npy", "indices.npy", "keys.jsonl", "lock"]
    )


def test_prints_of_another_source_and_damaged_ones_are_refused(shards):
    made = make_prints(samples_of(shards), shards / "prints", "train")
    assert len(made) == 11
    other = samples_of(shards)
    other.fingerprint = "other"
    with pytest.raises(ValueError, match="another source than train"):
        make_prints(other, shards / "prints", "train")
    content = (shards / "prints" / "thumbnails.npy").read_bytes()
    (shards / "prints" / "thumbnails.npy").write_bytes(content[:-5])
    with pytest.raises(ValueError, match="damaged"):
        Prints.open(shards / "prints")
    with pytest.raises(FileNotFoundError, match="no finished hashes"):
        Prints.open(shards / "nowhere")


def test_too_many_bad_images_end_it(shards):
    with pytest.raises(TooManyBadSamples, match="1 of 12"):
        make_prints(samples_of(shards, max_bad_share=0.05), shards / "prints", "train")
    assert not (shards / "prints" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train", "nothing-*.tar"], "train = 'nothing-*.tar'"),
        (["--hamming", "99"], "hamming = 99"),
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
