"""Command lines of the launch scripts: a recipe by name or file, a method, dotted overrides, --help, --print_config."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from modstruct.config import Recipe

RECIPES = Path(__file__).parent / "recipes"


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


def recipe_path(name: str, folder: Path = RECIPES, option: str = "--recipe") -> Path:
    """The file of a recipe (or method) by its name in modstruct/recipes, or the file itself if `name` is a path."""
    for path in (folder / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    raise ValueError(f"{option} = {name!r}: no such file; give a YAML file or one of {_names(folder)}")


def _expand(arguments: Sequence[str]) -> list[str]:
    """Recipe first, method second, overrides after them in the order given; names become files."""
    names = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names.add_argument("--recipe", default="scenes")
    names.add_argument("--method")
    chosen, rest = names.parse_known_args(arguments)
    files = [recipe_path(chosen.recipe)]
    if chosen.method:
        files.append(recipe_path(chosen.method, RECIPES / "methods", "--method"))
    return [word for file in files for word in ("--recipe", str(file))] + rest


def recipe_parser(description: str, usage: str) -> ArgumentParser:
    """Parser with every field of Recipe; the caller adds its own options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description,
        usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument(
        "--recipe",
        action=ActionConfigFile,
        help=f"Recipe: a YAML file, or one of {_names(RECIPES)} (default: scenes).",
    )
    parser.add_argument(
        "--method", help=f"Losses that replace the recipe's: a YAML file, or one of {_names(RECIPES / 'methods')}."
    )
    parser.add_argument("--local_rank", type=int, default=0, help="Set by the launcher.")
    parser.add_class_arguments(Recipe, as_group=True)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> tuple[Recipe, Namespace]:
    """The checked recipe and the caller's own options.

    A wrong key or value is said in one line, by one process, and all end with exit status 2.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = parser.parse_args(_expand(arguments))
        built = parser.instantiate_classes(options)
        return Recipe(**{field.name: built[field.name] for field in fields(Recipe)}), built
    except (ValueError, argparse.ArgumentError) as error:
        if is_first_process():
            print(f"error: {error}{_suggestion(parser, str(error))}", file=sys.stderr)
        sys.exit(2)


def checkpoint_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with the recipe of its --checkpoint in front, as the base of all overrides."""
    from modstruct.checkpoints import find  # here, so that --help needs no torch

    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--checkpoint")
    chosen = option.parse_known_args(arguments)[0].checkpoint
    found = chosen and find(chosen, chosen, "--checkpoint")
    return ["--recipe", str(found / "recipe.yaml"), *arguments] if found else list(arguments)


def _suggestion(parser: ArgumentParser, message: str) -> str:
    """The known key that an unknown one in the message comes nearest to."""
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    unknown = [word.removeprefix("--") for word in re.findall(r"[\w.-]+", message)]
    near = [match for word in unknown if word not in known for match in difflib.get_close_matches(word, known, 1, 0.8)]
    return f" (did you mean {near[0]}? --help lists every field)" if near else ""


def is_first_process() -> bool:
    """True on the process that speaks for all, before torch.distributed is up."""
    return int(os.environ.get("RANK", 0)) == 0
