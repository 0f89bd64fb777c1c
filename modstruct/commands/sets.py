"""Sets as the command line names them: captioned shards, labelled sets, the recipe's own data, the built-in scenes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from modstruct import distributed
from modstruct.config import Recipe, Source
from modstruct.data.classification.class_files import load_classes
from modstruct.data.classification.labelled_shards import check_labels
from modstruct.data.classification.registry import SCENES, open_labelled, parse_set, set_splits
from modstruct.data.run_data import BUILT_IN, scenes_of
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.data.shards.sources import as_sources
from modstruct.errors import printable, refuse
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.files import refusing

RECIPES_OWN = "eval"


def open_sets(
    words: Sequence[str], recipe: Recipe, image_size: int, all_splits: bool
) -> dict[str, tuple[str, EmbeddingSource]]:
    """The sets that are wanted, by name, each with the word that `read_set` finds it by again; every process calls it.

    image_size: of the scenes, where they are drawn. all_splits: training and validation splits of labelled sets too,
    those that are there. Raises ValueError or FileNotFoundError, naming the set, for one that is not known or whose
    files are missing or wrong, and for two of one name.
    """
    words = list(words) or ["scenes_colour" if recipe.data.eval == BUILT_IN else RECIPES_OWN]
    sources: dict[str, tuple[str, EmbeddingSource]] = {}
    for word in words:
        for one in (word, *(_other_splits(word) if all_splits else ())):
            try:
                found = distributed.main_first(partial(read_set, one, recipe, image_size))
            except (ValueError, OSError, distributed.FailedElsewhere) as error:
                if one == word:
                    raise
                if distributed.is_main():
                    print(printable(f"{one}: left out: {error}"), flush=True)
                continue
            if sources.setdefault(found.name, (one, found))[0] != one:
                refuse("--sets", found.name, "two sets have this name: give each one of its own")
    return sources


def read_set(word: str, recipe: Recipe, image_size: int) -> EmbeddingSource:
    """The set that a word names, opened by this process."""
    with refusing("data.cache", recipe.data.cache):
        return _read_set(word, recipe, image_size)


def _read_set(word: str, recipe: Recipe, image_size: int) -> EmbeddingSource:
    data = recipe.data
    if word == RECIPES_OWN:
        if data.eval is None:
            refuse("data.eval", None, "name the shards of the set `eval`, or other --sets")
        shards, classes = data.eval, data.zero_shot
        if BUILT_IN in (shards, classes):
            scenes = scenes_of(recipe, image_size)
            shards = scenes.test if shards == BUILT_IN else shards
            classes = None if classes == BUILT_IN and shards != scenes.test else classes
            classes = scenes.zero_shot if classes == BUILT_IN else classes
        samples = EvaluationSamples(as_sources(shards), data, "data.eval", distributed.is_main())
        named = load_classes(classes) if classes else None
        missing = named and distributed.is_main() and check_labels(named, samples.samples, data, "data.eval")
        if missing:
            refuse("data.zero_shot", classes, f"{missing}; correct `label` in the file, or give null")
        return EmbeddingSource.of_samples(RECIPES_OWN, samples, named)
    if _is_captioned(word):
        name, _, shards = word.partition("=")
        samples = EvaluationSamples([Source(shards)], data, f"--sets {name}", distributed.is_main())
        return EmbeddingSource.of_samples(name, samples)
    if word.partition(":")[0] in SCENES and "@" not in word:
        folder = Path(scenes_of(recipe, image_size).zero_shot).parent
        word = f"{word}@{folder}"
    return EmbeddingSource.of_labelled(open_labelled(word, data))


def splits_beside(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Sets that are the training or validation split of another one: its name -> (the other one, split)."""
    beside = {f"{name}-{split}": (name, split) for name in names for split in ("train", "validation")}
    return {name: beside[name] for name in names if name in beside}


def _other_splits(word: str) -> list[str]:
    """Words of the splits that a labelled set can have beside its usual one, unless the word names a split."""
    if word == RECIPES_OWN or _is_captioned(word):
        return []
    whole = word if word.partition(":")[0] not in SCENES or "@" in word else f"{word}@."  # the scenes' folder is known
    if parse_set(whole).split is not None:
        return []
    head, at, place = word.partition("@")
    return [f"{head}:{split}{at}{place}" for split in set_splits(whole)[:-1]]


def _is_captioned(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and "@" not in name and "/" not in name
