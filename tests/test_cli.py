"""Command lines: what wins over what, and one line for whatever is wrong."""

from __future__ import annotations

import runpy
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from modstruct import cli
from modstruct.commands.arguments import checkpoint_arguments
from modstruct.config import LossesConfig, Recipe, Source
from modstruct.config.migrations import SCHEMA
from modstruct.config.recipe_files import recipe_to_yaml

SCRIPTS = Path(__file__).parents[1] / "launch_scripts"
RECIPES = sorted(path.stem for path in cli.RECIPES.glob("*.yaml"))
METHODS = sorted(path.stem for path in (cli.RECIPES / "methods").glob("*.yaml"))
FUSION_METHODS = [name for name in METHODS if name.startswith("albef")]
TWO_TOWER_METHODS = [name for name in METHODS if name not in FUSION_METHODS]


@pytest.fixture(scope="module")
def parser():
    parser = cli.recipe_parser("A test.", "test")
    parser.add_argument("--resume")
    return parser


@pytest.fixture
def parse(parser):
    return lambda *arguments: cli.parse(parser, arguments)[0]


@pytest.fixture
def refused(parser, capsys):
    """The one line on standard error that a wrong command line ends with."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.parse(parser, arguments)
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def recipe_file(tmp_path):
    def write(content: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(content)
        return str(path)

    return write


def leaf_names(value: object, prefix: str = "") -> list[str]:
    inner = [(f.name, getattr(value, f.name)) for f in fields(value)]
    return [
        name
        for key, child in inner
        for name in (leaf_names(child, f"{prefix}{key}.") if is_dataclass(child) else [f"{prefix}{key}"])
    ]


def test_no_arguments_mean_the_scenes_recipe(parse):
    assert parse() == parse("--recipe", "scenes")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_by_name_and_by_path(parse, name):
    assert parse("--recipe", name) == parse(f"--recipe={cli.RECIPES / name}.yaml")


def on(recipe) -> dict[str, object]:
    losses = {field.name: getattr(recipe.losses, field.name) for field in fields(recipe.losses)}
    return {name: loss for name, loss in losses.items() if loss.weight > 0}


def weights(recipe) -> dict[str, float]:
    return {name: loss.weight for name, loss in on(recipe).items()}


RECIPE_NAMES = sorted(path.stem for path in cli.RECIPES.glob("*.yaml"))
ALBEF = {"queue_contrast": 1.0, "matching": 1.0, "masked_language": 1.0}
ON = {
    "albef": ALBEF,
    "albef_all": ALBEF | {"separation": 1.0, "bridge": 1.0, "geometry": 0.25},
    "albef_br": ALBEF | {"bridge": 1.0},
    "albef_gc": ALBEF | {"geometry": 0.25},
    "albef_inmodal": ALBEF,
    "albef_sep": ALBEF | {"separation": 1.0},
    "align": {"contrastive": 1.0, "alignment": 1.0},
    "align_uniform": {"contrastive": 1.0, "alignment": 1.0},
    "all": {"contrastive": 1.0, "separation": 1.0, "bridge": 1.0, "geometry": 0.25},
    "br": {"contrastive": 1.0, "bridge": 1.0},
    "clip": {"contrastive": 1.0},
    "clip_2v": {"contrastive": 1.0},
    "clip_inmodal": {"contrastive": 1.0},
    "cyclip": {"contrastive": 1.0, "geometry": 0.25},
    "gc": {"contrastive": 1.0, "geometry": 0.25},
    "sep": {"contrastive": 1.0, "separation": 1.0},
    "sep_no_ortho": {"contrastive": 1.0, "separation": 1.0},
    "siglip": {"sigmoid": 1.0},
}
IN_MODAL = {"align", "align_uniform", "all", "br", "clip_inmodal", "gc", "sep", "sep_no_ortho"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_every_method_over_every_recipe_turns_on_its_own_losses_alone(parse, recipe, name):
    framework = "fusion" if name in FUSION_METHODS else "two_tower"
    losses = parse("--recipe", recipe, "--method", name, "--framework", framework).losses
    assert weights(parse("--recipe", recipe, "--method", name, "--framework", framework)) == ON[name]
    assert losses.contrastive.in_modal == (name in IN_MODAL) or not losses.contrastive.weight
    assert losses.queue_contrast.in_modal == (name == "albef_inmodal")
    assert losses.contrastive.second_view == (name == "clip_2v") or not losses.contrastive.weight
    assert (losses.separation.orthogonality_weight == 0) == (name == "sep_no_ortho") or not losses.separation.weight
    assert losses.geometry.augmented == (name != "cyclip") or not losses.geometry.weight


def test_a_method_of_ones_own_turns_the_other_losses_off_and_keeps_their_other_fields(parse, recipe_file):
    method = recipe_file("losses: {bridge: {weight: 2}}")
    recipe = parse("--method", method, "--losses.geometry.normalize", "pairs", "--losses.sigmoid.weight", "1")
    assert weights(recipe) == {"bridge": 2.0, "sigmoid": 1.0}
    assert recipe.losses.contrastive.in_modal
    assert recipe.losses.geometry.normalize == "pairs"


def test_a_recipe_file_of_version_1_means_what_it_meant(parse, recipe_file):
    older = recipe_file("framework: fusion\nlosses: {queue_contrast: {weight: 1, positives: picture}}")
    recipe = parse("--recipe", older)
    assert weights(recipe) == {"contrastive": 1.0, "queue_contrast": 1.0}
    assert recipe.losses.queue_contrast.positives == "image"
    assert weights(parse("--recipe", recipe_file("schema: 2\nlosses: {bridge: {weight: 1}}"))) == {"bridge": 1.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--losses.queue_contrast.positives", "picture"], "give one of pair, image"),
        (["--method", "clip", "--losses.contrastive.weight", "0"], "losses.*.weight"),
        (["--schema", str(SCHEMA + 1)], "schema"),
    ],
)
def test_what_a_version_no_longer_has_is_refused_by_name(parse, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        parse(*words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_a_method_replaces_the_losses_and_nothing_else(parse, recipe_file, name):
    every_loss_on = "losses: {contrastive: {weight: 9, in_modal: true}, separation: {weight: 9}, bridge: {weight: 9}, "
    every_loss_on += "queue_contrast: {weight: 9}, matching: {weight: 9}, masked_language: {weight: 9}, "
    every_loss_on += "alignment: {weight: 9, uniformity_weight: 8}, "
    every_loss_on += "geometry: {weight: 9, augmented: false}}"
    framework = "fusion" if name in FUSION_METHODS else "two_tower"
    path = recipe_file(f"{every_loss_on}\noutput: runs/mine\nframework: {framework}")
    recipe = parse("--recipe", path, "--method", name)
    assert on(recipe).keys() == on(parse("--framework", framework, "--method", name)).keys()
    assert 9 not in [getattr(recipe.losses, field.name).weight for field in fields(LossesConfig)]
    assert recipe.output == "runs/mine"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_names_only_what_is_on(name):
    content = yaml.safe_load((cli.RECIPES / "methods" / f"{name}.yaml").read_text())
    assert {loss: section["weight"] for loss, section in content["losses"].items()} == ON[name]


def test_a_method_decides_whether_there_is_a_second_view_and_orthogonality(parse, recipe_file):
    path = recipe_file("losses: {contrastive: {second_view: true}, separation: {weight: 1, orthogonality_weight: 0}}")
    assert parse("--recipe", path).losses.contrastive.second_view
    losses = parse("--recipe", path, "--method", "sep").losses
    assert not losses.contrastive.second_view
    assert losses.separation.orthogonality_weight == 1
    assert not parse("--recipe", path, "--method", "clip").losses.contrastive.second_view


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--method", "clip_2v", "--losses.contrastive.in_modal", "true"], "losses.contrastive.second_view = True"),
        (["--method", "clip_2v", "--framework", "fusion"], "losses.contrastive.second_view = True"),
        (["--losses.separation.orthogonality_weight", "-1"], "losses.separation.orthogonality_weight = -1.0"),
        (["--losses.alignment.uniformity_weight", "inf"], "losses.alignment.uniformity_weight = inf"),
        (["--losses.alignment.smallest_cosine", "0"], "losses.alignment.smallest_cosine = 0.0"),
        (["--losses.alignment.uniformity_t", "0"], "losses.alignment.uniformity_t = 0.0"),
        (["--losses.alignment.form", "cosine"], "inverse_square, distance"),
    ],
)
def test_losses_that_cannot_be_are_refused(refused, words, field):
    assert field in refused(*words)


@pytest.mark.parametrize("loss", sorted(ALBEF))
def test_two_towers_have_no_losses_of_the_fusion_model(refused, loss):
    line = refused(f"--losses.{loss}.weight", "1")
    assert f"losses.{loss}.weight = 1.0: two towers have no fusion encoder" in line
    assert "framework: fusion" in line


def test_overrides_win_over_recipe_and_method_wherever_they_stand(parse):
    parts = (["--losses.bridge.weight", "0.5"], ["--recipe", "emoji"], ["--method", "br"], ["--output=runs/mine"])
    for turn in range(4):
        order = parts[turn:] + parts[:turn]
        recipe = parse(*(word for part in order for word in part))
        assert recipe.losses.bridge.weight == 0.5
        assert recipe.output == "runs/mine"
        assert recipe.losses.contrastive.in_modal  # of the method
        assert recipe.data.train == parse("--recipe", "emoji").data.train
    assert parse("--train.seed", "1", "--train.seed", "2").train.seed == 2


def test_a_method_may_be_a_file_of_ones_own(parse, recipe_file):
    path = recipe_file("losses: {bridge: {weight: 3.0}}")
    assert parse("--method", path).losses.bridge.weight == 3.0


def test_sources_with_weights_can_be_given_in_a_file_and_on_the_line(parse, recipe_file):
    expected = [Source("a.tar", 2.0), Source("b.tar")]
    assert parse("--data.train", "[{shards: a.tar, weight: 2}, {shards: b.tar}]").data.train == expected
    path = recipe_file("data: {train: [{shards: a.tar, weight: 2}, {shards: b.tar}]}")
    assert parse("--recipe", path).data.train == expected
    assert parse("--data.train", "[a.tar, b.tar]").data.train == ["a.tar", "b.tar"]
    assert parse("--data.train", "data/{000..009}.tar").data.train == "data/{000..009}.tar"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--train.step", "3"], ["train.step", "did you mean train.steps?"]),
        (["--geometry.weight", "0.1"], ["geometry.weight", "did you mean losses.geometry.weight?"]),
        (["--learning_rate=1"], ["learning_rate", "did you mean optimizer.learning_rate?"]),
        (["--optimizer.lr=1"], ["optimizer.lr", "optimizer has learning_rate, betas, eps"]),
        (["--model.vision.depth", "3"], ["model.vision.depth", "model.vision has image_size"]),
        (["--meth", "clip"], ["meth", "--help lists every field"]),
        (["stray"], ["stray"]),
        (["--train.steps", "many"], ["train.steps = many", "a whole number or null"]),
        (["--train.global_batch", "2.5"], ["train.global_batch = 2.5", "a whole number"]),
        (["--train.precision", "fp8"], ["train.precision = fp8", "one of fp32, bf16_mixed, bf16, fp16"]),
        (["--views.flip", "maybe"], ["views.flip = maybe", "true or false"]),
        (["--views.mean", "[0.5,0.5]"], ["views.mean = [0.5, 0.5]", "[a number, a number, a number]"]),
        (["--evaluation.top_k", "[one]"], ["evaluation.top_k", "a list of a whole number"]),
        (["--data.train", "[{weight: 3}]"], ["data.train: give", "a list of {shards, weight, "]),
        (
            ["--data.train", '[{"shards": "a.tar", "wieght": 2}]'],
            ["data.train = ", "no list of sources", "max_repeats"],
        ),
        (["--data.train", '[{"shards": "a.tar", "weight": 0}]'], ["data.train.weight = 0.0: give a finite number"]),
        (["--train.seed", "9223372036854775808"], ["train.seed = 9223372036854775808", "at most 9223372036854775807"]),
        (["--evaluation.top_k", "[99999999999999999999]"], ["evaluation.top_k = [99999999999999999999]", "at most"]),
        (["--train", "5"], ["train: a section", "it has global_batch, micro_batch"]),
        (["--views.crop_scale", "[0.9,0.1]"], ["views.crop_scale = (0.9, 0.1)", "0 < low <= high <= 1"]),
        (["--model.vision.patch_size", "0"], ["model.vision.patch_size = 0", "at least 1"]),
        (["--model.vision.patch_size", "7"], ["model.vision.patch_size = 7", "a divisor of"]),
        (["--model.text.heads", "0"], ["model.text.heads = 0", "at least 1"]),
        (["--model.pretrained", "openai"], ["model.pretrained = 'openai'", "needs model.name"]),
        (["--optimizer.learning_rate", "nan"], ["optimizer.learning_rate = nan", "a number"]),
        (["--optimizer.learning_rate", "0"], ["optimizer.learning_rate = 0.0", "above 0"]),
        (["--losses.bridge.weight=-1"], ["losses.bridge.weight = -1.0", "0 (off) or more"]),
        (
            ["--method", "clip", "--losses.contrastive.weight", "0"],
            ["losses.*.weight", "at least one weight must be above 0"],
        ),
        (
            ["--train.epochs", "3", "--train.steps", "9"],
            ["train.steps = 9", "exactly one of train.steps and train.epochs"],
        ),
        (["--recipe", "nope"], ["--recipe = 'nope'", "emoji, finetune_open_clip, scenes"]),
        (["--method", "nope"], ["--method = 'nope'", "clip_inmodal, cyclip"]),
        (["--recipe"], ["--recipe", "expected one argument"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else "",
)
def test_a_wrong_command_line_ends_with_one_line_that_says_what_is_right(refused, arguments, parts):
    line = refused(*arguments)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("optimiser: {learning_rate: 1}", ["optimiser.learning_rate", "did you mean optimizer.learning_rate?"]),
        ("optimizer: {learning_rat: 1}", ["optimizer.learning_rat", "did you mean optimizer.learning_rate?"]),
        ("model: {vision: {depth: 3}}", ["model.vision.depth", "model.vision has image_size"]),
        ("optimizer: {learning_rate: fast}", ["optimizer.learning_rate = fast", "a number"]),
        ("train: {precision: fp8}", ["train.precision = fp8", "one of fp32, bf16_mixed, bf16, fp16"]),
        ("optimizer: {learning_rate: .inf}", ["optimizer.learning_rate = inf", "finite"]),
        ("optimizer: 5", ["optimizer: a section", "it has learning_rate"]),
        ("data: {train: [{shards: a, weight: -1}]}", ["data.train"]),
        ("optimizer: {learning_rate: [1", ["--recipe", "recipe.yaml", "cannot be read as YAML", "line 1"]),
        (
            "train: {steps: 3, seed: 1,\n  steps: 4}",
            ["recipe.yaml", "line 2: the key 'steps' is there already, in line 1"],
        ),
        ("train.steps: 3\ntrain: {steps: 4}", ["recipe.yaml", "train.steps is given twice"]),
        ("train: {steps: 4}\ntrain.steps.x: 3", ["recipe.yaml", "train.steps.x is given twice"]),
        ("on: 3", ["on: no such field"]),
        ("output: no", ["output = False: give text (in quotes"]),
        ("output: 2024", ["output = 2024: give text (in quotes"]),
        ("- scenes", ["--recipe", "recipe.yaml", "must hold fields"]),
        ("", ["--recipe", "recipe.yaml", "must hold fields"]),
        ("output: !!python/object/apply:os.getcwd []", ["--recipe", "recipe.yaml", "cannot be read as YAML"]),
    ],
)
def test_a_wrong_recipe_file_ends_with_one_line_too(refused, recipe_file, content, parts):
    line = refused("--recipe", recipe_file(content))
    for part in parts:
        assert part in line


def test_dotted_names_in_a_recipe_file_are_its_sections(parse, recipe_file):
    """A recipe of version 1 has losses.contrastive.weight = 1 only where it does not say otherwise."""
    recipe = parse("--recipe", recipe_file("losses.contrastive.weight: 0.5\ntrain.steps: 3\ntrain: {seed: 4}"))
    assert (recipe.losses.contrastive.weight, recipe.train.steps, recipe.train.seed) == (0.5, 3, 4)


def test_help_lists_every_field_with_its_text(parser, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(parser, ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    entries = {block.split()[0]: block for block in text.split("\n  --")}
    for name in leaf_names(Recipe()):
        explained = entries[name].replace("\n", " ").split(" ", 2)[2]
        assert len(explained.split()) >= 3, name
    words = " ".join(text.split())
    for name in (*RECIPES, *METHODS):
        assert name in words
    assert "Shards of the final table; null for none." in words


TELLING = ["--output", "1e-4", "--logging.wandb", "2.e5", "--data.cache", "on", "--data.caption_fields", "{a.b: 1}"]
"""Texts and a name that YAML readers take for something else."""


@pytest.mark.parametrize("printing", ["--print_config", "--print_config=skip_default"])
@pytest.mark.parametrize(
    "arguments", [[], ["--recipe", "clip_rn50_cc3m", "--method", "siglip", "--train.seed", "5"], TELLING]
)
def test_the_printed_configuration_is_a_recipe_that_parses_to_the_same(
    parser, parse, recipe_file, capsys, arguments, printing
):
    with pytest.raises(SystemExit) as end:
        cli.parse(parser, [*arguments, printing])
    assert end.value.code == 0
    printed = recipe_file(capsys.readouterr().out)
    without_resume = cli.recipe_parser("", "")  # as tools are, which have no option of the script's
    assert cli.parse(without_resume, ["--recipe", printed])[0] == parse(*arguments)


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_recipe_parses_to_the_same(parse, recipe_file, name):
    recipe = parse("--recipe", name, "--data.train", "[{shards: a.tar, weight: 2.5}]", "--losses.bridge.t", "null")
    assert parse("--recipe", recipe_file(recipe_to_yaml(recipe))) == recipe


def test_text_that_looks_like_a_number_is_saved_as_text(parse, recipe_file):
    recipe = parse(*TELLING)
    text = recipe_to_yaml(recipe)
    assert cli.parse_recipe_text(text) == recipe
    earlier = text.replace("'1e-4'", "1e-4")  # as it was saved before
    assert cli.parse_recipe_text(earlier) == parse("--recipe", recipe_file(earlier)) == recipe


@pytest.mark.parametrize("arguments", [["--train.step", "3"], ["--recipe"], ["--help"], ["--print_config"]])
def test_other_processes_end_alike_and_stay_silent(parser, monkeypatch, capsys, arguments):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        cli.parse(parser, arguments)
    assert end.value.code == (0 if arguments[0] in ("--help", "--print_config") else 2)
    assert capsys.readouterr() == ("", "")


def run_script(name: str, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("name", ["pretrain", "evaluate"])
def test_the_launch_scripts_explain_and_refuse(monkeypatch, capsys, name):
    assert run_script(name, monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert "deepspeed" in text
    assert "--optimizer.learning_rate" in text
    assert run_script(name, monkeypatch, "--checkpoint", "nowhere", "--train.step", "3") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_evaluate_needs_a_checkpoint(monkeypatch, capsys):
    assert run_script("evaluate", monkeypatch) == 2
    assert "checkpoint" in capsys.readouterr().err


def test_a_checkpoints_recipe_is_the_base_that_overrides_change(parser, recipe_file, tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "recipe.yaml").write_text("output: runs/saved\ntrain: {seed: 4, steps: 7}")
    for given in (folder, tmp_path):
        arguments = checkpoint_arguments(["--train.seed", "5", "--checkpoint", str(given)])
        words = [word for word in arguments if word not in ("--checkpoint", str(given))]
        recipe, _ = cli.parse(parser, words)
        assert (recipe.output, recipe.train.steps, recipe.train.seed) == ("runs/saved", 7, 5)
    with pytest.raises(ValueError, match=r"--checkpoint = 'nowhere': is no checkpoint"):
        checkpoint_arguments(["--checkpoint", "nowhere"])


@pytest.mark.parametrize(("rank", "speaks"), [(0, True), (1, True), (3, False)])
def test_a_lost_process_is_said_in_one_line_and_not_by_all(monkeypatch, capfd, rank, speaks):
    """gloo's words for it are about sockets. Whoever is left says it, since the main process may be what is lost."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))

    def command():
        raise RuntimeError("[…/pair.cc:561] Connection closed by peer [127.0.0.1]:54974")

    with pytest.raises(SystemExit) as end:
        cli.run(command)
    assert end.value.code == 1
    said = "\n".join(line for line in capfd.readouterr().err.splitlines() if line.startswith("error"))
    assert len(said.splitlines()) == speaks
    assert ("another process has ended" in said) == speaks
    assert "pair.cc" not in said


def test_an_error_of_the_program_itself_keeps_its_traceback():
    def command():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(command)
