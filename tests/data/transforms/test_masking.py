"""Masked tokens: as many and of the kinds of BERT's recipe, drawn from each sample's own seed."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest
from tiny_models import word_tokenizer

from modstruct.data.shards.loader import identity
from modstruct.data.transforms.augment import sample_seed
from modstruct.data.transforms.text_views import IGNORED, mask_tokens


def likely(count: int, of: int, share: float) -> bool:
    return binomtest(count, of, share).pvalue > 1e-4


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_rates_are_bert_s(rate):
    tokenizer = word_tokenizer(context_length=12)
    ids = tokenizer(["a red square above a blue circle"]).repeat(6000, 1)
    words = int((ids[0] != tokenizer.padding_id).sum()) - 1  # the start is never masked, the end may be
    masked, labels = mask_tokens(ids, [sample_seed(0, 0, n, "text_masked") for n in range(6000)], rate, tokenizer)
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    count = int(chosen.sum())
    assert likely(count, 6000 * words, rate)
    for place in range(1, words + 1):  # no place is favoured
        assert likely(int(chosen[:, place].sum()), 6000, rate)
    mask_tokens_drawn = int((masked[chosen] == tokenizer.mask_id).sum())
    assert likely(mask_tokens_drawn, count, 0.8)
    others = masked[chosen & (masked != tokenizer.mask_id)]
    kept = int((masked[chosen] == ids[chosen]).sum())
    # A tenth is replaced by any id of the vocabulary, which may be the same again.
    assert likely(kept, count, 0.1 + 0.1 / tokenizer.vocab_size)
    counts = torch.bincount(others, minlength=tokenizer.vocab_size)
    unused = [i for i in range(tokenizer.vocab_size) if i not in ids[0].tolist()]
    assert all(likely(int(counts[i]), count, 0.1 / tokenizer.vocab_size) for i in unused)


def test_start_and_padding_are_never_chosen():
    tokenizer = word_tokenizer(context_length=12)
    ids = tokenizer(["star", "a red square", ""])
    masked, labels = mask_tokens(ids, [1, 2, 3], 0.999999, tokenizer)
    never = (ids == tokenizer.padding_id) | (torch.arange(12) == 0)
    assert (labels[never] == IGNORED).all()
    assert torch.equal(masked[never], ids[never])
    assert (labels[~never] != IGNORED).all()


def test_a_caption_s_masked_tokens_depend_on_its_seed_alone():
    tokenizer = word_tokenizer()
    ids = tokenizer(["a red square above a green circle"] * 5)
    masked, labels = mask_tokens(ids, [5, 6, 7, 8, 5], 0.4, tokenizer)
    for row, seed in enumerate([5, 6, 7, 8, 5]):
        alone = mask_tokens(ids[row : row + 1], [seed], 0.4, tokenizer)
        assert torch.equal(alone[0][0], masked[row])
        assert torch.equal(alone[1][0], labels[row])
    assert torch.equal(labels[0], labels[4])
    assert not torch.equal(labels[0], labels[1])


def test_the_captions_are_left_as_they_were():
    tokenizer = word_tokenizer()
    ids = tokenizer(["a red square"])
    before = ids.clone()
    mask_tokens(ids, [2**63 - 1], 0.9, tokenizer)
    assert torch.equal(ids, before)


def test_identities_fit_int64_and_tell_contents_apart():
    found = {identity(str(n).encode()) for n in range(1000)}
    assert len(found) == 1000
    assert all(0 <= number < 2**63 for number in found)
    assert identity(b"a") == identity(b"a")
