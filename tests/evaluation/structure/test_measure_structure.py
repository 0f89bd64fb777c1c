"""Structure of an embedded set: the metrics of the arrays that it has, each with its definition."""

from __future__ import annotations

import numpy as np
import pytest

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Result
from modstruct.evaluation.structure.measure import OPTIONAL, StructureConfig, measure

CONFIG = StructureConfig(separability_pairs=50)
BASIC = {"alignment", "modality_gap", "uniformity_image", "uniformity_text"}


def unit(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def a_set(more=(), pairs=None):
    arrays = {"image": unit(20, 0), "text": unit(40, 1)}
    arrays |= {name: unit(40 if name.startswith("text") else 20, 2 + n) for n, name in enumerate(more)}
    if pairs is None:
        pairs = np.stack([np.arange(40) // 2, np.arange(40)], axis=1)
    return EmbeddedSet("made", {}, arrays, pairs=pairs, source={"fingerprint": "abc"})


@pytest.mark.parametrize("more", [(), OPTIONAL[:1], OPTIONAL])
def test_metrics_are_those_of_the_arrays_the_set_has(tmp_path, more):
    embedded = a_set(more)
    result = measure(embedded, CONFIG)
    assert ("bridge_best_t" in result.values) == ("bridge_deviation" in result.curves) == ("image_augmented" in more)
    assert ("orthogonality_text" in result.values) == ("text_independent" in more)
    assert result.settings["arrays"] == ["image", "text", *more]
    assert (result.metric, result.set, result.fingerprint) == ("structure", "made", "abc")
    assert result.rows == {"image": 20, "text": 40, "pairs": 40}
    assert all(value.higher_is_better is None and value.about and value.label for value in result.values.values())
    assert len({value.label for value in result.values.values()}) == len(result.values)
    result.save(tmp_path / "structure.json")
    assert Result.load(tmp_path / "structure.json").values == result.values


def test_labels_tell_modality_and_kind():
    values = measure(a_set(OPTIONAL), CONFIG).values
    assert values["effective_rank_text_uncentred"].label == "effective rank, texts, uncentred"
    assert "uncentred, of embeddings as they are" in values["effective_rank_text"].about
    assert values["uniformity_image_independent"].label == "uniformity, images, independent"
    assert (values["linear_separability"].unit, values["linear_separability"].chance) == ("share", 0.5)


def test_basic_metrics_are_alone_where_that_is_asked():
    found = measure(a_set(OPTIONAL), StructureConfig(metrics="basic"))
    assert set(found.values) == BASIC
    assert found.curves == {}
    assert {name: measure(a_set(), CONFIG).values[name] for name in BASIC} == found.values


def test_a_set_without_pairs_is_refused():
    with pytest.raises(ValueError, match=r"pairs = 'made': this set has none"):
        measure(a_set(pairs=np.empty((0, 2), np.int64)), CONFIG)
