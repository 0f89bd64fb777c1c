"""Probes of factors of one modality, from embeddings of equal width: what is there is read, the rest is at chance."""

from dataclasses import replace

import numpy as np
import pytest

from modstruct.data.synthetic.factors import ASIDES, GROUND_TEXTURES, LIGHTS, MOODS, TEMPLATES_OF_SEVERAL
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.information.private import measure, projected
from modstruct.evaluation.information.probes import ProbeConfig

QUICK = ProbeConfig(folds=2, strengths=(1.0, 100.0), iterations=30)
ROWS = 300
VALUES = {
    "ground_texture": GROUND_TEXTURES,
    "light": LIGHTS,
    "mood": MOODS,
    "aside": ASIDES,
    "template": TEMPLATES_OF_SEVERAL,
}


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def a_set(without=(), scenes=True):
    """Embeddings z tell nothing, those of the image's independent head the light, and trunk features the texture."""
    random = np.random.default_rng(0)
    drawn = {name: random.integers(0, len(values), ROWS) for name, values in VALUES.items()}
    records = [{name: VALUES[name][of[row]] for name, of in drawn.items()} for row in range(ROWS)]
    if scenes:  # as split_of_scenes knows them
        others = dict.fromkeys(
            ("shape", "colour", "size", "fill", "place", "count", "ground_colour", "wording_seed"), 1
        )
        records = [record | others | {"split": "test"} for record in records]
    noise = {name: 0.1 * random.standard_normal((ROWS, 8)) for name in ("image", "text", "head")}
    arrays = {"image": unit(noise["image"]), "text": unit(noise["text"])}
    arrays["image_independent"] = unit(noise["head"] + np.eye(8)[drawn["light"]])
    arrays["image_features"] = 3 * np.eye(20)[drawn["ground_texture"]].astype(np.float32)
    arrays = {name: rows for name, rows in arrays.items() if name not in without}
    pairs = np.repeat(np.arange(ROWS)[:, None], 2, axis=1)
    return EmbeddedSet("made", {}, arrays, pairs=pairs, metadata=records, source={"fingerprint": "f"})


def test_each_factor_is_read_from_where_it_is():
    result = measure(a_set(), QUICK)
    values = result.values
    groups = {f"{name}/image" for name in ("ground_texture", "light")} | {
        f"{n}/text" for n in ("mood", "aside", "template")
    }
    assert set(result.grouped) == set(result.groups) == groups
    for name, read in (("light", "independent"), ("ground_texture", "projection")):
        for kind in ("shared", "independent", "projection"):
            value = values[f"{name}/image/{kind}"]
            assert value.value == pytest.approx(1 if kind == read else 1 / len(VALUES[name]), abs=0.12), (name, kind)
            assert value.low <= value.value <= value.high
            assert value.chance == pytest.approx(1 / len(VALUES[name]), abs=0.06)
            assert (value.unit, value.higher_is_better, value.rows) == ("share", True, ROWS)
            assert result.outcomes[f"{name}/image/{kind}"].mean() == pytest.approx(value.value)
    assert values["light/image/independent"].label == "[z, zⁱ]"
    assert set(result.grouped["mood/text"]) == {"shared"}
    assert result.settings["notes"] == ["not embedded: text, [z, random]", "not embedded: text, [z, zⁱ]"]
    assert (result.metric, result.fingerprint) == ("private_factors", "f")


def test_of_other_sets_fields_are_named_and_probed_from_both_modalities():
    found = measure(a_set({"image_features"}, scenes=False), replace(QUICK, labels=["light"], rows=200))
    assert set(found.values) == {"light/image/shared", "light/image/independent", "light/text/shared"}
    assert found.rows == {"used for light, image": 200, "used for light, text": 200}
    with pytest.raises(ValueError, match=r"labels = \(\): made is not of scenes: name fields"):
        measure(a_set(scenes=False), QUICK)
    with pytest.raises(ValueError, match="labels = 'hue': no image has it"):
        measure(a_set(scenes=False), replace(QUICK, labels=["hue"]))


def test_captions_of_one_image_share_a_fold_and_are_resampled_together():
    one = a_set()
    text = np.repeat(one.rows("text"), 2, axis=0)
    pairs = np.stack([np.arange(2 * ROWS) // 2, np.arange(2 * ROWS)], axis=1)
    double = EmbeddedSet("double", {}, {"image": one.rows("image"), "text": text}, pairs=pairs, metadata=one.metadata)
    result = measure(double, replace(QUICK, labels=["mood"]))
    value, single = (
        result.values["mood/text/shared"],
        measure(one, replace(QUICK, labels=["mood"])).values["mood/text/shared"],
    )
    assert value.rows == 2 * ROWS
    assert value.value == pytest.approx(single.value, abs=0.02)  # twins in another fold would be recognised
    assert value.high - value.low == pytest.approx(single.high - single.low, rel=0.2)


def test_the_random_projection_is_the_same_anywhere_and_keeps_lengths():
    rows = np.random.default_rng(0).standard_normal((50, 400)).astype(np.float32)
    made = projected(rows, 256, 0)
    assert np.array_equal(made, projected(rows, 256, 0))
    assert not np.array_equal(made, projected(rows, 256, 1))
    assert np.linalg.norm(made, axis=1) == pytest.approx(np.linalg.norm(rows, axis=1), rel=0.25)
