"""Distinct captions in order of first appearance, as a dictionary of the texts themselves gives them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.evaluation.embeddings.source import distinct_captions

TEXTS = st.one_of(st.sampled_from(["a", "b", "a ", "", "ä", "\ud800"]), st.text(max_size=3))


@settings(max_examples=40)
@given(st.lists(st.lists(TEXTS, max_size=4), max_size=12))
def test_they_agree_with_a_dictionary(captions):
    texts, pairs = distinct_captions(captions)
    row: dict[str, int] = {}
    expected = {(i, row.setdefault(text, len(row))) for i, of_image in enumerate(captions) for text in of_image}
    assert texts == list(row)
    assert pairs.tolist() == [list(pair) for pair in sorted(expected)]
    assert pairs.dtype == np.int64
