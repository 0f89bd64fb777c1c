"""`evaluate.py` on a fusion model: the same metrics as the run's own, and matching as a second stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from processes import run_on_processes
from small_runs import small_recipe
from tiny_run import ds_config

from modstruct.config import Recipe


def measured_recipe(output: str, cache: str) -> Recipe:
    recipe = small_recipe(output, cache, 3, "albef_all", 12, None, 0, 0)
    data = replace(recipe.data, eval="scenes", zero_shot="scenes")
    return replace(recipe, data=data, evaluation=replace(recipe.evaluation, rerank=4))


def train_and_evaluate(output: str, cache: str) -> tuple[dict, dict]:
    from modstruct.commands.quick import evaluate_checkpoint
    from modstruct.training.pretrain import Pretraining

    run = Pretraining(measured_recipe(output, cache), ds_config("zero3"), None).build()
    with run.heartbeat:
        run.train()
        own = run.finish()
    again = evaluate_checkpoint(measured_recipe(output, cache), output, f"{output}/evaluation.json")
    return tuple({metric: result.to_json() for metric, result in of.items()} for of in (own, again))


def test_a_checkpoint_is_measured_as_the_run_measured_itself(tmp_path):
    found = run_on_processes(train_and_evaluate, 2, str(tmp_path / "run"), str(tmp_path / "cache"))
    own, again = found[0]
    assert found[1][0] == own
    for kind in ("retrieval", "reranked", "zero_shot"):
        assert own[kind]["values"] == again[kind]["values"]
    assert {name.partition("/")[0] for name in own["reranked"]["values"]} == {"text_to_image", "image_to_text"}
    written = json.loads(Path(tmp_path, "run", "evaluation.json").read_text())["results"]
    assert written["reranked"] == json.loads(json.dumps(again["reranked"]))
