"""Command lines of the launch scripts: a recipe by name or file, a method, dotted overrides, --help, --print_config."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import logging
import os
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_dumper, set_parsing_settings
from tqdm import tqdm

from modstruct.config import LossesConfig, Recipe
from modstruct.config.migrations import SCHEMA, migrate, migrate_checkpoint, migrate_method
from modstruct.config.recipe_files import MAPPINGS, leaves, to_yaml
from modstruct.errors import (
    FailedElsewhere,
    LostProcess,
    RunError,
    escape_what_cannot_be_shown,
    printable,
    refuse,
    require,
)
from modstruct.files import disk_error, parse_yaml, read_yaml
from modstruct.list_options import list_words
from modstruct.stopping import has_failed, is_first_process, requested

RECIPES = Path(__file__).parent / "config" / "recipes"
FINETUNE_RECIPES = RECIPES / "finetune"


LARGEST = 2**63 - 1
NO_HOME = "Could not determine home directory"  # as pathlib says it
HOME_REMEDY = "this user has no home directory: set it, or give data.cache, and what else begins with ~, as full paths"
LOSSES_OFF = {loss.name: {"weight": 0.0} for loss in fields(LossesConfig)}
OWN_SCRIPT = {RECIPES: "pretrain.py", FINETUNE_RECIPES: "finetune.py"}
NO_METHOD = (
    "a downstream task has losses of its own; methods are of launch_scripts/pretrain.py: --model.pretrained goes on "
    "from two towers (recipe finetune_open_clip), --fusion.init from a fusion model"
)
DEFAULT_RECIPE = {RECIPES: "scenes", FINETUNE_RECIPES: "vqa"}


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


def recipe_path(name: str, folder: Path = RECIPES, option: str = "--recipe") -> Path:
    """The file of a recipe (or method) by its name in modstruct/config/recipes, or the file itself if it is a path."""
    for path in (folder / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    for others, script in OWN_SCRIPT.items():
        if folder in OWN_SCRIPT and (others / f"{name}.yaml").is_file():
            refuse(option, name, f"is a recipe of launch_scripts/{script}: start that")
    refuse(option, name, f"no such file; give a YAML file or one of {_names(folder)}")


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The fields in a file; refused, by the file's name, where it holds anything else."""
    try:
        content = read_yaml(path)
        fields = nested(content) if isinstance(content, dict) else None
    except (OSError, ValueError) as error:
        refuse("--recipe", str(path), f"cannot be read as YAML: {' '.join(str(error).split())}")
    if fields is None:
        refuse("--recipe", str(path), "must hold fields (name: value) and nothing else")
    return fields


def nested(recipe: dict[str, Any], into: dict[str, Any] | None = None, prefix: str = "") -> dict[str, Any]:
    """A recipe's fields, dotted ones (`train.steps: 5`) in their sections.

    Raises ValueError for a field given both ways, of which one would silently replace the other.
    """
    made = {} if into is None else into
    for name, value in recipe.items():
        *sections, field = name.split(".")
        place: Any = made
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        is_section = isinstance(value, dict) and f"{prefix}{name}" not in MAPPINGS
        both_sections = is_section and isinstance(place, dict) and isinstance(place.get(field, {}), dict)
        if not both_sections and (not isinstance(place, dict) or field in place):
            raise ValueError(f"{prefix}{name} is given twice, and only one of the two would count; leave one out")
        if is_section:
            nested(value, place.setdefault(field, {}), f"{prefix}{name}.")
        else:
            place[field] = value
    return made


def _expand(arguments: Sequence[str], recipes: Path) -> list[str]:
    """Recipe first, method second, overrides after them in the order given; names become files."""
    names = plain_parser()
    names.add_argument("--recipe", default=DEFAULT_RECIPE[recipes])
    names.add_argument("--method")
    chosen, rest = names.parse_known_args(arguments)
    require(recipes == RECIPES or chosen.method is None, "--method", chosen.method, NO_METHOD)
    path = recipe_path(chosen.recipe, recipes)
    # A checkpoint's own recipe stands beside its state.
    migrated = (migrate_checkpoint if (path.parent / "state.json").is_file() else migrate)(read_recipe_file(path))
    contents = [migrated]
    if chosen.method:
        method = migrate_method(read_recipe_file(recipe_path(chosen.method, RECIPES / "methods", "--method")))
        contents += [{"losses": LOSSES_OFF}, method]
    return _as_options(contents) + rest


def _as_options(contents: Sequence[dict[str, Any]]) -> list[str]:
    return [word for content in contents for word in ("--recipe", to_yaml(content))]


def plain_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)


class ConfigParser(ArgumentParser):
    """A parser that knows the dataclass it fills, and, of a recipe, the folder of those known by name."""

    config_type: type
    recipes: Path | None = None

    def dump(self, config: Namespace, *arguments: Any, **options: Any) -> str:
        """As YAML. Of a recipe its fields alone, which every script takes, without the script's own options; always
        with its schema, without which the text would be read as of version 1."""
        if not self.recipes:
            return super().dump(config, *arguments, **options)
        names = [field.name for field in fields(self.config_type)]
        text = super().dump(Namespace({name: config[name] for name in names}), *arguments, **options)
        if options.get("skip_default") and not text.startswith("schema:"):
            return f"schema: {SCHEMA}\n" + ("" if text.strip() == "{}" else text)
        return text


def config_parser(description: str, usage: str, config_type: type) -> ConfigParser:
    """Parser with every field of a dataclass; the caller adds its own options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_dumper("yaml", partial(to_yaml, default_flow_style=False, allow_unicode=True))
    parser = ConfigParser(
        description=description,
        usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,  # an abbreviated --recipe or --method would slip past _expand
    )
    parser.add_argument("--local_rank", type=int, default=0, help="Set by the launcher.")
    parser.add_class_arguments(config_type, as_group=True)
    parser.config_type = config_type
    return parser


def recipe_parser(description: str, usage: str, recipe_type: type = Recipe, recipes: Path = RECIPES) -> ConfigParser:
    """The same of a recipe, which comes first by its name or file. recipes: folder of those known by name."""
    parser = config_parser(description, usage, recipe_type)
    parser.add_argument(
        "--recipe",
        action=ActionConfigFile,
        help=f"Recipe: a YAML file, or one of {_names(recipes)} (default: {DEFAULT_RECIPE[recipes]}).",
    )
    if recipes == RECIPES:
        methods = _names(RECIPES / "methods")
        parser.add_argument("--method", help=f"Losses that replace the recipe's: a YAML file, or one of {methods}.")
    parser.recipes = recipes
    return parser


def parse(
    parser: ConfigParser,
    arguments: Sequence[str] | None = None,
    prepare: Callable[[Sequence[str]], Sequence[str]] = list,
) -> tuple[Any, Namespace]:
    """The checked recipe, or other dataclass of the parser, and the caller's own options.

    prepare: applied to the arguments first. A wrong key or value is said in one line, by one process, and all end with
    exit status 2.
    """
    escape_what_cannot_be_shown()
    sections = sections_of(parser.config_type)
    try:
        with nullcontext() if is_first_process() else redirect_stdout(io.StringIO()):  # --help is said once, too
            given = prepare(list_words(parser, sys.argv[1:] if arguments is None else arguments))
            options = parser.parse_args(_expand(given, parser.recipes) if parser.recipes else list(given))
        _check_sections(options, sections)
        _check_numbers(options)
        built = parser.instantiate(options)
        return _config_of(parser, built), built
    except (ValueError, argparse.ArgumentError) as error:
        if is_first_process():
            print(f"error: {printable(one_line(parser, error, sections))}", file=sys.stderr)
        sys.exit(2)


def parse_recipe_text(text: str) -> Recipe:
    """The recipe that `recipe_files.recipe_to_yaml` wrote; ValueError where it cannot be one."""
    parser = recipe_parser("", "")
    try:
        content = parse_yaml(text.encode("utf-8", "surrogatepass"))
        if not isinstance(content, dict):
            refuse("recipe", text[:40], "must hold fields (name: value) and nothing else")
        written = to_yaml(migrate_checkpoint(nested(content)))
        return _config_of(parser, parser.instantiate(parser.parse_string(written)))
    except (ValueError, argparse.ArgumentError) as error:
        raise ValueError(one_line(parser, error, sections_of(Recipe))) from error


def losses_of(method: str, options: Mapping[str, object]) -> LossesConfig:
    """Of a method. options: fields of its losses, by dotted name. Raises ValueError for wrong ones, in one line."""
    parser = recipe_parser("", "")
    words = [f"--losses.{name}={to_yaml(value, default_flow_style=True)}" for name, value in options.items()]
    try:
        path = recipe_path(method, RECIPES / "methods", "method")
        contents = [{"schema": SCHEMA, "losses": LOSSES_OFF}, migrate_method(read_recipe_file(path))]
        given = parser.parse_args([*_as_options(contents), *words])
        return _config_of(parser, parser.instantiate(given)).losses
    except (ValueError, argparse.ArgumentError) as error:
        raise ValueError(one_line(parser, error, sections_of(Recipe))) from error


def _config_of(parser: ConfigParser, built: Namespace) -> Any:
    config = parser.config_type(**{field.name: built[field.name] for field in fields(parser.config_type)})
    if isinstance(config, Recipe):
        config.losses.require_any()
    return config


def _check_sections(options: Namespace, sections: dict[str, list[str]]) -> None:
    """Refuse a plain value in the place of a section, which jsonargparse lets a recipe file give."""
    for name in sections:
        if not isinstance(options.get(name), Namespace):
            raise ValueError(not_a_section(name, sections))


def _check_numbers(options: Namespace) -> None:
    """Refuse whole numbers beyond those of arrays."""
    for name, value in leaves(options.as_dict()).items():
        listed = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        for number in listed:
            fits = not isinstance(number, int) or abs(number) <= LARGEST
            require(fits, name, value, f"whole numbers are at most {LARGEST}, and at least -{LARGEST}")


def speaks_for_its_host() -> bool:
    """Whether this process reports what all others of its host notice too; on the main process's host, two may, since
    the main process may be what they have lost."""
    return int(os.environ.get("RANK", 0)) <= 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0


def run(command: Callable[[], object], told: str = "") -> None:
    """Carry out a command; an error that the user can mend is one line, and its traceback stands in the run's log.

    told: what the first line says besides; it comes before PyTorch is loaded, which takes a minute on a busy machine.
    """
    if is_first_process():
        count = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
        processes = "one process" if count == 1 else f"{count} processes"
        print(f"Starting on {processes}{told and '; '}{told}", file=sys.stderr, flush=True)
    try:
        try:
            command()
        except RuntimeError as error:
            require(NO_HOME not in str(error), "HOME", os.environ.get("HOME"), HOME_REMEDY)
            lost = LostProcess.if_it_is(error)
            if lost is None:
                raise
            raise lost from error
    except (ValueError, RunError, OSError) as error:
        logging.getLogger("modstruct").debug("traceback", exc_info=True)
        trouble = disk_error(error)
        quiet = not is_first_process() and isinstance(error, FailedElsewhere)
        if isinstance(error, LostProcess):  # all that are left notice
            # A Ctrl-C ends all, and the first to go is missed by the others.
            quiet = not speaks_for_its_host() or requested() == signal.SIGINT
        if not quiet:
            # On a line of its own, not at the end of the progress bar, which the main process may have left unfinished.
            begin = "" if is_first_process() else "\n"
            tqdm.write(f"{begin}error (process {os.environ.get('RANK', 0)}): {printable(trouble)}", file=sys.stderr)
            sys.stderr.flush()
        has_failed(1)
        sys.exit(1)


def run_tool(command: Callable[[], int | None], errors: tuple[type[Exception], ...] = (OSError, RunError)) -> int:
    """The exit status of a tool: its command's (None is 0), or 2 where one of `errors` ends it, said in one line."""
    escape_what_cannot_be_shown()
    try:
        return command() or 0
    except errors as error:
        print(printable(f"error: {disk_error(error)}"), file=sys.stderr)
        return 2


# What is wrong with a command line or a recipe, in one line: field, value and what is allowed. jsonargparse says it in
# up to ten lines and in Python's types; where its wording is not known here, it is joined to one line as it is.
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_UNKNOWN = (
    re.compile(r"unrecognized arguments: --([\w.-]+)"),
    re.compile(r"[Oo]ption '([\w.-]+)' is not accepted"),
    re.compile(r"Group '([\w.-]+)' does not accept option '([\w.-]+)'"),
)


def one_line(parser: ConfigParser, error: Exception, sections: dict[str, list[str]]) -> str:
    """The message of an error that parsing raised."""
    text = str(error)
    options = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    for pattern in _UNKNOWN:
        if found := pattern.search(text):
            return _unknown(".".join(found.groups()), list(options), sections)
    if ours := re.search(r"^\s+- ([\w.]+ = .+)$", text, re.MULTILINE):  # among what else the value could have been
        return ours[1]
    if lacking := re.fullmatch(r"the following arguments are required: ([\w., ]+)", text):
        names = (f"--{name}" if name in options else name for name in lacking[1].split(", "))
        return f"needed, and not given: {', '.join(names)}"
    key = re.search(r'Parser key "([\w.]+)"', text)
    name = key[1] if key else ""
    if name in sections:
        return not_a_section(name, sections)
    expected = getattr(options.get(name), "_typehint", None)
    if expected is None:
        return " ".join(text.split())
    value = text.rpartition("alue: ")[2].strip()  # "Given value: …" or "Got value: …"
    given = "" if "Namespace(" in value else f" = {value}"  # a source that jsonargparse has half built
    quoted = value in ("True", "False") or ("text" in allowed(expected) and value[:1] not in "[{")
    hint = " (in quotes, where YAML takes a word for something else: no, 2024)" if quoted else ""
    return f"{name}{given}: give {allowed(expected)}{hint}"


def allowed(expected: object) -> str:
    """What a type of the recipe means to a reader."""
    parts = typing.get_args(expected)
    origin = typing.get_origin(expected)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(allowed(part) for part in parts)
    if origin is tuple:
        return f"[{', '.join(allowed(part) for part in parts)}]"
    if origin is list:
        return f"a list of {allowed(parts[0])}"
    if dataclasses.is_dataclass(expected):
        return f"{{{', '.join(field.name for field in dataclasses.fields(expected))}}}"
    return next((name for kind, name in _NAMES.items() if kind is expected), str(expected))


def not_a_section(name: str, sections: dict[str, list[str]]) -> str:
    """The message for a section that was given a value."""
    return f"{name}: a section, which takes no value of its own; it has {', '.join(sections[name])}"


def _unknown(name: str, options: list[str], sections: dict[str, list[str]]) -> str:
    fields = [option for option in options if option not in sections]
    parent, _, leaf = name.rpartition(".")
    if shortened := [field for field in fields if field.endswith(f".{name}")]:  # as `modstruct.objective` takes them
        near = shortened
    elif parent in sections:
        near = [f"{parent}.{field}" for field in difflib.get_close_matches(leaf, sections[parent], 1, 0.7)]
    else:
        near = difflib.get_close_matches(name, fields, 1, 0.85)
    near += [field for field in fields if field.rpartition(".")[2] == leaf]
    if near:
        return f"{name}: no such field (did you mean {near[0]}? --help lists every field)"
    if parent in sections:
        return f"{name}: no such field; {parent} has {', '.join(sections[parent])}"
    return f"{name}: no such field; --help lists every field"


def _sections(value: Any, name: str = "") -> dict[str, list[str]]:
    """The names of the fields inside value and inside each section in it, by dotted name."""
    inside = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    found = {name: list(inside)} if name else {}
    for field, inner in inside.items():
        if dataclasses.is_dataclass(inner):
            found |= _sections(inner, f"{name}.{field}" if name else field)
    return found


@cache
def sections_of(recipe_type: type) -> dict[str, list[str]]:
    """The names of the fields in each section of a recipe, by the section's dotted name."""
    return _sections(recipe_type())
