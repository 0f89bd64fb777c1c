"""Command lines of the launch scripts: a recipe by name or file, a method, dotted overrides, --help, --print_config."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from tqdm import tqdm

from modstruct.cli_errors import SECTIONS, not_a_section, one_line
from modstruct.config import Recipe, RunError, refuse, require
from modstruct.yaml_files import read_yaml

RECIPES = Path(__file__).parent / "recipes"


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


def recipe_path(name: str, folder: Path = RECIPES, option: str = "--recipe") -> Path:
    """The file of a recipe (or method) by its name in modstruct/recipes, or the file itself if `name` is a path."""
    for path in (folder / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    raise ValueError(f"{option} = {name!r}: no such file; give a YAML file or one of {_names(folder)}")


def _check_recipe_file(path: Path) -> Path:
    """Refuse a file that is no mapping of fields, where the parser could not name the file."""
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        refuse("--recipe", str(path), f"cannot be read as YAML: {' '.join(str(error).split())}")
    require(isinstance(content, dict), "--recipe", str(path), "must hold fields (name: value) and nothing else")
    return path


def _expand(arguments: Sequence[str]) -> list[str]:
    """Recipe first, method second, overrides after them in the order given; names become files."""
    names = _plain_parser()
    names.add_argument("--recipe", default="scenes")
    names.add_argument("--method")
    chosen, rest = names.parse_known_args(arguments)
    files = [recipe_path(chosen.recipe)]
    if chosen.method:
        files.append(recipe_path(chosen.method, RECIPES / "methods", "--method"))
    return [word for file in files for word in ("--recipe", str(_check_recipe_file(file)))] + rest


def _plain_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)


def recipe_parser(description: str, usage: str) -> ArgumentParser:
    """Parser with every field of Recipe; the caller adds its own options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description,
        usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,  # an abbreviated --recipe or --method would slip past _expand
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


def parse(
    parser: ArgumentParser,
    arguments: Sequence[str] | None = None,
    prepare: Callable[[Sequence[str]], Sequence[str]] = list,
) -> tuple[Recipe, Namespace]:
    """The checked recipe and the caller's own options.

    prepare: applied to the arguments first. A wrong key or value is said in one line, by one process, and all end with
    exit status 2.
    """
    try:
        with nullcontext() if is_first_process() else redirect_stdout(io.StringIO()):  # --help is said once, too
            options = parser.parse_args(_expand(prepare(sys.argv[1:] if arguments is None else arguments)))
        _check_sections(options)
        built = parser.instantiate(options)
        return Recipe(**{field.name: built[field.name] for field in fields(Recipe)}), built
    except (ValueError, argparse.ArgumentError) as error:
        if is_first_process():
            print(f"error: {one_line(parser, error)}", file=sys.stderr)
        sys.exit(2)


def _check_sections(options: Namespace) -> None:
    """Refuse a plain value in the place of a section, which jsonargparse lets a recipe file give."""
    for name in SECTIONS:
        if not isinstance(options.get(name), Namespace):
            raise ValueError(not_a_section(name))


def checkpoint_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with the recipe of its --checkpoint in front, as the base of all overrides.

    Whoever made the checkpoint wrote that recipe, so shell commands need the user's own data.allow_pipe.
    """
    from modstruct.checkpoints import find  # here, so that --help needs no torch

    option = _plain_parser()
    option.add_argument("--checkpoint")
    chosen = option.parse_known_args(arguments)[0].checkpoint
    found = chosen and find(chosen, chosen, "--checkpoint")
    base = ["--recipe", str(found / "recipe.yaml"), "--data.allow_pipe", "false"] if found else []
    return [*base, *arguments]


def is_first_process() -> bool:
    """True on the process that speaks for all, before torch.distributed is up."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def run(command: Callable[[], object]) -> None:
    """Carry out a command; an error that the user can mend is one line, and its traceback stands in the run's log."""
    from modstruct.distributed import FailedElsewhere, LostProcess, speaks_for_its_host  # --help needs no torch

    try:
        try:
            command()
        except RuntimeError as error:
            lost = LostProcess.if_it_is(error)
            if lost is None:
                raise
            raise lost from error
    except (ValueError, RunError, OSError) as error:
        logging.getLogger("modstruct").debug("traceback", exc_info=True)
        quiet = not is_first_process() and isinstance(error, FailedElsewhere)
        if isinstance(error, LostProcess):  # all that are left notice
            quiet = not speaks_for_its_host()
        if not quiet:
            # On a line of its own, not at the end of the progress bar, which the main process may have left unfinished.
            begin = "" if is_first_process() else "\n"
            tqdm.write(f"{begin}error (process {os.environ.get('RANK', 0)}): {error}", file=sys.stderr)
            sys.stderr.flush()
        sys.exit(1)
