"""An embedded set: one folder of memory-mapped arrays, written once and read by every metric.

FOLDER/
    manifest.json           written last: a folder without it is unfinished
    image.npy, text.npy     (n, D), (m, D) float16 or float32, unit norm: the shared embeddings
    image_features.npy, text_features.npy           (n, F), (m, F') before the projection, not normalised
    image_projected.npy, text_projected.npy         (n, D), (m, D) after it, before normalisation
    image_independent.npy, text_independent.npy     unit norm: of the independent heads
    image_augmented.npy     (n, D) unit norm: of one augmented view of each image
    pairs.npy               (p, 2) int64, (image row, text row), only with captions
    labels.npy              (n,) int64, -1 where there is none, only with classes
    class_prompts.npy       (c, t, D) float32, unit norm: class c's name in template t
    classes.json            {"names": […], "templates": […], "label": field of the metadata or null}
    copies.npy              (c,) int64, only where images have equal bytes: the last c of the n rows of images are
                            copies of earlier rows, of these
    keys.jsonl, metadata.jsonl      one JSON text, one JSON object an image, in the order of rows
    captions.jsonl          one JSON text a text row

Rows of images are samples in the order of the source, but copies come last: what compares images with each other or
with captions takes the rows before them and `distinct_pairs`; what counts labels takes all rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.errors import require
from modstruct.evaluation.embeddings.set_files import (
    CLASSES_FILE,
    FEATURE_ARRAYS,
    FORMAT,
    IMAGE_ARRAYS,
    LISTS,
    MANIFEST,
    READABLE,
    TABLES,
    TEXT_ARRAYS,
    RowStream,
    as_stream,
    check_line_count,
    check_manifest,
    copies_within,
    counted,
    damaged,
    merged_pairs,
    open_array,
    within,
    write_array,
    write_json,
    write_lines,
)
from modstruct.files import sync_folder

PARSED_BYTES = 64 << 20
"""Of a list that `check` reads line by line."""


class EmbeddedSet:
    """A finished set, opened by `EmbeddedSet.open`; arrays stay on the disk until their rows are used.

    folder: where it lies. manifest: what its writer noted. model: {"name", "fingerprint", …}. source: {"name",
    "fingerprint"}, or empty. arrays: names of the embeddings there are.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.name: str = manifest["name"]
        self.model: dict = manifest["model"]
        self.source: dict = manifest.get("source") or {}
        self.arrays: frozenset[str] = frozenset(manifest["arrays"])
        self.splits: dict[str, EmbeddedSet] = {}
        """Embedded splits beside this one, "train" and "validation", which probes need."""
        self._open: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> EmbeddedSet:
        """Open a finished set; sizes and kinds of all arrays are checked, their contents not read.

        Raises FileNotFoundError where there is none or an unfinished one, ValueError where it is damaged or of another
        format; both name the file and the remedy.
        """
        folder = Path(folder).expanduser()
        path = folder / MANIFEST
        if not path.is_file():
            state = "an unfinished embedded set: `evaluate.py embed` resumes it" if folder.is_dir() else "missing"
            raise FileNotFoundError(f"{path}: {state}; embed the set first")
        try:
            manifest = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            damaged(path, str(error))
        if not isinstance(manifest, dict) or manifest.get("format") not in READABLE:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise ValueError(f"{path}: format {found!r}, this version reads 1 to {FORMAT}: embed the set again")
        check_manifest(manifest, path)
        opened = cls(folder, manifest)
        for name, shape in (manifest["arrays"] | manifest["tables"]).items():
            opened._open[name] = open_array(
                folder / f"{name}.npy", shape, "embed the set again with --embedding.overwrite true"
            )
        return opened

    def check(self) -> None:
        """Read what metrics read beside the embeddings: lists (large ones are only counted), classes, labels, pairs.

        Raises ValueError naming the file and the remedy.
        """
        for name, kind in (("keys", str), ("metadata", dict), ("captions", str)):
            path, expected = self.folder / f"{name}.jsonl", self.manifest["rows"].get(LISTS[name], 0)
            if path.is_file() and path.stat().st_size > PARSED_BYTES:
                check_line_count(path, expected)
            else:
                self._lines(name, kind)
        classes = len(self.class_names)
        if self.labels is not None and not np.all((self.labels >= -1) & (self.labels < classes)):
            damaged(self.folder / "labels.npy", f"a label that is none of the {classes} classes, nor -1")
        if self.class_prompts is not None and self.class_prompts.shape[:2] != (classes, len(self.templates)):
            damaged(self.folder / "class_prompts.npy", f"not of {classes} classes and {len(self.templates)} templates")
        limits = [self.manifest["rows"]["image"], self.manifest["rows"]["text"]]
        if not np.all((self.pairs >= 0) & (self.pairs < limits)):
            damaged(self.folder / "pairs.npy", f"a pair beyond the {limits} rows of images and texts")
        try:
            _ = self.copies
        except ValueError as error:
            damaged(self.folder / "copies.npy", str(error))

    def rows(self, array: str) -> np.ndarray:
        """The rows of an embedding, a read-only memory map; ValueError where the set was embedded without it."""
        has = ", ".join(sorted(self.arrays))
        require(
            array in self.arrays,
            "array",
            array,
            f"{self.folder} has {has}: embed it with --embedding.arrays '[…, {array}]'",
        )
        return self._open[array]

    @property
    def pairs(self) -> np.ndarray:
        """(p, 2) int64, (image row, text row); (0, 2) without captions."""
        return self._open["pairs"] if "pairs" in self._open else np.empty((0, 2), dtype=np.int64)

    @property
    def merged(self) -> bool:
        """Whether equal images were looked for; formats before the second did not."""
        return self.manifest["format"] > 1

    @cached_property
    def copies(self) -> np.ndarray:
        """(c,) int64, the row that each of the last c rows of images is a copy of."""
        if "copies" not in self._open:
            return np.empty(0, dtype=np.int64)
        return copies_within(self._open["copies"], self.manifest["rows"]["image"])

    def distinct_rows(self, array: str) -> np.ndarray:
        """As `rows`, of images without the copies."""
        rows = self.rows(array)
        return rows[: len(rows) - len(self.copies)] if array in IMAGE_ARRAYS else rows

    @property
    def distinct_pairs(self) -> np.ndarray:
        """(p', 2) int64: `pairs` of the images that are no copies, with those of their copies."""
        if not len(self.copies):
            return self.pairs
        return merged_pairs(within(self.pairs, self.manifest["rows"]), self.image_row)

    @property
    def image_row(self) -> np.ndarray:
        """(n,) int64, for each row of images the row of the same image that is no copy."""
        return np.concatenate([np.arange(self.manifest["rows"]["image"] - len(self.copies)), self.copies])

    def groups(self, rows: np.ndarray) -> np.ndarray | None:
        """(r,) int64, equal where rows (r,) of images are of one image, which are no independent evidence; None where
        no two are, or all."""
        found = self.image_row[rows]
        return found if 1 < len(np.unique(found)) < len(found) else None

    @cached_property
    def indices(self) -> np.ndarray:
        """(n,) int64, number of each image in its source."""
        return self._open["indices"] if "indices" in self._open else np.arange(self.manifest["rows"]["image"])

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64, class row of each image or -1; None without classes."""
        return self._open.get("labels")

    @property
    def class_prompts(self) -> np.ndarray | None:
        """(c, t, D) float32, unit norm; None without classes."""
        return self._open.get("class_prompts")

    @property
    def class_names(self) -> list[str]:
        return self._classes["names"]

    @property
    def templates(self) -> list[str]:
        return self._classes["templates"]

    @property
    def label_field(self) -> str | None:
        """Field of the metadata that the labels came from; None where they came otherwise."""
        return self._classes["label"]

    @cached_property
    def keys(self) -> list[str]:
        """Key of each image."""
        return self._lines("keys", str)

    @cached_property
    def captions(self) -> list[str]:
        """Caption of each text row."""
        return self._lines("captions", str)

    @cached_property
    def metadata(self) -> list[dict]:
        """Metadata of each image."""
        return self._lines("metadata", dict)

    @cached_property
    def _classes(self) -> dict:
        path = self.folder / CLASSES_FILE
        if "labels" not in self._open:
            return {"names": [], "templates": [], "label": None}
        try:
            classes = json.loads(path.read_bytes())
            names, templates, _ = (classes[key] for key in ("names", "templates", "label"))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            damaged(path, str(error))
        if not all(isinstance(text, str) for text in (*names, *templates)):
            damaged(path, "names and templates are lists of texts")
        return classes

    def _lines(self, name: str, kind: type) -> list:
        path = self.folder / f"{name}.jsonl"
        expected = self.manifest["rows"].get(LISTS[name], 0)
        if expected == 0 and not path.exists():
            return []
        try:
            with open(path, encoding="utf-8") as file:
                values = [json.loads(line) for line in file]
        except (OSError, ValueError, RecursionError) as error:
            damaged(path, str(error))
        if len(values) != expected or not all(isinstance(value, kind) for value in values):
            damaged(path, f"{len(values)} lines where there are {expected} rows, each of kind {kind.__name__}")
        return values


@dataclass(kw_only=True)
class SetContents:
    """What a set is written from; arrays and lists may be streams, which are read once."""

    name: str = field(kw_only=False)
    model: dict[str, Any] = field(kw_only=False)
    """{"name", "fingerprint", …}."""
    arrays: Mapping[str, np.ndarray | RowStream] = field(kw_only=False)
    """By name, of IMAGE_ARRAYS and TEXT_ARRAYS, "image" at least; float16 and float32 are kept, else made float32."""
    pairs: np.ndarray | None = None
    copies: np.ndarray | None = None
    """None where no images are equal."""
    indices: np.ndarray | None = None
    labels: np.ndarray | None = None
    class_prompts: np.ndarray | None = None
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    label: str | None = None
    """Field of the metadata that the labels came from."""
    keys: Iterable[str] | None = None
    """Of the images; by default their numbers."""
    captions: Iterable[str] = ()
    metadata: Iterable[dict] = ()
    """Of the images; by default empty."""
    source: dict[str, Any] | None = None
    skipped: dict[str, int] | None = None
    """Number of samples left out, by cause."""
    left_out: Iterable[dict[str, str]] = ()
    """Which samples."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How the set was made."""
    command: Sequence[str] = ()
    seconds: float = 0.0

    def tables(self, rows: dict[str, int], dimension: int) -> dict[str, np.ndarray]:
        """The arrays of TABLES that there are. Raises ValueError where one does not fit the rows and the dimension."""
        tables: dict[str, np.ndarray] = {}
        if self.pairs is not None:
            tables["pairs"] = within(np.asarray(self.pairs, dtype=np.int64).reshape(-1, 2), rows)
        if self.copies is not None:
            tables["copies"] = copies_within(np.asarray(self.copies, dtype=np.int64), rows["image"])
        if self.indices is not None:
            indices = tables["indices"] = np.asarray(self.indices, dtype=np.int64)
            require(indices.shape == (rows["image"],), "indices", indices.shape, "one for each image")
        if self.labels is not None:
            labels, classes = np.asarray(self.labels, dtype=np.int64), len(self.class_names)
            fits = labels.shape == (rows["image"],) and bool(np.all((labels >= -1) & (labels < classes)))
            require(fits, "labels", labels.shape, f"one of -1 … {classes - 1} for each of {rows['image']} images")
            tables["labels"] = labels
        if self.class_prompts is not None:
            expected = (len(self.class_names), len(self.templates), dimension)
            found = self.class_prompts.shape
            require(found == expected, "class_prompts", found, f"of shape {expected}")
            tables["class_prompts"] = np.asarray(self.class_prompts, dtype=np.float32)
        return tables


def write_embedded_set(folder: str | Path, contents: SetContents) -> EmbeddedSet:
    """Write a set into a folder, over one that is there, and open it; row by row where arrays or lists are streams.

    Raises ValueError where sizes do not fit each other, or rows are not finite or not of unit norm; the folder is
    unfinished then.
    """
    folder = Path(folder).expanduser()
    streams = {array: as_stream(rows) for array, rows in contents.arrays.items()}
    rows = counted(streams)
    tables = contents.tables(rows, streams["image"].shape[1])

    clear(folder)
    for array, stream in streams.items():
        write_array(folder / f"{array}.npy", stream, unit=array not in FEATURE_ARRAYS)
    for table, values in tables.items():
        write_array(folder / f"{table}.npy", as_stream(values))
    if contents.class_names:
        names, templates = list(contents.class_names), list(contents.templates)
        write_json(folder / CLASSES_FILE, {"names": names, "templates": templates, "label": contents.label})
    count = rows["image"]
    write_lines(folder, "keys", map(str, range(count)) if contents.keys is None else contents.keys, count)
    write_lines(folder, "metadata", contents.metadata or ({} for _ in range(count)), count)
    write_lines(folder, "left_out", contents.left_out)
    if rows["text"]:
        write_lines(folder, "captions", contents.captions, rows["text"])
    manifest = {
        "format": FORMAT,
        "name": contents.name,
        "model": contents.model,
        "source": contents.source,
        "rows": rows,
        "arrays": {array: list(stream.shape) for array, stream in streams.items()},
        "tables": {table: list(values.shape) for table, values in tables.items()},
        "dtype": streams["image"].dtype.name,
        "skipped": contents.skipped or {},
        "settings": contents.settings,
        "command": list(contents.command),
        "seconds": contents.seconds,
    }
    write_json(folder / MANIFEST, manifest)
    sync_folder(folder)
    return EmbeddedSet.open(folder)


def clear(folder: Path) -> None:
    """Remove the files of a set, its manifest first; others in the folder stay."""
    names = [MANIFEST, CLASSES_FILE, *(f"{name}.npy" for name in (*IMAGE_ARRAYS, *TEXT_ARRAYS, *TABLES))]
    for name in [*names, *(f"{name}.jsonl" for name in (*LISTS, "left_out"))]:
        (folder / name).unlink(missing_ok=True)
