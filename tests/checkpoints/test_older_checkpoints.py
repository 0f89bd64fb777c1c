"""Checkpoints of version 0.1.0 resume and evaluate as that version did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from processes import run_on_processes
from tiny_run import ds_config
from tiny_tasks import VOCABULARY, write_files

from modstruct import checkpoints
from modstruct.cli import config_parser, parse_recipe_text
from modstruct.config import FinetuneRecipe
from modstruct.config.migrations import migrate_checkpoint

WRITTEN = Path(__file__).parent / "written_by_0.1.0"
STEP = "step-00000002"


def resume(kind: str, folder: str) -> dict[str, float]:
    """The final scalars of a resumed run, made in `folder`, which paths of the recipe are relative to."""
    import os

    from modstruct.evaluation.tables import scalars

    os.chdir(folder)
    text = (Path("run/checkpoints") / STEP / "recipe.yaml").read_text()
    if kind in ("two_tower", "fusion"):
        from modstruct.training.pretrain import pretrain

        return scalars(pretrain(parse_recipe_text(text), ds_config("zero2"), "latest").values())
    from modstruct.training.finetune import finetune

    parser = config_parser("", "", FinetuneRecipe)
    built = parser.instantiate(parser.parse_string(yaml.safe_dump(migrate_checkpoint(yaml.safe_load(text)))))
    recipe = FinetuneRecipe(**{name: built[name] for name in FinetuneRecipe.__dataclass_fields__})
    return scalars(finetune(recipe, ds_config("zero2"), "latest").values())


@pytest.mark.parametrize("kind", ["two_tower", "fusion"])
def test_captions_are_augmented_as_that_version_did(kind):
    recipe = parse_recipe_text((WRITTEN / kind / "checkpoints" / STEP / "recipe.yaml").read_text())
    assert (recipe.views.text, recipe.views.eda_rate, recipe.data.scenes.told) == ("eda", 0.1, 1.0)


RENAMED = {"text -> image R@": "text_to_image/recall_at_", "image -> text R@": "image_to_text/recall_at_"}


def flat(metrics: dict, name: str) -> dict[str, float]:
    """What version 0.1.0 wrote, nested, under the names of today's scalars."""
    if not isinstance(metrics, dict):
        return {name.removesuffix("/value").replace("/chance", "_chance"): metrics}
    found = {}
    for key, value in metrics.items():
        for old, new in RENAMED.items():
            key = key.replace("matched " + old, "matched_" + new).replace(old, new)
        found |= flat(value, f"{name}/{key}" if name else key)
    return found


@pytest.mark.parametrize("kind", ["two_tower", "fusion", "snli_ve", "retrieval"])
def test_resumed_run_reaches_the_weights_and_metrics_of_the_version_that_wrote_it(kind, tmp_path):
    expected = json.loads((WRITTEN / kind / "after_step_4.json").read_text())
    shutil.copytree(WRITTEN / kind / "checkpoints", tmp_path / "run" / "checkpoints")
    if kind == "fusion":
        (tmp_path / "vocab.txt").write_text(VOCABULARY)
    elif kind != "two_tower":
        write_files(tmp_path)
    [found] = run_on_processes(resume, 1, kind, str(tmp_path))
    saved = checkpoints.read(tmp_path / "run" / "checkpoints" / "step-00000004")
    for file, sums in expected["sums"].items():
        tensors = getattr(saved, file.removesuffix(".safetensors"))
        assert tensors.keys() == sums.keys()
        for name, tensor in tensors.items():
            made = [tensor.double().sum().item(), tensor.double().square().sum().item()]
            assert made == pytest.approx(sums[name], rel=1e-5, abs=1e-5), name
    for counts in ("sizes", "seconds", "skipped"):
        expected["metrics"].pop(counts, None)
    wanted = flat(expected["metrics"], "" if kind in ("two_tower", "fusion") else kind)
    assert len(wanted) > 1
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-4)
