"""Hard negatives: never a positive, drawn as the similarities say, by the place in the data alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_on_processes
from scipy.stats import chisquare
from torch.nn.functional import normalize

from modstruct import distributed
from modstruct.data.transforms.augment import sample_seed
from modstruct.models.fusion.pretraining import NONE, hard_negatives


def unit(rows: int, width: int = 4, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def draw(image_ids, text_ids, scale=10.0, seed=0, of="image", slots=None, embeddings=0, scope="global"):
    rows = len(image_ids)
    batch = {
        "image_id": torch.tensor(image_ids),
        "text_id": torch.tensor(text_ids),
        "slot": torch.arange(rows) if slots is None else slots,
    }
    images, texts = unit(rows, seed=embeddings), unit(rows, seed=embeddings + 1)
    return hard_negatives(images, texts, torch.tensor([scale]), batch, seed, of, scope)


IDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9)


@given(
    pairs=IDS,
    scale=st.sampled_from([0.0, 2.0, 100.0, 1000.0]),
    seed=st.integers(0, 99),
    of=st.sampled_from(["image", "text"]),
)
def test_no_pair_of_the_batch_is_ever_a_negative(pairs, scale, seed, of):
    found = draw([i for i, _ in pairs], [t for _, t in pairs], scale, seed, of, embeddings=seed).tolist()
    for (image, text), other in zip(pairs, found, strict=True):
        made = {n: (p[0], text) if of == "image" else (image, p[1]) for n, p in enumerate(pairs)}
        possible = [n for n, pair in made.items() if pair not in pairs]
        assert other in possible if possible else other == NONE


def test_every_row_of_one_image_has_no_negative():
    assert draw([7, 7, 7], [1, 2, 3]).tolist() == [NONE] * 3
    assert draw([1], [1], scale=1000.0).tolist() == [NONE]


def test_a_image_that_has_the_caption_in_a_third_pair_is_no_negative():
    # Image 2 has caption 1 as well (third pair), so the first text's only wrong image is 3.
    images, texts = [1, 2, 2, 3], [1, 2, 1, 3]
    assert {int(draw(images, texts, seed=seed)[0]) for seed in range(50)} == {3}


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_frequencies_are_the_softmax_over_the_wrong_ones(scale):
    draws = 3000
    image_ids, text_ids = [1, 2, 3, 1, 5, 6], [1, 2, 3, 4, 5, 2]
    found = torch.stack([draw(image_ids, text_ids, scale, seed) for seed in range(draws)])
    logits = scale * unit(6).double() @ unit(6, seed=1).double().T
    for row in range(6):
        # 3 has image 1 too; 5 has the caption of 1.
        wrong = [k for k in range(6) if image_ids[k] != image_ids[row] and text_ids[k] != text_ids[row]]
        right = logits[row, wrong].softmax(0) * draws
        counts = torch.tensor([(found[:, row] == k).sum() for k in wrong])
        assert counts.sum() == draws
        assert chisquare(counts.numpy(), right.numpy()).pvalue > 1e-4


def test_draws_depend_on_the_place_in_the_data_and_on_the_direction():
    ids = list(range(40))
    base = draw(ids, ids, 1.0)
    assert torch.equal(base, draw(ids, ids, 1.0))
    assert not torch.equal(base, draw(ids, ids, 1.0, slots=torch.arange(40) + 40))
    assert not torch.equal(base, draw(ids, ids, 1.0, of="text"))
    assert not torch.equal(base, draw(ids, ids, 1.0, seed=1))


def test_draws_are_the_seeds_of_the_places():
    slots = torch.tensor([0, 7, 2**40, 2**62])
    found = sample_seed(5, 0, slots, "image")
    assert found.tolist() == [sample_seed(5, 0, slot, "image") for slot in slots.tolist()]


def of_all_processes(scope: str) -> torch.Tensor:
    rows, processes = 12, distributed.world_size()
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 8, 9, 10, 11])
    mine = slice(distributed.rank() * rows // processes, (distributed.rank() + 1) * rows // processes)
    batch = {"image_id": ids[mine], "text_id": torch.arange(rows)[mine], "slot": torch.arange(rows)[mine]}
    given = unit(rows)[mine], unit(rows, seed=1)[mine], torch.tensor([2.0]), batch
    return distributed.gather(hard_negatives(*given, 3, "image", scope))


def test_the_same_for_any_number_of_processes():
    alone = of_all_processes("global")
    for processes in (2, 3):
        assert all(torch.equal(alone, found) for found in run_on_processes(of_all_processes, processes, "global"))


def test_local_negatives_are_rows_of_the_own_process():
    for found in run_on_processes(of_all_processes, 2, "local"):
        assert all(place // 6 == row // 6 for row, place in enumerate(found.tolist()))
