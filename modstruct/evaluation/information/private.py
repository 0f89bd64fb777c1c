"""Factors that one modality alone holds, from embeddings of equal width: does an independent head keep more of them
than a random one would?"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from modstruct.data.synthetic.information import CAPTION_ONLY, IMAGE_ONLY, split_of_scenes
from modstruct.distributed.collect import share_out
from modstruct.errors import require
from modstruct.evaluation.classification.linear import Features
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet, label_numbers
from modstruct.evaluation.information.probes import ProbeConfig, Probed, drawn, folds_of, linear_right
from modstruct.evaluation.result import Result, mean_share
from modstruct.evaluation.retrieval.rows import check_rows, row_blocks

MODALITIES = {"image": "image", "text": "caption"}
KINDS = {
    "shared": ("[z]", "the shared embedding z"),
    "independent": ("[z, zⁱ]", "z and the independent embedding zⁱ"),
    "projection": ("[z, random]", "z and a fixed random projection of the tower's features, of z's width"),
}
ABOUT = (
    "How much of a factor a linear probe reads from the embeddings of a modality, above all of factors that this "
    "modality alone holds. An independent head is worth its width where [z, zⁱ] beats [z, random], a random projection "
    "of the features that the head starts from. A logistic regression is fitted on the other folds of the set, whose "
    "images the model was not trained on; chance is the most frequent value."
)


def measure(embedded: EmbeddedSet, config: ProbeConfig) -> Result:
    """Accuracy of cross-validated linear probes of factors, from [z], [z, zⁱ] and [z, random projection].

    embedded: with captions. config: as for the information, of which words, the perceptron and levels count for
    nothing. Labels: config.labels, of built-in scenes by default the factors of one modality; those are probed from
    their own modality, others from both. Values: LABEL/MODALITY/KIND, KIND of KINDS; a kind whose embedding the set
    does not have is left out and named in settings["notes"]. Outcomes: whether each row is right, with row and group.
    Every process calls it; labels, kinds and folds are shared out. Raises ValueError as `information.measure`.
    """
    require(len(embedded.pairs) > 0, "set", embedded.name, "has no captions")
    own = dict.fromkeys(IMAGE_ONLY, "image") | dict.fromkeys(CAPTION_ONLY, "text")
    own = own if split_of_scenes(embedded.metadata) else {}
    labels = config.labels or [*own]
    require(len(labels) > 0, "labels", (), f"{embedded.name} is not of scenes: name fields of its metadata")
    probed = {
        (label, modality): _probed(embedded, label, modality, config)
        for label in labels
        for modality in ([own[label]] if label in own else MODALITIES)
    }
    items = [(of, kind, fold) for of, one in probed.items() for kind in one.features for fold in one.folds]
    found = share_out(
        items, lambda item: linear_right(probed[item[0]].features[item[1]], item[2], probed[item[0]].classes, config)
    )
    outcomes: dict[str, np.ndarray] = {}
    values = {}
    for (of, kind, fold), right in zip(items, found, strict=True):
        rows = outcomes.setdefault("/".join((*of, kind)), np.zeros(len(probed[of].rows), dtype=np.uint8))
        rows[fold.held_out] = right
    for (label, modality), one in probed.items():
        chance = float(np.bincount(one.labels).max() / len(one.rows))
        groups = one.groups if len(np.unique(one.groups)) < len(one.rows) else None
        for kind in one.features:
            name, (shown, what) = f"{label}/{modality}/{kind}", KINDS[kind]
            about = f"Accuracy of a linear probe of {what}."
            values[name] = mean_share(outcomes[name], groups, label=shown, chance=chance, about=about)
        outcomes |= {f"{label}/{modality}/row": one.rows, f"{label}/{modality}/group": one.groups}
    missing = {
        f"{modality}, {KINDS[k][0]}" for (_, modality), one in probed.items() for k in KINDS.keys() - one.features
    }
    return Result(
        "private_factors",
        embedded.name,
        values,
        "Factors of one modality alone",
        ABOUT,
        groups={f"{label}/{modality}": f"{label}, from the {MODALITIES[modality]}" for label, modality in probed},
        settings=asdict(config) | {"notes": [f"not embedded: {name}" for name in sorted(missing)]},
        rows={f"used for {label}, {modality}": len(one.rows) for (label, modality), one in probed.items()},
        fingerprint=embedded.source.get("fingerprint"),
        outcomes=outcomes,
    )


def _probed(embedded: EmbeddedSet, label: str, modality: str, config: ProbeConfig) -> Probed:
    """Rows of a modality with a value of the label; a text has that of the first of its images."""
    numbers, names = label_numbers(embedded, label)
    pairs = embedded.distinct_pairs
    known, first = np.unique(pairs[:, 1] if modality == "text" else pairs[:, 0], return_index=True)
    images = pairs[first, 0]
    kept = drawn(np.flatnonzero(numbers[images] >= 0), config)
    rows, images = known[kept], images[kept]
    named = {"shared": modality, "independent": f"{modality}_independent", "projection": f"{modality}_features"}
    arrays = {kind: embedded.rows(name)[rows] for kind, name in named.items() if name in embedded.arrays}
    for kind, own in arrays.items():
        check_rows(f"{embedded.name}'s {named[kind]}", own)
    if "projection" in arrays:
        arrays["projection"] = projected(arrays["projection"], arrays["shared"].shape[1], config.seed)
    joined = {kind: (arrays["shared"], own) if kind != "shared" else (own,) for kind, own in arrays.items()}
    features = {kind: Features(of, np.arange(len(rows)), numbers[images]) for kind, of in joined.items()}
    return Probed(features, rows, images, len(names), folds_of(images, config))


def projected(rows: np.ndarray, width: int, seed: int) -> np.ndarray:
    """(n, F) -> (n, width) float32, by a Gaussian matrix of the seed, which keeps lengths on average."""
    matrix = np.random.default_rng([seed, 4]).standard_normal((rows.shape[1], width)) / width**0.5
    return np.concatenate([block.numpy() @ matrix.astype(np.float32) for _, block in row_blocks(rows)])
