"""What a command line takes from a checkpoint: its recipe, or the sizes of its model."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from modstruct.cli import (
    DEFAULT_RECIPE,
    RECIPES,
    ConfigParser,
    plain_parser,
    read_recipe_file,
    recipe_path,
    sections_of,
)
from modstruct.config import DataConfig
from modstruct.config.migrations import is_fine_tuning
from modstruct.errors import printable, refuse, require
from modstruct.stopping import is_first_process


def checkpoint_arguments(arguments: Sequence[str], fine_tuned: bool = False) -> list[str]:
    """The command line with the recipe of its --checkpoint in front, as the base of all overrides.

    Whoever made the checkpoint wrote that recipe, so shell commands need the user's own data.allow_pipe; it writes to
    no folder that is no cache already, and is refused where it asks for more than MOST.
    """
    from modstruct.checkpoints import find  # here, so that --help needs no torch

    option = plain_parser()
    option.add_argument("--checkpoint")
    chosen = option.parse_known_args(arguments)[0].checkpoint
    found = chosen and find(chosen, chosen, "--checkpoint")
    if not found:
        return list(arguments)
    recipe = found / "recipe.yaml"
    content = read_recipe_file(recipe)
    is_fine_tuned = is_fine_tuning(content)
    remedy = "a fine-tuned model: `evaluate.py task`" if is_fine_tuned else "a pre-trained model: `evaluate.py`"
    require(is_fine_tuned == fine_tuned, "--checkpoint", chosen, f"{remedy} measures it")
    given = {word.partition("=")[0] for word in arguments}
    require_modest(content, given)
    safely = [] if fine_tuned else ["--data.allow_pipe", "false"]
    cache = _field(content, "data.cache")
    if "--data.cache" not in given and (own := own_cache(cache)) != cache:
        safely = [*safely, "--data.cache", str(own)]
    return ["--recipe", str(recipe), *safely, *arguments]


MOST = {
    "data.scenes.train_samples": 250_000,
    "data.scenes.validation_samples": 250_000,
    "data.scenes.test_samples": 250_000,
    "data.workers": 256,
    "data.read_ahead_mib": 1024,
    "data.max_image_pixels": 1_000_000_000,
    "evaluation.batch": 65_536,
    "model.vision.image_size": 4_096,
    "fusion.vision.image_size": 4_096,
}
"""Of what a recipe that others may have written asks of this machine; the sizes of its model are bounded by its weights
(models/bounded.py)."""
CACHED = ("indexes", "pipes", "scene-tasks-", "scenes-", "tokenizers")
"""With what the names of folders in a cache begin."""


def require_modest(recipe: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Refuse a checkpoint's recipe that asks for more than MOST. given: options of the user's own, which may."""
    for name, most in MOST.items():
        value = _field(recipe, name)
        if isinstance(value, (int, float)) and value > most and f"--{name}" not in given:
            remedy = f"at most {most:,} in a checkpoint's recipe, which others may have written"
            refuse(name, value, f"{remedy}; give --{name} yourself if it is right")


def own_cache(cache: object) -> object:
    """The data.cache of a recipe that others may have written, if it is a cache on this machine; else the default."""
    default = DataConfig().cache
    if cache is None or cache == default:
        return cache
    folder = Path(str(cache)).expanduser()
    with suppress(OSError):
        if any(name.startswith(CACHED) for name in os.listdir(folder)):
            return cache
    if is_first_process():
        told = f"data.cache = {cache} in the checkpoint's recipe is no cache here: {default} is used (--data.cache)"
        print(printable(told), flush=True)
    return default


def _field(recipe: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted field; None where the recipe does not give it."""
    node: Any = recipe
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


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
    made_with = recipe_of(chosen, framework="fusion") if chosen else {}
    require_modest({"fusion": made_with.get("fusion")}, {word.partition("=")[0] for word in arguments})
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
