"""Results: right metrics beside chance, outcomes row by row, and one clear error where sets do not fit."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from probe_cases import clouds, embedded, unit
from sklearn.linear_model import LogisticRegression

from modstruct.evaluation.classification import linear_probe
from modstruct.evaluation.classification.linear import FitConfig
from modstruct.evaluation.classification.linear_probe import AdamWProbeConfig, FewShotConfig, LinearProbeConfig
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Result

CLASSES = 7


def overlapping(name, count, seed):
    return embedded(name, *clouds(count, 12, CLASSES, seed=seed, spread=1.5))


def a_set(validation=True):
    """Seven classes that overlap, with splits."""
    made = overlapping("test", 140, 1)
    made.splits = {"train": overlapping("train", 210, 0)}
    if validation:
        made.splits["validation"] = overlapping("validation", 70, 2)
    return made


def rows_of(*made):
    # In float64: scikit-learn would fit float32 rows in float32.
    rows = np.concatenate([one.rows("image_features") for one in made]).astype(np.float64)
    return rows, np.concatenate([one.labels for one in made])


def test_the_last_fit_is_scikit_learns_on_train_and_validation(tmp_path):
    test = a_set()
    config = LinearProbeConfig(fit=FitConfig(precision="float64", gradient_tolerance=1e-10))
    result = linear_probe.measure(test, config)
    peer = LogisticRegression(C=result.settings["c"], max_iter=1000, tol=1e-10)
    peer.fit(*rows_of(test.splits["train"], test.splits["validation"]))
    right = peer.predict(test.rows("image_features")) == test.labels
    np.testing.assert_array_equal(result.outcomes["top_1"], right)
    for name, k in (("top_1", 1), ("top_5", 5)):
        value = result.values[name]
        assert value.value == pytest.approx(result.outcomes[name].mean())
        assert value.low < value.value < value.high
        assert (value.chance, value.rows, value.label) == (k / 7, 140, f"top-{k}")
        assert (value.unit, value.higher_is_better) == ("share", True)
    average = result.values["mean_per_class"]
    assert average.value == pytest.approx(np.mean([right[test.labels == c].mean() for c in range(CLASSES)]))
    assert average.low < average.value < average.high
    assert (average.chance, average.rows) == (1 / 7, 7)
    assert result.rows == {"train": 210, "test": 140, "fitted": 280, "validation": 70}
    assert (result.metric, result.set, result.fingerprint) == ("linear_probe", "test", "s0")
    assert (result.settings["train"], result.settings["validation"]) == ("train", "validation")
    accuracy, loss = result.curves["held_out_accuracy"], result.curves["held_out_loss"]
    assert accuracy.chosen == loss.chosen == result.settings["strength"]
    assert accuracy.y[accuracy.x.index(accuracy.chosen)] == max(accuracy.y)
    assert all(low <= y <= high for low, y, high in zip(accuracy.low, accuracy.y, accuracy.high, strict=True))
    assert accuracy.logarithmic
    assert accuracy.title == "Search of the penalty on held-out rows: accuracy"
    assert accuracy.chance[0] == 1 / 7
    result.save(tmp_path / "linear_probe.json")
    assert Result.load(tmp_path / "linear_probe.json").values == result.values


def test_without_a_validation_set_a_share_of_the_training_set_serves():
    result = linear_probe.measure(a_set(validation=False))
    assert (result.settings["fitted_in_search"], result.settings["held_out_in_search"]) == (168, 42)
    assert result.rows["fitted"] == 210
    assert result.values["top_1"].value > 0.5


def test_a_given_strength_is_not_searched():
    result = linear_probe.measure(a_set(validation=False), LinearProbeConfig("image", strength=1e6))
    assert result.curves == {}
    assert result.settings["strength"] == 1e6
    assert set(result.outcomes) == {"top_1", "top_5"}


@pytest.mark.parametrize("measure", [linear_probe.measure, linear_probe.measure_adamw])
def test_scale_and_shift_of_columns_do_not_matter_to_standardised_rows(measure):
    """Whatever the unit of a column, the classifier and its outcomes are the same."""
    found = []
    config = LinearProbeConfig("image_projected", standardize=True, strength=1.0, adamw=AdamWProbeConfig(epochs=2))
    for scale in (np.ones(12), 2.0 ** np.arange(-6, 6)):
        train, test = (
            embedded(role, rows, labels, image_projected=(rows * scale + scale).astype(np.float32))
            for role, (rows, labels) in (("train", clouds(70, 12, 7, 0)), ("test", clouds(70, 12, 7, 1)))
        )
        test.splits = {"train": train}
        found.append(measure(test, config).outcomes["top_1"])
    assert np.mean(found[0] == found[1]) > 0.98


def test_cyclips_protocol_is_measured_on_projected_features(caplog):
    test, config = a_set(), LinearProbeConfig(adamw=AdamWProbeConfig(epochs=60, batch=32))
    result = linear_probe.measure_adamw(test, config)
    assert "probed on image, since image_projected is not embedded" in caplog.text
    assert (result.settings["features"], result.settings["features_asked"]) == ("image", "image_projected")
    assert (result.metric, result.settings["end"]) == ("linear_probe_adamw", "epochs")
    assert result.values["top_1"].value > 0.5
    assert result.rows["fitted"] == 210
    curve = result.curves["train_loss"]
    assert (curve.x, len(curve.y), curve.x_label) == ([float(e) for e in range(1, 61)], 60, "epoch")
    caplog.clear()
    rows, labels = clouds(70, 12, CLASSES, 0, spread=1.5)
    test = embedded("test", rows, labels, image_projected=rows)
    test.splits = {"train": test}
    assert linear_probe.measure_adamw(test, config).settings["features"] == "image_projected"
    assert caplog.text == ""


def test_default_features_that_are_not_embedded_give_way_and_others_do_not():
    rows, labels = clouds(70, 12, CLASSES, 0, spread=1.5)
    names = [f"class {c}" for c in range(CLASSES)]
    test = EmbeddedSet("test", {}, {"image": unit(rows)}, labels=labels, class_names=names)
    test.splits = {"train": test}
    assert linear_probe.measure(test, LinearProbeConfig(strength=1.0)).settings["features"] == "image"
    assert linear_probe.measure_few_shot(test, FewShotConfig(shots=(1,), strength=1.0)).settings["features"] == "image"
    with pytest.raises(ValueError, match="image_independent"):
        linear_probe.measure(test, LinearProbeConfig("image_independent"))


def test_images_without_a_label_and_classes_without_an_image_are_left_out():
    rows, labels = clouds(80, 8, 4, seed=0)
    names = ["a", "never seen", "b", "c", "d"]
    labels = np.array([0, 2, 3, 4])[labels]
    others, truth = clouds(40, 8, 4, seed=1)
    truth = np.array([0, 2, 3, 4])[truth]
    truth[truth == 4] = -1  # the test set has no image of d
    test = embedded("test", others, truth, names, splits={"train": embedded("train", rows, labels, names)})
    result = linear_probe.measure(test, LinearProbeConfig(strength=1.0))
    assert result.settings["classes"] == 4
    assert result.outcomes["top_1"].shape == (30,)
    assert result.values["mean_per_class"].rows == 3
    assert result.values["top_1"].chance == 1 / 4


def test_features_say_what_is_before_them():
    """Only the independent embedding knows the class; the shared one is at chance, both together are as good."""
    random = np.random.default_rng(0)
    made = []
    for seed, name in enumerate(("train", "test")):
        independent, labels = clouds(120, 6, 3, seed)
        independent /= np.linalg.norm(independent, axis=1, keepdims=True)
        noise = random.standard_normal((120, 6)).astype(np.float32)
        made.append(embedded(name, noise, labels, image_independent=independent))
    made[1].splits = {"train": made[0]}
    top = {
        features: linear_probe.measure(made[1], LinearProbeConfig(features, strength=0.1)).values["top_1"].value
        for features in ("image", "image_independent", "image+image_independent")
    }
    assert top["image"] < 0.5
    assert min(top["image_independent"], top["image+image_independent"]) > 0.8


def test_few_shots_have_means_deviations_and_outcomes_over_draws(tmp_path):
    config = FewShotConfig(shots=(1, 4, 16), draws=3)
    result = linear_probe.measure_few_shot(a_set(validation=False), config)
    for shots in config.shots:
        each = result.settings["by_draw"][f"shots_{shots}/top_1"]
        assert len(each) == len(result.settings["by_draw"][f"shots_{shots}/strength"]) == 3
        value = result.values[f"shots_{shots}/top_1"]
        assert (value.value, value.deviation) == pytest.approx((np.mean(each), np.std(each, ddof=1)))
        assert (value.chance, value.rows, value.low) == (1 / 7, 140, None)
        assert value.about == "Share of the images whose own class scores highest."  # said once for all shots
        outcome = result.outcomes[f"shots_{shots}/top_1"]
        assert outcome.mean() == pytest.approx(np.mean(each))
        assert set(np.round(outcome * 3, 5)) <= {0, 1, 2, 3}
    curve = result.curves["top_1"]
    assert curve.x == [1, 4, 16]
    assert curve.y == [result.values[f"shots_{shots}/top_1"].value for shots in config.shots]
    assert curve.y[0] < curve.y[2]
    assert curve.chance == [1 / 7] * 3
    assert all(0 <= low < y < high <= 1 for low, y, high in zip(curve.low, curve.y, curve.high, strict=True))
    assert result.groups == {"shots_1": "1 shot", "shots_4": "4 shots", "shots_16": "16 shots"}
    assert result.headlines == ("shots_1/top_1", "shots_4/top_1", "shots_16/top_1")
    assert (result.metric, result.set) == ("few_shot", "test")
    result.save(tmp_path / "few_shot.json")
    assert Result.load(tmp_path / "few_shot.json").values == result.values


def test_one_draw_has_no_deviation():
    result = linear_probe.measure_few_shot(a_set(), FewShotConfig(shots=(2,), draws=1))
    assert set(result.values) == {"shots_2/top_1", "shots_2/top_5", "shots_2/mean_per_class"}
    assert all(value.deviation is None for value in result.values.values())
    assert result.curves["top_1"].low is None
    assert result.headlines == ("shots_2/top_1",)
    assert result.rows == {"train": 210, "test": 140, "validation": 70}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "other", "fingerprint": "f1"}}, "test = 'bad': is of the model 'other'"),
        ({"names": [f"class {c}" for c in range(6)] + ["renamed"]}, "has 7 classes and train 7, .* class 6 on"),
        ({"names": [f"class {c}" for c in range(9)]}, "has 9 classes and train 7, .* class 7 on"),
        ({"rows": clouds(70, 5, CLASSES, 0)[0]}, r"has 5 columns of image\w*, train has 12"),
        ({"labels": np.full(70, -1)}, "test = 'bad': has no labelled image"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused(change, message):
    rows, labels = clouds(70, 12, CLASSES, 0)
    given = {"rows": rows, "labels": labels, "names": [f"class {c}" for c in range(CLASSES)]} | change
    bad = embedded("bad", given.pop("rows"), given.pop("labels"), **given, splits=a_set().splits)
    few_shot = partial(linear_probe.measure_few_shot, config=FewShotConfig())
    for measure in (linear_probe.measure, linear_probe.measure_adamw, few_shot):
        with pytest.raises(ValueError, match=message):
            measure(bad)


def test_classes_that_only_the_test_set_has_and_single_classes_are_refused():
    rows, labels = clouds(40, 4, 4, seed=0)
    names = list("abcd")
    test = embedded("test", rows, labels, names)
    with pytest.raises(ValueError, match="train = None: the training split is not embedded"):
        linear_probe.measure(test)
    test.splits = {"train": embedded("three", rows, np.where(labels == 3, 0, labels), names)}
    with pytest.raises(ValueError, match=r"test = 'test': has images of \['d'\], of which three has none"):
        linear_probe.measure(test)
    test.splits = {"train": embedded("one", rows, np.zeros(40, dtype=np.int64), names)}
    with pytest.raises(ValueError, match="train = 'one': has images of 1 of its classes"):
        linear_probe.measure(test)
