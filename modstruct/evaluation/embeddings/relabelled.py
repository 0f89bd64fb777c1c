"""A set with other classes from a finished one of the same samples, whose embeddings are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.data.classification.labelled_shards import LabelledSamples
from modstruct.evaluation.embeddings import set_files
from modstruct.evaluation.embeddings.embedded_set import MANIFEST, EmbeddedSet
from modstruct.evaluation.embeddings.source import EmbeddingSource


def twin_of(folder: Path, source: EmbeddingSource, settings: dict[str, Any]) -> Path | None:
    """Beside a set that is to be embedded, a finished one of the same samples, model and settings, with other classes.

    Not where samples were left out: which, is known by reading them.
    """
    if not (source.content and isinstance(source.samples, LabelledSamples)):
        return None
    for path in sorted(folder.parent.glob(f"*/{MANIFEST}")):
        noted = set_files.read_json(path)
        before, of_classes = noted.get("settings", {}), ("source fingerprint", "classes")
        same = all(before.get(name) == value for name, value in settings.items() if name not in of_classes)
        same &= noted.get("source", {}).get("content") == source.content
        if same and noted["rows"]["image"] == len(source.samples) and not noted["skipped"]:
            return path.parent
    return None


def relabelled(
    twin: EmbeddedSet,
    source: EmbeddingSource,
    prompts: np.ndarray | None,
    settings: dict[str, Any],
    command: Sequence[str],
) -> EmbeddedSet:
    """What embedding a source would give, from the embeddings of the same samples with other classes."""
    metadata = list(map(source.samples.labelled, twin.metadata, twin.keys))
    made = replace(twin, name=source.name, labels=source.labels_of(metadata), class_prompts=prompts, metadata=metadata)
    made.class_names, made.templates = list(source.class_names), list(source.templates)
    made.label_field, made.source = source.label_field, source.noted
    made.settings, made.command, made.seconds, made.folder = settings, list(command), 0.0, None
    return made
