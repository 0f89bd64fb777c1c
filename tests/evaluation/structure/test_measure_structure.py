"""Structure of an embedded set: the metrics of the arrays that it has."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modstruct.evaluation.embeddings.embedded_set import SetContents, write_embedded_set
from modstruct.evaluation.structure.measure import OPTIONAL, measure_set_structure, structure_metrics
from modstruct.evaluation.structure.sampling import SamplingConfig

CONFIG = SamplingConfig(separability_pairs=50)


def unit(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write(folder, more=(), pairs=None):
    arrays = {"image": unit(20, 0), "text": unit(40, 1)}
    arrays |= {name: unit(40 if name.startswith("text") else 20, 2 + n) for n, name in enumerate(more)}
    if pairs is None:
        pairs = np.stack([np.arange(40) // 2, np.arange(40)], axis=1)
    captions = [str(n) for n in range(40)]
    return write_embedded_set(
        folder, SetContents("made", {}, arrays, pairs=pairs, captions=captions, source={"fingerprint": "abc"})
    )


@pytest.mark.parametrize("more", [(), OPTIONAL[:1], OPTIONAL])
def test_metrics_are_those_of_the_arrays_the_set_has(tmp_path, more):
    embedded = write(tmp_path, more)
    result = measure_set_structure(embedded, CONFIG)
    expected = structure_metrics(
        embedded.rows("image"),
        embedded.rows("text"),
        embedded.pairs,
        config=CONFIG,
        **{name: embedded.rows(name) for name in more},
    )
    assert result["figures"] | {"curves": result["curves"]} == expected
    assert ("bridge_best_t" in result["figures"]) == ("image_augmented" in more)
    assert ("orthogonality_text" in result["figures"]) == ("text_independent" in more)
    assert result["settings"]["arrays"] == ["image", "text", *more]
    assert (result["metric"], result["set"], result["source_fingerprint"]) == ("structure", "made", "abc")
    assert result["rows"] == {"image": 20, "text": 40, "pairs": 40}
    json.dumps(result, allow_nan=False)


def test_a_set_without_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pairs = .*has none"):
        measure_set_structure(write(tmp_path, pairs=np.empty((0, 2), np.int64)), CONFIG)
