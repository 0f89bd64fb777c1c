"""Checkpoints of version 0.1.0 resume and evaluate as that version did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from processes import run_on_processes
from safetensors.torch import load_file
from tiny_run import ds_config
from tiny_tasks import VOCABULARY, write_files

from modstruct.cli import config_parser, parse_recipe_text
from modstruct.config import FinetuneRecipe
from modstruct.config.migrations import migrate_checkpoint

WRITTEN = Path(__file__).parent / "written_by_0.1.0"
STEP = "step-00000002"


def resume(kind: str, folder: str) -> dict:
    """The final metrics of a resumed run, made in `folder`, which paths of the recipe are relative to."""
    import os

    os.chdir(folder)
    text = (Path("run/checkpoints") / STEP / "recipe.yaml").read_text()
    if kind in ("two_tower", "fusion"):
        from modstruct.training.pretrain import pretrain

        return pretrain(parse_recipe_text(text), ds_config("zero2"), "latest")
    from modstruct.training.finetune import finetune

    parser = config_parser("", "", FinetuneRecipe)
    built = parser.instantiate(parser.parse_string(yaml.safe_dump(migrate_checkpoint(yaml.safe_load(text)))))
    recipe = FinetuneRecipe(**{name: built[name] for name in FinetuneRecipe.__dataclass_fields__})
    return finetune(recipe, ds_config("zero2"), "latest")


def leaves(tree: object, name: str = "") -> dict[str, float]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{name}/{key}").items()}
    return {name: tree} if isinstance(tree, int | float) else {}


@pytest.mark.parametrize("kind", ["two_tower", "fusion", "snli_ve", "retrieval"])
def test_resumed_run_reaches_the_weights_and_metrics_of_the_version_that_wrote_it(kind, tmp_path):
    expected = json.loads((WRITTEN / kind / "after_step_4.json").read_text())
    shutil.copytree(WRITTEN / kind / "checkpoints", tmp_path / "run" / "checkpoints")
    if kind == "fusion":
        (tmp_path / "vocab.txt").write_text(VOCABULARY)
    elif kind != "two_tower":
        write_files(tmp_path)
    [metrics] = run_on_processes(resume, 1, kind, str(tmp_path))
    for file, sums in expected["sums"].items():
        tensors = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / file)
        assert tensors.keys() == sums.keys()
        for name, tensor in tensors.items():
            made = [tensor.double().sum().item(), tensor.double().square().sum().item()]
            assert made == pytest.approx(sums[name], rel=1e-5, abs=1e-5), name
    expected["metrics"].pop("sizes", None)  # whose keys have other names now
    expected["metrics"].pop("seconds", None)
    made, wanted = leaves(metrics), leaves(expected["metrics"])
    assert {name: made[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-4)
