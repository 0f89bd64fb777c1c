"""ALBEF's three losses against plain float64 transcriptions of the paper's equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from towers import Made, computed

from modstruct.config import (
    ContrastiveConfig,
    LossesConfig,
    MaskedLanguageConfig,
    MatchingConfig,
    QueueContrastConfig,
)
from modstruct.embeddings import Outputs
from modstruct.losses.distillation import ramped
from modstruct.losses.objective import build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.losses.queue_contrast import QueueContrast
from modstruct.losses.row_losses import MaskedLanguage, Matching

PAIRS, WIDTH, VOCABULARY = 6, 5, 9
PICTURES = torch.tensor([1, 2, 1, 3, 4, 2])


def outputs(queue: int = 7, blanks: int = 8, seed: int = 0, dtype=torch.float64) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Tensor:
        return normalize(torch.randn(count, WIDTH, dtype=torch.float64, generator=generator)).to(dtype)

    def logits(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)

    return Made(
        image=rows(PAIRS),
        text=rows(PAIRS),
        logit_scale=torch.tensor([9.0], dtype=dtype),
        image_augmented=rows(PAIRS),
        text_augmented=rows(PAIRS),
        image_queue=rows(queue),
        text_queue=rows(queue),
        pair_ids=PICTURES,
        queue_ids=torch.tensor([9, 1, 1, 8, 2, 7, 7])[:queue],
        matching_logits=logits(3 * PAIRS, 2),
        matching_labels=torch.tensor([1] * PAIRS + [0, 0, -100, 0, -100, 0] + [0] * PAIRS),
        masked_logits=logits(blanks, VOCABULARY),
        masked_logits_ema=logits(blanks, VOCABULARY),
        masked_labels=torch.randint(VOCABULARY, (blanks,), generator=generator),
    )


def with_gradients(loss, made: Outputs) -> dict[str, Tensor]:
    names = ("image", "text", "logit_scale", "matching_logits", "masked_logits")
    leaves = {name: made[name].clone().requires_grad_() for name in names}
    value = loss(Made(made | leaves))
    return {"value": value.detach()} | dict(
        zip(names, torch.autograd.grad(value, list(leaves.values()), materialize_grads=True), strict=True)
    )


def assert_same(ours, plain, made: Outputs) -> None:
    found, right = with_gradients(lambda o: computed(ours, o)[0], made), with_gradients(plain, made)
    assert found["value"].shape == ()
    for name, value in right.items():
        torch.testing.assert_close(found[name], value.reshape(found[name].shape), rtol=1e-9, atol=1e-11)


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """-sum_k t_k log p_k for each row."""
    logs = scores - scores.exp().sum(1, keepdim=True).log()
    return -(targets * logs).sum(1)


def plain_contrast(alpha: float, by_image: bool, in_modal: bool = False):
    def one_way(x, x_m, c_m, queue, o, alpha=alpha):
        columns = torch.cat([c_m, queue])
        if by_image:
            same = (o.pair_ids[:, None] == torch.cat([o.pair_ids, o.queue_ids])).double()
            right = same / same.sum(1, keepdim=True)
        else:
            right = torch.eye(len(x), len(columns), dtype=torch.float64)
        soft = (o.logit_scale.detach() * x_m @ columns.T).exp()
        targets = alpha * soft / soft.sum(1, keepdim=True) + (1 - alpha) * right
        return cross_entropy(o.logit_scale * x @ columns.T, targets).mean()

    def loss(o):
        to_text = one_way(o.image, o.image_augmented, o.text_augmented, o.text_queue, o)
        crossed = (to_text + one_way(o.text, o.text_augmented, o.image_augmented, o.image_queue, o)) / 2
        if not in_modal:
            return crossed
        images = one_way(o.image, o.image_augmented, o.image_augmented, o.image_queue, o, alpha=0.0)
        texts = one_way(o.text, o.text_augmented, o.text_augmented, o.text_queue, o, alpha=0.0)
        return (2 * crossed + images + texts) / 4

    return loss


@pytest.mark.parametrize("queue", [0, 7])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("positives", ["pair", "image"])
@pytest.mark.parametrize("in_modal", [False, True])
def test_contrast_with_queue(queue, alpha, positives, in_modal):
    config = QueueContrastConfig(weight=1.0, alpha=alpha, ramp_steps=0, positives=positives, in_modal=in_modal)
    plain = plain_contrast(alpha, positives == "image", in_modal)
    assert_same(QueueContrast(config, LossSettings()), plain, outputs(queue))


def test_with_no_image_twice_positives_are_the_pairs():
    made = outputs()
    made.pair_ids, made.queue_ids = torch.arange(PAIRS), torch.arange(7) + 50
    values = [
        computed(QueueContrast(QueueContrastConfig(weight=1.0, positives=positives), LossSettings()), made)[0]
        for positives in ("pair", "image")
    ]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("in_modal", [False, True])
def test_contrast_is_the_mean_of_its_ways(in_modal):
    config = QueueContrastConfig(weight=1.0, in_modal=in_modal)
    value, terms = computed(QueueContrast(config, LossSettings()), outputs())
    own = {"image_to_image", "text_to_text"} if in_modal else set()
    assert terms.keys() == {"image_to_text", "text_to_image"} | own
    torch.testing.assert_close(value, sum(terms.values()) / len(terms))


def test_alpha_rises_over_the_first_epoch():
    assert [ramped(0.4, step, 4) for step in (0, 1, 2, 4, 9)] == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.4])
    assert ramped(0.4, 0, 0) == 0.4
    for config, right in (({}, 0.1), ({"ramp_steps": 2}, 0.2), ({"ramp_steps": 0}, 0.4)):
        loss = QueueContrast(QueueContrastConfig(weight=1.0, **config), LossSettings(epoch_steps=4))
        found, _ = computed(loss, outputs(), step=1)
        torch.testing.assert_close(found, plain_contrast(right, False)(outputs()))
        loss = MaskedLanguage(MaskedLanguageConfig(weight=1.0, **config), LossSettings(epoch_steps=4))
        torch.testing.assert_close(computed(loss, outputs(), step=1)[0], plain_masked(right)(outputs()))


def plain_matching(o):
    kept = o.matching_labels >= 0
    one_hot = torch.eye(2, dtype=torch.float64)[o.matching_labels[kept]]
    return cross_entropy(o.matching_logits[kept], one_hot).mean()


def test_matching_leaves_out_rows_without_a_negative():
    made = outputs()
    assert_same(Matching(MatchingConfig(weight=1.0), LossSettings()), plain_matching, made)
    _, terms = computed(Matching(MatchingConfig(weight=1.0), LossSettings()), made)
    kept = made.matching_labels >= 0
    right = (made.matching_logits[kept].argmax(1) == made.matching_labels[kept]).double().mean()
    assert float(terms["accuracy"]) == pytest.approx(float(right))


def plain_masked(alpha: float):
    def loss(o):
        one_hot = torch.eye(VOCABULARY, dtype=torch.float64)[o.masked_labels]
        soft = o.masked_logits_ema.exp()
        targets = (1 - alpha) * one_hot + alpha * soft / soft.sum(1, keepdim=True)
        return cross_entropy(o.masked_logits, targets).mean()

    return loss


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_masked_language_with_distillation(alpha):
    loss = MaskedLanguage(MaskedLanguageConfig(weight=1.0, alpha=alpha, ramp_steps=0), LossSettings())
    assert_same(loss, plain_masked(alpha), outputs())


def test_a_batch_without_masked_tokens_or_negatives_costs_nothing():
    made = outputs(blanks=0)
    found = with_gradients(
        lambda o: computed(MaskedLanguage(MaskedLanguageConfig(weight=1.0), LossSettings()), o)[0], made
    )
    assert float(found["value"]) == 0.0
    made.matching_labels = torch.full((3 * PAIRS,), -100)
    assert float(computed(Matching(MatchingConfig(weight=1.0), LossSettings()), made)[0]) == 0.0


def test_the_objective_sums_them_and_stays_near_float64_in_float32():
    config = LossesConfig(
        contrastive=ContrastiveConfig(weight=0.0),
        queue_contrast=QueueContrastConfig(weight=2.0, ramp_steps=0),
        matching=MatchingConfig(weight=0.5),
        masked_language=MaskedLanguageConfig(weight=3.0, ramp_steps=0),
    )
    right = 2 * plain_contrast(0.4, False)(outputs()) + plain_matching(outputs()) / 2 + 3 * plain_masked(0.4)(outputs())
    total, terms = build_objective(config)(outputs(), step=0)
    torch.testing.assert_close(total, right.reshape(()))
    assert {"queue_contrast", "matching", "matching/accuracy", "masked_language", "masked_language/words"} < set(terms)
    single, _ = build_objective(config)(outputs(dtype=torch.float32), step=0)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), right.reshape(()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("missing", ["text_queue", "image_augmented", "matching_logits", "masked_logits_ema"])
def test_what_is_missing_is_named(missing):
    config = LossesConfig(
        contrastive=ContrastiveConfig(weight=0.0),
        queue_contrast=QueueContrastConfig(weight=1.0),
        matching=MatchingConfig(weight=1.0),
        masked_language=MaskedLanguageConfig(weight=1.0),
    )
    made = {name: value for name, value in outputs().items() if name != missing}
    with pytest.raises(ValueError, match=rf"embeddings\.{missing} = None: losses\.\w+ needs it"):
        build_objective(config)(made, step=0)
