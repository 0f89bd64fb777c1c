"""Held-out losses of probes on toy distributions whose information is known by enumeration."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from modstruct.data.synthetic.information import ExactInformation, entropy, mutual_information
from modstruct.evaluation.classification.linear import Features
from modstruct.evaluation.information.measure import best_answers, information_values, label_surprise
from modstruct.evaluation.information.probes import ProbeConfig, Probed, folds_of, probed

QUICK = ProbeConfig(
    folds=3, strengths=(1.0, 10.0), iterations=40, hidden=16, epochs=15, learning_rate=0.01, samples=200
)
ROWS = 900


def features_of(labels, *arrays):
    return Features(tuple(a.astype(np.float32) for a in arrays), np.arange(len(labels)), labels)


def toy(seed, rows=ROWS):
    """x_T and x_V of 4 values each, y of 3: a random joint distribution, rows drawn from it, and one-hot features."""
    random = np.random.default_rng(seed)
    joint = random.dirichlet(np.full(3, 0.3), (4, 4)) * random.dirichlet(np.full(16, 2.0)).reshape(4, 4, 1)
    t, v, y = np.unravel_index(random.choice(joint.size, rows, p=joint.ravel()), joint.shape)
    return joint, np.eye(4)[t], np.eye(4)[v], y.astype(np.int64)


def held_out(features, questions, config=QUICK, groups=None):
    """Losses of each question, and what answered it."""
    labels = next(iter(features.values())).labels
    groups = np.arange(len(labels)) if groups is None else groups
    of = Probed(features, np.arange(len(labels)), groups, int(labels.max()) + 1, folds_of(groups, config))
    by_fold = [{name: probed(rows, fold, of.classes, config) for name, rows in features.items()} for fold in of.folds]
    losses, chosen = best_answers(questions, of, by_fold)
    return {question: SimpleNamespace(rows=losses[question], chosen=chosen[question]) for question in questions}


@pytest.mark.parametrize("seed", [1, 2])
def test_estimates_are_near_the_information_and_not_above_it_beyond_chance(seed):
    joint, text, image, y = toy(seed)
    both = (text[:, :, None] * image[:, None, :]).reshape(len(y), -1)
    features = {n: features_of(y, a) for n, a in (("text", text), ("image", image), ("both", both))}
    found = held_out(features, {"text": ["text"], "image": ["image"], "joint": ["text", "image", "both"]})
    exact = {
        "text": mutual_information(joint.sum(1)),
        "image": mutual_information(joint.sum(0)),
        "joint": mutual_information(joint.reshape(16, 3)),
    }
    metrics = information_values(
        label_surprise(y, 3),
        {name: loss.rows for name, loss in found.items()},
        np.arange(len(y)),
        ProbeConfig(),
        exact=ExactInformation(entropy(joint.sum((0, 1))), **exact, aligned=0.0),
    )
    for name, value in exact.items():
        width = metrics[name].high - metrics[name].low
        # Each of up to 32 free weights costs half a nat of held-out loss, over all training rows.
        assert value - 0.05 - width < metrics[name].value < value + width
        assert metrics[name].low <= metrics[name].value <= metrics[name].high
        assert metrics[f"bias/{name}"].value == pytest.approx(metrics[name].value - value)
        assert metrics[f"exact/{name}"].value == pytest.approx(value)
    gap = abs(exact["text"] - exact["image"])
    assert metrics["gap"].value == pytest.approx(abs(metrics["text"].value - metrics["image"].value))
    assert metrics["gap"].low - 0.05 < gap < metrics["gap"].high + 0.05


def test_estimates_of_labels_that_features_do_not_tell_are_near_nothing():
    random = np.random.default_rng(4)
    y = random.integers(0, 3, ROWS)
    found = held_out({"noise": features_of(y, random.normal(size=(ROWS, 8)))}, {"noise": ["noise"]})
    estimate = (label_surprise(y, 3) - found["noise"].rows).mean()
    assert -0.03 < estimate < 0.01  # above 0 would be information out of nothing; below it is what fitting noise costs


def test_the_perceptron_finds_what_no_linear_probe_does():
    random = np.random.default_rng(5)
    x = random.normal(size=(ROWS, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    features = {"x": features_of(y, x)}
    curved = held_out(features, {"y": ["x"]}, replace(QUICK, hidden=32, epochs=40))["y"]
    straight = held_out(features, {"y": ["x"]}, replace(QUICK, hidden=0))["y"]
    assert np.log(2) - curved.rows.mean() > 0.3
    assert abs(np.log(2) - straight.rows.mean()) < 0.02
    assert curved.chosen == {"x, perceptron": 3}


def test_rows_of_a_group_are_never_parted_by_a_fold():
    """Each group has a feature of its own and a label of its own choice: told only if it is on both sides."""
    random = np.random.default_rng(6)
    groups = np.repeat(np.arange(60), 6)
    y = random.integers(0, 2, 60)[groups]
    features = {"name": features_of(y, np.eye(60)[groups])}
    together = held_out(features, {"y": ["name"]}, groups=groups)["y"].rows.mean()
    parted = held_out(features, {"y": ["name"]})["y"].rows.mean()
    assert together > 0.6
    assert parted < 0.3


def test_a_label_that_only_some_folds_have_seen_has_a_finite_loss():
    random = np.random.default_rng(7)
    y = np.where(np.arange(300) == 17, 2, random.integers(0, 2, 300))
    x = np.eye(3)[y] + 0.01 * random.normal(size=(300, 3))
    losses = held_out({"x": features_of(y, x)}, {"y": ["x"]})["y"].rows
    assert np.isfinite(losses).all()
    assert losses[17] < 2 * np.log(300) + 2


def test_one_seed_gives_one_estimate():
    _, text, _, y = toy(8, rows=300)
    features = {"text": features_of(y, text)}
    first, again = (held_out(features, {"y": ["text"]})["y"].rows for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, held_out(features, {"y": ["text"]}, replace(QUICK, seed=1))["y"].rows)


def test_exactly_aligned_features_cost_at_least_the_gap_by_estimate_too():
    """Z_T = Z_V = the factor that both know, and labels that only one knows: the excess is the gap, ln 4."""
    random = np.random.default_rng(9)
    shared, own = random.integers(0, 3, ROWS), random.integers(0, 4, ROWS)
    features = {
        "text": features_of(own, np.eye(3)[shared]),
        "image": features_of(own, np.eye(3)[shared], np.eye(4)[own]),
        "aligned": features_of(own, np.eye(3)[shared], np.eye(3)[(shared + 1) % 3]),
    }
    found = held_out(
        features, {"text": ["text"], "image": ["image"], "joint": ["text", "image"], "shared": ["aligned"]}
    )
    losses = {name: loss.rows for name, loss in found.items()}
    metrics = information_values(label_surprise(own, 4), losses, np.arange(ROWS), ProbeConfig())
    assert metrics["excess"].value == pytest.approx(np.log(4), abs=0.06)
    assert metrics["excess"].value >= metrics["gap"].value - 0.02
    assert "exact/gap" not in metrics


def test_what_probes_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"information\.folds = 1"):
        ProbeConfig(folds=1)
    with pytest.raises(ValueError, match=r"information\.strengths"):
        ProbeConfig(strengths=())
    with pytest.raises(ValueError, match=r"information\.folds = 5: at most 4"):
        held_out({"x": features_of(np.array([0, 1, 0, 1]), np.eye(4))}, {"y": ["x"]}, ProbeConfig())
