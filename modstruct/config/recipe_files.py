"""Recipes as text and as nested dictionaries, and what may differ when a run is resumed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from typing import Any

import yaml

from modstruct.config import FinetuneRecipe, Recipe
from modstruct.config.migrations import is_fine_tuning, migrate_checkpoint
from modstruct.errors import refuse, require

# What a resumed run may change: how long and how fast it learns, what it writes down, and where it finds helpers.
CHANGEABLE = (
    "optimizer.learning_rate",
    "optimizer.initial_learning_rate",
    "optimizer.final_learning_rate",
    "optimizer.warmup_steps",
    "train.steps",
    "train.epochs",
    "train.max_skipped_steps",
    "train.hang_timeout_minutes",
    "train.micro_batch",
    "train.gradient_sums",
    "train.activation_checkpointing",
    "train.compile",
    "logging",
    "evaluation",
    "checkpoints",
    "output",
    "data.train",  # where the samples lie; that they are the same is checked by fingerprint and filters
    "data.caption_lines",  # what is read by it likewise
    "data.allow_pipe",
    "data.validation",
    "data.test",
    "data.eval",
    "data.zero_shot",
    "data.cache",
    "data.workers",
    "data.pipe_cache_gib",
    "data.read_ahead_mib",
    "data.max_bad_share",
)

# Paths may differ from host to host; what lies there is compared instead.
PATHS = (
    "output",
    "init",
    "data.train",
    "data.validation",
    "data.eval",
    "data.test",
    "data.answers",
    "data.zero_shot",
    "data.cache",
    "tokenizer.path",
)


# Fields that are mappings, not sections.
MAPPINGS = ("data.caption_fields",)


def recipe_to_dict(recipe: Recipe | FinetuneRecipe) -> dict:
    """Nested plain dictionary (tuples become lists), as YAML reads it back."""
    return yaml.safe_load(recipe_to_yaml(recipe))


def recipe_to_yaml(recipe: Recipe | FinetuneRecipe) -> str:
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return to_yaml(plain(asdict(recipe)))


class _Dumper(yaml.SafeDumper):
    """Quotes text, too, that is a number to jsonargparse or in YAML 1.2, though not in PyYAML's 1.1: 1e-4."""


_NUMBER = re.compile(r"(?:[-+]?(?:\.[0-9_]+|[0-9][0-9_]*\.?[0-9_]*)[eE][-+]?[0-9]+|0o[0-7]+)$")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def to_yaml(tree: object, **options: Any) -> str:
    """Plain values as YAML whose text jsonargparse, too, reads as text."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, **options)


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    """A nested dictionary's values by their dotted names."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in MAPPINGS:
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_in(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _has_section(names: Iterable[str], section: str) -> bool:
    return any(name.startswith(f"{section}.") for name in names)


def decisive_fields(recipe: Recipe | FinetuneRecipe) -> dict[str, object]:
    """The fields by their dotted names, paths left out: equal on all hosts of a run."""
    return {name: value for name, value in leaves(recipe_to_dict(recipe)).items() if not _is_in(name, PATHS)}


def check_resumable(saved: dict, recipe: Recipe | FinetuneRecipe) -> None:
    """Refuse, by name, a recipe that differs from a checkpoint's in more than CHANGEABLE.

    saved: the checkpoint's recipe as a nested dictionary.
    """
    asked = recipe_to_dict(recipe)
    script = f"launch_scripts/{'finetune' if is_fine_tuning(saved) else 'pretrain'}.py"
    remedy = f"a run of {script}, which resumes it"
    require(is_fine_tuning(saved) == is_fine_tuning(asked), "--resume", saved.get("output"), remedy)
    before, now = leaves(migrate_checkpoint(saved)), leaves(asked)
    changed = []
    for name in sorted(before.keys() | now.keys()):
        if _is_in(name, CHANGEABLE):
            continue
        younger_loss = name.startswith("losses.") and not _has_section(before, name.rpartition(".")[0])
        if name not in before and younger_loss:
            if name.endswith(".weight") and now[name]:
                refuse(name, now[name], "the checkpoint is older than this loss: 0 (off)")
        elif name not in before:
            refuse(name, now[name], "the checkpoint's recipe lacks this field, and no migration gives it a value")
        elif name not in now:
            refuse(name, before[name], "the checkpoint was made with it, and this version has no such field")
        elif before[name] != now[name]:
            changed.append(name)
    if changed:
        first, *more = changed
        made_with = f"the checkpoint was made with {before[first]!r}"
        if more:
            shown = [f"{name} (was {before[name]!r})" for name in more]
            if len(shown) > 5:
                shown[5:] = [f"{len(shown) - 5} more"]
            made_with += f", and other values of {', '.join(shown)}"
            made_with += ": give --recipe, --method and options as the run's first command had them (its log.txt tells)"
        refuse(first, now[first], f"{made_with}; a resumed run may change only {', '.join(CHANGEABLE)}")
    filters = _filters(before)
    if filters != _filters(now):
        remedy = f"the checkpoint was made with {filters!r}; a resumed run must have the same filters"
        refuse("data.train.filter", _filters(now), remedy)


def _filters(fields: dict[str, object]) -> list[object]:
    """Of the sources of data.train in turn, equal neighbours once, since a source may be divided."""
    train, of_all = fields.get("data.train"), fields.get("data.filter")
    sources = train if isinstance(train, list) else [train]
    own = [source.get("filter") if isinstance(source, dict) else None for source in sources]
    return [text for text, _ in groupby((of_all if text is None else text) or "" for text in own)]
