"""Zero-shot classification agrees with a plain transcription in float64, ties and missing classes included."""

from __future__ import annotations

import numpy as np
import pytest

from modstruct.data.classification.published import PAPER_TEMPLATE
from modstruct.evaluation.classification import zero_shot as module
from modstruct.evaluation.classification.accuracy import accuracies
from modstruct.evaluation.classification.zero_shot import ZeroShotConfig, class_embeddings, images_ahead, measure
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Result
from modstruct.evaluation.statistics import wilson


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def grid(random, *shape):
    """Rows of few small whole numbers, whose products are exact and often equal."""
    return random.integers(-2, 3, shape).astype(np.float32)


def plainly_ahead(image, classes, truth, names=None):
    """Classes that score as high as the image's own, by two loops in float64."""
    ahead = []
    for row, label in zip(image.astype(np.float64), truth, strict=True):
        scores = classes.astype(np.float64) @ row
        count = 0
        for other in range(len(classes)):
            same = names is not None and names[other] == names[label] and np.array_equal(classes[other], classes[label])
            later = same and other > label  # of one name and embedding the first goes ahead
            count += other != label and scores[other] >= scores[label] and not later
        ahead.append(count)
    return np.array(ahead)


def embedded(image, prompts, labels, names=None, templates=None, **other):
    """prompts: (c, t, D)."""
    names = names or [f"class {number}" for number in range(prompts.shape[0])]
    templates = templates or [f"template {number} of {{}}" for number in range(prompts.shape[1])]
    return EmbeddedSet(
        "things",
        {"name": "m", "fingerprint": "f"},
        {"image": image.astype(np.float32)},
        labels=labels,
        class_prompts=prompts.astype(np.float32),
        class_names=names,
        templates=templates,
        source={"name": "things", "fingerprint": "abc"},
        **other,
    )


def ahead_of(image, classes, truth, names=None):
    names = names or [str(number) for number in range(len(classes))]
    return images_ahead(image, np.arange(len(image)), np.asarray(truth), classes, names)


def zero_shot(image, classes, truth, top_k, names=None):
    ahead = ahead_of(image, classes, truth, names)
    return accuracies(ahead, truth, len(classes), top_k)


def test_class_embeddings_average_directions_not_lengths():
    random = np.random.default_rng(0)
    prompts = random.normal(size=(4, 3, 8)).astype(np.float32)
    embedded = class_embeddings(prompts, [0, 1, 2])
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-6)
    stretched = prompts * random.uniform(0.1, 10, (4, 3, 1)).astype(np.float32)
    np.testing.assert_allclose(class_embeddings(stretched, [0, 1, 2]), embedded, atol=1e-6)
    np.testing.assert_allclose(class_embeddings(stretched, [1]), unit(prompts[:, 1]), atol=1e-6)
    expected = np.stack([unit(unit(of_class).mean(0)) for of_class in prompts])
    np.testing.assert_allclose(embedded, expected, atol=1e-6)


def test_classes_of_one_name_are_one_to_the_table_too():
    classes = unit(np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32))
    image = classes[[0, 1, 2]]
    metrics = zero_shot(image, classes, [0, 1, 2], [1], ["cat", "missile", "missile"])
    assert metrics["top_1"].value == pytest.approx(2 / 3)  # the first of the two goes ahead
    assert zero_shot(image, classes, [0, 1, 2], [1])["top_1"].value == pytest.approx(1 / 3)


def test_accuracy_agrees_with_sorting():
    random = np.random.default_rng(1)
    image, classes = unit(random.normal(size=(500, 6))), unit(random.normal(size=(7, 6)))
    truth = random.integers(0, 6, 500)  # class 6 has no image
    truth[:300] = 0  # uneven classes: the two averages differ
    order = np.argsort(-(image @ classes.T), axis=1)
    metrics = zero_shot(image.astype(np.float32), classes.astype(np.float32), truth, [1, 3, 7])
    for k in (1, 3, 7):
        assert metrics[f"top_{k}"].value == np.mean((order[:, :k] == truth[:, None]).any(axis=1))
        assert metrics[f"top_{k}"].chance == pytest.approx(k / 7)
    per_class = [np.mean(order[truth == c, 0] == c) for c in range(6)]
    assert metrics["mean_per_class"].value == pytest.approx(np.mean(per_class))
    assert metrics["mean_per_class"].chance == pytest.approx(1 / 7)


def test_collapsed_class_embeddings_are_never_right():
    image = np.random.default_rng(2).normal(size=(100, 64)).astype(np.float32)
    classes = np.repeat(image[:1], 5, axis=0)
    assert zero_shot(image, classes, np.arange(100) % 5, [1, 4, 5])["top_4"].value == 0
    assert zero_shot(image, classes, np.arange(100) % 5, [1, 4, 5])["top_5"].value == 1


@pytest.mark.parametrize("blocks", [False, True])
def test_ties_and_equal_classes_agree_with_a_plain_transcription(monkeypatch, blocks):
    random = np.random.default_rng(3)
    if blocks:
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 16)
    for _ in range(20):
        image, classes = grid(random, 37, 5), grid(random, 9, 5)
        classes[[3, 7]] = classes[1]
        truth = random.integers(0, 9, 37)
        assert ahead_of(image, classes, truth).tolist() == plainly_ahead(image, classes, truth).tolist()
        names = ["a", "b", "c", "b", "d", "e", "a", "f", "g"]  # 0 and 6 have other embeddings, 7 another name
        found = ahead_of(image, classes, truth, names)
        assert found.tolist() == plainly_ahead(image, classes, truth, names).tolist()


def test_rows_choose_images_whatever_the_blocks(monkeypatch):
    random = np.random.default_rng(4)
    image, classes = unit(random.normal(size=(101, 8))).astype(np.float16), unit(random.normal(size=(6, 8)))
    rows = np.flatnonzero(random.random(101) < 0.5)
    truth = random.integers(0, 6, len(rows))
    whole = ahead_of(image[rows], classes.astype(np.float32), truth)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 30)
    assert images_ahead(image, rows, truth, classes.astype(np.float32), list("abcdef")).tolist() == whole.tolist()


def test_metrics_are_those_of_plain_counting(tmp_path):
    random = np.random.default_rng(5)
    prompts = unit(random.normal(size=(7, 4, 6)))
    labels = random.integers(-1, 6, 300)  # class 6 has no image, and some images have no class
    labels[:120] = 0  # uneven classes
    labels[labels == 5] = -1
    labels[7] = 5  # a class of one image
    image = unit(random.normal(size=(300, 6))).astype(np.float32)
    image[labels >= 0] = unit(image[labels >= 0] + 0.5 * prompts[labels[labels >= 0]].mean(1)).astype(np.float32)
    result = measure(embedded(image, prompts, labels), ZeroShotConfig(top_k=(1, 3, 7, 8)))

    rows = np.flatnonzero(labels >= 0)
    truth, outcomes = labels[rows], result.outcomes
    assert (result.metric, result.set, result.fingerprint) == ("zero_shot", "things", "abc")
    assert result.rows == {"image": 300, "labelled": len(rows), "classes": 7}
    assert outcomes["row"].tolist() == rows.tolist()
    assert outcomes["label"].tolist() == truth.tolist()
    assert result.headlines == ("first/top_1", "ensemble/top_1")
    for group, chosen in (("first", [0]), ("ensemble", [0, 1, 2, 3])):
        classes = unit(unit(prompts[:, chosen].astype(np.float32).astype(np.float64)).mean(1))
        ahead = plainly_ahead(image[rows], classes.astype(np.float32), truth)
        metrics = result.grouped[group]
        assert outcomes[f"{group}/classes_ahead"].tolist() == ahead.tolist()
        for k in (1, 3, 7):
            metric = metrics[f"top_{k}"]
            assert outcomes[f"{group}/top_{k}"].tolist() == (ahead < k).tolist()
            assert metric.value == pytest.approx(np.mean(ahead < k))
            assert (metric.chance, metric.rows, metric.label) == (k / 7, len(rows), f"top-{k}")
            assert (metric.unit, metric.higher_is_better) == ("share", True)
            assert metric.about.startswith("Share of the images whose own class")
            assert 0 <= metric.low <= metric.value <= metric.high <= 1
        assert "top_8" not in metrics
        each = {c: np.mean(ahead[truth == c] < 1) for c in range(6)}
        mean = metrics["mean_per_class"]
        assert mean.value == pytest.approx(np.mean(list(each.values())))
        assert (mean.chance, mean.rows) == (1 / 7, 6)
        assert 0 <= mean.low < mean.value < mean.high <= 1
        table = {f"class {c}": (each[c], int(np.sum(truth == c))) for c in range(6)}
        by_class = result.grouped[f"{group}/per_class"]
        assert {name: (value.value, value.rows) for name, value in by_class.items()} == table
        for value in by_class.values():
            assert (value.low, value.high) == pytest.approx(wilson(value.value, value.rows))
    result.save(tmp_path / "zero_shot.json")
    assert Result.load(tmp_path / "zero_shot.json").values == result.values


def test_the_papers_template_stays_out_of_the_ensemble():
    random = np.random.default_rng(6)
    prompts, image = unit(random.normal(size=(3, 3, 4))), unit(random.normal(size=(20, 4)))
    labels = np.arange(20) % 3
    templates = [PAPER_TEMPLATE, "a photo of a {}.", "art of a {}."]
    both = measure(embedded(image, prompts, labels, templates=templates))
    assert both.settings["templates"] == {"first": templates[:1], "ensemble": templates[1:]}
    assert both.groups["ensemble"] == "Ensemble of templates"
    behind = measure(embedded(image, prompts[:, 1:], labels))
    alone = behind.outcomes["ensemble/classes_ahead"]
    assert both.outcomes["ensemble/classes_ahead"].tolist() == alone.tolist()
    one = measure(embedded(image, prompts[:, :1], labels, templates=templates[:1]))
    assert one.grouped.keys() == {"first", "first/per_class"}
    assert one.grouped["first"] == both.grouped["first"]
    assert behind.settings["templates"]["ensemble"] == ["template 0 of {}", "template 1 of {}"]


def test_classes_of_one_name_are_decided_as_an_argmax_would():
    prompts = np.eye(4)[[0, 1, 1, 2]][:, None]
    image, labels = np.eye(4, dtype=np.float32)[[0, 1, 1, 2]], np.array([0, 1, 2, 3])
    names = ["crane", "missile", "missile", "tench/carp"]
    result = measure(embedded(image, prompts, labels, names), ZeroShotConfig((1, 2)))
    assert result.outcomes["first/top_1"].tolist() == [True, True, False, True]
    assert result.outcomes["first/top_2"].all()
    assert result.settings["classes_of_one_name"] == ["missile"]
    by_class = result.grouped["first/per_class"]
    assert {name: value.label for name, value in by_class.items()} == {
        **{name: name for name in ("crane", "missile (1)", "missile (2)")},
        "tench|carp": "tench/carp",
    }
    other = measure(embedded(image, prompts, labels), ZeroShotConfig((1, 2)))
    assert other.outcomes["first/top_1"].tolist() == [True, False, False, True]  # collapsed, not of one name


def test_copies_of_an_image_are_resampled_together():
    random = np.random.default_rng(7)
    prompts = unit(random.normal(size=(4, 1, 8)))
    image, labels = unit(prompts[:, 0][np.arange(40) % 4] + random.normal(size=(40, 8))), np.arange(40) % 4
    single = measure(embedded(image, prompts, labels))
    rows = np.concatenate([np.arange(40), np.repeat(np.arange(40), 4)])
    copied = measure(embedded(image[rows], prompts, labels[rows], copies=rows[40:]))
    assert copied.outcomes["group"].tolist() == rows.tolist()
    for name in ("first/top_1", "first/mean_per_class", "first/per_class/class 1"):
        one, several = single.values[name], copied.values[name]
        assert several.value == pytest.approx(one.value)
        assert several.high - several.low > 0.75 * (one.high - one.low)
    rows = np.array([0, 1, 2, 3, 0, 0])  # all images of class 0 are one
    assert (
        measure(embedded(image[rows], prompts, labels[rows], copies=rows[4:])).values["first/per_class/class 0"].rows
        == 3
    )


def test_one_image_a_class_gives_the_interval_of_top_1():
    random = np.random.default_rng(8)
    prompts = unit(random.normal(size=(40, 1, 16)))
    image = unit(prompts[:, 0] + 0.4 * random.normal(size=(40, 16)))
    metrics = measure(embedded(image, prompts, np.arange(40))).grouped["first"]
    top, mean = metrics["top_1"], metrics["mean_per_class"]
    assert 0 < top.value < 1
    assert (mean.value, mean.low, mean.high) == pytest.approx((top.value, top.low, top.high))
    right = measure(embedded(prompts[:, 0], prompts, np.arange(40))).values["first/mean_per_class"]
    assert (right.value, right.high) == pytest.approx((1, 1))
    assert right.low < 1


def test_the_interval_of_uneven_classes_covers_the_true_mean():
    random = np.random.default_rng(9)
    sizes, accuracy = np.array([400, 60, 20]), np.array([0.9, 0.5, 0.2])
    covered = 0
    for _ in range(200):
        truth = random.choice(3, 480, p=sizes / 480)
        wrong = random.random(480) >= accuracy[truth]
        found = accuracies(wrong.astype(int), truth, 3, [1])["mean_per_class"]
        covered += found.low <= accuracy.mean() <= found.high
    assert covered >= 180  # 95 % is 190; 180 or fewer happens once in 700 draws of a true 95 % interval


def test_a_set_that_cannot_be_classified_is_refused():
    image, prompts = np.eye(4, dtype=np.float32), np.eye(4)[:, None]
    with pytest.raises(ValueError, match="things: the set has no classes; embed a set of labelled images"):
        measure(EmbeddedSet("things", {"name": "m", "fingerprint": "f"}, {"image": image}))
    with pytest.raises(ValueError, match="labels = 'things': none of the 4 images has a label"):
        measure(embedded(image, prompts, np.full(4, -1)))
    with pytest.raises(ValueError, match=r"zero_shot.top_k = \(0, 1\): whole numbers of at least 1"):
        ZeroShotConfig((0, 1))


def test_rows_that_cannot_be_scored_are_refused():
    image, classes = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"image embeddings have dimension 3, class embeddings 2"):
        ahead_of(image, classes[:, :2], np.arange(3))
    image[1, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of 3 image embeddings are not finite, the first is row 1"):
        ahead_of(image, classes, np.arange(3))


@pytest.mark.parametrize("sizes", [(1000, *[10] * 9), (10, *[1000] * 9), (20, 20, 20, 20)])
def test_classes_that_are_wholly_right_or_wrong_have_an_interval_all_the_same(sizes):
    """A model that names one class for everything: that no image of a class differs tells little of the next one. The
    interval is at least what images that are right with the mean's probability, whatever their class, would give."""
    truth = np.repeat(np.arange(len(sizes)), sizes)
    found = accuracies((truth > 0).astype(int), truth, len(sizes), [1])
    mean, top = found["mean_per_class"], found["top_1"]
    p = 1 / len(sizes)
    half = 1.96 * (p * (1 - p) * (1 / np.array(sizes)).sum()) ** 0.5 / len(sizes)
    assert mean.value == pytest.approx(p)
    assert mean.low < mean.value < mean.high
    assert mean.high - mean.low == pytest.approx(2 * half, rel=0.1)
    if len({*sizes}) == 1:
        assert (mean.low, mean.high) == (top.low, top.high)
    twice = accuracies(
        np.repeat((truth > 0).astype(int), 2), np.repeat(truth, 2), len(sizes), [1], np.arange(2 * len(truth)) // 2
    )
    assert (twice["mean_per_class"].low, twice["mean_per_class"].high) == (mean.low, mean.high)
