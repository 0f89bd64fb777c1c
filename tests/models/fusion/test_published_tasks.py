"""ALBEF's fine-tuned files: names both ways, and the forward pass of the models that start from them."""

from __future__ import annotations

import logging
import runpy
from pathlib import Path

import pytest
import torch
from albef_names import TASKS, PlainAlbef, task_sizes, task_weights
from test_published import assert_same
from tiny_fusion import albef_losses, fusion_recipe, training_batch
from tiny_models import word_tokenizer
from torch.nn import functional as F
from whole_checkpoint import Whole
from whole_checkpoint import write as write_whole

from modstruct import checkpoints
from modstruct.config import FinetuneRecipe, TaskConfig
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.losses.objective import build_objective
from modstruct.models.fusion.answering import AnswerModel
from modstruct.models.fusion.classifier import Classifier, PairClassifier
from modstruct.models.fusion.ema import EmaModel
from modstruct.models.fusion.initial_weights import Initial, start_from
from modstruct.models.fusion.pretraining import FusionModel
from modstruct.models.fusion.published import from_albef, to_albef

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
convert = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "convert_albef.py"))["main"]


def recipe_of(task: str) -> FinetuneRecipe:
    described = TaskConfig(name=task, alpha=0.4, answer_context=6, ramp_steps=0)
    return FinetuneRecipe(task=described, fusion=fusion_recipe().fusion, losses=albef_losses())


def task_model(task: str) -> EmaModel:
    recipe, tokenizer = recipe_of(task), word_tokenizer()
    torch.manual_seed(3)
    if task == "vqa":
        return AnswerModel(recipe, tokenizer)
    if task == "retrieval":
        return FusionModel(recipe, tokenizer, build_objective(recipe.losses))
    kind = PairClassifier if task in ("nlvr2", "text_assignment") else Classifier
    return kind(recipe, tokenizer, classes=2 if task == "nlvr2" else 3)


@pytest.mark.parametrize("task", TASKS)
def test_names_round_trip(task, tmp_path):
    weights = task_weights(task)
    assert_same(to_albef(from_albef(weights)), weights)
    torch.save({"model": weights}, tmp_path / "theirs.pth")
    arguments = ["--weights", str(tmp_path / "theirs.pth"), "--out", str(tmp_path / "ours.safetensors")]
    assert convert(["--to", "ours", *arguments]) == 0
    arguments = ["--weights", str(tmp_path / "ours.safetensors"), "--out", str(tmp_path / "back.pth")]
    assert convert(["--to", "albef", *arguments]) == 0
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], weights)


@pytest.mark.parametrize("task", TASKS)
def test_a_model_of_the_task_takes_every_weight_but_the_one_layer_of_text_assignments_head(task):
    model, given = task_model(task), from_albef(task_weights(task))
    start_from(model, Initial(word_tokenizer(), given, Path("theirs.pth")))
    for name, value in model.state_dict().items():
        if name.startswith("head." if task == "text_assignment" else "language_head."):
            assert name not in given
        elif name.endswith("words.position_embeddings.weight"):
            assert torch.equal(value, given[name][: len(value)]), name
        else:
            assert torch.equal(value, given[name]), name


def test_their_numbers_of_images_in_the_queue_are_no_images_of_ours():
    ids = from_albef(task_weights("retrieval"))["queue.ids"]
    assert (ids < 0).all()
    # The places that were never filled are images of their own, the two places of image 3 are one image.
    assert len(ids.unique()) == 9
    assert ids[0] == ids[2]
    pushed = task_model("retrieval")
    pushed.queue.push(*(F.normalize(torch.rand(4, 8), dim=1) for _ in range(2)), torch.arange(4))
    assert (to_albef(pushed.state_dict() | pushed.ema_state_dict(), fine_tuned=True)["idx_queue"] == -100).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_ours_has_their_names(task, tmp_path, caplog, monkeypatch):
    """A checkpoint knows its recipe; heads that ALBEF's model lacks are left out, as the log says."""
    monkeypatch.setattr(logging.getLogger("modstruct"), "propagate", True)
    model = task_model(task)
    if task == "retrieval":
        model.queue.push(*(F.normalize(torch.rand(10, 8), dim=1) for _ in range(2)), torch.arange(10))
    saved = Whole(
        dict(model.state_dict()),
        {},
        {},
        checkpoints.TrainState(),
        {"step": 1},
        recipe_to_dict(recipe_of(task)),
        model.ema_state_dict(),
    )
    write_whole(checkpoints.step_folder(tmp_path / "run", 1), saved, word_tokenizer())
    assert convert(["--to", "albef", "--weights", str(tmp_path / "run"), "--out", str(tmp_path / "x.pth")]) == 0
    made, right = torch.load(tmp_path / "x.pth", weights_only=True)["model"], task_weights(task)
    left_out = {"retrieval": "language_head", "text_assignment": "head"}
    assert (f"none: {left_out[task]}" if task in left_out else "") in caplog.text
    only_theirs = {n for n in right if n.startswith(("vision_proj", "text_proj", "temp", "ta_head"))}
    assert right.keys() - made.keys() == (only_theirs if task == "text_assignment" else set())
    if task != "text_assignment":  # ours has EMA weights there
        assert made.keys() == right.keys()
    for name in made.keys() & right.keys():
        if "position_" not in name:  # as many as the tokenizer's context
            assert made[name].shape == right[name].shape, name


@pytest.mark.parametrize("task", ["snli_ve", "nlvr2", "vqa"])
def test_the_forward_pass_is_albef_s(task):
    weights, model = task_weights(task), task_model(task).eval()
    start_from(model, Initial(word_tokenizer(), weights, Path("theirs.pth")))
    batch = {name: value for name, value in training_batch(rows=4).items() if name in ("image", "text")}
    plain, mask = PlainAlbef(weights, task_sizes(task)), batch["text"] != word_tokenizer().padding_id
    if task == "nlvr2":
        batch["image"] = torch.stack([batch["image"], batch["image"].flip(0)], dim=1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.backbone.mean, model.backbone.std))
    pixels = (batch["image"].double() / 255 - mean) / std
    images = [plain.image(one) for one in (pixels.unbind(1) if task == "nlvr2" else [pixels])]
    fused = plain.fuse(plain.text(batch["text"], mask), mask, *images)
    with torch.no_grad():
        if task == "vqa":
            question, seen = model.encode(batch)
            start = torch.full((4, 1), model.start_id)
            found = model._logits(model.decode(start, question, seen))[:, 0]
            torch.testing.assert_close(found.double(), plain.first_word(model.start_id, fused, mask), **CLOSE)
        else:
            torch.testing.assert_close(model.classify(batch).double(), plain.classes(fused), **CLOSE)
