"""Results in the formats of LAION's CLIP_benchmark, so that published models stand beside ours, and ours beside theirs.

A JSON file is {"dataset", "model", "pretrained", "task", "metrics": {name: number}, "language"}; a CSV line holds the
same, the metrics as columns, and model_fullname, "MODEL PRETRAINED".
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modstruct.evaluation.result import Result, is_number, read_json, share
from modstruct.reporting.loading import Evaluation
from modstruct.reporting.tables import csv_text

log = logging.getLogger("modstruct")

TASKS = {
    "zeroshot_classification": ("zero_shot", "Zero-shot classification"),
    "zeroshot_retrieval": ("retrieval", "Image-text retrieval"),
    "linear_probe": ("linear_probe_adamw", "Linear probe by AdamW"),
}
"""Their task -> our metric and its title."""
NAMES = {
    "zeroshot_classification": {"acc": "ensemble/top_", "mean_per_class_recall": "ensemble/mean_per_class"},
    "zeroshot_retrieval": {
        "image_retrieval_recall@": "text_to_image/recall_at_",
        "text_retrieval_recall@": "image_to_text/recall_at_",
    },
    "linear_probe": {"lp_acc": "top_", "lp_mean_per_class_recall": "mean_per_class"},
}
"""By task their names -> ours, which a K may follow."""
SETS = {
    "imagenet1k": "imagenet", "imagenetv2": "imagenet_v2", "imagenet-a": "imagenet_a", "imagenet-r": "imagenet_r",
    "cars": "stanford_cars", "renderedsst2": "rendered_sst2", "pets": "oxford_pets", "flowers": "flowers102",
    "vtab/cifar100": "cifar100", "vtab/dtd": "dtd", "vtab/svhn": "svhn", "vtab/flowers102": "flowers102",
    "vtab/flowers": "flowers102", "vtab/pets": "oxford_pets",
}  # fmt: skip
"""Their data set -> our set; vtab/caltech101 has another split than ours, and keeps its name."""
GROUPS = {"ensemble": "Ensemble of templates", "text_to_image": "Text → image", "image_to_text": "Image → text"}
FIELDS = ("dataset", "model", "pretrained", "task", "language")


def read_benchmark(paths: Sequence[Path]) -> list[Evaluation]:
    """The models in files of CLIP_benchmark, as runs in the order of the files.

    Data sets that we have go by our names; languages other than English stand behind them. What has no counterpart, or
    is there a second time, is left out, counted and named. Raises ValueError naming the file and the line.
    """
    runs: dict[str, Evaluation] = {}
    left_out = Counter[str]()
    for path, line, entry in (found for one in paths for found in _entries(one)):
        dataset, model, pretrained, task, language = (entry.get(name) or "" for name in FIELDS)
        if not (dataset and model and all(isinstance(entry.get(name) or "", str) for name in FIELDS)):
            what = "dataset and model must be texts: this is no result of CLIP_benchmark"
            raise ValueError(f"{path}, line {line}: {what}")
        if task not in TASKS:
            left_out[f"task {task or 'not named'}"] += 1
            continue
        numbers = {ours: number for name, number in entry["metrics"].items() if (ours := _renamed(name, NAMES[task]))}
        wrong = [number for number in numbers.values() if not is_number(number) or not 0 <= number <= 1]
        if wrong or not numbers:
            what = f"{wrong[0]!r} is no share from 0 to 1" if wrong else f"no metric of {task} is there"
            raise ValueError(f"{path}, line {line}, {dataset} of {model}: {what}")
        metric, title = TASKS[task]
        dataset = dataset.removeprefix("wds/")
        set_name = SETS.get(dataset, dataset) + ("" if language in ("", "en") else f" ({language})")
        values = {name: share(number, label=_label(name)) for name, number in numbers.items()}
        settings = {"source": f"As published in {path.name}; its data are not known to be ours."}
        result = Result(metric, set_name, values, title, groups=GROUPS, settings=settings)
        name = f"{model} {pretrained}".strip()
        run = runs.setdefault(name, Evaluation(path, name, {"name": name, "published": str(path), "commands": []}))
        if run.results.setdefault((set_name, metric), result) is not result:
            left_out[f"a second {metric} of {set_name}"] += 1
    for cause, number in left_out.items():
        log.warning("--beside: %d results left out: %s", number, cause)
    return list(runs.values())


def _entries(path: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, line, entry with its metrics apart) of a JSON or CSV file; a CSV's empty cells are left out."""
    if path.suffix.lower() != ".csv":
        entry = read_json(path)
        if not isinstance(entry.get("metrics"), dict):
            raise ValueError(f'{path}: it has no "metrics": give a JSON or CSV file of CLIP_benchmark')
        yield path, 1, entry
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := sorted({"dataset", "model", "task"} - set(reader.fieldnames or ())):
            raise ValueError(f"{path}: there is no column {missing[0]}: give a JSON or CSV file of CLIP_benchmark")
        for line in reader:
            metrics = {name: _number(text) for name, text in line.items() if name and name not in FIELDS and text}
            yield path, reader.line_num, line | {"metrics": metrics}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _renamed(name: str, names: dict[str, str]) -> str | None:
    """The name on the other side, by the beginning that it has, with the K behind it."""
    for own, other in names.items():
        if name.startswith(own) and re.fullmatch(r"\d*", name[len(own) :]):
            return other + name[len(own) :]
    return None


def _label(name: str) -> str:
    return name.rpartition("/")[2].replace("recall_at_", "R@").replace("top_", "top-").replace("_", " ")


def benchmark_entries(runs: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """What runs measured as the content of CLIP_benchmark's JSON files, one a model, data set and task.

    Zero-shot values are those of the ensemble of templates, of the first template where there is one alone.
    """
    task_of = {metric: task for task, (metric, _) in TASKS.items()}
    theirs_of = {ours: theirs for theirs, ours in reversed(SETS.items())}
    made = []
    for run in runs:
        architecture, _, tag = str(run.model.get("open_clip") or "").partition(":")
        model, pretrained = (architecture, tag) if architecture else (run.name, str(run.model.get("checkpoint") or ""))
        for (set_name, metric), result in run.results.items():
            if not (task := task_of.get(metric)):
                continue
            whole = any(name.startswith("ensemble/") for name in result.values)
            names = {n if whole else n.replace("first/", "ensemble/"): v.value for n, v in result.values.items()}
            back = {ours: theirs for theirs, ours in NAMES[task].items()}
            metrics = {theirs: value for name, value in names.items() if (theirs := _renamed(name, back))}
            texts = (theirs_of.get(set_name, set_name), model, pretrained, task, "en")
            made.append(dict(zip(FIELDS, texts, strict=True)) | {"metrics": metrics})
    return made


def benchmark_files(runs: Sequence[Evaluation]) -> dict[str, str]:
    """Content by name: benchmark.csv, and a JSON file for each entry."""
    entries = benchmark_entries(runs)
    names = list(dict.fromkeys(name for entry in entries for name in entry["metrics"]))
    lines = [
        [entry["metrics"].get(name) for name in names]
        + [entry[name] for name in FIELDS]
        + [f"{entry['model']} {entry['pretrained']}"]
        for entry in entries
    ]
    files = {"benchmark.csv": csv_text([*names, *FIELDS, "model_fullname"], lines)}
    for i, entry in enumerate(entries):
        parts = "_".join(entry[name] for name in ("dataset", "pretrained", "model", "language", "task"))
        files[f"{i:03d}_{re.sub(r'[^A-Za-z0-9_.@-]', '_', parts)[:120]}.json"] = json.dumps(entry) + "\n"
    return files
