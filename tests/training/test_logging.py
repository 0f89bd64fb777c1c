"""What a run writes for those who watch it: its recipe, what differs from the defaults, and elsewhere on request."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modstruct.config import DataConfig, LoggingConfig, Recipe, TrainConfig
from modstruct.evaluation.examples import ProjectedPoints
from modstruct.training.logging import Curves, Telemetry


def recipe(tmp_path, **options) -> Recipe:
    data = DataConfig(train="https://me:secret@host/0.tar?signature=secret")
    return Recipe(output=str(tmp_path), data=data, train=TrainConfig(steps=4, seed=3), logging=LoggingConfig(**options))


def test_tensorboard_shows_the_recipe_and_what_differs_from_the_defaults(tmp_path):
    telemetry = Telemetry(recipe(tmp_path), 0, 4)
    telemetry.scalars({"loss/total": 1.5}, 1)
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "seed: 3" in text
    told = str(events.SummaryMetadata("_hparams_/session_start_info"))
    assert "train.seed" in told
    assert "https://host/0.tar?" in told
    assert "secret" not in text + told
    assert "optimizer.learning_rate" not in told
    assert events.Scalars("loss/total")[0].value == 1.5


def test_the_projector_has_a_line_for_each_point(tmp_path):
    labels = [("image", "a\tred\nstar"), ("text", "a blue moon")]
    curves = Curves(tmp_path, purge_step=1)
    curves.embeddings("eval", ProjectedPoints(torch.eye(2), labels, torch.rand(2, 3, 32, 32)), 4)
    curves.close()
    told = next(tmp_path.rglob("metadata.tsv")).read_text().splitlines()
    assert told == ["modality\tcaption", "image\ta red star", "text\ta blue moon"]
    assert next(tmp_path.rglob("sprite.png")).stat().st_size > 0
    assert (tmp_path / "projector_config.pbtxt").is_file()


def test_weights_and_biases_is_started_before_tensorboard_and_goes_on_after_a_resume(tmp_path, monkeypatch):
    started = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: started.append(given)))
    for first_step in (0, 2):
        Telemetry(recipe(tmp_path, wandb="birds"), first_step, 4).close()
    one, two = started
    assert (one["project"], one["sync_tensorboard"], one["config"]["train"]["seed"]) == ("birds", True, 3)
    assert one["config"]["data"]["train"] == "https://host/0.tar?..."
    assert one["id"] == two["id"]
    assert two["resume"] == "allow"


def test_a_missing_package_is_refused_by_the_field(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging\.wandb = 'birds': needs a package that is missing"):
        Telemetry(recipe(tmp_path, wandb="birds"), 0, 4)
