from __future__ import annotations

from pathlib import Path

import pytest
from published_samples import SNLI_VE, as_lines, touched

from modstruct.data.downstream.snli_ve import ENTAILMENT_LABELS, read_snli_ve


@pytest.fixture
def dev(tmp_path: Path) -> tuple[Path, Path]:
    touched(tmp_path / "images" / "2407214681.jpg")
    return as_lines(tmp_path / "snli_ve_dev.jsonl", SNLI_VE), tmp_path / "images"


def test_hypotheses_without_an_agreed_label_are_left_out_and_counted(dev):
    found = read_snli_ve(*dev)
    assert [ENTAILMENT_LABELS[pair.label] for pair in found.entries] == ["neutral", "entailment", "contradiction"]
    assert [pair.hypothesis for pair in found.entries] == ["Hypothesis 0.", "Hypothesis 2.", "Hypothesis 3."]
    assert found.entries[0].pair_id == "2407214681.jpg#0r0n"
    assert found.entries[0].image == dev[1] / "2407214681.jpg"
    assert found.left_out == {"no label agreed on": 1}


def test_the_first_release_spelt_the_key_otherwise(dev):
    line = SNLI_VE[0].copy()
    line["Flikr30kID"] = line.pop("Flickr30K_ID")
    assert read_snli_ve(as_lines(dev[0], [line]), dev[1]).entries[0].image.name == "2407214681.jpg"


@pytest.mark.parametrize("written", ["2407214681", "2407214681.jpg", 2407214681])
def test_an_image_s_number_may_have_an_ending_or_be_a_number(dev, written):
    as_lines(dev[0], [SNLI_VE[0] | {"Flickr30K_ID": written}])
    assert read_snli_ve(*dev).entries[0].image == dev[1] / "2407214681.jpg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Flickr30K_ID": "../secret"}, r"line 1: Flickr30K_ID = '\.\./secret': the number of an image"),
        ({"Flickr30K_ID": ".hidden"}, r"Flickr30K_ID"),
        ({"Flickr30K_ID": True}, r"Flickr30K_ID = True: the number of an image"),
        ({"Flickr30K_ID": -3}, r"Flickr30K_ID = -3"),
        ({"gold_label": "perhaps"}, r"gold_label = 'perhaps': one of contradiction, neutral, entailment, -"),
        ({"sentence2": ""}, r"sentence2 = ''"),
        ({"pairID": 3}, r"pairID = 3"),
    ],
)
def test_a_malformed_hypothesis_is_named_by_file_line_and_key(dev, change: dict, message: str):
    as_lines(dev[0], [SNLI_VE[0] | change])
    with pytest.raises(ValueError, match=message):
        read_snli_ve(*dev)


def test_a_missing_key_file_folder_or_image_is_named(dev):
    line = {key: value for key, value in SNLI_VE[0].items() if key != "Flickr30K_ID"}
    with pytest.raises(ValueError, match=r"there is no key 'Flickr30K_ID'"):
        read_snli_ve(as_lines(dev[0].with_name("other.jsonl"), [line]), dev[1])
    with pytest.raises(ValueError, match=r"data\.train\.hypotheses = .*necla-ml/SNLI-VE"):
        read_snli_ve(dev[0].with_name("none.jsonl"), dev[1])
    with pytest.raises(ValueError, match=r"data\.train\.images = .*Flickr30K"):
        read_snli_ve(dev[0], dev[1] / "none")
    (dev[1] / "2407214681.jpg").unlink()
    with pytest.raises(ValueError, match=r"data\.train\.images = .*1 of 1 images.*2407214681\.jpg"):
        read_snli_ve(*dev)
