"""Results in the formats of LAION's CLIP_benchmark, so that published models stand beside ours, and ours beside theirs.

A JSON file is {"dataset", "model", "pretrained", "task", "metrics": {name: number}, "language"}; a CSV line holds the
same, the metrics as columns, and model_fullname, "MODEL PRETRAINED".
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from modstruct.evaluation.result import Result, is_number, read_json, share
from modstruct.reporting.loading import Evaluation
from modstruct.reporting.tables import as_cell

log = logging.getLogger("modstruct")

Names = tuple[tuple[str, str], ...]
TASKS: dict[str, tuple[str, str, Names]] = {
    "zeroshot_classification": (
        "zero_shot",
        "Zero-shot classification",
        (("acc", "ensemble/top_"), ("mean_per_class_recall", "ensemble/mean_per_class")),
    ),
    "zeroshot_retrieval": (
        "retrieval",
        "Image-text retrieval",
        (
            ("image_retrieval_recall@", "text_to_image/recall_at_"),
            ("text_retrieval_recall@", "image_to_text/recall_at_"),
        ),
    ),
    "linear_probe": (
        "linear_probe_adamw",
        "Linear probe by AdamW",
        (("lp_acc", "top_"), ("lp_mean_per_class_recall", "mean_per_class")),
    ),
}
"""Their task -> our metric, its title, and their names beside ours, which a K may follow."""
SETS = {
    "imagenet1k": "imagenet",
    "imagenetv2": "imagenet_v2",
    "imagenet-a": "imagenet_a",
    "imagenet-r": "imagenet_r",
    "cars": "stanford_cars",
    "renderedsst2": "rendered_sst2",
    "pets": "oxford_pets",
    "flowers": "flowers102",
    **{f"vtab/{name}": name for name in ("cifar100", "dtd", "svhn", "flowers102")},
    "vtab/flowers": "flowers102",
    "vtab/pets": "oxford_pets",
}
"""Their data set -> our set; vtab/caltech101 has another split than ours, and keeps its name."""
GROUPS = {
    "ensemble": "Ensemble of templates",
    "text_to_image": "Text → image",
    "image_to_text": "Image → text",
}
FIELDS = ("dataset", "model", "pretrained", "task", "language")


def read_benchmark(paths: Sequence[Path]) -> list[Evaluation]:
    """The models in files of CLIP_benchmark, as runs in the order of the files.

    Data sets that we have go by our names; languages other than English stand behind them. What has no counterpart, or
    is there a second time, is left out, counted and named. Raises ValueError naming the file and the line.
    """
    runs: dict[str, Evaluation] = {}
    left_out: dict[str, int] = {}
    for path, line, entry in chain.from_iterable(map(_entries, paths)):
        texts = {name: entry.get(name) or ("en" if name == "language" else "") for name in FIELDS}
        if not all(isinstance(text, str) for text in texts.values()) or not (texts["dataset"] and texts["model"]):
            raise ValueError(
                f"{path}, line {line}: dataset and model must be texts: this is no result of CLIP_benchmark"
            )
        if texts["task"] not in TASKS:
            left_out[f"task {texts['task'] or 'not named'}"] = (
                left_out.get(f"task {texts['task'] or 'not named'}", 0) + 1
            )
            continue
        metric, title, pairs = TASKS[texts["task"]]
        numbers = {ours: number for name, number in entry["metrics"].items() if (ours := _renamed(name, pairs))}
        wrong = [number for number in numbers.values() if not is_number(number) or not 0 <= number <= 1]
        if wrong or not numbers:
            what = f"{wrong[0]!r} is no share from 0 to 1" if wrong else f"no metric of {texts['task']} is there"
            raise ValueError(f"{path}, line {line}, {texts['dataset']} of {texts['model']}: {what}")
        dataset = texts["dataset"].removeprefix("wds/")
        set_name = SETS.get(dataset, dataset) + ("" if texts["language"] == "en" else f" ({texts['language']})")
        values = {name: share(number, label=_label(name)) for name, number in numbers.items()}
        found = {name.rpartition("/")[0] for name in values}
        groups = {name: group for name, group in GROUPS.items() if name in found}
        about = f"As published in {path.name}; its data are not known to be ours."
        result = Result(metric, set_name, values, title, groups=groups, settings={"source": about})
        name = " ".join(filter(None, (texts["model"], texts["pretrained"])))
        run = runs.setdefault(name, Evaluation(path, name, {"name": name, "published": str(path), "commands": []}))
        if run.results.setdefault((set_name, metric), result) is not result:
            left_out[f"a second {metric} of {set_name}"] = left_out.get(f"a second {metric} of {set_name}", 0) + 1
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
        if missing := {"dataset", "model", "task"} - set(reader.fieldnames or ()):
            raise ValueError(
                f"{path}: there is no column {sorted(missing)[0]}: give a JSON or CSV file of CLIP_benchmark"
            )
        for line in reader:
            metrics = {name: _number(text) for name, text in line.items() if name and name not in FIELDS and text}
            yield path, reader.line_num, {name: line.get(name) for name in FIELDS} | {"metrics": metrics}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _renamed(name: str, pairs: Names) -> str | None:
    """The name on the other side, by the pair that it begins with, with the K behind it."""
    for theirs, ours in pairs:
        if name.startswith(theirs) and re.fullmatch(r"\d*", name[len(theirs) :]):
            return ours + name[len(theirs) :]
    return None


def _label(name: str) -> str:
    last = name.rpartition("/")[2]
    return last.replace("recall_at_", "R@").replace("top_", "top-").replace("_", " ")


def benchmark_entries(runs: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """What runs measured as the content of CLIP_benchmark's JSON files, one a model, data set and task.

    Zero-shot values are those of the ensemble of templates, of the first template where there is one alone.
    """
    theirs_of = {ours: theirs for theirs, ours in reversed(SETS.items())}
    made = []
    for run in runs:
        architecture, _, tag = str(run.model.get("open_clip") or "").partition(":")
        model, pretrained = (architecture, tag) if architecture else (run.name, str(run.model.get("checkpoint") or ""))
        for task, (metric, _, pairs) in TASKS.items():
            back = tuple((ours, theirs) for theirs, ours in pairs)
            for set_name, result in ((s, r) for (s, m), r in run.results.items() if m == metric):
                whole = any(name.startswith("ensemble/") for name in result.values)
                names = {n if whole else n.replace("first/", "ensemble/"): v.value for n, v in result.values.items()}
                metrics = {theirs: value for name, value in names.items() if (theirs := _renamed(name, back))}
                texts = (theirs_of.get(set_name, set_name), model, pretrained, task, "en")
                made.append(dict(zip(FIELDS, texts, strict=True)) | {"metrics": metrics})
    return made


def benchmark_files(runs: Sequence[Evaluation]) -> dict[str, str]:
    """Content by name: benchmark.csv, and a JSON file for each entry."""
    entries = benchmark_entries(runs)
    names = list(dict.fromkeys(name for entry in entries for name in entry["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *FIELDS, "model_fullname"])
    files = {}
    for i, entry in enumerate(entries):
        texts = [entry[name] for name in FIELDS] + [f"{entry['model']} {entry['pretrained']}"]
        writer.writerow([*(entry["metrics"].get(name) for name in names), *map(as_cell, texts)])
        parts = "_".join(str(entry[name]) for name in ("dataset", "pretrained", "model", "language", "task"))
        files[f"{i:03d}_{re.sub(r'[^A-Za-z0-9_.@-]', '_', parts)[:120]}.json"] = json.dumps(entry) + "\n"
    return {"benchmark.csv": text.getvalue()} | files
