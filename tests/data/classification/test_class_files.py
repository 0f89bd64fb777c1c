"""A class file says which label is which class; a wrong one is refused by file, key and remedy."""

from __future__ import annotations

import pytest

from modstruct.data.classification.class_files import load_classes

GOOD = """
label: shape
templates: ["an image of a {}", "one {}"]
classes: {circle: round thing, square: box, 3: "three"}
"""


@pytest.fixture
def class_file(tmp_path):
    def write(content):
        path = tmp_path / "classes.yaml"
        path.write_text(content, encoding="utf-8")
        return path

    return write


def test_names_are_those_of_labels_as_text(class_file):
    assert load_classes(class_file(GOOD)).classes == {"circle": "round thing", "square": "box", "3": "three"}


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
        ('["an image of a {}", "one {}"]', "[]", r"templates = \[\]"),
        ("square: box", "square: 7", r"classes.square = 7.*readable name"),
        ("square: box", "'3': box", "line 4: the key '3' is there already, in the same line"),
        ('{circle: round thing, square: box, 3: "three"}', "[circle, square]", "a mapping"),
        ("label: shape", "label: shape\nnames: {}", "unknown key 'names'"),
        ("label: shape", "label: [", "not a YAML file"),
        (GOOD, "just text", "the keys label, templates and classes"),
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
