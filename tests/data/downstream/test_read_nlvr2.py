from __future__ import annotations

from pathlib import Path

import pytest
from published_samples import NLVR2_DEV, as_lines, touched

from modstruct.data.downstream.nlvr2 import read_nlvr2


@pytest.fixture
def dev(tmp_path: Path) -> tuple[Path, Path]:
    pairs = ("dev-850-0", "dev-896-0")
    touched(*(tmp_path / "dev" / f"{pair}-img{side}.png" for pair in pairs for side in (0, 1)))
    return as_lines(tmp_path / "dev.json", NLVR2_DEV), tmp_path / "dev"


def test_the_published_file_gives_statements_about_two_images(dev):
    first, second = read_nlvr2(*dev).entries
    assert first.identifier == "dev-850-0-0"
    assert first.images == (dev[1] / "dev-850-0-img0.png", dev[1] / "dev-850-0-img1.png")
    assert first.sentence == "The right image shows a curving walkway."
    assert first.label is False
    assert second.label is True


def test_training_images_lie_in_numbered_folders_or_together(tmp_path: Path):
    lines = [{"sentence": "So.", "label": "True", "identifier": "train-10171-0-0", "directory": 17}]
    statements = as_lines(tmp_path / "train.json", lines)
    for folder in ("images/train/17", "flat"):
        touched(*(tmp_path / folder / f"train-10171-0-img{side}.png" for side in (0, 1)))
    for root, folder in (("images/train", "images/train/17"), ("flat", "flat")):
        (statement,) = read_nlvr2(statements, tmp_path / root).entries
        assert statement.images[1] == tmp_path / folder / "train-10171-0-img1.png"


def test_the_hidden_test_set_has_no_labels(dev):
    as_lines(dev[0], [{"sentence": "So.", "identifier": "dev-850-0-0"}])
    assert read_nlvr2(*dev).entries[0].label is None


def test_a_label_may_be_a_text_or_a_truth_value(dev):
    as_lines(dev[0], [{"sentence": "So.", "label": False, "identifier": "dev-850-0-0"}])
    assert read_nlvr2(*dev).entries[0].label is False


def test_statements_without_their_images_are_named_or_left_out(dev):
    (dev[1] / "dev-896-0-img1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 images.*dev-896-0-img1\.png.* data\.leave_out_missing"):
        read_nlvr2(*dev, option="data.eval")
    found = read_nlvr2(*dev, leave_out_missing=True)
    assert [statement.identifier for statement in found.entries] == ["dev-850-0-0"]
    assert found.left_out == {"image missing": 1}


def test_a_missing_file_or_folder_is_refused_by_its_option(dev):
    with pytest.raises(ValueError, match=r"data\.train\.statements = .*lil-lab/nlvr"):
        read_nlvr2(dev[0].with_name("none.json"), dev[1])
    with pytest.raises(ValueError, match=r"data\.train\.images = .*lil-lab/nlvr"):
        read_nlvr2(dev[0], dev[1] / "none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence": "So."', r"line 2: not JSON"),
        ("[]", r"line 2: a JSON object"),
        ('{"sentence": "So."}', r"line 2: there is no key 'identifier'"),
        ('{"sentence": "So.", "label": "True", "identifier": "dev/../../x-0-0-0"}', r"identifier = 'dev/"),
        ('{"sentence": "So.", "label": "True", "identifier": "dev-1-0"}', r"identifier = 'dev-1-0': split-set"),
        ('{"sentence": "So.", "label": "True", "identifier": "dev-850-0-0"}', r"no other statement has"),
        ('{"sentence": "So.", "label": "yes", "identifier": "dev-896-0-0"}', r"label = 'yes': one of True, False"),
        ('{"sentence": "So.", "label": 1, "identifier": "dev-896-0-0"}', r"label = 1"),
        ('{"sentence": "So.", "label": "True", "identifier": "dev-896-0-0", "directory": "../.."}', r"directory = "),
        ('{"label": "True", "identifier": "dev-896-0-0"}', r"there is no key 'sentence'"),
    ],
)
def test_a_malformed_statement_is_named_by_file_line_and_key(dev, line: str, message: str):
    as_lines(dev[0], NLVR2_DEV[:1])
    dev[0].write_text(dev[0].read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"dev\.json, {message}" if message.startswith("line") else message):
        read_nlvr2(*dev)
