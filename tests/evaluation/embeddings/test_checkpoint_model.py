"""A checkpoint of either framework embeds as its model does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import CAPTIONS, random_images, word_tokenizer
from tiny_run import tiny_recipe
from whole_checkpoint import Whole
from whole_checkpoint import write as write_whole

from modstruct import checkpoints
from modstruct.checkpoints import TrainState
from modstruct.config import ContrastiveConfig, LossesConfig
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.evaluation.embeddings.model import checkpoint_model
from modstruct.losses.objective import build_objective
from modstruct.models.build import build_model

RECIPES = {
    "two_tower": lambda recipe: recipe,
    "without independent heads": lambda recipe: replace(
        recipe, losses=LossesConfig(contrastive=ContrastiveConfig(weight=1.0))
    ),
    "fusion": lambda recipe: replace(recipe, framework="fusion"),
}


@pytest.fixture(params=RECIPES)
def made(request, tmp_path):
    """A recipe, its model with random weights, and the run's folder with a checkpoint of them."""
    recipe = RECIPES[request.param](tiny_recipe(tmp_path / "run", tmp_path / "cache"))
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    model = build_model(recipe, tokenizer, build_objective(recipe.losses)).eval()
    state, described = TrainState(4), recipe_to_dict(recipe)
    checkpoint = Whole(model.state_dict(), {}, {"cpu.0": torch.get_rng_state()}, state, {"step": 4}, described)
    write_whole(checkpoints.step_folder(tmp_path / "run", 4), checkpoint, tokenizer)
    return recipe, model, tmp_path / "run"


def test_a_checkpoint_embeds_as_its_model(made):
    recipe, model, run = made
    embedding = checkpoint_model(recipe, str(run))
    independent = build_objective(recipe.losses).independent
    names = {f"{name}{kind}" for name in ("image", "text") for kind in ("", "_features", "_projected")}
    names |= {"image_independent", "text_independent"} if independent else set()
    assert embedding.arrays == names | {"image_augmented"}
    assert (embedding.name, embedding.dimension) == ("run/step-00000004", 15)
    # Features of texts bring the texts along, which the set counts its texts by.
    assert embedding.chosen_arrays(["text_features"]) == ["image", "text", "text_features"]
    images, texts = random_images(32), word_tokenizer()(CAPTIONS)
    with torch.no_grad():
        rows = embedding.encode({"image": images}) | embedding.encode({"text": embedding.tokenize(CAPTIONS)})
        expected = model({"image": images, "text": texts}, features=True)
    assert rows.keys() - {"logit_scale"} == names
    for name in names:
        torch.testing.assert_close(rows[name], expected[name])
    assert embedding.details["logit_scale"] == pytest.approx(float(expected["logit_scale"]))


def test_the_fingerprint_is_that_of_the_weights(made):
    recipe, model, run = made
    first = checkpoint_model(recipe, str(run)).fingerprint
    assert checkpoint_model(recipe, str(run / "checkpoints/step-00000004")).fingerprint == first
    weights = model.state_dict()
    weights["logit_scale"] += 1
    other = Whole(weights, {}, {}, TrainState(5), {"step": 5}, recipe_to_dict(recipe))
    write_whole(checkpoints.step_folder(run, 5), other, word_tokenizer())
    assert checkpoint_model(recipe, str(run)).fingerprint != first


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"--checkpoint = .*: this run has no checkpoint yet"):
        checkpoint_model(tiny_recipe(tmp_path, tmp_path), str(tmp_path))
