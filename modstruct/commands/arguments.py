"""What a command line takes from a checkpoint: its recipe, or the sizes of its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modstruct.cli import (
    DEFAULT_RECIPE,
    RECIPES,
    ConfigParser,
    plain_parser,
    read_recipe_file,
    recipe_path,
    sections_of,
)
from modstruct.config.migrations import is_fine_tuning
from modstruct.errors import require


def checkpoint_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with the recipe of its --checkpoint in front, as the base of all overrides.

    Whoever made the checkpoint wrote that recipe, so shell commands need the user's own data.allow_pipe.
    """
    return _with_recipe_of_checkpoint(arguments, fine_tuned=False, safely=["--data.allow_pipe", "false"])


def task_checkpoint_arguments(arguments: Sequence[str]) -> list[str]:
    """The same of a fine-tuned --checkpoint."""
    return _with_recipe_of_checkpoint(arguments, fine_tuned=True, safely=[])


def _with_recipe_of_checkpoint(arguments: Sequence[str], fine_tuned: bool, safely: list[str]) -> list[str]:
    from modstruct.checkpoints import find  # here, so that --help needs no torch

    option = plain_parser()
    option.add_argument("--checkpoint")
    chosen = option.parse_known_args(arguments)[0].checkpoint
    found = chosen and find(chosen, chosen, "--checkpoint")
    if not found:
        return list(arguments)
    recipe = found / "recipe.yaml"
    is_fine_tuned = is_fine_tuning(read_recipe_file(recipe))
    remedy = "a fine-tuned model: `evaluate.py task`" if is_fine_tuned else "a pre-trained model: `evaluate.py`"
    require(is_fine_tuned == fine_tuned, "--checkpoint", chosen, f"{remedy} measures it")
    return ["--recipe", str(recipe), *safely, *arguments]


def take_initial_sizes(parser: ConfigParser, arguments: Sequence[str]) -> Sequence[str]:
    """Make sizes and colours of the --init model, where that is a run or checkpoint of ours, the recipe's defaults.

    Whoever made it wrote its recipe, so what that names to be read or fetched is left out: its weights are all there.
    """
    from modstruct.models.fusion.initial_weights import recipe_of  # here, so that --help needs no torch

    recipes = parser.recipes or RECIPES
    option = plain_parser()
    option.add_argument("--init")
    option.add_argument("--recipe", default=DEFAULT_RECIPE[recipes])
    given = option.parse_known_args(arguments)[0]
    named_by_recipe = read_recipe_file(recipe_path(given.recipe, recipes)).get("init")
    chosen = named_by_recipe if given.init is None else given.init
    # Published files bring no sizes, and one that the recipe names need not be there when only --help is wanted.
    chosen = chosen if isinstance(chosen, str) and chosen != "null" and Path(chosen).expanduser().is_dir() else None
    made_with = recipe_of(chosen) if chosen else {}
    colours = made_with.get("views") or {}
    sizes = _dotted(made_with.get("fusion", {}), "fusion")
    sizes |= {f"views.{name}": colours[name] for name in ("mean", "std") if name in colours}
    sections = sections_of(parser.config_type)
    for name in sizes:
        section, _, field = name.rpartition(".")
        known = name not in sections and field in sections.get(section, ())
        require(known, "--init", chosen, f"its recipe gives {name}, which is no field of a fusion model")
    parser.set_defaults({n: value for n, value in sizes.items() if n.rpartition(".")[2] not in ("init", "pretrained")})
    return arguments


def _dotted(value: object, name: str) -> dict[str, object]:
    """The plain values in a section by their dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {dotted: plain for key, inner in value.items() for dotted, plain in _dotted(inner, f"{name}.{key}").items()}
