"""The smallest answer model, its tokenizer and batches, which the tests of models, tasks and processes share."""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct.config import FinetuneRecipe, FusionConfig, FusionTextConfig, FusionVisionConfig, TaskConfig, TrainConfig
from modstruct.data.tokenizers import Tokenizer, WordPieceTokenizer
from modstruct.models.fusion.answering import AnswerModel, answer_tokens

WORDS = ["what", "colour", "is", "there", "a", "red", "blue", "dark", "light", "green", "star", "yes", "no", "two"]
WORDS += ["?", "'", "1", "2", ".", "##ish"]
VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]).encode()
QUESTIONS = ["what colour is the star?", "is there a red star?", "what is there?", "is there a star?"]
# For each question its answers and their weights; the third question has none that can be used.
ANSWERS = [{"dark blue": 0.6, "blue": 0.3, "a dark light blue": 0.1}, {"yes": 0.7, "no": 0.3}, {}, {"no": 1.0}]
ANSWER_LIST = ["yes", "no", "red", "dark red", "dark blue", "blue", "dark light blue", "two", "green", "dark"]


def answer_tokenizer(context: int = 10) -> Tokenizer:
    return WordPieceTokenizer(VOCABULARY, context)


def answer_recipe(width: int = 12, image_width: int = 16, **task) -> FinetuneRecipe:
    vision = FusionVisionConfig(image_size=16, patch_size=8, width=image_width, layers=1, heads=2)
    text = FusionTextConfig(text_layers=1, fusion_layers=2, width=width, heads=2)
    return FinetuneRecipe(
        task=TaskConfig(**{"name": "vqa", "answer_context": 6, "ramp_steps": 0} | task),
        fusion=FusionConfig(vision=vision, text=text),
        train=TrainConfig(steps=1, global_batch=4),
    )


def answer_model(recipe: FinetuneRecipe | None = None, seed: int = 0) -> AnswerModel:
    """With weights large enough for answers to differ, and an EMA model that differs."""
    torch.manual_seed(seed)
    model = AnswerModel(recipe or answer_recipe(), answer_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if parameter.dim() > 1 else 1)
        for parameter in model.ema.module.parameters() if model.ema else ():
            parameter.mul_(0.7 if parameter.dim() > 1 else 1)
    return model.eval()


def question_batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (len(QUESTIONS), 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {"image": images[rows], "text": answer_tokenizer()(QUESTIONS[rows])}


def with_answers(batch: dict[str, Tensor], answers: list[dict[str, float]], context: int = 6) -> dict[str, Tensor]:
    """The batch with answers to its questions, as the task's collate gives them."""
    rows = [(text, of, weight) for of, some in enumerate(answers) for text, weight in some.items()] or [("", 0, 0.0)]
    texts, of, weights = zip(*rows, strict=True)
    answer = answer_tokenizer(context)(texts)
    batch = batch | {"answer": answer, "answer_of": torch.tensor(of), "answer_weight": torch.tensor(weights)}
    return batch | {"answer_tokens": answer_tokens(answer, padding_id=0)}
