"""Answers: the loss is ALBEF's, no token sees the ones after it, ranking and writing are what they say."""

from __future__ import annotations

import pytest
import torch
from tiny_answers import (
    ANSWER_LIST,
    ANSWERS,
    QUESTIONS,
    answer_model,
    answer_recipe,
    answer_tokenizer,
    question_batch,
    with_answers,
)
from torch import Tensor

from modstruct.config import ContrastiveConfig, FinetuneRecipe, LossesConfig
from modstruct.losses.distillation import Distillation
from modstruct.losses.objective import Objective, build_objective
from modstruct.models.fusion.answering import AnswerModel
from modstruct.models.fusion.initial_weights import Initial, start_from
from modstruct.models.fusion.pretraining import FusionModel
from modstruct.models.fusion.published import to_albef


def log_probabilities(model: AnswerModel, batch: dict[str, Tensor], question: int, ids: list[int]) -> Tensor:
    """Of every next token (vocabulary,), after ids, to one question, in a pass of its own."""
    row = {name: batch[name][question : question + 1] for name in ("image", "text")}
    fused, mask = model.encode(row)
    hidden = model.decode(torch.tensor([ids]), fused, mask)
    return model.head(hidden[0, -1:], model.words.word_embeddings)[0].log_softmax(dim=-1)


def likelihood(model: AnswerModel, batch: dict[str, Tensor], question: int, answer: str) -> Tensor:
    """Log likelihood of an answer, token by token."""
    ids = [token for token in answer_tokenizer()([answer])[0].tolist() if token != 0]
    return sum(log_probabilities(model, batch, question, ids[:t])[ids[t]] for t in range(1, len(ids)))


def transcribed_loss(model: AnswerModel, batch: dict[str, Tensor], alpha: float) -> float:
    """Li et al. 2021, VQA: for each question, the weighted sum over its answers of the sum over tokens of
    (1 - alpha) times the cross entropy plus alpha times that against the EMA model; the mean over questions."""
    model = model.double()
    copy = model.ema.module.double() if model.ema else model
    total = 0.0
    for question, answers in enumerate(ANSWERS):
        for answer, weight in answers.items():
            ids = [token for token in answer_tokenizer(6)([answer])[0].tolist() if token != 0]
            for t in range(1, len(ids)):
                ours = log_probabilities(model, batch, question, ids[:t])
                theirs = log_probabilities(copy, batch, question, ids[:t]).exp()
                total += weight * float((alpha - 1) * ours[ids[t]] - alpha * (theirs * ours).sum())
    return total / len(QUESTIONS)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_loss_is_albefs(alpha):
    model = answer_model(answer_recipe(alpha=alpha))
    batch = with_answers(question_batch(), ANSWERS)
    found, _ = Objective({"task": Distillation(alpha, ramp_steps=0)}, {"task": 1.0})(model(batch), step=5)
    with torch.no_grad():
        expected = transcribed_loss(model, batch, alpha)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    assert (model.distils, expected > 1) == (alpha > 0, True)


def test_rows_are_the_answers_tokens():
    outputs = answer_model()(with_answers(question_batch(), ANSWERS))
    # "a dark light blue" has 4 tokens and an end; a question without answers has no row, yet counts.
    assert outputs["logits"].shape[0] == len(outputs["labels"]) == (2 + 1) + (1 + 1) + (4 + 1) + 3 * 2
    assert outputs["entries"].tolist() == [4]
    assert outputs["weights"].tolist() == pytest.approx(
        [0.6] * 3 + [0.3] * 2 + [0.1] * 5 + [0.7] * 2 + [0.3] * 2 + [1.0] * 2
    )
    assert not (outputs["labels"] == 0).any()
    assert not outputs["logits_ema"].requires_grad


@pytest.mark.parametrize("answers", [ANSWERS, [{}, {}, {}, {}]], ids=["some", "none"])
def test_every_parameter_has_a_gradient(answers):
    model = answer_model()
    loss, terms = Objective({"task": Distillation(0.4, 0)}, {"task": 1.0})(
        model(with_answers(question_batch(), answers)), 0
    )
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    if not any(answers):
        assert float(loss.detach()) == float(terms["task/accuracy"]) == 0
        assert not any(parameter.grad.any() for parameter in model.parameters())


def test_no_token_sees_the_ones_after_it():
    model = answer_model()
    question, mask = model.encode(question_batch())
    answers = answer_tokenizer(6)(["dark light blue star"] * 4)
    hidden = model.decode(answers, question, mask)
    for changed in range(1, 6):
        other = answers.clone()
        other[:, changed] = 7 if int(answers[0, changed]) != 7 else 8
        moved = (model.decode(other, question, mask) - hidden).abs().amax(dim=(0, 2))
        assert torch.equal(moved[:changed], torch.zeros(changed))
        assert (moved[changed:] > 1e-4).all()


def test_answers_depend_on_image_and_question():
    model, batch = answer_model(), question_batch()
    answers = answer_tokenizer(6)(ANSWER_LIST)
    before = model.rank(batch, answers, 10)[1]
    for name, other in (("image", 255 - batch["image"]), ("text", batch["text"].flip(0))):
        assert not torch.allclose(model.rank(batch | {name: other}, answers, 10)[1], before, atol=1e-3)


def test_padding_changes_nothing():
    model = answer_model()
    narrow = with_answers(question_batch(), ANSWERS)
    wide = dict(narrow)
    narrow["text"] = narrow["text"][:, :8]
    assert (narrow["text"] == 0).any()
    wide["answer"] = torch.cat([wide["answer"], wide["answer"].new_zeros(len(wide["answer"]), 3)], dim=1)
    for name, value in model(wide).items():
        torch.testing.assert_close(model(narrow)[name], value, rtol=1e-5, atol=1e-5)
    answers = answer_tokenizer(6)(ANSWER_LIST)
    first = model.rank(question_batch(), answers, 10)
    second = model.rank({"image": narrow["image"], "text": narrow["text"]}, answers[:, :5], 10)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("candidates", "at_once"), [(10, 3), (128, 1), (99, 64)])
def test_ranking_equals_brute_force(candidates, at_once):
    model, batch = answer_model(), question_batch()
    numbers, likelihoods = model.rank(batch, answer_tokenizer(6)(ANSWER_LIST), candidates, at_once)
    with torch.no_grad():
        expected = torch.tensor([[likelihood(model, batch, q, a) for a in ANSWER_LIST] for q in range(len(QUESTIONS))])
    assert numbers.sort(dim=1).values.tolist() == [list(range(len(ANSWER_LIST)))] * len(QUESTIONS)
    torch.testing.assert_close(likelihoods, expected.gather(1, numbers), rtol=1e-5, atol=1e-5)
    assert (likelihoods.diff(dim=1) <= 0).all()
    assert len(set(numbers[:, 0].tolist())) > 1 or len(set(numbers[:, 1].tolist())) > 1


def test_candidates_are_chosen_by_their_first_token():
    model, batch = answer_model(), question_batch()
    numbers, _ = model.rank(batch, answer_tokenizer(6)(ANSWER_LIST), 4, 3)
    firsts = answer_tokenizer(6)(ANSWER_LIST)[:, 1].tolist()
    for question in range(len(QUESTIONS)):
        with torch.no_grad():
            first = log_probabilities(model, batch, question, [2])
        # Ties, of which "dark …" has four, go to the earlier answer.
        best = sorted(range(len(ANSWER_LIST)), key=lambda n: -float(first[firsts[n]]))[:4]
        assert sorted(numbers[question].tolist()) == sorted(best)


def test_ranking_makes_as_many_passes_whatever_the_batch():
    model, passes = answer_model(), []
    model.decoder.register_forward_hook(lambda *_: passes.append(1))
    for rows in (slice(0, 1), slice(None)):
        model.rank(question_batch(rows), answer_tokenizer(6)(ANSWER_LIST), 7, 3)
        passes.append(0)
    assert passes == [1, 1, 1, 1, 0] * 2  # the first tokens, then 7 candidates by 3


def test_writing_is_the_argmax_token_by_token():
    ends = set()
    for seed in range(6):
        model, batch = answer_model(seed=seed), question_batch()
        with torch.no_grad():  # ends are frequent enough for both kinds to occur
            model.head.bias[3] += 3.0 * (seed % 3)
        written = model.generate(batch)
        assert written.shape == (4, 6)
        for question, row in enumerate(written.tolist()):
            ids = [2]
            while len(ids) < 6 and ids[-1] not in (3, 0):
                with torch.no_grad():
                    ids.append(int(log_probabilities(model, batch, question, ids).argmax()))
            assert row == ids + [0] * (6 - len(ids))
            ends.add(3 in ids)
    assert ends == {True, False}


def test_writing_makes_as_many_passes_whatever_is_written():
    model, passes = answer_model(), []
    model.decoder.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        model.head.bias[3] += 100.0
    assert model.generate(question_batch()).tolist() == [[2, 3, 0, 0, 0, 0]] * 4
    assert len(passes) == 5


def pretrained(recipe: FinetuneRecipe) -> dict[str, Tensor]:
    torch.manual_seed(7)
    losses = LossesConfig(contrastive=ContrastiveConfig(weight=1.0))
    recipe.losses = losses
    model = FusionModel(recipe, answer_tokenizer(), build_objective(losses))
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("layers", "came_from"), [(1, [2]), (2, [1, 2]), (3, [1, 2]), (None, [1, 2])])
def test_the_decoder_starts_from_pre_training(layers, came_from):
    recipe = answer_recipe(width=16, decoder_layers=layers)
    weights = pretrained(recipe)
    torch.manual_seed(0)
    model = AnswerModel(recipe, answer_tokenizer())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_from(model, Initial(answer_tokenizer(), dict(weights)))
    found = model.state_dict()
    sources = {f"decoder.layer.{place}.": f"backbone.fusion.layer.{n}." for place, n in enumerate(came_from)}
    sources |= {"words.": "backbone.words.", "head.": "language_head.", "backbone.": "backbone."}
    new = f"decoder.layer.{len(came_from)}."
    for name, value in found.items():
        own = next((own for own in sources if name.startswith(own)), None)
        expected = before[name] if own is None else weights[sources[own] + name.removeprefix(own)]
        assert torch.equal(value, expected), name
        assert own is not None or name.startswith(new)
        assert torch.equal(model.ema.module.state_dict()[name], value)
    assert len(model.decoder.layer) == (layers or 2)


def test_albefs_published_names_start_the_same_decoder():
    recipe = answer_recipe(width=16)
    weights = pretrained(recipe)
    ours, theirs = (AnswerModel(recipe, answer_tokenizer()) for _ in range(2))
    start_from(ours, Initial(answer_tokenizer(), dict(weights)))
    start_from(theirs, Initial(answer_tokenizer(), to_albef(weights)))
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_cross_attention_of_another_width_keeps_its_initialisation():
    recipe = answer_recipe(width=12, image_width=16)
    weights = pretrained(recipe)
    starting = AnswerModel(recipe, answer_tokenizer()).starting_weights(weights)
    absent = AnswerModel(recipe, answer_tokenizer()).state_dict().keys() - starting.keys()
    assert absent == {f"decoder.layer.{n}.crossattention.self.{k}.weight" for n in (0, 1) for k in ("key", "value")}


def test_an_answer_models_own_weights_stay_its_own():
    model = answer_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    other = answer_model(seed=1)
    start_from(other, Initial(answer_tokenizer(), weights))
    for name, value in other.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_an_answer_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match=r"task\.answer_context = 11: .*at most the tokenizer's context of 10"):
        AnswerModel(answer_recipe(answer_context=11), answer_tokenizer())
