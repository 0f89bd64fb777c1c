"""Evaluation folders as a report reads them, one model each, checked before anything is drawn; and retrieved examples.

Every JSON file in results/SET/examples/ (examples.json, leakage.json) is {"examples": [EXAMPLE, …]} with
EXAMPLE = {"direction": "text_to_image", "query": ITEM, "rank": of the best right item, "right": that item, "results":
[ITEM, …]} and ITEM = {"key": …, "image": file name beside it, or "text": …, "right": whether it belongs to the query,
"score": …}, where everything but the query and the results may be missing.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from modstruct.errors import tree_without_credentials
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.set_files import MODEL_FILE
from modstruct.evaluation.result import Result, is_number, read_json, refuse_file
from modstruct.files import parse_yaml


@dataclass(frozen=True)
class Evaluation:
    """One evaluation folder: a model and everything measured of it; or several that differ only in their seed."""

    folder: Path
    name: str
    """What tables call it: its model's name without what the names of all have in common."""
    model: dict[str, Any]
    """model.json: name, fingerprint, checkpoint or open_clip, recipe, commands."""
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
    """By (set, metric)."""
    seeds: tuple[Evaluation, ...] = ()
    """The runs that `results` are the means of; empty for a run alone."""

    @property
    def published(self) -> bool:
        """Whether others published it: shown beside ours, compared with none."""
        return "published" in self.model

    @property
    def recipe(self) -> dict[str, Any]:
        """What the model was trained with, parsed anew; empty for a model of others, or where the text is no recipe."""
        try:
            recipe: Any = parse_yaml(str(self.model.get("recipe")).encode())
        except ValueError:
            return {}
        return recipe if isinstance(recipe, dict) else {}

    def embedded_set(self, name: str) -> EmbeddedSet | None:
        """The embedded set of that name, or None if the folder has no finished one."""
        folder = self.folder / "embeddings" / name
        return EmbeddedSet.open(folder) if (folder / "manifest.json").is_file() else None


def stem_of(out: str | Path) -> Path:
    """What names of a report's files begin with: OUT, given with or without ".html"; FOLDER/report of a folder."""
    out = Path(out).expanduser()
    return out / "report" if out.is_dir() else out.with_suffix("") if out.suffix == ".html" else out


def load_evaluations(folders: Sequence[str | Path]) -> list[Evaluation]:
    """Read several evaluation folders, in the order given, with short names.

    Raises FileNotFoundError or ValueError naming the file that is missing or broken, and the remedy.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    if not paths:
        raise ValueError("report: no evaluation folder is named; give at least one")
    for i, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:i]]:
            raise ValueError(f"{path}: named twice; name each evaluation folder once")
    loaded = [load_evaluation(path) for path in paths]
    names = [run.name for run in loaded]
    if len(set(names)) < len(names):
        names = [f"{run.name}/{run.folder}" for run in loaded]
    return [replace(run, name=name) for run, name in zip(loaded, short_names(names), strict=True)]


def load_evaluation(folder: Path) -> Evaluation:
    """Read model.json and every results/SET/METRIC.json of one evaluation folder, without credentials in addresses:
    reports are sent around."""
    path = folder / MODEL_FILE
    if not path.is_file():
        remedy = "`evaluate.py full --checkpoint RUN --out EVALUATION` writes one"
        raise FileNotFoundError(f"{path}: there is no such file, so {folder} is no evaluation folder: {remedy}")
    model = {"commands": []} | tree_without_credentials(read_json(path))
    if not isinstance(model.get("name"), str) or not model["name"]:
        refuse_file(path, f'"name" = {model.get("name")!r}: the model\'s name must be a text')
    # Backwards: where an older version's linear_probe_sgd lies beside linear_probe_adamw, the latter counts.
    found = {file: Result.load(file) for file in sorted(folder.glob("results/*/*.json"), reverse=True)}
    if not found:
        remedy = f"`evaluate.py measure {folder}` comes first"
        raise FileNotFoundError(f"{folder / 'results'}: there are no results; {remedy}")
    results = {
        (file.parent.name, result.metric): replace(
            result,
            command=tuple(tree_without_credentials(result.command)),
            settings=tree_without_credentials(result.settings),
        )
        for file, result in found.items()
    }
    return Evaluation(folder, model["name"], model, results)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the words at their beginnings and ends that all have in common; each keeps a word of its own."""
    without_step = [re.sub(r"/step-\d+$", "", name) for name in names]
    names = without_step if len(set(without_step)) == len(names) else names
    parts = [re.findall(r"step-\d+|[^/_@ -]+|[/_@ -]", name) for name in names]
    start, end = (
        len(list(takewhile(lambda words: len(set(words)) == 1, zip(*of, strict=False))))
        for of in (parts, [part[::-1] for part in parts])
    )
    # Words that are in all names are kept where a name would be nothing without them, as of clip and clip_sep.
    while min(len(part) for part in parts) <= start + end and start + end:
        start, end = (start - 1, end) if start else (0, end - 1)
    cut = ["".join(part[start : len(part) - end]).strip("/_@ -") for part in parts]
    return cut if all(cut) and len(names) > 1 else list(names)


SIDE_PIXELS = 192
"""Longest side of an embedded image: sharp at the 96 pixels it is shown with on a high-resolution screen."""
SHOWN_QUERIES = 6
"""Of each set and direction."""
SHOWN_RESULTS = 5
LARGEST_PAGE_BYTES = 6 << 20
"""Of all images in the page; later ones are named instead of shown."""


Gallery = list[list[dict[str, Any]]]
"""The queries of one direction, each with what the runs found of it: an EXAMPLE with "run", its number, and ITEMs of
"name" (key), "image" (data URI), "text", "right" and "score", each None where it is missing, as an image is beyond the
page's limit."""


def galleries(runs: Sequence[Evaluation], limit: int = LARGEST_PAGE_BYTES) -> dict[tuple[str, str], Gallery]:
    """By set and direction. limit: bytes of all images.

    Raises ValueError naming a file that is broken or missing.
    """
    found: dict[tuple[str, str], dict[tuple, list[tuple[int, Path, dict[str, Any]]]]] = {}
    for i, run in enumerate(runs):
        for path in sorted(run.folder.glob("results/*/examples/*.json")):
            for example in _read(path):
                of_set = found.setdefault((path.parents[1].name, str(example.get("direction", "retrieved"))), {})
                query = example["query"]
                # The key identifies an image; its file may have another name in each run.
                key = query.get("key") or query.get("image"), query.get("text")
                of_set.setdefault(key, []).append((i, path, example))
    images: dict[Path, str | None] = {}

    def retrieved(i: int, path: Path, example: dict[str, Any]) -> dict[str, Any]:
        shown = [example["query"], *example["results"][:SHOWN_RESULTS]]
        query, *results = (_item(item, path, images, limit) for item in shown)
        right = _item(example["right"], path, images, limit) if "right" in example else None
        return {"run": i, "rank": example.get("rank"), "query": query, "right": right, "results": results}

    made = {}
    for place, queries in sorted(found.items(), key=lambda entry: entry[0][0]):
        most = sorted(queries.values(), key=len, reverse=True)  # those of most runs can be compared
        made[place] = [[retrieved(*one) for one in of] for of in most[:SHOWN_QUERIES]]
    return made


def _read(path: Path) -> list[dict[str, Any]]:
    examples: Any = read_json(path).get("examples")
    for example in examples if isinstance(examples, list) else [{}]:
        found = example if isinstance(example, dict) else {}
        results = found.get("results")
        items = [found.get("query"), *results, found.get("right", {})] if isinstance(results, list) else [None]
        if not all(isinstance(item, dict) for item in items):
            refuse_file(path, '"examples" must be a list of objects with a query and its results')
    return examples


def _item(item: dict[str, Any], beside: Path, made: dict[Path, str | None], limit: int) -> dict[str, Any]:
    """made: the images so far, each file once; `limit` bytes of them at most."""
    text, right, score = (item.get(key) for key in ("text", "right", "score"))
    file = item.get("image", item.get("picture"))  # the older name of the field
    # A name only: a results file must not make the page read other files.
    if file is not None and (not isinstance(file, str) or Path(file).name != file):
        refuse_file(beside, f'"image" = {file!r}: it must name a file of this folder')
    if file and (path := beside.parent / file) not in made:
        uri = _data_uri(path)
        made[path] = uri if len(uri) + sum(len(other or "") for other in made.values()) <= limit else None
    return {
        "name": str(item.get("key") or file or ""),
        "text": None if text is None else str(text),
        "image": made[beside.parent / file] if file else None,
        "right": right if isinstance(right, bool) else None,
        "score": score if is_number(score) else None,
    }


def _data_uri(path: Path) -> str:
    """An image as a small JPEG."""
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (SIDE_PIXELS, SIDE_PIXELS))
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        refuse_file(path, f"not an image that can be read ({error})")
    return data_uri(image)


def data_uri(image: Image.Image) -> str:
    """An image, made small itself, as a page holds it."""
    image.thumbnail((SIDE_PIXELS, SIDE_PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
