"""What is written is what is read; unfinished and damaged folders and rows that do not fit are refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.set_files import RowStream

MODEL = {"name": "some model", "fingerprint": "1234"}
CAPTIONS = ["a red square", "naïve 🟥\ntwo lines", "\ud800"]


def unit(rows: int, dimension: int = 8, seed: int = 0, dtype=np.float32) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((rows, dimension))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(dtype)


def written(folder, count: int = 5, **changes) -> EmbeddedSet:
    arrays = {"image": unit(count), "text": unit(3, seed=1), "image_features": 50 * unit(count, 12, seed=2)}
    given = {
        "embeddings": arrays,
        "pairs": [[0, 0], [1, 2]],
        "indices": [7, 3, 9, 11, 20],
        "labels": [0, 1, -1, 0, 1],
        "class_prompts": unit(4, seed=3).reshape(2, 2, 8),
        "class_names": ["cat", "dog"],
        "templates": ["a {}", "the {}"],
        "keys": list("abcde"),
        "captions": CAPTIONS,
        "metadata": [{"number": n, "name": "é"} for n in range(5)],
        "source": {"name": "shards", "fingerprint": "5678"},
    }
    return EmbeddedSet("pets", MODEL, **given | changes).save(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_written_is_what_is_read(tmp_path, dtype):
    image, text = unit(5, dtype=dtype), unit(3, seed=1, dtype=dtype)
    written(tmp_path / "set", embeddings={"image": image, "text": text})
    opened = EmbeddedSet.open(tmp_path / "set")
    assert (opened.name, opened.model, opened.arrays) == ("pets", MODEL, {"image", "text"})
    np.testing.assert_array_equal(opened.rows("image"), image)
    np.testing.assert_array_equal(opened.rows("text"), text)
    assert opened.rows("image").dtype == dtype
    assert opened.manifest["dtype"] == np.dtype(dtype).name
    assert opened.pairs.tolist() == [[0, 0], [1, 2]]
    assert opened.indices.tolist() == [7, 3, 9, 11, 20]
    assert opened.labels.tolist() == [0, 1, -1, 0, 1]
    np.testing.assert_array_equal(opened.class_prompts, unit(4, seed=3).reshape(2, 2, 8))
    assert (opened.class_names, opened.templates) == (["cat", "dog"], ["a {}", "the {}"])
    assert (opened.keys, opened.captions) == (list("abcde"), CAPTIONS)
    assert opened.metadata == [{"number": n, "name": "é"} for n in range(5)]
    assert opened.source == {"name": "shards", "fingerprint": "5678"}


def test_lists_have_slices(tmp_path):
    opened = written(tmp_path)
    assert opened.keys[:2] == ["a", "b"]
    assert opened.captions[1:] == CAPTIONS[1:]
    assert opened.metadata[-1:] == [{"number": 4, "name": "é"}]


def test_rows_are_read_only_maps_of_the_file(tmp_path):
    rows = written(tmp_path).rows("image")
    assert isinstance(rows.base, np.memmap) or isinstance(rows, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 0


def test_a_set_of_images_alone_has_no_texts_and_numbers_for_keys(tmp_path):
    opened = EmbeddedSet("bare", MODEL, {"image": unit(4)}).save(tmp_path)
    assert opened.pairs.shape == (0, 2)
    assert opened.labels is None
    assert opened.class_prompts is None
    assert (opened.captions, opened.class_names, opened.templates) == ([], [], [])
    assert (opened.keys, opened.metadata) == (list("0123"), [{}] * 4)
    assert opened.indices.tolist() == [0, 1, 2, 3]
    assert EmbeddedSet("empty", MODEL, {"image": unit(0)}).save(tmp_path).rows("image").shape == (0, 8)


def test_a_stream_of_pieces_is_the_same_as_the_array(tmp_path):
    rows = unit(5, dtype=np.float16)
    pieces = RowStream(rows.shape, rows.dtype, iter([rows[:2], rows[2:2], rows[2:]]))
    written(tmp_path / "stream", embeddings={"image": pieces, "text": unit(3)})
    written(tmp_path / "array", embeddings={"image": rows, "text": unit(3)})
    assert (tmp_path / "stream/image.npy").read_bytes() == (tmp_path / "array/image.npy").read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "stream/image.npy"), rows)


def test_a_set_written_over_another_keeps_nothing_of_it(tmp_path):
    written(tmp_path)
    opened = EmbeddedSet("bare", MODEL, {"image": unit(4)}).save(tmp_path)
    assert opened.labels is None
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"manifest.json", "image.npy", "indices.npy", "keys.jsonl", "metadata.jsonl", "left_out.jsonl"}


def test_an_array_that_was_not_embedded_is_refused_with_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"array = 'text_features': .* has image, image_features, text: embed it with"):
        written(tmp_path).rows("text_features")


def test_an_unfinished_folder_is_told_from_a_missing_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing; embed the set first"):
        EmbeddedSet.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="row 3 is not finite"):
        EmbeddedSet("nan", MODEL, {"image": np.where(np.arange(5)[:, None] == 3, np.nan, 1)}).save(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"unfinished embedded set: `evaluate.py embed` resumes it"):
        EmbeddedSet.open(tmp_path / "set")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def _edit(**changes):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("image.npy", _cut, r"image\.npy.*is damaged"),
        ("pairs.npy", lambda path: path.unlink(), r"pairs\.npy.*is damaged"),
        ("text.npy", lambda path: np.save(path, unit(4)), r"text\.npy.*has shape \(4, 8\), not \[3, 8\]"),
        ("manifest.json", _cut, r"manifest\.json.*is damaged"),
        ("manifest.json", lambda path: path.write_text("[1]"), r"manifest\.json.*is damaged"),
        ("manifest.json", _edit(format=3), "format 3, this version reads 1 to 2"),
        ("manifest.json", _edit(arrays={"../image": [5, 8]}), "is damaged .*"),
    ],
)
def test_a_damaged_set_is_refused_when_it_is_opened(tmp_path, file, damage, message):
    written(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        EmbeddedSet.open(tmp_path)


def test_lists_of_another_length_are_refused_when_they_are_read(tmp_path):
    opened = written(tmp_path)
    (tmp_path / "keys.jsonl").write_text('"a"\n"b"\n')
    with pytest.raises(ValueError, match=r"keys\.jsonl.*2 lines where there are 5 rows"):
        _ = opened.keys[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": {"text": unit(3)}}, "must have image"),
        (
            {"embeddings": {"image": unit(5), "pixels": unit(5)}},
            r"arrays = \['image', 'pixels'\]: may be image, ",
        ),
        ({"embeddings": {"image": unit(5), "text": unit(3, 9)}}, r"text = \(3, 9\): must be of shape \(3, 8\)"),
        ({"embeddings": {"image": unit(5), "image_features": unit(4)}}, r"image_features = \(4, 8\)"),
        ({"embeddings": {"image": 2 * unit(5), "text": unit(3)}}, "row 0 has norm 2; it must have unit norm"),
        ({"pairs": [[0, 3]]}, r"pairs = \[\[0, 3\], \[0, 3\]\]: .* from 0 to below \[5, 3\]"),
        ({"pairs": [0, 3]}, r"pairs = \(2,\): must be of shape \(2, 2\)"),
        ({"labels": [0, 1, 2, 0, 1]}, r"labels = \[0, 2\]: .* from -1 to below 2"),
        ({"class_prompts": unit(4).reshape(4, 1, 8)}, r"class_prompts = \(4, 1, 8\): must be of shape \(2, 2, 8\)"),
        ({"keys": ["a"]}, "keys = '1 of them': give 5"),
        ({"captions": ["a", "b"]}, "captions = '2 of them': give 3"),
        ({"indices": [1]}, r"indices = \(1,\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, **changes)
    assert not (tmp_path / "manifest.json").exists()
