"""The smallest fusion models and training batches that the tests share."""

from __future__ import annotations

import torch
from tiny_models import CAPTIONS, random_images, word_tokenizer
from torch import Tensor

from modstruct.config import (
    ContrastiveConfig,
    FusionConfig,
    FusionTextConfig,
    FusionVisionConfig,
    LossesConfig,
    MaskedLanguageConfig,
    MatchingConfig,
    QueueContrastConfig,
    Recipe,
    SeparationConfig,
    TrainConfig,
)
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.text_views import mask_tokens
from modstruct.losses.objective import build_objective
from modstruct.models.fusion.pretraining import FusionModel


def albef_losses(**others) -> LossesConfig:
    """ALBEF's three losses, alpha at once; others: further sections."""
    return LossesConfig(
        contrastive=ContrastiveConfig(weight=0.0),
        queue_contrast=others.pop("queue_contrast", QueueContrastConfig(weight=1.0, ramp_steps=0)),
        matching=others.pop("matching", MatchingConfig(weight=1.0)),
        masked_language=others.pop("masked_language", MaskedLanguageConfig(weight=1.0, ramp_steps=0)),
        **others,
    )


def fusion_recipe(independent: bool = False, losses: LossesConfig | None = None, seed: int = 0, **fusion) -> Recipe:
    """Widths of image and text differ. fusion: fields of FusionConfig, and `text` and `vision` sections."""
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "heads": 2} | fusion.pop("vision", {})
    text = {"text_layers": 1, "fusion_layers": 2, "width": 12, "heads": 2} | fusion.pop("text", {})
    more = {"separation": SeparationConfig(weight=1.0)} if independent else {}
    return Recipe(
        framework="fusion",
        losses=losses or albef_losses(**more),
        train=TrainConfig(steps=1, seed=seed),
        fusion=FusionConfig(
            **{"embed_dim": 8, "queue": 10} | fusion,
            vision=FusionVisionConfig(**vision),
            text=FusionTextConfig(**text),
        ),
    )


def fusion_model(recipe: Recipe | None = None, tokenizer: Tokenizer | None = None, seed: int = 0) -> FusionModel:
    """With weights large enough for the outputs to differ from row to row."""
    recipe = recipe or fusion_recipe()
    torch.manual_seed(seed)
    model = FusionModel(recipe, tokenizer or word_tokenizer(), build_objective(recipe.losses))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.ema.module.load_state_dict(model.state_dict())
    return model


def training_batch(rows: int = 6, seed: int = 0, size: int = 16, rate: float = 0.5) -> dict[str, Tensor]:
    """Rows 0 and 4 have the same caption, and so on through the four CAPTIONS; every image is another. The second view
    of a caption is of other length."""
    tokenizer = word_tokenizer()
    captions = [CAPTIONS[row % len(CAPTIONS)] for row in range(rows)]
    text = tokenizer(captions)
    seeds = [seed * 1000 + row for row in range(rows)]
    masked, labels = mask_tokens(text, seeds, rate, tokenizer)
    return {
        "image": random_images(size, rows, seed + 1),
        "image_augmented": random_images(size, rows, seed + 500),
        "text": text,
        "text_augmented": tokenizer([caption.partition(" ")[2] for caption in captions]),
        "text_masked": masked,
        "masked_labels": labels,
        "image_id": torch.arange(rows) + 100,
        "text_id": torch.arange(rows) % len(CAPTIONS),
        "slot": torch.arange(rows) + seed * rows,
    }
