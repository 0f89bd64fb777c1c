"""A set without some images gives the metrics of a set that never had them, and bad lists are refused."""

from __future__ import annotations

import numpy as np
import pytest

from modstruct.evaluation.embeddings.derived import without
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.leakage.result import read_keys
from modstruct.evaluation.retrieval.measure import measure_retrieval

MODEL = {"name": "m", "fingerprint": "f"}
IMAGES, DIMENSION = 30, 8


def unit(random, *shape) -> np.ndarray:
    rows = random.standard_normal((*shape, DIMENSION))
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def written(folder, numbers, name="emoji", source=None) -> EmbeddedSet:
    """The images of these numbers, each with a caption of its own and one that it shares with two neighbours."""
    image, own, shared, prompts = (unit(np.random.default_rng(s), n) for s, n in enumerate([30, 30, 10, 6]))
    captions: dict[str, np.ndarray] = {}
    pairs = []
    for row, number in enumerate(numbers):
        for caption, embedding in ((f"own {number}", own[number]), (f"shared {number // 3}", shared[number // 3])):
            captions.setdefault(caption, embedding)
            pairs.append((row, list(captions).index(caption)))
    numbers = list(numbers)
    return EmbeddedSet(
        name,
        MODEL,
        {
            "image": image[numbers].astype(np.float16),
            "text": np.stack(list(captions.values())),
            "image_features": 3 * image[numbers],
            "text_features": 2 * np.stack(list(captions.values())),
        },
        pairs=np.array(pairs),
        labels=np.array(numbers) % 4 - 1,
        class_prompts=prompts.reshape(3, 2, DIMENSION),
        class_names=["a", "b", "c"],
        templates=["{}", "a {}"],
        label_field="colour",
        keys=[f"k{n}" for n in numbers],
        captions=list(captions),
        metadata=[{"n": n} for n in numbers],
        source=source,
    ).save(folder)


@pytest.fixture
def whole(tmp_path):
    return written(tmp_path / "whole", range(IMAGES), source={"name": "s", "fingerprint": "x"})


LEFT_OUT = [0, 1, 2, 7, 29]


def test_metrics_are_those_of_a_set_without_the_images(whole, tmp_path):
    left = without(whole, [f"k{n}" for n in LEFT_OUT], tmp_path / "left")
    never = written(tmp_path / "never", [n for n in range(IMAGES) if n not in LEFT_OUT])
    assert left.keys == never.keys
    assert left.metadata == never.metadata
    assert set(left.captions) == set(never.captions)
    assert "shared 0" not in left.captions
    assert "shared 2" in left.captions
    for array in ("image", "image_features"):
        assert np.array_equal(left.rows(array), never.rows(array))
        assert left.rows(array).dtype == whole.rows(array).dtype
    assert np.array_equal(left.labels, never.labels)
    assert np.array_equal(left.class_prompts, never.class_prompts)
    assert (left.class_names, left.templates) == (never.class_names, never.templates)
    order = [left.captions.index(caption) for caption in never.captions]
    for array in ("text", "text_features"):
        assert np.array_equal(left.rows(array)[order], never.rows(array))
    metrics = [measure_retrieval(s.rows("image"), s.rows("text"), s.pairs) for s in (left, never, whole)]
    assert metrics[0] == metrics[1]
    assert metrics[0] != metrics[2]


def test_the_set_has_a_name_and_fingerprint_of_its_own_and_is_made_once(whole, tmp_path):
    left = without(whole, ["k3"], tmp_path / "left")
    assert left.name == "emoji-without-leaked"
    assert left.source["fingerprint"] != whole.source["fingerprint"]
    assert (left.source["of"], left.source["left_out"]) == ("x", 1)
    before = (tmp_path / "left" / "image.npy").stat().st_ino
    assert without(whole, ["k3", "k3"], tmp_path / "left").keys == left.keys
    assert (tmp_path / "left" / "image.npy").stat().st_ino == before
    assert "k4" not in without(whole, ["k3", "k4"], tmp_path / "left").keys


def test_leaving_out_nothing_leaves_all(whole, tmp_path):
    left = without(whole, [], tmp_path / "left")
    assert (left.keys, left.captions) == (whole.keys, whole.captions)


def test_a_set_of_images_alone(tmp_path):
    plain = EmbeddedSet("a", MODEL, {"image": unit(np.random.default_rng(0), 4)}, keys=list("wxyx")).save(
        tmp_path / "a"
    )
    left = without(plain, ["x"], tmp_path / "b")
    assert left.keys == ["w", "y"]
    assert left.labels is None
    assert left.pairs.shape == (0, 2)


def test_lists_that_do_not_fit_the_set_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match=r"'other'.*1 of 2 are not in"):
        without(whole, ["k1", "other"], tmp_path / "left")
    with pytest.raises(ValueError, match="no image"):
        without(whole, whole.keys, tmp_path / "left")
    for itself in (whole.folder, whole.folder / ".." / whole.folder.name):
        with pytest.raises(ValueError, match="is the set itself; name another"):
            without(whole, ["k1"], itself)
    assert not (tmp_path / "left").exists()
    assert EmbeddedSet.open(whole.folder).keys == whole.keys


def test_keys_are_read_one_a_line(tmp_path):
    path = tmp_path / "leaked_keys.jsonl"
    path.write_text('"a"\n"b \\u00fc"\n')
    assert read_keys(path) == ["a", "b ü"]
    path.write_text('"a"\nplain\n')
    with pytest.raises(ValueError, match="line 2 = 'plain'"):
        read_keys(path)


def test_images_that_leave_for_their_key_alone_are_counted(tmp_path, caplog):
    folder = tmp_path / "repeated"
    written(folder, range(IMAGES))
    (folder / "keys.jsonl").write_text("".join(f'"k{n % 20}"\n' for n in range(IMAGES)))
    left = without(EmbeddedSet.open(folder), ["k3", "k12"], tmp_path / "left")
    assert len(left.keys) == IMAGES - 3
    assert "1 images leave with another of the same key" in caplog.text
