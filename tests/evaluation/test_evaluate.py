"""What training measures of a source: a perfect model scores 100 %, and what is measured can be shown and saved."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numbered_images import CLASS_FILE, LastNumberTokenizer, LookUp, views, write_source
from torch.nn import functional as F

from modstruct.config import EvaluationConfig
from modstruct.data.run_data import EvaluationData
from modstruct.evaluation.evaluate import evaluate
from modstruct.evaluation.examples import retrieved_examples
from modstruct.evaluation.result import from_json
from modstruct.evaluation.tables import save_results, scalars, table


def measured(samples, encode=None, zero_shot_path=None, **more):
    config = EvaluationConfig(batch=4, recall_at=[5], top_k=[1, 2, 3])
    data = EvaluationData(views(), LastNumberTokenizer(), samples, zero_shot_path)
    return evaluate(encode or LookUp(), samples, data, config, **more)


def test_a_perfect_model_scores_everything(tmp_path):
    results = measured(write_source(tmp_path, list(range(30)), lambda n: [f"thing {n}", f"object {n}"]))
    recalls = results["retrieval"].values
    assert {value.value for value in recalls.values()} == {1.0}
    assert set(recalls) == {f"{way}/recall_at_{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5)}
    assert recalls["text_to_image/recall_at_1"].chance == pytest.approx(1 / 30)
    assert recalls["image_to_text/recall_at_1"].chance == pytest.approx(2 / 60)
    assert results["structure"].values["alignment"].value == pytest.approx(0)
    assert {"image": 30, "text": 60, "pairs": 60}.items() <= results["retrieval"].rows.items()
    assert set(results) == {"retrieval", "structure"}


def test_zero_shot_uses_the_images_that_have_a_label(tmp_path):
    class_file = tmp_path / "classes.yaml"
    class_file.write_text(CLASS_FILE)
    samples = write_source(
        tmp_path, list(range(30)), label_of=lambda n: {"parity": [None, "odd", "even"][n % 3]} if n < 20 else {}
    )
    encode = LookUp()
    found = measured(samples, encode, class_file)["zero_shot"]
    assert found.rows["labelled"] == 13
    # The tokenizer knows a word by its length: number, even, odd.
    number, even, odd = (encode.text_table[200 + len(word) - 3] for word in ("number", "even", "odd"))
    even, odd = F.normalize(number + even, dim=0), F.normalize(number + odd, dim=0)
    labelled = [(n, n % 3 == 1) for n in range(20) if n % 3]
    right = [(encode.image_table[n] @ (odd - even) > 0).item() == is_odd for n, is_odd in labelled]
    assert found.values["top_1"].value == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1
    assert set(found.values) == {"top_1", "top_2", "mean_per_class"}  # three is more than there are classes
    assert (found.values["top_2"].value, found.values["top_2"].chance, found.values["top_1"].chance) == (1, 1, 0.5)


def test_a_label_that_is_no_class_is_refused(tmp_path):
    class_file = tmp_path / "classes.yaml"
    class_file.write_text(CLASS_FILE)
    with pytest.raises(ValueError, match="parity = 'prime'"):
        measured(write_source(tmp_path, [1, 2, 3], label_of=lambda n: {"parity": "prime"}), zero_shot_path=class_file)


def test_what_is_measured_can_be_shown_and_saved(tmp_path):
    results = measured(write_source(tmp_path, list(range(30)), broken=[3]), LookUp(noise=0.5))
    save_results(results.values(), tmp_path / "metrics.json")
    saved = json.loads((tmp_path / "metrics.json").read_text())
    path = tmp_path / "metrics.json"
    assert {name: from_json(content, path).values for name, content in saved["results"].items()} == {
        name: result.values for name, result in results.items()
    }
    assert "undecodable image" in table([*results.values()])
    assert all(isinstance(value, float) for value in scalars(results.values()).values())


def test_examples_show_the_caption_that_was_retrieved(tmp_path, monkeypatch):
    samples = write_source(tmp_path, [*range(10), 0], lambda n: [f"thing {n}", f"object {n}"])
    grids, drawn = [], []
    monkeypatch.setattr("modstruct.evaluation.examples.example_grid", lambda *arguments: drawn.append(arguments))
    encode = LookUp()
    encode.text_table[4] = encode.image_table[5]  # "thing 4" comes before "object 5", and is now nearest to image 5
    measured(samples, encode, inspect=lambda source: grids.append(retrieved_examples(source, samples, views(), 20)))
    ((images, own, found),) = drawn
    assert images[:, 0, 4, 4].tolist() == [*range(10)]  # the copy of image 0 is no image of its own
    assert [text.split()[-1] for text in own] == [str(n) for n in range(10)]
    assert (own[5], found[5]) == ("thing 5", "thing 4")
    assert own[6] == found[6]
