"""Information of captions and images about labels (Jiang et al. 2023, section 3), of an embedded set."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from modstruct.data.synthetic.drawing import draw
from modstruct.data.synthetic.factors import Scene
from modstruct.errors import refuse, require
from modstruct.evaluation.classification.features import Features
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.information.probes import ProbeConfig, held_out_losses
from modstruct.evaluation.information.scenes import TARGETS, ExactInformation, exact_information, split_of_scenes
from modstruct.evaluation.retrieval.rows import check_rows
from modstruct.evaluation.statistics import bootstrap_mean, mean_interval

CPU = torch.device("cpu")
SET_LABEL = "label"
"""Name of the classes that a set was embedded with, where they came from no field of the metadata."""
PIXEL_SIDE = 16
DEFAULT = ProbeConfig()
NOTES = (
    "text, image, joint and shared are held-out estimates from below: H(Y) less a probe's cross-entropy is at most the "
    "information, on average over rows; a better probe may find more.",
    "gap is the difference of two bounds from below, and no bound of Delta_p, neither from below nor from above: it is "
    "too large where the probe of the poorer modality misses more, too small where that of the richer one does.",
    "excess, the left side of Theorem 3.1, is a difference of two bounds as well.",
    "The probes see features of frozen encoders, words and pixels, not caption and image themselves: what those "
    "leave out is lost (data processing), so that the information of the modalities may be larger still.",
    "Intervals are over rows with the fitted probes held fixed, and do not cover a probe's bias.",
    "The theorem is about exactly aligned features. Those of a model are not: excess may then be smaller than the gap.",
)
EXACT_NOTE = (
    "exact: from the generator's probabilities. The training split is independent draws of them; validation and test "
    "redraw a scene or caption that occurred before, which makes scenes of one object slightly rarer."
)
DRAWN_SIDE = 64
"""Pixels a side at which a scene is rendered, before it is averaged down."""
WORD = re.compile(r"\w+(?:['-]\w+)*")


def measure_information(
    embedded: EmbeddedSet,
    labels: Sequence[str] = (),
    config: ProbeConfig | None = None,
    device: torch.device = CPU,
    progress: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Estimates of I(X_T; Y), I(X_V; Y), I(X_T, X_V; Y), Delta_p and both sides of Theorem 3.1 (Jiang et al. 2023).

    embedded: with captions. labels: fields of its metadata, numbers or texts, or the field that its classes came from;
    by default those classes, and for built-in scenes all factors whose exact values are known. Pairs whose image has no
    value are left out; at most config.rows pairs are used, drawn at random. Features: "image_features" and
    "text_features" where the set has them, else the shared embeddings; the words of the captions; for built-in scenes
    small renderings. Runs on one process.
    Returns the content of METRIC.json but for "command", with `information_metrics` by label, and the outcomes
    "LABEL/text", … (rows,) float32: the information that the probes found in each row, H(Y) less loss. Raises
    ValueError for a set without captions, and for a label that is missing, has values that are no classes, or fewer
    than two of them.
    """
    config = config or ProbeConfig()
    started = time.perf_counter()
    if not len(embedded.pairs):
        refuse("set", embedded.name, "has no captions: the information gap is between captions and images")
    for array in sorted(embedded.arrays & {"image", "text", "image_features", "text_features"}):
        check_rows(f"{embedded.name}'s {array}", embedded.rows(array))
    split = split_of_scenes(embedded.metadata)
    metrics: dict[str, Any] = {}
    outcomes: dict[str, np.ndarray] = {}
    chosen, rows = {}, {}
    for label in tqdm(labels or _known_labels(embedded, split), desc="labels", disable=not progress, leave=False):
        numbers, names = label_numbers(embedded, label)
        pairs = _drawn_pairs(embedded.pairs, numbers, config)
        features, questions = _features(embedded, pairs, numbers[pairs[:, 0]], split, config)
        groups = embedded.image_row[pairs[:, 0]]  # copies of an image are no independent evidence
        found = held_out_losses(features, questions, groups, len(names), config, device)
        surprise = label_surprise(numbers[pairs[:, 0]], len(names))
        losses = {name: loss.rows for name, loss in found.items()}
        exact = exact_information(label, split) if split else None
        metrics[label] = information_metrics(surprise, losses, groups, config, exact)
        outcomes |= {f"{label}/{name}": (surprise - loss).astype(np.float32) for name, loss in losses.items()}
        chosen[label] = {name: loss.chosen for name, loss in found.items()}
        rows[label] = len(pairs)
    result = {
        "metric": "information",
        "set": embedded.name,
        "figures": metrics,
        "curves": {},
        "settings": asdict(config)
        | {"chosen": chosen, "unit": "nats", "notes": [*NOTES, *([EXACT_NOTE] if split else [])]},
        "rows": dict(embedded.manifest["rows"]) | {"used": rows},
        "source_fingerprint": embedded.source.get("fingerprint"),
        "seconds": time.perf_counter() - started,
    }
    return result, outcomes


def label_numbers(embedded: EmbeddedSet, label: str) -> tuple[np.ndarray, list[str]]:
    """Class of each image, (n,) int64, -1 for none, and the classes that occur, in alphabetical order or the set's.

    label: a field of the metadata, or the name of the classes that the set was embedded with.
    """
    if embedded.labels is not None and label == _set_label(embedded):
        classes, numbers = np.unique(embedded.labels, return_inverse=True)
        offset = int(classes[0] == -1)
        names = [embedded.class_names[c] for c in classes[offset:]]
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
    """Features by name, and by question those that may answer it."""
    images, texts = pairs[:, 0], pairs[:, 1]
    found: dict[str, list] = {}
    for array, of in (("image", images), ("text", texts), ("image_features", images), ("text_features", texts)):
        if array in embedded.arrays:
            found[array] = [PairedRows(embedded.rows(array), of)]
    by_image = ["image_features" if "image_features" in found else "image"]
    by_text = ["text_features" if "text_features" in found else "text"]
    both = [(by_image[0], by_text[0])]
    if config.words:
        found["words"] = [bag_of_words([embedded.captions[row] for row in texts], config.words)]
        by_text.append("words")
        both.append((by_image[0], "words"))
    if split:
        found["pixels"] = [scene_pixels([embedded.metadata[row] for row in images], PIXEL_SIDE)]
        by_image.append("pixels")
    names = {" + ".join(pair) for pair in both}
    for pair in {*both, ("image", "text")}:
        found[" + ".join(pair)] = [array for name in pair for array in found[name]]
    questions = {
        "text": by_text,
        "image": by_image,
        "joint": [*by_text, *by_image, *names, "image + text"],
        "shared": ["image + text"],
    }
    used = {name for answers in questions.values() for name in answers}
    rows = np.arange(len(pairs))
    return {n: Features(tuple(found[n]), rows, labels) for n in sorted(used)}, questions


def label_surprise(labels: np.ndarray, classes: int) -> np.ndarray:
    """-log of the share of each row's label, (n,): its mean over rows is H(Y) of these rows, in nats."""
    return -np.log(np.bincount(labels, minlength=classes) / len(labels))[labels]


def information_metrics(
    surprise: np.ndarray,
    losses: Mapping[str, np.ndarray],
    groups: np.ndarray,
    config: ProbeConfig = DEFAULT,
    exact: ExactInformation | None = None,
) -> dict[str, dict]:
    """Metrics {"value", "low", "high", "rows"} in nats.

    surprise: (n,) of `label_surprise`. losses: held-out, (n,) each, "text", "image", "joint" and, where there are
    shared embeddings, "shared". groups: (n,), rows that are resampled together. config: of the intervals. Returns
      entropy                   H(Y) of these rows
      text, image, joint        H(Y) less the loss: estimates from below of I(X_T; Y), I(X_V; Y), I(X_T, X_V; Y)
      shared                    the same of both shared embeddings, I(Z_T, Z_V; Y)
      gap                       |text - image|, the estimate of Delta_p
      excess                    loss of "shared" less loss of "joint": the left side of Theorem 3.1
    and, where exact values are given, "exact" with entropy, text, image, joint, gap and aligned_excess (the smallest
    left side over exactly aligned features), and "bias", the estimate less the exact value.
    Intervals: over rows, for the fitted probes; they do not cover what better probes would find.
    """
    drawn = config.samples, config.level, config.seed, groups

    def mean(rows: np.ndarray) -> dict[str, float]:
        low, high = bootstrap_mean(rows, *drawn)
        return {"value": float(rows.mean()), "low": low, "high": high, "rows": len(rows)}

    metrics: dict[str, dict] = {"entropy": mean(surprise)}
    metrics |= {name: mean(surprise - loss) for name, loss in losses.items()}
    both = np.column_stack([losses["image"], losses["text"]])
    low, high = mean_interval(both, gap_of_losses, *drawn)
    metrics["gap"] = {"value": float(gap_of_losses(both.mean(0)[None])[0]), "low": low, "high": high, "rows": len(both)}
    if "shared" in losses:
        metrics["excess"] = mean(losses["shared"] - losses["joint"])
    if exact is not None:
        names = ("entropy", "text", "image", "joint", "gap")
        known = {name: float(getattr(exact, name)) for name in names}
        metrics["exact"] = {name: {"value": value} for name, value in known.items()}
        metrics["exact"]["aligned_excess"] = {"value": float(exact.aligned_excess)}
        metrics["bias"] = {name: {"value": metrics[name]["value"] - value} for name, value in known.items()}
    return metrics


def gap_of_losses(means: np.ndarray) -> np.ndarray:
    """|loss of one - loss of the other|, (s, 2) -> (s,): H(Y) is the same in both and cancels."""
    return np.abs(means[:, 0] - means[:, 1])


class PairedRows:
    """Rows of an embedding in the order of pairs, read on use. rows: (n, D); of: (p,), row of each pair."""

    def __init__(self, rows: np.ndarray, of: np.ndarray):
        self._rows, self._of = rows, of
        self.shape = (len(of), rows.shape[1])

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        return self._rows[self._of[places]]


def bag_of_words(captions: Sequence[str], largest: int, least: int = 3) -> np.ndarray:
    """Words and pairs of neighbouring words in each caption: (n, terms) float16, 0 or 1.

    The terms are the `largest` most frequent ones of those in at least `least` captions; equally frequent ones in
    alphabetical order. They are chosen without labels. Lower case, without punctuation.
    """
    found = [_terms(caption) for caption in captions]
    counts = Counter(term for terms in found for term in terms)
    frequent = sorted((-count, term) for term, count in counts.items() if count >= least)[:largest]
    column = {term: number for number, (_, term) in enumerate(frequent)}
    bags = np.zeros((len(captions), max(len(column), 1)), dtype=np.float16)
    for row, terms in enumerate(found):
        bags[row, [column[term] for term in terms if term in column]] = 1
    return bags


def _terms(caption: str) -> set[str]:
    words = WORD.findall(caption.lower())
    return {*words, *(f"{a} {b}" for a, b in pairwise(words))}


def scene_pixels(records: Sequence[Mapping[str, Any]], side: int) -> np.ndarray:
    """Images of built-in scenes, rendered from their records and averaged down: (n, 3 side^2) float16, 0 … 1."""
    pixels = np.empty((len(records), 3 * side**2), dtype=np.float16)
    for row, record in enumerate(records):
        image = draw(Scene.from_record(dict(record)), DRAWN_SIDE).resize((side, side), Image.Resampling.BOX)
        pixels[row] = np.asarray(image, dtype=np.float32).ravel() / 255
    return pixels
