"""What the metrics of a report are called, which are shares, and which way is better."""

from __future__ import annotations

import re
from dataclasses import dataclass

TIES = "A tie counts against the model: an item that scores as high as the right one is placed ahead of it."


@dataclass(frozen=True)
class Task:
    """One kind of result as a section: its heading, what it measures, and its metrics in the summary."""

    title: str
    explanation: str
    higher_is_better: bool | None = None
    """None if the metrics describe and no direction is better: nothing is marked."""
    headlines: tuple[str, ...] = ()
    """Metrics of the summary, names joined with "/"."""
    short: str = ""
    """Precedes a metric in a sentence where its own name does not tell the task."""
    shares: bool = True
    """Whether metrics between 0 and 1 are shares, and shown in percent."""


TASKS = {
    "retrieval": Task(
        "Image-text retrieval",
        "Each caption ranks all images, and each image all captions, by the inner product of their embeddings. "
        "R@K is the share of queries with a right item among the first K; a query's rank is that of its best right "
        f"item. {TIES} Chance is that of a random order of the same gallery.",
        True,
        ("text_to_image/recall_at_1", "image_to_text/recall_at_1"),
    ),
    "zero_shot": Task(
        "Zero-shot classification",
        "An image goes to the class whose name lies nearest to it: the name in the first template alone, or the mean "
        f"over the templates (the ensemble). {TIES}",
        True,
        ("top_1", "first/top_1", "ensemble/top_1"),
        "Zero-shot",
    ),
    "linear_probe": Task(
        "Linear probe",
        "Accuracy of a linear classifier trained on frozen image features and tested on held-out images.",
        True,
        ("top_1",),
        "Linear probe",
    ),
    "linear_probe_adamw": Task(
        "Linear probe by AdamW",
        "The same by CyCLIP's protocol: 32 epochs of AdamW on the projected features before normalisation.",
        True,
        ("top_1",),
        "Linear probe, AdamW",
    ),
    "few_shot": Task(
        "Few-shot classification",
        "Accuracy of a classifier trained on frozen image features with only a few labelled images of each class, "
        "the mean over several draws of them, which are the same for every run. The deviation is that over the draws.",
        True,
        ("shots_1/top_1", "shots_4/top_1", "shots_16/top_1"),
        "Few-shot",
    ),
    "structure": Task(
        "Structure of the latent space",
        "Shape of the two clouds of embeddings: how near pairs lie (alignment), how evenly each modality fills the "
        "sphere (uniformity), how far apart the modalities lie (gap, linear separability), along how many directions "
        "they spread (effective rank), and where the augmented image lies on the bridge between image and caption. "
        "These metrics describe; no direction is better by itself, so none is marked.",
        shares=False,
    ),
    "information": Task(
        "Information",
        "How much caption and image tell of a label, in nats, and the gap between the two. By theorem 3.1 of Jiang "
        "et al. (2023) exact alignment costs at least this gap. Probes estimate each information from below, so that a "
        "gap of two estimates is no bound; where the exact values are known they stand beside it, with the bias. The "
        "metrics describe, so none is marked.",
        shares=False,
    ),
    "leakage": Task(
        "Leakage",
        "Items of the set that also occur, wholly or nearly, in what the model was trained on. A share above zero "
        "makes this set's other metrics too good.",
    ),
}
WORDS = {
    "evaluation_to_training": "Copies found in the training data",
    "text_to_image": "Text → image",
    "image_to_text": "Image → text",
    "index_text_to_image": "Approximate index, text → image",
    "index_image_to_text": "Approximate index, image → text",
    "first": "First template",
    "ensemble": "Ensemble of templates",
    "any": "Found in any way",
    "both": "Found in both ways",
    "by_hash": "By perceptual hash",
    "map_at_r": "mAP@R",
    "mean_per_class": "Mean over classes",
    "bridge_best_t": "Bridge, best t",
    "bridge_deviation": "Bridge, deviation at best t",
    "geometry_inter": "Geometry, inter-modality term",
    "geometry_intra": "Geometry, intra-modality term",
}
ALWAYS_SHARES = ("linear_separability",)
NOT_SHARES = re.compile(
    r"rank|loss|perplexity|entropy|count|number|distance|similarity|norm|temperature|decay|strength"
)
LOWER_IS_BETTER = re.compile(r"(median|mean)_(log_)?rank|loss|error|nll|brier|calibration|^ece$|perplexity|entropy")
NO_DIRECTION = re.compile(
    r"^(count|number|classes|rows|queries|images|texts|seconds|weight_decay|strength)|_deviation$"
)


def task_of(metric: str) -> Task:
    """The section of a kind of result; an unknown one is shown without a direction."""
    return TASKS.get(metric) or Task(
        humanised(metric),
        "A result that this version of the report does not know: its metrics are shown as they were saved, and none is "
        "marked as better.",
        shares=False,
    )


def humanised(name: str) -> str:
    """A name as people write it: "recall_at_5" -> "R@5", "top_1" -> "Top-1", "modality_gap" -> "Modality gap"."""
    if name in WORDS:
        return WORDS[name]
    if found := re.fullmatch(r"recall_at_(\d+)", name):
        return f"R@{found[1]}"
    if found := re.fullmatch(r"top_(\d+)", name):
        return f"Top-{found[1]}"
    if found := re.fullmatch(r"(?:shots?_(\d+)|(\d+)_shots?)", name):
        count = found[1] or found[2]
        return f"{count} shot{'' if count == '1' else 's'}"
    if found := re.fullmatch(r"(.+)_(image|text)(_.+)?", name):
        return f"{humanised(found[1])}, {found[2]}s{(found[3] or '').replace('_', ' ')}"
    if name.endswith("_deviation"):
        return f"{humanised(name.removesuffix('_deviation'))}, deviation"
    spaced = name.replace("_", " ").strip()
    return spaced[:1].upper() + spaced[1:]


def label(names: tuple[str, ...]) -> str:
    """A metric's names in one line."""
    return ", ".join(humanised(name) for name in names)


def is_share(metric: str, names: tuple[str, ...], values: list[float]) -> bool:
    """Whether a metric is shown in percent: by its section, unless its name says otherwise or it leaves [0, 1]."""
    if names[-1] in ALWAYS_SHARES:
        return True
    bare = not any(NOT_SHARES.search(name) for name in names)
    return task_of(metric).shares and bare and all(0 <= value <= 1 for value in values)


def direction(metric: str, names: tuple[str, ...]) -> int:
    """1 where higher is better, -1 where lower is, 0 where neither."""
    if not task_of(metric).higher_is_better or NO_DIRECTION.search(names[-1]):
        return 0
    return -1 if LOWER_IS_BETTER.search(names[-1]) else 1


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def lowered(text: str) -> str:
    """Text inside a sentence: "Top-K accuracy" -> "top-K accuracy", but "R@1" as it is."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def number(value: float) -> str:
    """Four significant digits, with an exponent only for small values."""
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{value:.{max(0, 3 - len(str(int(abs(value)))) + 1)}f}"


def shown(value: float, share: bool) -> str:
    """A value as it is printed: percent with one decimal, or a plain number; a true minus sign."""
    return (percent(value) if share else number(value)).replace("-", "\u2212")
