"""`launch_scripts/export.py`: a checkpoint's weights with a card, the measured tables of these very weights in it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import modstruct
from modstruct.cli import parse_recipe_text
from modstruct.commands.export import export_checkpoint
from modstruct.config import Recipe

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints" / "written_by_0.1.0"
EVALUATION = Path(__file__).parent / "written_by_0.1.0" / "evaluation"


def test_the_card_has_the_tables_of_these_weights_and_of_no_others(tmp_path, capsys):
    run = CHECKPOINTS / "two_tower"
    recipe = parse_recipe_text(next(run.glob("checkpoints/*/recipe.yaml")).read_text())
    evaluation, out = tmp_path / "evaluation", tmp_path / "out"
    shutil.copytree(EVALUATION, evaluation)  # of this very checkpoint
    described = json.loads((evaluation / "model.json").read_text())
    (evaluation / "model.json").write_text(json.dumps(described | {"fingerprint": "0"}))
    with pytest.raises(ValueError, match=r"--results = .* is of other weights"):
        export_checkpoint(recipe, str(run), "open_clip", str(out), str(evaluation))
    assert not out.exists()
    export_checkpoint(recipe, str(run), "open_clip", str(out), str(EVALUATION))
    card = (out / "README.md").read_text()
    assert "### scenes\\_colour" in card
    assert "R@1" in card
    assert "24 (2 steps of 12)" in card
    assert "--results" not in capsys.readouterr().out
    export_checkpoint(recipe, str(run), "open_clip", str(tmp_path / "bare"))
    said = "bare; its card has no results: --results EVALUATION, of `evaluate.py full`, adds them"
    assert said in capsys.readouterr().out
    shutil.rmtree(tmp_path / "bare")
    modstruct.load(out, "cpu")
    neighbours = {tmp_path / f"out{end}" / "kept" for end in (".old", ".part")}
    for file in neighbours:
        file.parent.mkdir()
        file.touch()
    export_checkpoint(recipe, str(run), "open_clip", str(out), str(EVALUATION))  # takes the place of the earlier one
    assert {*tmp_path.iterdir()} == {evaluation, out, *(file.parent for file in neighbours)}
    assert all(file.exists() for file in neighbours)
    for number, harm in enumerate(
        [
            lambda folder: (folder / ".git").mkdir(),  # a clone to push from
            lambda folder: (folder / "README.md").unlink(),
            lambda folder: (folder / "README.md").write_text("# Mine\n\n---\n---\ntags: [modstruct, of another]\n"),
            lambda folder: (folder / "open_clip_config.json").unlink(),
            lambda folder: (shutil.rmtree(folder), folder.write_text("a file")),
        ]
    ):
        other = tmp_path / str(number)
        harm(shutil.copytree(out, other))
        with pytest.raises(ValueError, match=r"^--out = .* holds other files"):
            export_checkpoint(recipe, str(run), "open_clip", str(other))


def test_a_fusion_model_is_refused_by_name(tmp_path):
    run = CHECKPOINTS / "fusion"
    recipe = parse_recipe_text(next(run.glob("checkpoints/*/recipe.yaml")).read_text())
    with pytest.raises(ValueError, match=r"--format = 'onnx': a fusion model has no such form; open_clip"):
        export_checkpoint(recipe, str(run), "onnx", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # an import of it fails
    with pytest.raises(ValueError, match="--format = 'onnx': pip install onnx onnxruntime"):
        export_checkpoint(Recipe(), "no such run", "onnx", str(tmp_path / "out"))
