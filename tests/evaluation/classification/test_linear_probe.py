"""Results: right metrics beside chance, outcomes row by row, and one clear error where sets do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from probe_cases import clouds, embedded
from sklearn.linear_model import LogisticRegression

from modstruct.evaluation.classification.adamw_probe import AdamWProbeConfig
from modstruct.evaluation.classification.few_shot import FewShotConfig, measure_few_shot
from modstruct.evaluation.classification.linear_probe import LinearProbeConfig, measure_linear_probe
from modstruct.evaluation.classification.logistic_regression import FitConfig

CLASSES = 7


@pytest.fixture
def sets(tmp_path):
    """Train, test, validation of seven classes that overlap."""
    sizes = {"train": 210, "test": 140, "validation": 70}
    return [
        embedded(tmp_path / name, *clouds(count, 12, CLASSES, seed=seed, spread=1.5))
        for seed, (name, count) in enumerate(sizes.items())
    ]


def rows_of(*made):
    # In float64: scikit-learn would fit float32 rows in float32.
    rows = np.concatenate([one.rows("image_features") for one in made]).astype(np.float64)
    return rows, np.concatenate([one.labels for one in made])


def test_the_last_fit_is_scikit_learns_on_train_and_validation(sets):
    train, test, validation = sets
    config = LinearProbeConfig(fit=FitConfig(precision="float64", gradient_tolerance=1e-10))
    result, outcomes = measure_linear_probe(train, test, validation, config)
    peer = LogisticRegression(C=result["settings"]["c"], max_iter=1000, tol=1e-10).fit(*rows_of(train, validation))
    truth = test.labels
    right = peer.predict(test.rows("image_features")) == truth
    np.testing.assert_array_equal(outcomes["top_1"], right)
    metrics = result["figures"]
    for name in ("top_1", "top_5"):
        assert metrics[name].pop("low") < metrics[name]["value"] < metrics[name].pop("high")
    assert metrics["top_1"] == {"value": pytest.approx(right.mean()), "chance": 1 / 7, "rows": 140}
    assert metrics["top_5"] == {
        "value": pytest.approx(outcomes["top_5"].mean(dtype=np.float64)),
        "chance": 5 / 7,
        "rows": 140,
    }
    per_class = np.mean([right[truth == c].mean() for c in range(CLASSES)])
    assert metrics["mean_per_class"] == {"value": pytest.approx(per_class), "chance": 1 / 7, "rows": 7}
    assert result["rows"] == {"train": 210, "test": 140, "fitted": 280, "validation": 70}
    assert (result["metric"], result["set"], result["source_fingerprint"]) == ("linear_probe", "test", "s0")
    curves = result["curves"]
    assert curves["held_out_accuracy"][curves["strength"].index(result["settings"]["strength"])] == max(
        curves["held_out_accuracy"]
    )
    json.dumps(result)


def test_without_a_validation_set_a_share_of_the_training_set_serves(sets):
    result, _ = measure_linear_probe(*sets[:2])
    assert (result["settings"]["fitted_in_search"], result["settings"]["held_out_in_search"]) == (168, 42)
    assert result["rows"]["fitted"] == 210
    assert result["figures"]["top_1"]["value"] > 0.5


def test_a_given_strength_is_not_searched(sets):
    result, outcomes = measure_linear_probe(*sets[:2], config=LinearProbeConfig("image", strength=1e6))
    assert result["curves"] == {}
    assert result["settings"]["strength"] == 1e6
    assert set(outcomes) == {"top_1", "top_5"}


@pytest.mark.parametrize("method", ["lbfgs", "adamw"])
def test_scale_and_shift_of_columns_do_not_matter_to_standardised_rows(tmp_path, method):
    """Whatever the unit of a column, the classifier and its outcomes are the same."""
    found = []
    for name, scale in (("plain", np.ones(12)), ("stretched", 2.0 ** np.arange(-6, 6))):
        made = [
            embedded(tmp_path / name / role, (rows * scale + scale).astype(np.float32), labels)
            for role, (rows, labels) in (("train", clouds(70, 12, 7, 0)), ("test", clouds(70, 12, 7, 1)))
        ]
        config = LinearProbeConfig(standardize=True, method=method, strength=1.0, adamw=AdamWProbeConfig(epochs=2))
        found.append(measure_linear_probe(*made, config=config)[1]["top_1"])
    assert np.mean(found[0] == found[1]) > 0.98


def test_cyclips_protocol_is_measured_too(sets):
    config = LinearProbeConfig(method="adamw", adamw=AdamWProbeConfig(epochs=60, batch=32))
    result, _ = measure_linear_probe(*sets, config=config)
    assert result["figures"]["top_1"]["value"] > 0.5
    assert result["rows"]["fitted"] == 210
    assert len(result["curves"]["train_loss"]) == 60


def test_images_without_a_label_and_classes_without_an_image_are_left_out(tmp_path):
    rows, labels = clouds(80, 8, 4, seed=0)
    names = ["a", "never seen", "b", "c", "d"]
    labels = np.array([0, 2, 3, 4])[labels]
    others, truth = clouds(40, 8, 4, seed=1)
    truth = np.array([0, 2, 3, 4])[truth]
    truth[truth == 4] = -1  # the test set has no image of d
    made = [embedded(tmp_path / n, r, t, names) for n, r, t in (("train", rows, labels), ("test", others, truth))]
    result, outcomes = measure_linear_probe(*made, config=LinearProbeConfig(strength=1.0))
    assert result["settings"]["classes"] == 4
    assert outcomes["top_1"].shape == (30,)
    assert result["figures"]["mean_per_class"]["rows"] == 3
    assert result["figures"]["top_1"]["chance"] == 1 / 4


def test_features_say_what_is_before_them(tmp_path):
    """Only the independent embedding knows the class; the shared one is at chance, both together are as good."""
    random = np.random.default_rng(0)
    made = []
    for seed, name in enumerate(("train", "test")):
        independent, labels = clouds(120, 6, 3, seed)
        independent /= np.linalg.norm(independent, axis=1, keepdims=True)
        noise = random.standard_normal((120, 6)).astype(np.float32)
        made.append(embedded(tmp_path / name, noise, labels, image_independent=independent))
    config = {"strength": 0.1}
    top = {
        features: measure_linear_probe(*made, config=LinearProbeConfig(features, **config))[0]["figures"]["top_1"][
            "value"
        ]
        for features in ("image", "image_independent", "image+image_independent")
    }
    assert top["image"] < 0.5
    assert min(top["image_independent"], top["image+image_independent"]) > 0.8


def test_few_shots_have_means_deviations_and_outcomes_over_draws(sets):
    config = FewShotConfig(shots=(1, 4, 16), draws=3)
    result, outcomes = measure_few_shot(*sets[:2], config=config)
    metrics, curves = result["figures"], result["curves"]
    for shots in config.shots:
        each = curves[f"shots_{shots}/top_1"]
        assert len(each) == 3
        named = metrics[f"shots_{shots}"]
        assert named["top_1"] == {"value": pytest.approx(np.mean(each)), "chance": 1 / 7, "rows": 140}
        assert named["top_1_deviation"]["value"] == pytest.approx(np.std(each, ddof=1))
        assert outcomes[f"shots_{shots}/top_1"].mean() == pytest.approx(np.mean(each))
        assert set(np.round(outcomes[f"shots_{shots}/top_1"] * 3, 5)) <= {0, 1, 2, 3}
    assert curves["shots"] == [1, 4, 16]
    assert curves["top_1"] == [metrics[f"shots_{shots}"]["top_1"]["value"] for shots in config.shots]
    assert curves["top_1"][0] < curves["top_1"][2]
    assert result == {**result, "metric": "few_shot", "set": "test"}
    json.dumps(result)


def test_one_draw_has_no_deviation(sets):
    result, _ = measure_few_shot(*sets, config=FewShotConfig(shots=(2,), draws=1))
    assert set(result["figures"]["shots_2"]) == {"top_1", "top_5", "mean_per_class"}
    assert result["rows"] == {"train": 210, "test": 140, "validation": 70}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "other", "fingerprint": "f1"}}, "test = 'bad': is of the model 'other'"),
        ({"names": [f"class {c}" for c in range(6)] + ["renamed"]}, "has 7 classes and train 7, .* class 6 on"),
        ({"names": [f"class {c}" for c in range(9)]}, "has 9 classes and train 7, .* class 7 on"),
        ({"rows": clouds(70, 5, CLASSES, 0)[0]}, "has 5 columns of image_features, train has 12"),
        ({"labels": np.full(70, -1)}, "test = 'bad': has no labelled image"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused(tmp_path, sets, change, message):
    rows, labels = clouds(70, 12, CLASSES, 0)
    given = {"rows": rows, "labels": labels, "names": [f"class {c}" for c in range(CLASSES)]} | change
    bad = embedded(tmp_path / "bad", given.pop("rows"), given.pop("labels"), **given)
    for measure in (measure_linear_probe, measure_few_shot):
        with pytest.raises(ValueError, match=message):
            measure(sets[0], bad)


def test_classes_that_only_the_test_set_has_and_single_classes_are_refused(tmp_path):
    rows, labels = clouds(40, 4, 4, seed=0)
    names = list("abcd")
    test = embedded(tmp_path / "test", rows, labels, names)
    three = embedded(tmp_path / "three", rows, np.where(labels == 3, 0, labels), names)
    with pytest.raises(ValueError, match="test = 'test': has images of 'd', of which three has none"):
        measure_linear_probe(three, test)
    one = embedded(tmp_path / "one", rows, np.zeros(40, dtype=np.int64), names)
    with pytest.raises(ValueError, match="train = 'one': has images of 1 of its classes"):
        measure_linear_probe(one, test)
