"""Sets as the command line names them: captioned shards, labelled sets, the recipe's own data, the built-in scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modstruct import distributed
from modstruct.config import DataConfig, Recipe, Source, refuse
from modstruct.data.evaluation_samples import EvaluationSamples
from modstruct.data.labelled.class_files import load_classes
from modstruct.data.labelled.registry import SCENES, open_labelled, parse_set, set_splits
from modstruct.data.run_data import BUILT_IN
from modstruct.data.scenes.folder import ensure_scenes
from modstruct.data.sources import as_sources
from modstruct.evaluation.embedding import EmbeddingSource

RECIPES_OWN = "eval"


def set_words(words: Sequence[str], recipe: Recipe, all_splits: bool) -> list[str]:
    """The sets wanted, spelt so that `open_set` finds each again; labelled ones with all their splits, on request."""
    words = list(words) or ["scenes_colour" if recipe.data.eval == BUILT_IN else RECIPES_OWN]
    return [spelt for word in words for spelt in _with_splits(word, recipe, all_splits)]


def open_set(word: str, recipe: Recipe, image_size: int) -> EmbeddingSource:
    """The set that a word names; every process calls it. image_size: of the scenes, where they are drawn.

    Raises ValueError, naming the set, for one that is not known or whose files are missing or wrong.
    """
    return distributed.main_first(lambda: _open(word, recipe.data, image_size))


def splits_beside(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Sets that are the training or validation split of another one: its name -> (the other one, split)."""
    beside = {f"{name}-{split}": (name, split) for name in names for split in ("train", "validation")}
    return {name: beside[name] for name in names if name in beside}


def _with_splits(word: str, recipe: Recipe, all_splits: bool) -> list[str]:
    if word == RECIPES_OWN or _is_captioned(word) or not all_splits:
        return [word]
    whole = f"{word}@." if word in SCENES else word  # the scenes' folder is known
    parsed = parse_set(whole)
    if parsed.split is not None:
        return [word]
    *others, usual = set_splits(whole)
    head, _, place = word.partition("@")
    behind = f"@{place}" if place else ""
    return [f"{head}:{split}{behind}" for split in others] + [f"{head}:{usual}{behind}"] if others else [word]


def _open(word: str, data: DataConfig, image_size: int) -> EmbeddingSource:
    if word == RECIPES_OWN:
        if data.eval is None:
            refuse("data.eval", None, "name the shards of the set `eval`, or other --sets")
        shards, classes = data.eval, data.zero_shot
        if BUILT_IN in (shards, classes):
            scenes = ensure_scenes(data.scenes, data.cache, image_size)
            shards = scenes.test if shards == BUILT_IN else shards
            classes = None if classes == BUILT_IN and shards != scenes.test else classes
            classes = scenes.zero_shot if classes == BUILT_IN else classes
        samples = EvaluationSamples(as_sources(shards), data, "data.eval", distributed.is_main())
        return EmbeddingSource.of_samples(RECIPES_OWN, samples, classes and load_classes(classes))
    if _is_captioned(word):
        name, _, shards = word.partition("=")
        samples = EvaluationSamples([Source(shards)], data, f"--sets {name}", distributed.is_main())
        return EmbeddingSource.of_samples(name, samples)
    if word.partition(":")[0] in SCENES and "@" not in word:
        folder = Path(ensure_scenes(data.scenes, data.cache, image_size).zero_shot).parent
        word = f"{word}@{folder}"
    return EmbeddingSource.of_labelled(open_labelled(word, data))


def _is_captioned(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and "@" not in name and "/" not in name
