"""Evaluation folders as the commands leave them, of small random embeddings that have structure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from modstruct.evaluation.embeddings.embedded_set import SetContents, write_embedded_set
from modstruct.evaluation.retrieval.exact import pairs_ahead
from modstruct.evaluation.retrieval.measure import measure_retrieval
from modstruct.evaluation.statistics import bootstrap_mean
from modstruct.evaluation.structure.measure import structure_metrics

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle")
RECIPE = "output: runs/scenes\nlosses:\n  contrastive: {weight: 1.0, in_modal: true}\n  geometry: {weight: 0.25}\n"


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
        self.augmented = unit(self.image + 0.4 * unit(random.normal(size=common.shape)) + 0.3 * self.text)
        self.pairs = np.repeat(np.arange(rows)[:, None], 2, axis=1)
        self.captions = [
            f"a {COLOURS[i % 6]} {SHAPES[i % 3]} left of a {COLOURS[(i // 6) % 6]} {SHAPES[(i // 18) % 3]}"
            for i in range(rows)
        ]
        self.keys = [f"scene-{i:05d}" for i in range(rows)]


def save_result(folder: Path, set_name: str, metric: str, metrics: dict, outcomes: dict | None = None, **more) -> Path:
    """Write results/SET/METRIC.json, and METRIC.npz where there are outcomes."""
    path = folder / "results" / set_name / f"{metric}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "metric": metric,
        "set": set_name,
        "figures": metrics,
        "curves": {},
        "settings": {"seed": 0},
        "rows": {},
        "source_fingerprint": f"data-of-{set_name}",
        "seconds": 1.25,
        "command": ["evaluate.py", metric, str(folder)],
    } | more
    path.write_text(json.dumps(content))
    if outcomes:
        np.savez(path.with_suffix(".npz"), **outcomes)
    return path


def save_model(folder: Path, name: str, **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = {
        "name": name,
        "fingerprint": f"{abs(hash(name)):016x}",
        "checkpoint": f"runs/{name}/checkpoints/step-00000220",
        "recipe": RECIPE,
        "commands": [["deepspeed", "launch_scripts/pretrain.py", "--recipe", "scenes", "--method", name]],
    } | more
    (folder / "model.json").write_text(json.dumps(model))


def measured_mean(outcomes: np.ndarray, chance: float | None = None) -> dict:
    low, high = bootstrap_mean(outcomes)
    metric = {"value": float(np.mean(outcomes)), "low": low, "high": high, "rows": len(outcomes)}
    return metric if chance is None else metric | {"chance": chance}


def retrieval_result(folder: Path, set_name: str, made: Embeddings) -> None:
    metrics = measure_retrieval(made.image, made.text, made.pairs)
    outcomes, curves = {}, {}
    for direction, queries, gallery in (
        ("text_to_image", made.text, made.image),
        ("image_to_text", made.image, made.text),
    ):
        _, ahead, _ = pairs_ahead(queries, gallery, made.pairs)
        for k in (1, 5, 10):
            name = f"recall_at_{k}"
            outcomes |= {f"{direction}/{name}": ahead < k, f"{direction}/query": np.arange(len(queries))}
            metrics[direction][name] |= measured_mean(ahead < k)
        at = (1, 2, 5, 10, 20, 50, 100)
        curves |= {"k": list(map(float, at)), f"{direction}/recall": [float(np.mean(ahead < k)) for k in at]}
    rows = {"image": len(made.image), "text": len(made.text)}
    save_result(folder, set_name, "retrieval", metrics, outcomes, curves=curves, rows=rows)


def write_run(
    folder: Path, name: str, noise: float, gap: float, skill: float, seed: int, rows: int = 240, whole: bool = True
) -> Path:
    """A run with every metric on `scenes`, zero-shot, probe and few-shot on `shapes`. skill: about its accuracy."""
    save_model(folder, name)
    made = Embeddings(rows, noise, gap, seed)
    write_embedded_set(
        folder / "embeddings" / "scenes",
        SetContents(
            "scenes",
            {"name": name, "fingerprint": name},
            {"image": made.image, "text": made.text, "image_augmented": made.augmented},
            pairs=made.pairs,
            keys=made.keys,
            captions=made.captions,
            source={"name": "scenes", "fingerprint": "data-of-scenes"},
        ),
    )
    retrieval_result(folder, "scenes", made)
    if not whole:
        return folder
    structure = structure_metrics(made.image, made.text, made.pairs, made.augmented)
    curves = structure.pop("curves")
    save_result(folder, "scenes", "structure", structure, curves=curves, rows={"image": rows, "text": rows})

    random = np.random.default_rng(seed)
    difficulty = np.random.default_rng(7).random(rows)  # of each image: the same for all runs
    scores = difficulty + 0.15 * random.normal(size=rows)
    top = {f"top_{k}": scores < skill + 0.08 * (k - 1) for k in (1, 3, 5)}
    metrics = {key: measured_mean(right, k / 18) for (key, right), k in zip(top.items(), (1, 3, 5), strict=True)}
    metrics["per_class"] = {
        f"class {i}": {"value": float(np.mean(top["top_1"][i::30])), "chance": 1 / 18, "rows": 8} for i in range(30)
    }
    outcomes = {f"first/{name}": right for name, right in top.items()} | {"row": np.arange(rows)}
    save_result(folder, "shapes", "zero_shot", {"first": metrics}, outcomes, rows={"image": rows})
    probe = scores < skill + 0.2
    save_result(
        folder,
        "shapes",
        "linear_probe",
        {"top_1": measured_mean(probe, 1 / 18), "weight_decay": {"value": 0.01}},
        {"top_1": probe},
        curves={"strength": [1e-4, 1e-2, 1.0], "held_out_accuracy": [skill, skill + 0.2, skill + 0.1]},
    )
    shots = (1, 2, 4, 8, 16)
    few, outcomes = {}, {}
    for n in shots:
        right = np.mean([scores + 0.1 * random.normal(size=rows) < skill * (1 - 0.6 / (1 + n)) for _ in range(3)], 0)
        outcomes[f"shots_{n}/top_1"] = right.astype(np.float32)
        few[f"shots_{n}"] = {
            "top_1": {"value": float(right.mean()), "chance": 1 / 18, "rows": rows},
            "top_1_deviation": {"value": 0.03 / n**0.5, "rows": 3},
        }
    save_result(folder, "shapes", "few_shot", few, outcomes, curves={"shots": list(map(float, shots))})
    told = 1.9 * skill + 0.6
    information = {
        "entropy": {"value": 2.89},
        "text": {"value": 2.85, "low": 2.84, "high": 2.86},
        "image": {"value": told, "low": told - 0.1, "high": told + 0.1},
        "gap": {"value": 2.85 - told, "low": 2.75 - told, "high": 2.95 - told},
    }
    save_result(folder, "shapes", "information", {"shape": information})
    save_result(
        folder,
        "scenes",
        "leakage",
        {"any": {"value": 3 / rows, "rows": rows}, "by_hash": {"value": 0.0, "rows": rows}},
    )
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
