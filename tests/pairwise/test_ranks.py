"""Ranks by counting: exact where scores are, ties included; NaN scores; agreement with FAISS."""

from __future__ import annotations

import math

import faiss
import pytest
import reference
import torch
from comparison import integer_rows, permutation, rotation, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor

from modstruct.pairwise import nearest_counts
from modstruct.pairwise.ranks import counted


def drawn_pairs(queries: int, items: int, count: int, seed: int) -> Tensor:
    """(count, 2) in no order: several for some queries, none for others, some twice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in (queries, items)], 1)


def assert_counts(queries: Tensor, gallery: Tensor, pairs: Tensor) -> None:
    """nearest_counts agrees with counting all scores in float64, where those of float32 are exact."""
    for found, right in zip(
        nearest_counts(queries, gallery, pairs),
        reference.nearest_counts(queries.double(), gallery.double(), pairs),
        strict=True,
    ):
        assert found.dtype == torch.int64
        assert torch.equal(found, right)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 250),
    items=st.integers(1, 250),
    width=st.integers(1, 40),
    pairs=st.integers(0, 300),
    largest=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_counts_are_exact_where_scores_are(queries, items, width, pairs, largest, seed):
    assert_counts(
        integer_rows(queries, width, seed, largest),
        integer_rows(items, width, seed + 1000, largest),
        drawn_pairs(queries, items, pairs, seed),
    )


@pytest.mark.parametrize(
    ("queries", "items", "width", "pairs"),
    [
        (1, 1, 1, 1),
        (1, 7000, 8, 5),  # more items than are packed at a time (3,072)
        (700, 1, 8, 900),
        (193, 3073, 33, 400),
        (5, 400, 2048, 60),
    ],
)
def test_every_size_is_counted_exactly(queries, items, width, pairs):
    assert_counts(integer_rows(queries, width, 1), integer_rows(items, width, 2), drawn_pairs(queries, items, pairs, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.uint8])
def test_every_floating_and_integer_type_is_taken(dtype, index_dtype):
    queries, gallery, pairs = integer_rows(20, 8, 1), integer_rows(30, 8, 2), drawn_pairs(20, 30, 50, 3)
    found = nearest_counts(queries.to(dtype), gallery.to(dtype), pairs.to(index_dtype))
    for f, right in zip(found, nearest_counts(queries, gallery, pairs), strict=True):
        assert torch.equal(f, right)


@settings(max_examples=20, deadline=None)
@given(items=st.integers(2, 900), width=st.integers(1, 700), seed=st.integers(0, 999))
def test_equal_gallery_rows_tie_exactly_wherever_they_lie(items, width, seed):
    # Scores of unit rows are rounded: only the same order of additions gives the same bits.
    gallery = unit_rows(items, width, seed)
    copies = permutation(items, seed)[: max(2, items // 10)]
    gallery[copies] = gallery[copies[0]].clone()
    queries = unit_rows(37, width, seed + 1000)
    pairs = torch.stack((torch.arange(37), copies[torch.arange(37) % len(copies)]), 1)
    above, ties = nearest_counts(queries, gallery, pairs)
    above_of_first, ties_of_first = nearest_counts(
        queries, gallery, torch.stack((torch.arange(37), copies[:1].expand(37)), 1)
    )
    assert torch.equal(above, above_of_first)
    assert torch.equal(ties, ties_of_first)
    assert (ties >= len(copies) - 1).all()


@settings(max_examples=20, deadline=None)
@given(queries=st.integers(1, 60), items=st.integers(1, 250), width=st.integers(1, 80), seed=st.integers(0, 999))
def test_a_copy_of_an_item_adds_one_to_its_ties_and_to_what_it_is_above(queries, items, width, seed):
    x, gallery, pairs = (
        unit_rows(queries, width, seed),
        unit_rows(items, width, seed + 1),
        drawn_pairs(queries, items, 90, seed),
    )
    copied = seed % items
    above, ties = nearest_counts(x, gallery, pairs)
    # With the copied item as the positive, by the counts alone: which pairs does it tie with, which is it above?
    own_above, _ = nearest_counts(x, gallery, torch.stack((pairs[:, 0], torch.full((90,), copied)), 1))
    more_above, more_ties = nearest_counts(x, torch.cat((gallery, gallery[copied : copied + 1])), pairs)
    assert torch.equal(more_above - above, (own_above < above).long())
    assert torch.equal(more_ties - ties, (own_above == above).long())
    positive = pairs[:, 1] == copied
    assert (more_ties[positive] == ties[positive] + 1).all()


@settings(max_examples=20, deadline=None)
@given(queries=st.integers(1, 60), items=st.integers(1, 250), seed=st.integers(0, 999))
def test_the_order_of_queries_gallery_and_pairs_changes_nothing(queries, items, seed):
    x, gallery, pairs = (
        unit_rows(queries, 20, seed),
        unit_rows(items, 20, seed + 1),
        drawn_pairs(queries, items, 90, seed),
    )
    above, ties = nearest_counts(x, gallery, pairs)
    query_order, item_order, pair_order = permutation(queries, seed), permutation(items, seed), permutation(90, seed)
    moved = torch.stack((query_order.argsort()[pairs[:, 0]], item_order.argsort()[pairs[:, 1]]), 1)[pair_order]
    moved_above, moved_ties = nearest_counts(x[query_order], gallery[item_order], moved)
    assert torch.equal(moved_above, above[pair_order])
    assert torch.equal(moved_ties, ties[pair_order])


def test_a_rotation_of_both_and_a_longer_query_keep_the_ranks():
    # Of integers turned by a signed permutation of the axes, which is exact; a power of two is exact as well.
    x, gallery, pairs = integer_rows(50, 16, 1), integer_rows(300, 16, 2), drawn_pairs(50, 300, 90, 3)
    turn = torch.eye(16)[permutation(16, 1)] * torch.where(torch.arange(16) % 3 == 0, -1, 1)
    for found, right in zip(
        nearest_counts(4 * x @ turn, gallery @ turn, pairs), nearest_counts(x, gallery, pairs), strict=True
    ):
        assert torch.equal(found, right)
    # Turned by any rotation, scores that were apart stay so: the ranks of rows that have no ties.
    x, gallery, turn = unit_rows(50, 16, 1), unit_rows(300, 16, 2), rotation(16, 3).float()
    nearer, _ = nearest_counts(x, gallery, pairs)
    turned, _ = nearest_counts(x @ turn, gallery @ turn, pairs)
    assert (nearer - turned).abs().max() <= 1


def test_ranks_of_a_query_with_all_items_as_positives_are_all_ranks():
    x, gallery = unit_rows(3, 24, 1), unit_rows(500, 24, 2)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(500))
    above, ties = nearest_counts(x, gallery, pairs)
    assert torch.equal((above + ties).reshape(3, 500).sort(1).values, torch.arange(500).expand(3, -1))


def test_identical_and_orthogonal_towers():
    x = unit_rows(250, 40, 1)
    above, ties = nearest_counts(x, x, torch.arange(250).repeat(2, 1).T)
    assert (above == 0).all()  # of unit rows each is nearest to itself
    assert (ties == 0).all()
    apart = torch.cat((x, torch.zeros(250, 40)), 1), torch.cat((torch.zeros(250, 40), x), 1)
    above, ties = nearest_counts(*apart, torch.arange(250).repeat(2, 1).T)
    assert (above == 0).all()
    assert (ties == 249).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_the_worst_positive_and_above_any_other(dtype):
    x, gallery = integer_rows(300, 8, 1).to(dtype), integer_rows(400, 8, 2).to(dtype)
    pairs = drawn_pairs(300, 400, 500, 3)
    pairs[:3] = torch.tensor([[250, 7], [3, 399], [250, 399]])
    x[250, 3], gallery[399, 5] = math.nan, math.nan
    above, ties = nearest_counts(x, gallery, pairs)
    right_above, right_ties = reference.nearest_counts(x, gallery, pairs)
    assert torch.equal(above, right_above)
    assert torch.equal(ties, right_ties)
    broken = (pairs[:, 0] == 250) | (pairs[:, 1] == 399)
    assert (above[broken] == 400).all()
    assert (ties[broken] == 0).all()
    assert (above[~broken] >= 1).all()  # item 399


def test_infinite_scores_are_the_highest_and_the_lowest():
    gallery = torch.tensor([[1.0], [math.inf], [-math.inf], [math.inf], [2.0]])
    pairs = torch.stack((torch.zeros(5, dtype=torch.int64), torch.arange(5)), 1)
    above, ties = nearest_counts(torch.ones(1, 1), gallery, pairs)
    assert above.tolist() == [3, 0, 4, 0, 2]
    assert ties.tolist() == [0, 1, 0, 1, 0]


@settings(max_examples=30, deadline=None)
@given(queries=st.integers(1, 60), items=st.integers(1, 90), pairs=st.integers(1, 120), seed=st.integers(0, 999))
def test_counts_are_those_of_lists_by_faiss_ties_included(queries, items, pairs, seed):
    x, gallery, pairs = (
        integer_rows(queries, 6, seed),
        integer_rows(items, 6, seed + 1),
        drawn_pairs(queries, items, pairs, seed),
    )
    index = faiss.IndexFlatIP(6)
    index.add(gallery.numpy())
    scores, rows = (torch.from_numpy(array)[pairs[:, 0]] for array in index.search(x.numpy(), items))
    own = scores[rows == pairs[:, 1:]][:, None]
    above, ties = nearest_counts(x, gallery, pairs)
    assert torch.equal(above, (scores > own).sum(1))
    assert torch.equal(ties, (scores == own).sum(1) - 1)


def test_layout_does_not_matter():
    x, gallery, pairs = unit_rows(200, 33, 1), unit_rows(300, 33, 2), drawn_pairs(200, 300, 400, 3)
    above, ties = nearest_counts(x, gallery, pairs)
    transposed = [z.T.contiguous().T for z in (x, gallery, pairs)]
    with_gaps = [z.repeat_interleave(2, 1)[:, ::2] for z in (x, gallery, pairs)]
    for given_arguments in (transposed, with_gaps):
        assert not any(z.is_contiguous() for z in given_arguments)
        found_above, found_ties = nearest_counts(*given_arguments)
        assert torch.equal(found_above, above)
        assert torch.equal(found_ties, ties)


def test_counts_have_no_gradient():
    x, y = (unit_rows(5, 3, seed).requires_grad_() for seed in (1, 2))
    assert not any(counts.requires_grad for counts in nearest_counts(x, y, drawn_pairs(5, 5, 4, 1)))


def test_no_matrix_of_scores_is_made():
    x, gallery, pairs = unit_rows(400, 8, 1), unit_rows(500, 8, 2), drawn_pairs(400, 500, 600, 3)
    with LargestTensor() as largest:
        nearest_counts(x, gallery, pairs)
    assert largest.elements <= 500 * 8


def test_operator_passes_opcheck():
    x, gallery, pairs = unit_rows(5, 4, 1), unit_rows(6, 4, 2), drawn_pairs(5, 6, 7, 3).sort(0).values
    torch.library.opcheck(counted, (x, gallery, pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), "float32"))


def test_torch_compile_takes_the_whole_function():
    x, gallery, pairs = unit_rows(20, 8, 1), unit_rows(30, 8, 2), drawn_pairs(20, 30, 40, 3)
    compiled = torch.compile(nearest_counts, fullgraph=True, backend="aot_eager")
    for found, right in zip(compiled(x, gallery, pairs), nearest_counts(x, gallery, pairs), strict=True):
        assert torch.equal(found, right)
    with pytest.raises(ValueError, match="positives"):
        compiled(x, gallery, pairs + 30)


def test_no_pairs_no_counts():
    for counts in nearest_counts(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(0, 2, dtype=torch.int64)):
        assert counts.shape == (0,)
        assert counts.dtype == torch.int64


GOOD = {
    "queries": torch.zeros(4, 3),
    "gallery": torch.zeros(5, 3),
    "positives": torch.tensor([[0, 0], [3, 4]]),
    "precision": "float32",
}
BAD_INPUT = [
    ({"gallery": torch.zeros(5, 2)}, "width of gallery"),
    ({"gallery": torch.zeros(5)}, "shape of gallery"),
    ({"gallery": torch.zeros(0, 3)}, "shape of gallery"),
    ({"queries": torch.zeros(0, 3)}, "shape of queries"),
    ({"queries": torch.zeros(4, 3, dtype=torch.int64)}, "dtype of queries"),
    ({"gallery": torch.zeros(5, 3, dtype=torch.complex64)}, "dtype of gallery"),
    ({"gallery": torch.zeros(5, 3, dtype=torch.float64)}, "dtype of gallery"),
    ({"gallery": torch.zeros(5, 3, device="meta")}, "device of gallery"),
    ({"positives": torch.zeros(3, dtype=torch.int64)}, "shape of positives"),
    ({"positives": torch.zeros(2, 3, dtype=torch.int64)}, "shape of positives"),
    ({"positives": torch.zeros(2, 2)}, "dtype of positives"),
    ({"positives": torch.zeros(2, 2, dtype=torch.complex64)}, "dtype of positives"),
    ({"positives": torch.zeros(2, 2, dtype=torch.bool)}, "dtype of positives"),
    ({"positives": torch.zeros(2, 2, dtype=torch.int64, device="meta")}, "device of positives"),
    ({"positives": torch.tensor([[0, 0], [4, 0]])}, "positives"),
    ({"positives": torch.tensor([[0, 0], [0, 5]])}, "positives"),
    ({"positives": torch.tensor([[0, 0], [-1, 0]])}, "positives"),
    ({"positives": torch.tensor([[0, 0], [0, -1]])}, "positives"),
    ({"precision": "float16"}, "precision"),
]


@pytest.mark.parametrize(("bad", "name"), BAD_INPUT)
def test_bad_input_is_refused_by_name(bad, name):
    with pytest.raises(ValueError, match=f"^{name} = "):
        nearest_counts(**(GOOD | bad))
