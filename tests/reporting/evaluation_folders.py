"""Evaluation folders as the commands leave them, of small random embeddings that have structure."""

from __future__ import annotations

import json
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Curve, Result, Value, share
from modstruct.evaluation.statistics import bootstrap_mean

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle")
RECIPE = "output: runs/{name}\ntrain: {{seed: {seed}}}\nlosses:\n  geometry: {{weight: 0.25}}\n  method: {method}\n"
"""Of a run; two that differ in name and seed alone are seeds of one method."""


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Embeddings:
    """Images and captions of `rows` pairs: a common part, noise of each modality, and a gap between the two."""

    def __init__(self, rows: int, noise: float, gap: float, seed: int, dimension: int = 16):
        common = np.random.default_rng(0).normal(size=(rows, dimension)) * np.linspace(1.5, 0.3, dimension)
        random = np.random.default_rng(seed)
        shift = np.zeros(dimension)
        shift[0] = gap
        self.image = unit(common + noise * random.normal(size=common.shape) + shift)
        self.text = unit(common + noise * random.normal(size=common.shape) - shift)
        self.pairs = np.repeat(np.arange(rows)[:, None], 2, axis=1)
        self.captions = [
            f"a {COLOURS[i % 6]} {SHAPES[i % 3]} left of a {COLOURS[(i // 6) % 6]} {SHAPES[(i // 18) % 3]}"
            for i in range(rows)
        ]
        self.keys = [f"scene-{i:05d}" for i in range(rows)]


def save_older(folder: Path, set_name: str, metric: str, figures: dict, outcomes: dict | None = None, **more) -> Path:
    """Write results/SET/METRIC.json as versions without a schema did, and METRIC.npz where there are outcomes."""
    path = folder / "results" / set_name / f"{metric}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"metric": metric, "set": set_name, "figures": figures, "curves": {}, "settings": {"seed": 0}}
    content |= {"rows": {}, "source_fingerprint": f"data-of-{set_name}", "seconds": 1.25, "command": ["evaluate.py"]}
    path.write_text(json.dumps(content | more))
    if outcomes:
        np.savez(path.with_suffix(".npz"), **outcomes)
    return path


def save_result(folder: Path, set_name: str, metric: str, values: dict[str, Value], **more) -> Path:
    """Write results/SET/METRIC.json, and METRIC.npz where there are outcomes."""
    path = folder / "results" / set_name / f"{metric}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ("evaluate.py", metric, str(folder))
    Result(metric, set_name, values, **{"fingerprint": f"data-of-{set_name}", "command": command} | more).save(path)
    return path


def save_model(folder: Path, name: str, seed: int = 0, method: str | None = None, **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = {
        "name": name,
        "fingerprint": f"{crc32(name.encode()):016x}",
        "checkpoint": f"runs/{name}/checkpoints/step-00000220",
        "recipe": RECIPE.format(name=name, seed=seed, method=method or name),
        "commands": [["deepspeed", "launch_scripts/pretrain.py", "--recipe", "scenes", "--method", name]],
    } | more
    (folder / "model.json").write_text(json.dumps(model))


def measured_mean(outcomes: np.ndarray, label: str = "", chance: float | None = None, about: str = "") -> Value:
    low, high = bootstrap_mean(outcomes)
    more = {"label": label, "low": low, "high": high, "rows": len(outcomes), "chance": chance, "about": about}
    return share(np.mean(outcomes), **more)


def retrieval_result(folder: Path, set_name: str, made: Embeddings) -> None:
    values, outcomes, curves = {}, {}, {}
    rows, at = np.arange(len(made.image)), (1, 2, 5, 10, 20, 50, 100)
    for direction, scores in (("text_to_image", made.text @ made.image.T), ("image_to_text", made.image @ made.text.T)):
        rank = (scores >= scores[rows, rows][:, None]).sum(1)
        for k in (1, 5, 10):
            about = f"Share of queries with a right item among the first {k}."
            values[f"{direction}/recall_at_{k}"] = measured_mean(rank <= k, f"R@{k}", k / len(rows), about)
            outcomes |= {f"{direction}/recall_at_{k}": rank <= k, f"{direction}/row": rows}
        values[f"{direction}/median_rank"] = Value(float(np.median(rank)), "median rank", "rank", False, len(rows) / 2)
        bounds = [bootstrap_mean(rank <= k) for k in at]
        curves[f"{direction}/recall"] = Curve(
            list(map(float, at)),
            [float(np.mean(rank <= k)) for k in at],
            f"Recall at K, {direction}",
            "K",
            "recall",
            "share",
            [low for low, _ in bounds],
            [high for _, high in bounds],
            [k / len(rows) for k in at],
            logarithmic=True,
        )
    save_result(
        folder,
        set_name,
        "retrieval",
        values,
        title="Image-text retrieval",
        about="Each caption ranks all images, and each image all captions.",
        groups={"text_to_image": "Text → image", "image_to_text": "Image → text"},
        headlines=("text_to_image/recall_at_1", "image_to_text/recall_at_1"),
        curves=curves,
        rows={"image": len(rows), "text": len(rows), "pairs": len(rows)},
        outcomes=outcomes,
    )


def structure_result(folder: Path, set_name: str, made: Embeddings) -> None:
    spectra = {
        name: Curve(
            list(map(float, range(1, rows.shape[1] + 1))),
            np.linalg.svd(rows - rows.mean(0), compute_uv=False).tolist(),
            f"{name}s",
            "principal axis",
            "standard deviation",
            logarithmic=True,
            plot="Spectrum",
        )
        for name, rows in (("image", made.image), ("text", made.text))
    }
    gap = float(np.linalg.norm(made.image.mean(0) - made.text.mean(0)))
    values = {"modality_gap": Value(gap, "modality gap", about="Distance of the mean image from the mean caption.")}
    save_result(folder, set_name, "structure", values, title="Structure of the latent space", curves=spectra)


def write_run(
    folder: Path, name: str, noise: float, gap: float, skill: float, seed: int, method: str | None = None
) -> Path:
    """A run with every metric on `scenes`, zero-shot, probe and few-shot on `shapes`. skill: about its accuracy."""
    rows = 240
    save_model(folder, name, seed, method)
    made = Embeddings(rows, noise, gap, seed)
    EmbeddedSet(
        "scenes",
        {"name": name, "fingerprint": name},
        {"image": made.image, "text": made.text},
        pairs=made.pairs,
        keys=made.keys,
        captions=made.captions,
        source={"name": "scenes", "fingerprint": "data-of-scenes"},
    ).save(folder / "embeddings" / "scenes")
    retrieval_result(folder, "scenes", made)
    structure_result(folder, "scenes", made)

    random = np.random.default_rng(seed)
    difficulty = np.random.default_rng(7).random(rows)  # of each image: the same for all runs
    scores = difficulty + 0.15 * random.normal(size=rows)
    top = {f"first/top_{k}": scores < skill + 0.08 * (k - 1) for k in (1, 3, 5)}
    values = {name: measured_mean(right, name[6:], int(name[-1]) / 18) for name, right in top.items()}
    for i in range(30):
        found = top["first/top_1"][i::30]
        values[f"first/per_class/class {i}"] = share(found.mean(), chance=1 / 18, rows=len(found))
    save_result(
        folder,
        "shapes",
        "zero_shot",
        values,
        title="Zero-shot classification",
        groups={"first": "First template", "first/per_class": "First template, each class"},
        headlines=("first/top_1",),
        settings={"templates": {"first": ["a photo of a {}."]}},
        rows={"image": rows, "labelled": rows, "classes": 18},
        outcomes=top | {"row": np.arange(rows)},
    )
    probe = scores < skill + 0.2
    strengths = [1e-4, 1e-2, 1.0]
    search = Curve(
        strengths, [skill, skill + 0.2, skill + 0.1], "Search of the penalty", "L2 penalty", "accuracy", "share",
        logarithmic=True, chosen=0.01,
    )  # fmt: skip
    save_result(
        folder,
        "shapes",
        "linear_probe",
        {"top_1": measured_mean(probe, "top-1", 1 / 18)},
        title="Linear probe",
        headlines=("top_1",),
        curves={"held_out": search},
        settings={"features": "image_features"},
        outcomes={"top_1": probe},
    )
    few, outcomes = {}, {}
    for n in (1, 2, 4, 8, 16):
        right = np.mean([scores + 0.1 * random.normal(size=rows) < skill * (1 - 0.6 / (1 + n)) for _ in range(3)], 0)
        outcomes[f"shots_{n}/top_1"] = right.astype(np.float32)
        few[f"shots_{n}/top_1"] = share(right.mean(), label="top-1", chance=1 / 18, deviation=0.03 / n**0.5, rows=rows)
    groups = {f"shots_{n}": f"{n} shots" for n in (1, 2, 4, 8, 16)}
    save_result(folder, "shapes", "few_shot", few, title="Few-shot classification", groups=groups, outcomes=outcomes)
    told = 1.9 * skill + 0.6
    information = {
        "text": {"value": 2.85, "low": 2.84, "high": 2.86},
        "image": {"value": told, "low": told - 0.1, "high": told + 0.1},
    }
    save_older(folder, "shapes", "information", {"shape": information})
    save_older(folder, "scenes", "leakage", {"any": {"value": 3 / rows, "rows": rows}, "by_hash": {"value": 0.0}})
    write_examples(folder / "results" / "scenes" / "examples", made)
    return folder


def write_examples(folder: Path, made: Embeddings, queries: int = 3, shown: int = 4) -> None:
    """What the embeddings retrieve, both ways, with images that are drawn from the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = made.text @ made.image.T
    examples = []
    for row in np.linspace(0, len(made.image) - 1, queries).astype(int):
        for direction, of_row in (("text_to_image", scores[row]), ("image_to_text", scores[:, row])):
            best = np.argsort(-of_row)[:shown]
            by_text = direction == "text_to_image"
            examples.append(
                {
                    "direction": direction,
                    "query": _item(folder, made, row, as_image=not by_text),
                    "rank": int((of_row >= of_row[row]).sum()),
                    "right": _item(folder, made, row, as_image=by_text),
                    "results": [
                        _item(folder, made, i, as_image=by_text) | {"right": bool(i == row), "score": float(of_row[i])}
                        for i in best
                    ],
                }
            )
    (folder / "examples.json").write_text(json.dumps({"examples": examples}))


def _item(folder: Path, made: Embeddings, row: int, as_image: bool) -> dict:
    if not as_image:
        return {"key": made.keys[row], "text": made.captions[row]}
    file = f"{made.keys[row]}.png"
    if not (folder / file).exists():
        drawn = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(drawn)
        words = made.captions[row].split()
        for left, colour, shape in ((6, words[1], words[2]), (36, words[6], words[7])):
            box = (left, 20, left + 22, 42)
            if shape == "circle":
                pen.ellipse(box, fill=colour)
            elif shape == "square":
                pen.rectangle(box, fill=colour)
            else:
                pen.polygon([(left, 42), (left + 22, 42), (left + 11, 20)], fill=colour)
        drawn.save(folder / file)
    return {"key": made.keys[row], "picture": file}
