"""Zero-shot classification agrees with counting, and a wrong class file is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from modstruct.evaluation.zero_shot import class_embeddings, load_classes, zero_shot

GOOD = """
label: shape
templates: ["a picture of a {}", "one {}"]
classes: {circle: round thing, square: box, 3: "three"}
"""


@pytest.fixture
def class_file(tmp_path):
    def write(content):
        path = tmp_path / "classes.yaml"
        path.write_text(content, encoding="utf-8")
        return path

    return write


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_prompts_put_every_name_into_every_template(class_file):
    classes = load_classes(class_file(GOOD))
    assert classes.prompts == [
        *("a picture of a round thing", "one round thing"),
        *("a picture of a box", "one box"),
        *("a picture of a three", "one three"),
    ]


def test_labels_become_rows_and_missing_ones_are_marked(class_file):
    classes = load_classes(class_file(GOOD))
    samples = [{"shape": "square"}, {}, {"shape": None}, {"shape": 3}, {"shape": "3"}, {"colour": "red"}]
    assert classes.rows_of(samples).tolist() == [1, -1, -1, 2, 2, -1]


def test_a_label_that_is_no_class_is_refused_by_name(class_file):
    with pytest.raises(ValueError, match=r"shape = 'hexagon'.*circle, square, 3"):
        load_classes(class_file(GOOD)).rows_of([{"shape": "circle"}, {"shape": "hexagon"}])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label: shape", "", r"label = None: give the name of a field"),
        ("label: shape", "label: 3", r"label = 3"),
        ("one {}", "one", r"templates = 'one': give a text with exactly one \{\}"),
        ("one {}", "{} and {}", "exactly one"),
        ('["a picture of a {}", "one {}"]', "[]", r"templates = \[\]"),
        ("square: box", "square: 7", r"classes.square = 7.*readable name"),
        ("square: box", "'3': box", "differ as text"),
        ('{circle: round thing, square: box, 3: "three"}', "[circle, square]", "a mapping"),
        ("label: shape", "label: shape\nnames: {}", "unknown key 'names'"),
        ("label: shape", "label: [", "not a YAML file"),
        (GOOD, "just text", "three keys"),
        (GOOD, "!!python/object/apply:os.getcwd []", "not a YAML file"),
    ],
)
def test_a_wrong_class_file_is_refused_with_file_key_and_remedy(class_file, old, new, message):
    path = class_file(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message) as refusal:
        load_classes(path)
    assert str(path) in str(refusal.value)


def test_a_missing_class_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.zero_shot = .*none\.yaml"):
        load_classes(tmp_path / "none.yaml")


def test_class_embeddings_average_directions_not_lengths():
    random = np.random.default_rng(0)
    prompts = random.normal(size=(4 * 3, 8)).astype(np.float32)
    embedded = class_embeddings(prompts, templates=3)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-6)
    stretched = prompts * random.uniform(0.1, 10, (12, 1)).astype(np.float32)
    np.testing.assert_allclose(class_embeddings(stretched, templates=3), embedded, atol=1e-6)
    expected = np.stack([unit(unit(prompts[3 * c : 3 * c + 3]).mean(0)) for c in range(4)])
    np.testing.assert_allclose(embedded, expected, atol=1e-6)


def test_accuracy_agrees_with_sorting():
    random = np.random.default_rng(1)
    image, classes = unit(random.normal(size=(500, 6))), unit(random.normal(size=(7, 6)))
    truth = random.integers(0, 6, 500)  # class 6 has no picture
    truth[:300] = 0  # uneven classes: the two averages differ
    order = np.argsort(-(image @ classes.T), axis=1)
    figures = zero_shot(image.astype(np.float32), classes.astype(np.float32), truth, [1, 3, 7, 8])
    for k in (1, 3, 7):
        assert figures[f"top_{k}"]["value"] == np.mean((order[:, :k] == truth[:, None]).any(axis=1))
        assert figures[f"top_{k}"]["chance"] == pytest.approx(k / 7)
    assert "top_8" not in figures
    per_class = [np.mean(order[truth == c, 0] == c) for c in range(6)]
    assert figures["mean_per_class"]["value"] == pytest.approx(np.mean(per_class))
    assert figures["mean_per_class"]["chance"] == pytest.approx(1 / 7)


def test_collapsed_class_embeddings_are_never_right():
    image = np.random.default_rng(2).normal(size=(100, 64)).astype(np.float32)
    classes = np.repeat(image[:1], 5, axis=0)
    assert zero_shot(image, classes, np.arange(100) % 5, [1, 4, 5])["top_4"]["value"] == 0
    assert zero_shot(image, classes, np.arange(100) % 5, [1, 4, 5])["top_5"]["value"] == 1
