"""Information of caption and image about labels, of an embedded set, as a result with outcomes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from modstruct.errors import refuse, require
from modstruct.evaluation.classification.features import Features, Piece
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.information.gap import information_metrics, label_surprise
from modstruct.evaluation.information.inputs import PairedRows, bag_of_words, scene_pixels
from modstruct.evaluation.information.probes import ProbeConfig, held_out_losses
from modstruct.evaluation.information.scenes import TARGETS, exact_information, split_of_scenes
from modstruct.evaluation.retrieval.rows import check_rows

CPU = torch.device("cpu")
SET_LABEL = "label"
"""Name in the figures of the classes that a set was embedded with, where they came from no field."""
PIXEL_SIDE = 16
NOTES = (
    "text, image, joint and shared are held-out estimates from below: H(Y) less a probe's cross-entropy is at most the "
    "information, on average over rows; a better probe may find more.",
    "gap is the difference of two bounds from below, and no bound of Delta_p, neither from below nor from above: it is "
    "too large where the probe of the poorer modality misses more, too small where that of the richer one does.",
    "excess, the left side of Theorem 3.1, is a difference of two bounds as well.",
    "The probes see features of frozen encoders, words and pixels, not caption and image themselves: what those "
    "leave out is lost to them (data processing), so that the information of the modalities may be larger still.",
    "Intervals are over rows with the fitted probes held fixed, and know nothing of a probe's bias.",
    "The theorem is of exactly aligned features. Those of a model are not: excess may then be smaller than the gap.",
)
EXACT_NOTE = (
    "exact: from the generator's probabilities. The training split is independent draws of them; validation and test "
    "draw a scene or caption anew that came before, which makes scenes of one object a little rarer."
)


def measure_information(
    embedded: EmbeddedSet,
    labels: Sequence[str] = (),
    config: ProbeConfig | None = None,
    device: torch.device = CPU,
    progress: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """I(X_T; Y), I(X_V; Y), I(X_T, X_V; Y), Delta_p and both sides of Theorem 3.1 (Jiang et al. 2023), estimated.

    embedded: with captions. labels: fields of its metadata, numbers or texts, or the field its classes came from; by
    default those classes, and for built-in scenes all factors whose exact values are known. Pairs whose image has no
    value are left out. Of more pairs than config.rows, that many are drawn. Features: "image_features" and
    "text_features" where the set has them, else the shared embeddings; the words of the captions; for built-in scenes
    small images drawn anew. Runs in one process, without others.
    Returns the result in the form of METRIC.json (all but "command"), whose figures are by label and as
    `information_metrics` has them, and the outcomes "LABEL/text", … (rows,) float32: the information that the probes
    found in each row, H(Y) less loss. Raises ValueError for a set without captions, a label that is missing, whose
    values are no classes, or of which fewer than two occur.
    """
    config = config or ProbeConfig()
    begun = time.perf_counter()
    if not len(embedded.pairs):
        refuse("set", embedded.name, "has no captions: the information gap is between captions and images")
    for array in sorted(embedded.arrays & {"image", "text", "image_features", "text_features"}):
        check_rows(f"{embedded.name}'s {array}", embedded.rows(array))
    split = split_of_scenes(embedded.metadata)
    figures, outcomes, chosen, rows = {}, {}, {}, {}
    for label in tqdm(labels or _known_labels(embedded, split), desc="labels", disable=not progress, leave=False):
        numbers, names = label_numbers(embedded, label)
        pairs = _drawn_pairs(embedded.pairs, numbers, config)
        features, questions = _features(embedded, pairs, numbers[pairs[:, 0]], split, config)
        found = held_out_losses(features, questions, pairs[:, 0], len(names), config, device)
        surprise = label_surprise(numbers[pairs[:, 0]], len(names))
        losses = {name: loss.rows for name, loss in found.items()}
        exact = exact_information(label, split) if split else None
        figures[label] = information_metrics(
            surprise, losses, pairs[:, 0], config.samples, config.level, config.seed, exact
        )
        outcomes |= {f"{label}/{name}": (surprise - loss).astype(np.float32) for name, loss in losses.items()}
        chosen[label] = {name: loss.chosen for name, loss in found.items()}
        rows[label] = len(pairs)
    result = {
        "metric": "information",
        "set": embedded.name,
        "figures": figures,
        "curves": {},
        "settings": asdict(config)
        | {"chosen": chosen, "unit": "nats", "notes": [*NOTES, *([EXACT_NOTE] if split else [])]},
        "rows": dict(embedded.manifest["rows"]) | {"used": rows},
        "source_fingerprint": embedded.source.get("fingerprint"),
        "seconds": time.perf_counter() - begun,
    }
    return result, outcomes


def label_numbers(embedded: EmbeddedSet, label: str) -> tuple[np.ndarray, list[str]]:
    """Class of each image, (n,) int64, -1 for none, and the classes that occur, in alphabetical order or the set's.

    label: a field of the metadata, or of no field: the classes that the set was embedded with.
    """
    if embedded.labels is not None and label == _set_label(embedded):
        known, numbers = np.unique(embedded.labels, return_inverse=True)
        offset = int(known[0] == -1)
        names = [embedded.class_names[c] for c in known[offset:]]
        numbers = numbers.reshape(-1) - offset
    else:
        values = [record.get(label) for record in embedded.metadata]
        fields = sorted({field for record in embedded.metadata[:100] for field in record})
        require(any(v is not None for v in values), "labels", label, f"no image has it: name one of {fields}")
        broken = next((v for v in values if not isinstance(v, str | int | bool | None)), None)
        require(broken is None, "labels", label, f"has the value {broken!r}: name a field of texts or whole numbers")
        known = sorted({v for v in values if v is not None}, key=lambda v: (isinstance(v, str), v))
        place = {value: number for number, value in enumerate(known)}
        names = [str(value) for value in known]
        numbers = np.array([-1 if v is None else place[v] for v in values], dtype=np.int64)
    require(len(names) > 1, "labels", label, f"all images have the value {names[0] if names else None!r}: give two")
    return numbers, names


def _set_label(embedded: EmbeddedSet) -> str:
    return embedded.label_field or SET_LABEL


def _known_labels(embedded: EmbeddedSet, split: str | None) -> list[str]:
    if split:
        return list(TARGETS)
    if embedded.labels is None:
        refuse("labels", (), f"{embedded.name} has no classes: name fields of its metadata")
    return [_set_label(embedded)]


def _drawn_pairs(pairs: np.ndarray, numbers: np.ndarray, config: ProbeConfig) -> np.ndarray:
    """Pairs whose image has a class, at most config.rows of them, ascending by image."""
    pairs = pairs[numbers[pairs[:, 0]] >= 0]
    if config.rows and len(pairs) > config.rows:
        drawn = np.random.default_rng([config.seed, 3]).choice(len(pairs), config.rows, replace=False)
        pairs = pairs[np.sort(drawn)]
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


def _features(
    embedded: EmbeddedSet, pairs: np.ndarray, labels: np.ndarray, split: str | None, config: ProbeConfig
) -> tuple[dict[str, Features], dict[str, list[str]]]:
    """Features by name, and which of them may answer each question."""
    images, texts = pairs[:, 0], pairs[:, 1]
    found: dict[str, list] = {}
    for array, of in (("image", images), ("text", texts), ("image_features", images), ("text_features", texts)):
        if array in embedded.arrays:
            found[array] = [PairedRows(embedded.rows(array), of)]
    pictures = ["image_features" if "image_features" in found else "image"]
    captions = ["text_features" if "text_features" in found else "text"]
    both = [(pictures[0], captions[0])]
    if config.words:
        found["words"] = [bag_of_words([embedded.captions[row] for row in texts], config.words)]
        captions.append("words")
        both.append((pictures[0], "words"))
    if split:
        found["pixels"] = [scene_pixels([embedded.metadata[row] for row in images], PIXEL_SIDE)]
        pictures.append("pixels")
    names = {" + ".join(pair) for pair in both}
    for pair in {*both, ("image", "text")}:
        found[" + ".join(pair)] = [array for name in pair for array in found[name]]
    questions = {
        "text": captions,
        "image": pictures,
        "joint": [*captions, *pictures, *names, "image + text"],
        "shared": ["image + text"],
    }
    used = {name for asked in questions.values() for name in asked}
    rows = np.arange(len(pairs))
    return {n: Features((Piece(tuple(found[n]), rows),), labels) for n in sorted(used)}, questions
