"""Recipes of earlier versions, as this version reads them.

A recipe names its version in `schema`; one that does not is of version 1. What a version changed is a `Change` in
CHANGES, under the version that it leads to. To rename losses.bridge.t to losses.bridge.position, drop
views.flip and add train.colours (off: null), raise SCHEMA to 6 and write

    6: Change(
        renamed={"losses.bridge.t": "losses.bridge.position"},
        removed=("views.flip",),
        added={"train.colours": None},
    )

A whole loss section needs no entry: its default weight is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modstruct.errors import require

SCHEMA = 5
Tree = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """What a version changed, by dotted names."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Fields, old name -> new name."""
    values: Mapping[str, Mapping[object, object]] = field(default_factory=dict)
    """Field -> old value -> new value."""
    removed: tuple[str, ...] = ()
    """Fields that no longer mean anything."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Fields of a pre-training recipe whose default changed: the earlier one, for files that do not name them."""
    added: Mapping[str, object] = field(default_factory=dict)
    """Fields -> the value with which this version computes what the one before did. For checkpoints alone: a recipe
    file that does not name a field takes its default. Of a fine-tuning recipe only those in sections that it has."""
    added_to_pretraining: Mapping[str, object] = field(default_factory=dict)
    """The same, of fields that a section has in pre-training recipes alone."""


CHANGES: dict[int, Change] = {
    2: Change(
        values={"losses.queue_contrast.positives": {"picture": "image"}},
        defaults={"losses.contrastive.weight": 1.0},
    ),
    3: Change(added_to_pretraining={"data.caption_lines": False}),
    4: Change(
        added={
            "losses.queue_contrast.in_modal": False,
            "views.text": "eda",
            "data.scenes.told": 1.0,
            "losses.contrastive.second_view": False,
            "losses.separation.orthogonality_weight": 1.0,
        },
        added_to_pretraining={"model.vision.stem": "patch", "model.vision.pool": "cls"},
    ),
    5: Change(
        added={
            "train.gradient_sums": "whole",
            "train.float32_norms": False,
            "train.tf32": None,
            "train.ema_decay": None,
            "train.patch_dropout": 0.0,
            "train.unmasked_share": 0.0,
            "optimizer.layer_decay": 1.0,
            "optimizer.new_first_steps": 0,
            "optimizer.new_first_scale": True,
            "logging.projector": 0,
            "logging.wandb": None,
            "views.on": "loader",
        },
        added_to_pretraining={
            "data.caption_fields": None,
            "data.filter": None,
            "data.groups": 1,
            "data.order_version": 1,
            "data.read_ahead_mib": 64,
            "data.scaled_decoding": False,
            "evaluation.ema": False,
            "model.unlocked_image_layers": None,
            "model.unlocked_text_layers": None,
        },
    ),
}


def is_fine_tuning(recipe: Tree) -> bool:
    """Whether a recipe file describes a fine-tuning run."""
    return "task" in recipe


def migrate(recipe: Tree) -> Tree:
    """A recipe file's content as this version writes it. Raises ValueError for a version that is not known."""
    migrated = copy.deepcopy(recipe)
    for change in _changes_since(_version(recipe)):
        _apply(change, migrated)
        for name, value in {} if is_fine_tuning(recipe) else change.defaults.items():
            _set_if_missing(migrated, name, value)
    return migrated | {"schema": SCHEMA}


def migrate_method(method: Tree) -> Tree:
    """The content of a method's file, whose fields go by the same names; a method has no defaults."""
    version = _version(method)
    migrated = {name: copy.deepcopy(value) for name, value in method.items() if name != "schema"}
    for change in _changes_since(version):
        _apply(change, migrated)
    return migrated


def migrate_checkpoint(recipe: Tree) -> Tree:
    """A checkpoint's recipe: fields younger than it take the values that reproduce the code that wrote it."""
    migrated = migrate(recipe)
    for change in _changes_since(recipe.get("schema", 1)):
        if is_fine_tuning(recipe):
            added = {name: value for name, value in change.added.items() if name.partition(".")[0] in recipe}
        else:
            added = {**change.added, **change.added_to_pretraining}
        for name, value in added.items():
            _set_if_missing(migrated, name, value)
    return migrated


def _version(recipe: Tree) -> int:
    version = recipe.get("schema", 1)
    known = type(version) is int and 1 <= version <= SCHEMA
    require(known, "schema", version, f"this version of modstruct reads recipes of versions 1 to {SCHEMA}")
    return version


def _changes_since(version: int) -> list[Change]:
    return [CHANGES[later] for later in sorted(CHANGES) if later > version]


def _apply(change: Change, recipe: Tree) -> None:
    for old, new in change.renamed.items():
        section, key = _find(recipe, old)
        if section is not None:
            value = section.pop(key)
            require(_find(recipe, new)[0] is None, old, value, f"it is now called {new}, which the recipe gives, too")
            _set_if_missing(recipe, new, value)
            _drop_if_empty(recipe, old)
    for name, values in change.values.items():
        section, key = _find(recipe, name)
        if section is not None and isinstance(section[key], str):
            section[key] = values.get(section[key], section[key])
    for name in change.removed:
        section, key = _find(recipe, name)
        if section is not None:
            del section[key]
            _drop_if_empty(recipe, name)


def _find(recipe: Tree, name: str) -> tuple[Tree | None, str]:
    """The section that holds a field, None where it is not there, and the field's name in it."""
    *sections, key = name.split(".")
    node: object = recipe
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) and key in node else None), key


def _drop_if_empty(recipe: Tree, name: str) -> None:
    """Remove the sections of a field that has gone if nothing else is in them: this version may not know them."""
    section = name.rpartition(".")[0]
    parent, key = _find(recipe, section)
    if parent is not None and parent[key] == {}:
        del parent[key]
        _drop_if_empty(recipe, section)


def _set_if_missing(recipe: Tree, name: str, value: object) -> None:
    *sections, key = name.split(".")
    node = recipe
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):  # no section: the parser names it
            return
    node.setdefault(key, value)
