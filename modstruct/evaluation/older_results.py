"""Results of versions that wrote no schema: numbers alone, which today's metrics of these names declare here."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

RENAMED = {"linear_probe_sgd": "linear_probe_adamw"}
TITLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "retrieval": ("Image-text retrieval", ("text_to_image/recall_at_1", "image_to_text/recall_at_1")),
    "zero_shot": ("Zero-shot classification", ("top_1", "first/top_1", "ensemble/top_1")),
    "linear_probe": ("Linear probe", ("top_1",)),
    "linear_probe_adamw": ("Linear probe by AdamW", ("top_1",)),
    "few_shot": ("Few-shot classification", ("shots_1/top_1", "shots_4/top_1", "shots_16/top_1")),
    "structure": ("Structure of the latent space", ()),
}
"""METRIC -> what tables call it, and its headlines."""
VALUES: tuple[tuple[str, str, bool | None], ...] = (
    ("retrieval:*/median_rank", "rank", False),
    ("retrieval:*", "share", True),
    ("zero_shot:*", "share", True),
    ("linear_probe*:top_*", "share", True),
    ("linear_probe*:*per_class*", "share", True),
    ("few_shot:*", "share", True),
    ("structure:linear_separability", "share", None),
    ("information:*", "nats", None),
    ("leakage:*", "share", None),
)
"""METRIC:NAME -> unit, whether higher is better; the first that fits."""
CURVES: tuple[tuple[str, str, str, str, str, str, bool], ...] = (
    ("retrieval:*/recall", "k", "Recall at K", "K", "recall", "share", True),
    ("linear_probe:held_out_accuracy", "strength", "Search of the penalty", "penalty", "accuracy", "share", True),
    ("linear_probe_adamw:train_loss", "", "Training of the probe", "epoch", "loss", "nats", False),
    ("few_shot:top_?", "shots", "Accuracy by shots", "labelled images a class", "accuracy", "share", True),
    ("structure:spectrum_*", "", "Spectrum", "principal axis", "standard deviation", "number", True),
    ("structure:bridge_deviation", "bridge_t", "Deviation from the bridge", "t", "squared distance", "number", False),
)
"""METRIC:CURVE -> its x axis ("" for 1, 2, …), title, labels, unit of y, logarithmic x; others are axes or of draws."""
SHORT = {"recall_at_": "R@", "top_": "top-", "map_at_r": "mAP@R", "_to_": " → ", "_": " ", "/": ", "}


def converted(content: dict[str, Any], set_name: str, metric: str) -> dict[str, Any]:
    """A METRIC.json without "schema" as `Result.to_json` makes it; ValueError for what is no result.

    What no pattern knows is a plain number without a direction.
    """
    metric = RENAMED.get(metric, metric)
    values: dict[str, dict[str, Any]] = {}
    for name, value in _leaves(content.get("figures"), "figures"):
        if (of := name.removesuffix("_deviation")) in values and of != name:
            values[of]["deviation"] = value["value"]
            continue
        fits = (pattern[1:] for pattern in VALUES if fnmatchcase(f"{metric}:{name}", pattern[0]))
        unit, higher = next(fits, ("number", None))
        label = name.rpartition("/")[2] if "per_class/" in name else _words(name.rpartition("/")[2])
        values[name] = value | {"unit": unit, "higher_is_better": higher, "label": label}
    title, headlines = TITLES.get(metric, (_words(metric).capitalize(), ()))
    made = {"metric": metric, "set": set_name, "title": title, "values": values}
    made["groups"] = {group: _words(group) for name in values if (group := name.rpartition("/")[0])}
    made["headlines"] = [name for name in headlines if name in values]
    made["curves"] = dict(_curves(metric, content.get("curves") or {}, content.get("settings") or {}))
    made["rows"] = {name: count for name, count in (content.get("rows") or {}).items() if isinstance(count, int)}
    made |= {name: content[name] for name in ("settings", "seconds", "command", "embeddings") if content.get(name)}
    return made | ({"fingerprint": content["source_fingerprint"]} if content.get("source_fingerprint") else {})


def _leaves(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {"value": …}) of nested figures."""
    if not isinstance(node, dict) or not node:
        raise ValueError(f'"{name}" is missing or no object of figures')
    if "value" in node:
        yield name.partition("/")[2], {key: node.get(key) for key in ("value", "low", "high", "chance", "rows")}
        return
    for key, inner in node.items():
        yield from _leaves(inner, f"{name}/{key}")


def _curves(metric: str, curves: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, curve) of those that are known."""
    known = ((name, of) for name in curves for of in CURVES if fnmatchcase(f"{metric}:{name}", of[0]))
    for name, (_, axis, title, x_label, y_label, unit, logarithmic) in known:
        y = curves[name]
        made = {"x": curves.get(axis) or list(range(1, len(y) + 1)), "y": y, "unit": unit, "logarithmic": logarithmic}
        if deviation := curves.get(f"{name}_deviation"):
            made |= {"low": np.subtract(y, deviation).tolist(), "high": np.add(y, deviation).tolist()}
        made |= {"title": f"{title}: {_words(name)}", "x_label": x_label, "y_label": y_label}
        yield name, made | ({"chosen": settings.get("strength")} if axis == "strength" else {})


def _words(name: str) -> str:
    for part, shown in SHORT.items():
        name = name.replace(part, shown)
    return name
