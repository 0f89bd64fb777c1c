"""The command line of fine-tuning: its recipes, and the sizes that the pre-trained model brings."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from modstruct import cli
from modstruct.commands.arguments import checkpoint_arguments, take_initial_sizes
from modstruct.config import FinetuneRecipe, TokenizerConfig
from modstruct.models.fusion.initial_weights import find_initial
from modstruct.tasks import TASKS

RECIPES = sorted(path.stem for path in cli.FINETUNE_RECIPES.glob("*.yaml"))


@pytest.fixture
def parser():
    return cli.recipe_parser("A test.", "test", FinetuneRecipe, cli.FINETUNE_RECIPES)


@pytest.fixture
def parse(parser):
    return lambda *arguments: cli.parse(parser, arguments, prepare=partial(take_initial_sizes, parser))[0]


def checkpoint(folder: Path, recipe: object) -> str:
    path = folder / "checkpoints" / "step-00000003"
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_run(parse, name):
    recipe = parse("--recipe", name)
    assert recipe.task.name in TASKS
    published = name.removeprefix(recipe.task.name) != ""
    assert recipe.data.source == ("files" if published else "scenes")
    assert (recipe.train.steps is None) == published
    assert recipe.output == f"runs/{name}"


def test_what_is_of_pretraining_is_refused_with_its_script(parse, capsys):
    for words, said in (
        (["--method", "gc"], "--method = 'gc': a downstream task has losses of its own; methods are of launch_scripts"),
        (["--recipe", "finetune_open_clip"], "'finetune_open_clip': is a recipe of launch_scripts/pretrain.py"),
    ):
        with pytest.raises(SystemExit):
            parse(*words)
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"'vqa': is a recipe of launch_scripts/finetune\.py"):
        cli.recipe_path("vqa")


def test_in_modal_contrast_is_refused(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--recipe", "retrieval", "--losses.queue_contrast.in_modal", "true")
    assert "losses.queue_contrast.in_modal = True: fine-tuning reads one view" in capsys.readouterr().err


def test_sizes_come_from_the_checkpoint_and_may_be_overridden(parse, tmp_path):
    fusion = {"embed_dim": 24, "vision": {"image_size": 32, "width": 20}, "text": {"width": 36, "heads": 3}}
    init = checkpoint(tmp_path, {"framework": "fusion", "fusion": fusion})
    recipe = parse("--recipe", "snli_ve", "--init", init, "--fusion.vision.image_size", "48")
    assert (recipe.fusion.embed_dim, recipe.fusion.vision.width, recipe.fusion.text.width) == (24, 20, 36)
    assert recipe.fusion.vision.image_size == 48


def test_files_that_the_checkpoints_recipe_names_are_left_alone(parse, tmp_path):
    """Whoever made the checkpoint wrote that recipe; and the weights of --init replace theirs anyway."""
    vision = {"name": "deit_tiny_patch16_224", "image_size": 32, "pretrained": "/made/by/others.pth"}
    fusion = {"init": "/made/by/others", "vision": vision, "text": {"pretrained": "others/model"}}
    recipe = parse("--recipe", "vqa", "--init", checkpoint(tmp_path, {"fusion": fusion}))
    assert (recipe.fusion.init, recipe.fusion.vision.pretrained, recipe.fusion.text.pretrained) == (None, None, None)
    assert recipe.fusion.vision.name == "deit_tiny_patch16_224"


@pytest.mark.parametrize(
    "recipe", [None, [1], "text", {"fusion": [1]}, {"fusion": {"colour": 3}}, {"fusion": {"text": 3}}]
)
def test_a_damaged_recipe_of_the_checkpoint_is_said_in_one_line(parse, tmp_path, capsys, recipe):
    with pytest.raises(SystemExit) as end:
        parse("--recipe", "vqa", "--init", checkpoint(tmp_path, recipe))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --init = ")
    assert err.count("\n") == 1


def test_an_export_without_its_recipe_is_said_in_one_line(parse, tmp_path, capsys):
    (tmp_path / "modstruct_model.safetensors").write_bytes(b"")
    for content in (None, "{", "[]", '{"recipe": 3}'):
        if content is not None:
            (tmp_path / "modstruct_config.json").write_text(content)
        with pytest.raises(SystemExit):
            parse("--recipe", "vqa", "--init", str(tmp_path))
        err = capsys.readouterr().err
        assert err.startswith("error: --init = ")
        assert err.count("\n") == 1


def test_nothing_to_start_from_and_no_tokenizer_is_said_by_init(tmp_path):
    with pytest.raises(ValueError, match=r"--init = None: .*tokenizer\.path"):
        find_initial(None, TokenizerConfig(), str(tmp_path))


def test_a_run_without_a_checkpoint_is_said_to_have_none(parse, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SystemExit):
        parse("--recipe", "vqa", "--init", str(tmp_path))
    assert "no checkpoint yet" in capsys.readouterr().err


def test_a_two_tower_model_is_called_one(parse, tmp_path, capsys):
    run = checkpoint(tmp_path / "run", {"framework": "two_tower", "fusion": {"embed_dim": 24}})
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "open_clip_config.json").write_text("{}")
    for init, said in (
        (run, "a model of framework two_tower; give one of framework fusion"),
        (str(tmp_path / "export"), "two towers exported in open_clip's form: give their run or checkpoint"),
    ):
        with pytest.raises(SystemExit):
            parse("--recipe", "vqa", "--init", init)
        assert f"--init = '{init}': {said}" in capsys.readouterr().err


def test_evaluate_refuses_a_fine_tuned_model_in_its_words(tmp_path):
    given = checkpoint(tmp_path, {"task": {"name": "vqa"}})
    with pytest.raises(ValueError, match=r"--checkpoint = .*a fine-tuned model"):
        checkpoint_arguments(["--checkpoint", given])
