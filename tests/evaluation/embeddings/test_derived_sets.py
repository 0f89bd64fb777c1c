"""Post-hoc centring against its formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from modstruct.evaluation.embeddings.derived import SHARED, centred
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet

MODEL = {"name": "m", "fingerprint": "f"}
DIMENSION = 6


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def drawn(texts: bool = True, dtype=np.float32) -> EmbeddedSet:
    """12 images, the last 2 copies of the first, 9 texts, 3 classes in 2 templates; each modality in a cone."""
    random = np.random.default_rng(0)

    def cone(*shape: int) -> np.ndarray:
        return unit(random.standard_normal((*shape, DIMENSION)) + 3 * random.standard_normal(DIMENSION))

    image = cone(12)
    image[10:] = image[0]
    arrays = {
        "image": image,
        "image_augmented": cone(12),
        "image_features": 5 * cone(12),
        "image_independent": cone(12),
    }
    more = {}
    if texts:
        arrays |= {"text": cone(9), "text_features": 4 * cone(9)}
        more = {"pairs": np.array([(row, row % 9) for row in range(12)]), "captions": [f"c{n}" for n in range(9)]}
    return EmbeddedSet(
        "drawn",
        MODEL,
        {name: rows.astype(dtype) for name, rows in arrays.items()},
        copies=np.array([0, 0]),
        labels=np.arange(12) % 3,
        class_prompts=cone(3, 2).astype(np.float32),
        class_names=["a", "b", "c"],
        templates=["{}", "a {}"],
        source={"name": "s", "fingerprint": "x"},
        **more,
    )


def moved(rows: np.ndarray, mean: np.ndarray) -> np.ndarray:
    return unit(rows.astype(np.float64) - mean)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_mean_of_each_modality_goes_and_norms_stay(dtype, tmp_path):
    plain = drawn(dtype=dtype)
    made = centred(plain, tmp_path)
    tolerance = 1e-6 if dtype is np.float32 else 2e-3
    of_images = plain.rows("image")[:10].astype(np.float64).mean(0)  # the distinct ones
    of_texts = plain.rows("text").astype(np.float64).mean(0)
    for name, mean in (("image", of_images), ("image_augmented", of_images), ("text", of_texts)):
        assert made.rows(name).dtype == dtype
        np.testing.assert_allclose(made.rows(name), moved(plain.rows(name), mean), atol=tolerance)
    np.testing.assert_allclose(made.class_prompts, moved(plain.class_prompts, of_texts), atol=1e-6)
    for name in plain.arrays - SHARED.keys():
        assert np.array_equal(made.rows(name), plain.rows(name))
    made.check()


def test_prompts_of_a_set_without_captions_are_less_their_own_mean(tmp_path):
    plain = drawn(texts=False)
    made = centred(plain, tmp_path)
    mean = plain.class_prompts.reshape(-1, DIMENSION).astype(np.float64).mean(0)
    np.testing.assert_allclose(made.class_prompts, moved(plain.class_prompts, mean), atol=1e-6)


def test_the_set_says_that_it_is_centred(tmp_path):
    plain = drawn()
    plain.splits["train"] = plain
    made = centred(plain, tmp_path)
    assert made.name == "drawn-centred"
    assert made.source == {"name": "s-centred", "fingerprint": "x", "centred": True}
    assert made.splits == {}
    assert (plain.name, plain.source) == ("drawn", {"name": "s", "fingerprint": "x"})


def test_a_folder_holds_what_is_centred_and_is_written_once(tmp_path):
    plain = drawn(dtype=np.float16).save(tmp_path / "plain")
    folder = tmp_path / "centred"
    assert centred(plain, folder).arrays == plain.arrays
    assert EmbeddedSet.open(folder).arrays == SHARED.keys()  # features are those of the plain set
    before = (folder / "image.npy").stat().st_mtime_ns
    centred(plain, folder)
    assert (folder / "image.npy").stat().st_mtime_ns == before
    other = replace(plain, model=MODEL | {"fingerprint": "g"}, folder=None).save(tmp_path / "other")
    assert centred(other, folder).model["fingerprint"] == "g"
    assert (folder / "image.npy").stat().st_mtime_ns != before


@pytest.mark.parametrize("texts", [1, 3])
def test_an_embedding_that_is_the_mean_is_refused(texts, tmp_path):
    plain = drawn()
    text = np.broadcast_to(plain.rows("text")[:1], (texts, DIMENSION))
    one = replace(plain, embeddings={"image": plain.rows("image"), "text": text}, pairs=np.array([[0, 0]]))
    with pytest.raises(ValueError, match="drawn: text = 'row 0': is the mean of its modality"):
        centred(one, tmp_path)
