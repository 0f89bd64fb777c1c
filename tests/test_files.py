"""YAML and JSON of others: no key silently replaces another, and a key is what is written."""

from __future__ import annotations

import json

import pytest
from crafted_shards import encoded_image

from modstruct.data.classification.class_files import load_classes
from modstruct.data.classification.user_sets import load_user_set
from modstruct.data.downstream.vqa import read_vqa
from modstruct.data.faults import BadSample
from modstruct.data.shards.texts import parse_metadata
from modstruct.files import RepeatedKey, parse_json, parse_yaml, read_yaml

WORDS = ("no", "on", "yes", "off", "true", "null", "010", "1_000", "12:30", "2020-01-01", "1.50", "0x10", "~")


def test_a_key_is_text_as_it_is_written():
    assert list(parse_yaml("\n".join(f"{word}: x" for word in WORDS).encode())) == list(WORDS)
    assert parse_yaml(b"{a: no, b: 010, c: [on, 1.5, null]}") == {"a": False, "b": 8, "c": [True, 1.5, None]}


def test_a_merged_mapping_may_be_overridden():
    assert parse_yaml(b"base: &b {x: 1, y: 2}\nown: {<<: *b, x: 3}")["own"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there already, in line 1"),
        ("a: {b: 1, c: 2, b: 1}", "line 1: the key 'b' is there already, in the same line"),
        ("- x: 1\n  'x': 2", "line 2: the key 'x' is there already, in line 1"),
        ("3: a\n'3': b", "line 2: the key '3' is there already, in line 1"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "line 2: the key '<<'"),
    ],
)
def test_a_repeated_key_of_yaml_is_refused_by_line_and_name(tmp_path, content, named):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(RepeatedKey, match=named):
        read_yaml(tmp_path / "x.yaml")


def test_classes_called_no_and_010_are_read_right(tmp_path):
    file = tmp_path / "classes.yaml"
    file.write_text(
        "label: answer\ntemplates: ['{}']\nclasses: {no: refused, on: lit, 010: ten, true: right, 7: seven}"
    )
    classes = load_classes(file)
    labels = ["no", "on", "010", True, "true", 7, "7"]
    assert classes.rows_of([{"answer": label} for label in labels]).tolist() == [0, 1, 2, 3, 3, 4, 4]
    file.write_text("label: answer\ntemplates: ['{}']\nclasses:\n  0: no\n  1: yes")
    with pytest.raises(ValueError, match=r"classes\.0 = False: give a readable name, as text \(in quotes"):
        load_classes(file)


def test_a_repeated_class_or_key_is_refused_with_the_file(tmp_path):
    file = tmp_path / "set.yaml"
    file.write_text("name: birds\nimages: birds\nclasses:\n  jay: a jay\n  tit: a tit\n  jay: a magpie\n")
    with pytest.raises(ValueError, match=r"set\.yaml: .*line 6: the key 'jay' is there already, in line 4"):
        load_user_set(file)


def test_a_repeated_key_of_json_is_refused_in_files_of_others(tmp_path):
    with pytest.raises(RepeatedKey, match="the key 'a' stands twice"):
        parse_json(b'{"b": [{"a": 1, "a": 2}]}')
    with pytest.raises(BadSample, match=r"malformed metadata.*'label' stands twice"):
        parse_metadata(b'{"label": 1, "label": 2}', "here")
    assert parse_metadata(b'{"label": 1, "other": {"label": 2}}', "here") == {"label": 1, "other": {"label": 2}}
    questions = tmp_path / "questions.json"
    question = '{"question_id": 1, "image_id": 2, "question": "a?", "question": "b?"}'
    questions.write_text(f'{{"data_subtype": "val2014", "questions": [{question}]}}')
    with pytest.raises(ValueError, match=r"questions\.json: the key 'question' stands twice"):
        read_vqa(questions, tmp_path)
    # A key that nobody reads may stand there as often as it likes.
    questions.write_text(json.dumps({"data_subtype": "val2014", "questions": []}).replace("{", '{"x": 1, "x": 2, '))
    assert read_vqa(questions, tmp_path).entries == ()


def test_two_columns_of_one_name_are_refused(tmp_path):
    from modstruct.config import DataConfig
    from modstruct.data.classification.registry import open_labelled

    (tmp_path / "a.png").write_bytes(encoded_image(0))
    (tmp_path / "table.csv").write_text("image,label,label\na.png,x,y\n")
    (tmp_path / "set.yaml").write_text("name: s\nimages: table.csv\nclasses: {x: an x, y: a y}")
    with pytest.raises(ValueError, match="two columns called 'label'"):
        open_labelled(str(tmp_path / "set.yaml"), DataConfig(cache=str(tmp_path / "cache")))
