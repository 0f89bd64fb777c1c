"""Information of captions and images about labels (Jiang et al. 2023, section 3), of an embedded set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from modstruct.data.synthetic.drawing import draw
from modstruct.data.synthetic.factors import Scene
from modstruct.data.synthetic.information import (
    TARGETS,
    ExactInformation,
    exact_information,
    split_of_scenes,
    told_of_scenes,
)
from modstruct.distributed.collect import share_out
from modstruct.errors import require
from modstruct.evaluation.classification.linear import Features
from modstruct.evaluation.embeddings.embedded_set import SET_LABEL, EmbeddedSet, label_numbers
from modstruct.evaluation.information.probes import Answer, Fold, ProbeConfig, Probed, drawn, folds_of, probed, shares
from modstruct.evaluation.result import Result, Value
from modstruct.evaluation.retrieval.rows import check_rows
from modstruct.evaluation.statistics import bootstrap_mean, mean_interval

PIXEL_SIDE, DRAWN_SIDE = 16, 64
"""Pixels a side of a scene as a feature, and at which it is rendered before it is averaged down."""
WORD = re.compile(r"\w+(?:['-]\w+)*")
ABOUT = (
    "How much caption and image tell of a label Y, in nats (1 nat = 1.44 bits; telling 8 equally frequent values apart "
    "takes ln 8 = 2.08). By theorem 3.1 of Jiang et al. (2023) exact alignment of the two embeddings costs at least "
    "the gap between what caption and image tell. Each information is H(Y) less the cross-entropy of a probe on "
    "held-out rows, an estimate from below, so that a gap of two estimates is no bound; where the exact values are "
    "known they stand beside it, with the bias."
)
LABELS = {
    "entropy": ("H(Y)", "Entropy of the label: what there is to tell."),
    "text": ("I(caption; Y)", "What probes of the caption, its features and words, tell of the label."),
    "image": ("I(image; Y)", "What probes of the image's features tell of the label."),
    "joint": ("I(caption, image; Y)", "What probes of both together tell of the label."),
    "shared": ("I(embeddings; Y)", "What probes of both shared embeddings, which the loss aligns, tell of the label."),
    "gap": ("Information gap", "|I(caption; Y) - I(image; Y)|, the estimate of the theorem's right side."),
    "excess": ("Excess loss", "Loss of the shared embeddings less that of both modalities, the theorem's left side."),
    "aligned_excess": ("Least excess loss", "The theorem's left side of the best exactly aligned features."),
}
NOTES = (
    "gap and excess are differences of two bounds from below, and no bound of Delta_p or of the theorem's left side: "
    "the gap is too large where the probe of the poorer modality misses more, too small where that of the richer does.",
    "The probes see features of frozen encoders, words and pixels, not caption and image themselves: what those leave "
    "out is lost (data processing), so that the information of the modalities may be larger still.",
    "Intervals are over rows with the fitted probes held fixed, and do not cover a probe's bias.",
    "The theorem is about exactly aligned features. Those of a model are not: excess may then be smaller than the gap.",
)
EXACT_NOTE = (
    "exact: from the generator's probabilities. The training split is independent draws of them; validation and test "
    "redraw a scene or caption that occurred before, which makes scenes of one object slightly rarer. One digit of the "
    "split rule remains there: all but one of an object's shape, colour, size and fill nearly tell the last, so that "
    "captions tell more of it than those of the training split."
)
UNKNOWN_NOTE = "no exact values: the samples' `told`, how much their captions tell, differs or is no fraction."


def measure(embedded: EmbeddedSet, config: ProbeConfig) -> Result:
    """Estimates of I(X_T; Y), I(X_V; Y), I(X_T, X_V; Y), Delta_p and both sides of Theorem 3.1 (Jiang et al. 2023).

    embedded: with captions. Pairs whose image has no value of a label are left out; at most config.rows pairs are used,
    drawn at random. Features: "image_features" and "text_features" where the set has them, else the shared embeddings;
    the words of the captions; for built-in scenes small renderings. Every process calls it; labels, folds and features
    are shared out. Values are those of `information_values`, named LABEL/…; the outcomes LABEL/text, … are the
    information that the probes found in each row, H(Y) less loss. Headlines are of the label that is the set's classes,
    else of the first. Raises ValueError for a set without captions, and for a label that is missing, has values that
    are no classes, or fewer than two of them.
    """
    require(len(embedded.pairs) > 0, "set", embedded.name, "has no captions: the gap is between captions and images")
    for array in sorted(embedded.arrays & {"image", "text", "image_features", "text_features"}):
        check_rows(f"{embedded.name}'s {array}", embedded.rows(array))
    split = split_of_scenes(embedded.metadata)
    told = told_of_scenes(embedded.metadata) if split else None
    labels = config.labels or (list(TARGETS) if split else [embedded.label_field or SET_LABEL])
    has_labels = bool(config.labels or split or embedded.labels is not None)
    require(has_labels, "labels", (), f"{embedded.name} has no classes: name fields of its metadata")
    probes = {}
    for label in labels:
        probes[label], questions = _probes(embedded, label, split, config)
    items = [(label, fold, name) for label, p in probes.items() for fold in p.folds for name in p.features]

    def one(item: tuple[str, Fold, str]) -> dict[str, Answer]:
        label, fold, name = item
        return probed(probes[label].features[name], fold, probes[label].classes, config)

    found = share_out(items, one, "probes")
    answers = {(label, fold.number, name): a for (label, fold, name), a in zip(items, found, strict=True)}
    values: dict[str, Value] = {}
    outcomes: dict[str, np.ndarray] = {}
    chosen = {}
    for label, own in probes.items():
        by_fold = [{name: answers[label, fold.number, name] for name in own.features} for fold in own.folds]
        losses, chosen[label] = best_answers(questions, own, by_fold)
        surprise = label_surprise(own.labels, own.classes)
        exact = exact_information(label, split, told) if split and told is not None else None
        made = information_values(surprise, losses, own.groups, config, exact)
        values |= {f"{label}/{name}": value for name, value in made.items()}
        outcomes |= {f"{label}/{name}": (surprise - loss).astype(np.float32) for name, loss in losses.items()}
    notes = [*NOTES, UNKNOWN_NOTE if told is None else EXACT_NOTE] if split else [*NOTES]
    groups = {label: label for label in probes} | {f"{label}/exact": f"{label}, exact" for label in probes}
    sizes = {"image": embedded.rows_of("image"), "text": embedded.rows_of("text")}
    main = next((label for label, own in probes.items() if _are_classes(embedded, own)), labels[0])
    headlines = (f"{main}/{name}" for name in ("text", "image", "gap", "exact/gap"))
    return Result(
        metric="information",
        set=embedded.name,
        values=values,
        title="Information",
        about=ABOUT,
        groups=groups | {f"{label}/bias": f"{label}, estimate less exact" for label in probes},
        headlines=tuple(name for name in headlines if name in values),
        settings=asdict(config) | {"chosen": chosen, "notes": notes} | ({"told": told} if split else {}),
        rows=sizes | {f"used for {label}": len(own.labels) for label, own in probes.items()},
        fingerprint=embedded.source.get("fingerprint"),
        outcomes=outcomes,
    )


def _probes(
    embedded: EmbeddedSet, label: str, split: str | None, config: ProbeConfig
) -> tuple[Probed, dict[str, list[str]]]:
    """Of the pairs whose image has a class, at most config.rows, ascending by image; and by question the names of the
    features that may answer it."""
    numbers, names = label_numbers(embedded, label)
    pairs = drawn(embedded.pairs[numbers[embedded.pairs[:, 0]] >= 0], config)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    features, questions = _features(embedded, pairs, numbers[pairs[:, 0]], split, config)
    groups = embedded.image_row[pairs[:, 0]]  # copies of an image are no independent evidence
    return Probed(features, pairs[:, 0], groups, len(names), folds_of(groups, config)), questions


def _are_classes(embedded: EmbeddedSet, of: Probed) -> bool:
    """Whether a label tells the same rows apart as the set's classes do, which may have another name: `label`."""
    if embedded.labels is None:
        return False
    classes, labels = embedded.labels[of.rows].tolist(), of.labels.tolist()
    return len({*zip(classes, labels, strict=True)}) == len({*classes}) == len({*labels})


def best_answers(
    questions: Mapping[str, Sequence[str]], of: Probed, by_fold: Sequence[Mapping[str, Mapping[str, Answer]]]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, int]]]:
    """Losses of each question, (n,): in each fold the probe with the least loss on tuning rows answers.

    by_fold: for each fold, by the name of the features, what `probed` found. The label's shares are among the probes
    that may answer. Returns also how often each probe was chosen.
    """
    losses = {question: np.empty(len(of.labels)) for question in questions}
    chosen: dict[str, Counter[str]] = {question: Counter() for question in questions}
    for fold, found in zip(of.folds, by_fold, strict=True):
        for question, names in questions.items():
            able = {"shares": shares(of.labels, fold, of.classes)}
            able |= {f"{n}, {kind}": answer for n in found if n in names for kind, answer in found[n].items()}
            best = min(able, key=lambda name: able[name][0])
            losses[question][fold.held_out] = able[best][1]
            chosen[question][best] += 1
    return losses, {question: dict(counts) for question, counts in chosen.items()}


def _features(
    embedded: EmbeddedSet, pairs: np.ndarray, labels: np.ndarray, split: str | None, config: ProbeConfig
) -> tuple[dict[str, Features], dict[str, list[str]]]:
    """Features by name, and by question those that may answer it."""
    images, texts = pairs.T
    found: dict[str, tuple[np.ndarray, ...]] = {
        array: (embedded.rows(array)[of],)
        for array, of in (("image", images), ("text", texts), ("image_features", images), ("text_features", texts))
        if array in embedded.arrays
    }
    by_image = ["image_features" if "image_features" in found else "image"]
    by_text = ["text_features" if "text_features" in found else "text"]
    if config.words:
        found["words"] = (bag_of_words([embedded.captions[row] for row in texts], config.words),)
        by_text.append("words")
    joint = {f"{by_image[0]} + {name}": found[by_image[0]] + found[name] for name in by_text}
    joint["image + text"] = found["image"] + found["text"]
    if split:
        found["pixels"] = (scene_pixels([embedded.metadata[row] for row in images], PIXEL_SIDE),)
        by_image.append("pixels")
    questions = {"text": by_text, "image": by_image, "joint": [*by_text, *by_image, *joint], "shared": ["image + text"]}
    rows, found = np.arange(len(pairs)), found | joint
    return {name: Features(found[name], rows, labels) for name in sorted(questions["joint"])}, questions


def label_surprise(labels: np.ndarray, classes: int) -> np.ndarray:
    """-log of the share of each row's label, (n,): its mean over rows is H(Y) of these rows, in nats."""
    return -np.log(np.bincount(labels, minlength=classes) / len(labels))[labels]


def information_values(
    surprise: np.ndarray,
    losses: Mapping[str, np.ndarray],
    groups: np.ndarray,
    config: ProbeConfig,
    exact: ExactInformation | None = None,
) -> dict[str, Value]:
    """Values in nats, as LABELS has them, with intervals over rows, for the fitted probes.

    surprise: (n,) of `label_surprise`. losses: held-out, (n,) each, "text", "image", "joint" and, where there are
    shared embeddings, "shared" and so "excess". groups: (n,), rows that are resampled together. config: of the
    intervals. With exact values also "exact/…", with aligned_excess (the smallest left side over exactly aligned
    features), and "bias/…", the estimate less the exact value.
    """
    drawn = config.samples, config.level, config.seed, groups
    means = {"entropy": surprise} | {name: surprise - loss for name, loss in losses.items()}
    if "shared" in losses:
        means["excess"] = losses["shared"] - losses["joint"]
    found = {name: (float(rows.mean()), *bootstrap_mean(rows, *drawn)) for name, rows in means.items()}
    # H(Y) is the same in both and cancels.
    both, gap = np.column_stack([losses["image"], losses["text"]]), lambda means: np.abs(means[:, 0] - means[:, 1])
    found["gap"] = float(gap(both.mean(0)[None])[0]), *mean_interval(both, gap, *drawn)

    def value(name: str, number: float, **more: Any) -> Value:
        label, about = LABELS[name]
        return Value(number, label, "nats", about=about, **more)

    made = {}
    for name in (name for name in LABELS if name in found):
        number, low, high = found[name]
        made[name] = value(name, number, low=low, high=high, rows=len(surprise))
    if exact is None:
        return made
    known = {n: float(getattr(exact, n)) for n in ("entropy", "text", "image", "joint", "gap", "aligned_excess")}
    made |= {f"exact/{name}": value(name, number) for name, number in known.items()}
    return made | {f"bias/{n}": value(n, made[n].value - number) for n, number in known.items() if n in made}


def bag_of_words(captions: Sequence[str], largest: int, least: int = 3) -> np.ndarray:
    """Words and pairs of neighbouring words in each caption: (n, terms) float16, 0 or 1.

    The terms are the `largest` most frequent ones of those in at least `least` captions; equally frequent ones in
    alphabetical order. They are chosen without labels. Lower case, without punctuation.
    """
    words = [WORD.findall(caption.lower()) for caption in captions]
    found = [{*some, *map(" ".join, pairwise(some))} for some in words]
    counts = Counter(term for terms in found for term in terms)
    frequent = sorted((-count, term) for term, count in counts.items() if count >= least)[:largest]
    column = {term: number for number, (_, term) in enumerate(frequent)}
    bags = np.zeros((len(captions), max(len(column), 1)), dtype=np.float16)
    for row, terms in enumerate(found):
        bags[row, [column[term] for term in terms if term in column]] = 1
    return bags


def scene_pixels(records: Sequence[Mapping[str, Any]], side: int) -> np.ndarray:
    """Images of built-in scenes, rendered from their records and averaged down: (n, 3 side^2) float16, 0 … 1."""
    scenes = (draw(Scene.from_record(dict(record)), DRAWN_SIDE) for record in records)
    small = np.stack([np.asarray(scene.resize((side, side), Image.Resampling.BOX)).ravel() for scene in scenes])
    return (small.astype(np.float32) / 255).astype(np.float16)
