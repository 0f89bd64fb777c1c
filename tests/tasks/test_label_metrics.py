"""NLVR2's and SNLI-VE's metrics, and the majority label."""

from __future__ import annotations

from pathlib import Path

import pytest

from modstruct.data.downstream.nlvr2 import Nlvr2Statement
from modstruct.data.downstream.snli_ve import EntailmentPair
from modstruct.evaluation.statistics import majority_label
from modstruct.tasks.metrics import entailment_metrics, nlvr2_metrics, sentence_of


def statement(identifier: str, label: bool | None) -> Nlvr2Statement:
    return Nlvr2Statement(identifier, (Path("0.png"), Path("1.png")), "So.", label)


STATEMENTS = [
    statement("dev-1-0-0", True),
    statement("dev-1-1-0", False),
    statement("dev-1-0-1", True),  # another sentence of the same set
    statement("dev-2-0-0", False),
]


def test_a_sentence_is_judged_consistently_if_it_is_for_all_its_pairs():
    right = {item.identifier: item.label for item in STATEMENTS}
    assert nlvr2_metrics(right, STATEMENTS) == {"accuracy": 1, "consistency": 1}
    wrong_once = right | {"dev-1-1-0": True}
    assert nlvr2_metrics(wrong_once, STATEMENTS) == pytest.approx({"accuracy": 3 / 4, "consistency": 2 / 3})


def test_statements_of_one_sentence_differ_in_the_pair_alone():
    assert sentence_of("dev-1-0-0") == sentence_of("dev-1-3-0")
    assert (
        len({sentence_of(name) for name in ("dev-1-0-0", "dev-1-0-1", "dev-2-0-0", "test1-1-0-0", "dev-10-0-0")}) == 5
    )


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="none for the statement dev-1-0-0"):
        nlvr2_metrics({}, STATEMENTS)
    with pytest.raises(ValueError, match="test2-1-0-0 has no label"):
        nlvr2_metrics({"test2-1-0-0": True}, [statement("test2-1-0-0", None)])
    with pytest.raises(ValueError, match="none to measure"):
        nlvr2_metrics({}, [])


def pairs(*labels: int | None) -> list[EntailmentPair]:
    return [EntailmentPair("7.jpg#0r1n", Path("7.jpg"), "So.", label) for label in labels]


def test_entailment_is_measured_over_all_and_by_label():
    metrics = entailment_metrics([0, 1, 1, 1], pairs(0, 0, 1, 1))
    assert metrics == {"accuracy": 0.75, "contradiction": 0.5, "neutral": 1}


def test_entailment_needs_a_prediction_and_a_label_for_each_pair():
    with pytest.raises(ValueError, match="predictions: 1 for 2 pairs"):
        entailment_metrics([0], pairs(0, 1))
    with pytest.raises(ValueError, match=r"pair 7\.jpg#0r1n has no label"):
        entailment_metrics([0], pairs(None))
    with pytest.raises(ValueError, match="0 for 0 pairs"):
        entailment_metrics([], [])


def test_the_majority_label_is_the_most_frequent_and_the_smallest_of_several():
    assert majority_label([2, 1, 2, None, None, None]) == 2
    assert majority_label([2, 1, 0]) == 0
    assert majority_label([True, False, True]) is True
    with pytest.raises(ValueError, match="there are none"):
        majority_label([None])
