"""The model that a recipe describes, of either framework."""

from __future__ import annotations

from dataclasses import replace

from modstruct.config import Recipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.losses.objective import Objective
from modstruct.models.protocol import TrainableModel


def build_model(
    recipe: Recipe, tokenizer: Tokenizer, objective: Objective, read_weights: bool = True
) -> TrainableModel:
    """Two towers or the fusion model. objective: decides about independent heads and what else is made of a batch.

    read_weights: False leaves the pretrained files that the recipe names unread, since a checkpoint's weights follow.
    """
    if recipe.framework == "fusion":
        from modstruct.models.fusion.backbone import without_files
        from modstruct.models.fusion.initial_weights import start_pretraining
        from modstruct.models.fusion.pretraining import FusionModel

        described = recipe if read_weights else replace(recipe, fusion=without_files(recipe.fusion))
        model = FusionModel(described, tokenizer, objective)
        if described.fusion.init is not None:
            start_pretraining(model, described.fusion.init)
        return model
    from modstruct.models.two_tower import TwoTower

    config = recipe.model if read_weights else replace(recipe.model, pretrained=None)
    return TwoTower(config, recipe.views, tokenizer, objective)


def initial_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer that fusion.init brings, if it is a run, checkpoint or export of ours."""
    if recipe.framework != "fusion" or recipe.fusion.init is None:
        return None
    from modstruct.models.fusion.initial_weights import tokenizer_of

    return tokenizer_of(recipe.fusion.init)


def image_size(recipe: Recipe) -> int:
    """Side in pixels of the square image that the model takes."""
    if recipe.framework == "fusion":
        return recipe.fusion.vision.image_size
    from modstruct.models import towers

    return towers.image_size(recipe.model)


def log_scale_range(recipe: Recipe) -> tuple[float, float]:
    """Limits of the log of the logit scale."""
    return recipe.fusion.log_scale_range if recipe.framework == "fusion" else (0.0, recipe.model.logit_scale_max)
