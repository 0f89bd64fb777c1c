"""An embedded set: embeddings of images and texts, which belong together, and what is known of them.

In memory, or one folder of memory-mapped arrays that is written once and read by every metric:

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
    indices.npy             (n,) int64, number of each image in its source
    keys.jsonl, metadata.jsonl      one JSON text, one JSON object an image, in the order of rows
    captions.jsonl          one JSON text a text row
    left_out.jsonl          {"cause", "where"} of each sample that could not be used

Rows of images are samples in the order of the source, but copies come last: what compares images with each other or
with captions takes the rows before them and `distinct_pairs`; what counts labels takes all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.errors import refuse, require
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
    damaged,
    is_set_name,
    merged_pairs,
    open_array,
    read_json,
    read_lines,
    write_array,
    write_json,
    write_lines,
)
from modstruct.files import sync_folder

PARSED_BYTES = 64 << 20
"""A longer list is only counted by `check`, not parsed."""


class EmbeddedSet:
    """Made of arrays in memory, or opened by `EmbeddedSet.open`; then rows stay on the disk until they are used.

    model: {"name", "fingerprint", …}. arrays: by name, of IMAGE_ARRAYS and TEXT_ARRAYS, "image" at least; the attribute
    of this name holds the names. class_names, templates: empty without classes. label_field: of the metadata, where the
    labels came from it. source: {"name", "fingerprint"} or nothing. skipped: samples left out, by cause; left_out:
    which. settings, command, seconds: how the set was made. Arrays and lists that only `save` is to read may be streams
    and iterators. folder: where an opened set lies. manifest: what is noted of it. splits: embedded splits of the same
    set, "train" and "validation", which probes need.
    """

    def __init__(
        self,
        name: str,
        model: dict[str, Any],
        arrays: Mapping[str, np.ndarray | RowStream],
        *,
        pairs: np.ndarray | Sequence | None = None,
        copies: np.ndarray | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        labels: np.ndarray | Sequence[int] | None = None,
        class_prompts: np.ndarray | None = None,
        class_names: Sequence[str] = (),
        templates: Sequence[str] = (),
        label_field: str | None = None,
        keys: Iterable[str] | None = None,
        captions: Iterable[str] | None = None,
        metadata: Iterable[dict] | None = None,
        source: dict[str, Any] | None = None,
        skipped: dict[str, int] | None = None,
        left_out: Iterable[dict[str, str]] = (),
        settings: dict[str, Any] | None = None,
        command: Sequence[str] = (),
        seconds: float = 0.0,
    ):
        self.name, self.model, self.source = name, model, source or {}
        self.arrays = frozenset(arrays)
        self.class_names, self.templates, self.label_field = list(class_names), list(templates), label_field
        self.folder: Path | None = None
        self.splits: dict[str, EmbeddedSet] = {}
        self._rows = dict(arrays)
        given = {"pairs": pairs, "indices": indices, "labels": labels, "class_prompts": class_prompts, "copies": copies}
        self._tables = {table: _table(table, values) for table, values in given.items() if values is not None}
        self._lists = {"keys": keys, "captions": captions, "metadata": metadata}
        self._left_out = left_out
        self._noted = {
            "skipped": skipped or {},
            "settings": settings or {},
            "command": list(command),
            "seconds": seconds,
        }

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json; "rows" has the numbers of images and texts."""
        shapes = {name: list(rows.shape) for name, rows in self._rows.items()}
        return {
            "format": FORMAT,
            "name": self.name,
            "model": self.model,
            "source": self.source or None,
            "rows": {"image": shapes["image"][0], "text": shapes.get("text", [0])[0]},
            "arrays": shapes,
            "tables": {name: list(table.shape) for name, table in self._tables.items()},
            "dtype": self._rows["image"].dtype.name,
            **self._noted,
        }

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
        manifest = read_json(path, lambda found: found.get("format") not in READABLE or _sound_manifest(found))
        if manifest.get("format") not in READABLE:
            found = manifest.get("format")
            raise ValueError(f"{path}: format {found!r}, this version reads 1 to {FORMAT}: embed the set again")
        arrays = {name: open_array(folder / f"{name}.npy", shape) for name, shape in manifest["arrays"].items()}
        tables = {name: open_array(folder / f"{name}.npy", shape) for name, shape in manifest["tables"].items()}
        classes: dict[str, Any] = {"names": [], "templates": [], "label": None}
        if "labels" in tables:
            classes = read_json(folder / CLASSES_FILE, _sound_classes)
        opened = cls(
            manifest["name"],
            manifest["model"],
            arrays,
            class_names=classes["names"],
            templates=classes["templates"],
            label_field=classes["label"],
            source=manifest.get("source"),
        )
        opened.folder, opened.manifest, opened._tables = folder, manifest, tables
        return opened

    def save(self, folder: str | Path) -> EmbeddedSet:
        """Write the set into a folder, over one that is there, and open it; row by row where arrays are streams.

        Raises ValueError where sizes do not fit each other, or rows are not finite or not of unit norm; the folder is
        unfinished then.
        """
        folder = Path(folder).expanduser()
        require(folder != self.folder, "folder", str(folder), "is the set itself; name another")
        self.check()
        clear(folder)
        for name, rows in self._rows.items():
            write_array(folder / f"{name}.npy", rows, unit=name not in FEATURE_ARRAYS)
        for name, table in self._tables.items():
            write_array(folder / f"{name}.npy", table)
        if self.class_names:
            classes = {"names": self.class_names, "templates": self.templates, "label": self.label_field}
            write_json(folder / CLASSES_FILE, classes)
        write_lines(folder / "left_out.jsonl", self._left_out)
        for name, (modality, _) in LISTS.items():
            expected = self.manifest["rows"][modality]
            if expected or modality == "image":
                values = self._lists[name]
                count = write_lines(folder / f"{name}.jsonl", self._list(name) if values is None else values)
                require(count == expected, name, f"{count} of them", f"give {expected}, one for each {modality}")
        write_json(folder / MANIFEST, self.manifest)
        sync_folder(folder)
        return EmbeddedSet.open(folder)

    def check(self) -> None:
        """Read what metrics read beside the embeddings: labels, pairs and, of an opened set, lists (long ones are only
        counted). Raises ValueError naming what does not fit: of an opened set the file, with the remedy."""
        for name, found, fault in self._misfits():
            if self.folder is not None:
                damaged(self.folder / f"{name}.npy", fault)
            refuse(name, found, fault)
        for name, (modality, _) in LISTS.items() if self.folder is not None else ():
            path = self.folder / f"{name}.jsonl"
            if path.is_file() and path.stat().st_size > PARSED_BYTES:
                with open(path, "rb") as file:
                    count = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
                if count != self.manifest["rows"].get(modality, 0):
                    damaged(path, f"{count} lines where there are {self.manifest['rows']} rows")
            else:
                self._list(name)

    def _misfits(self) -> Iterator[tuple[str, object, str]]:
        """Arrays that do not fit the others: name, what was found, and what it must be."""
        known = (*IMAGE_ARRAYS, *TEXT_ARRAYS)
        if not {"image"} <= self.arrays <= {*known}:
            yield "arrays", sorted(self.arrays), f"must have image, and may have {', '.join(known)}"
            return
        shapes = {name: tuple(rows.shape) for name, rows in self._rows.items()}
        counts, dimension = self.manifest["rows"], shapes["image"][-1]
        for name, shape in shapes.items():
            count = counts["image" if name in IMAGE_ARRAYS else "text"]
            if len(shape) != 2 or shape[0] != count:
                yield name, shape, f"must be of shape ({count}, dimension), one row for each image or text"
            if name in ("text", "image_augmented") and shape[-1] != dimension:
                yield name, shape, f"must have one dimension with image, {dimension}"
        images, classes = counts["image"], len(self.class_names)
        tables: dict[str, tuple[Any, Any, Any]] = {  # shape, least value, values stay below
            "pairs": ((len(self.pairs), 2), 0, [images, counts["text"]]),
            "indices": ((images,), 0, np.inf),
            "labels": ((images,), -1, classes),
            "copies": ((len(self.copies),), 0, images - len(self.copies)),
            "class_prompts": ((classes, len(self.templates), dimension), -np.inf, np.inf),
        }
        for name, table in self._tables.items():
            shape, low, high = tables[name]
            if table.shape != shape:
                yield name, table.shape, f"must be of shape {shape}"
            elif (name != "class_prompts" and table.dtype.kind != "i") or not np.all((table >= low) & (table < high)):
                found = [np.min(table, axis=0).tolist(), np.max(table, axis=0).tolist()]
                yield name, found, f"least and largest value; must be from {low} to below {high}, the rows there are"

    def rows(self, array: str) -> np.ndarray:
        """The rows of an embedding, (n, D), of an opened set a read-only memory map; ValueError where there is none."""
        place = self.folder or f"set {self.name}"
        has = f"{place} has {', '.join(sorted(self.arrays))}"
        require(array in self.arrays, "array", array, f"{has}: embed it with --embedding.arrays '[…, {array}]'")
        rows = self._rows[array]
        assert isinstance(rows, np.ndarray)  # streams are for `save`
        return rows

    def distinct_rows(self, array: str) -> np.ndarray:
        """As `rows`, of images without the copies."""
        rows = self.rows(array)
        return rows[: len(rows) - len(self.copies)] if array in IMAGE_ARRAYS else rows

    @property
    def pairs(self) -> np.ndarray:
        """(p, 2) int64, (image row, text row); (0, 2) without captions."""
        return self._tables.get("pairs", np.empty((0, 2), dtype=np.int64))

    @property
    def distinct_pairs(self) -> np.ndarray:
        """(p', 2) int64: `pairs` of the images that are no copies, with those of their copies."""
        return merged_pairs(self.pairs, self.image_row) if len(self.copies) else self.pairs

    @property
    def merged(self) -> bool:
        """Whether equal images were looked for; formats before the second did not."""
        return self.manifest["format"] > 1

    @property
    def copies(self) -> np.ndarray:
        """(c,) int64, the row that each of the last c rows of images is a copy of."""
        return self._tables.get("copies", np.empty(0, dtype=np.int64))

    @property
    def image_row(self) -> np.ndarray:
        """(n,) int64, for each row of images the row of the same image that is no copy."""
        return np.concatenate([np.arange(self.manifest["rows"]["image"] - len(self.copies)), self.copies])

    def groups(self, rows: np.ndarray) -> np.ndarray | None:
        """(r,) int64, equal where rows (r,) of images are of one image, which are no independent evidence; None where
        no two are, or all."""
        found = self.image_row[rows]
        return found if 1 < len(np.unique(found)) < len(found) else None

    @property
    def indices(self) -> np.ndarray:
        """(n,) int64, number of each image in its source."""
        found = self._tables.get("indices")
        return np.arange(self.manifest["rows"]["image"]) if found is None else found

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64, class row of each image or -1; None without classes."""
        return self._tables.get("labels")

    @property
    def class_prompts(self) -> np.ndarray | None:
        """(c, t, D) float32, unit norm; None without classes."""
        return self._tables.get("class_prompts")

    @cached_property
    def keys(self) -> list[str]:
        """Key of each image, by default its number."""
        return self._list("keys")

    @cached_property
    def captions(self) -> list[str]:
        """Caption of each text row."""
        return self._list("captions")

    @cached_property
    def metadata(self) -> list[dict]:
        """Metadata of each image."""
        return self._list("metadata")

    def _list(self, name: str) -> list:
        modality, kind = LISTS[name]
        expected, given = self.manifest["rows"].get(modality, 0), self._lists[name]
        if given is not None:
            return list(given)
        if self.folder is None:
            return {"keys": [str(n) for n in range(expected)], "metadata": [{} for _ in range(expected)]}.get(name, [])
        path = self.folder / f"{name}.jsonl"
        if expected == 0 and not path.exists():
            return []
        try:
            values = list(read_lines(path))
        except (OSError, ValueError, RecursionError) as error:
            damaged(path, str(error))
        if len(values) != expected or not all(isinstance(value, kind) for value in values):
            damaged(path, f"{len(values)} lines where there are {expected} rows, each of kind {kind.__name__}")
        return values


def clear(folder: Path) -> None:
    """Remove the files of a set, its manifest first; others in the folder stay."""
    names = [MANIFEST, CLASSES_FILE, *(f"{name}.npy" for name in (*IMAGE_ARRAYS, *TEXT_ARRAYS, *TABLES))]
    for name in [*names, *(f"{name}.jsonl" for name in (*LISTS, "left_out"))]:
        (folder / name).unlink(missing_ok=True)


def _table(name: str, values: Any) -> np.ndarray:
    table = np.asarray(values)
    if name == "class_prompts":
        return table.astype(np.float32, copy=False)
    table = table.reshape(-1, 2) if name == "pairs" and table.size == 0 else table
    return table.astype(np.int64, copy=False) if table.dtype.kind in "iu" or table.size == 0 else table


def _sound_manifest(manifest: dict) -> bool:
    """Whether `save` can have written it."""

    def shapes(found: Any, known: Sequence[str]) -> bool:
        return all(name in known and all(type(side) is int and side >= 0 for side in found[name]) for name in found)

    return (
        is_set_name(manifest["name"])
        and isinstance(manifest["model"], dict)
        and isinstance(manifest.get("source"), (dict, type(None)))
        and all(type(manifest["rows"][modality]) is int for modality in ("image", "text"))
        and shapes(manifest["arrays"], (*IMAGE_ARRAYS, *TEXT_ARRAYS))
        and shapes(manifest["tables"], TABLES)
        and "image" in manifest["arrays"]
    )


def _sound_classes(classes: dict) -> bool:
    return "label" in classes and all(isinstance(text, str) for text in (*classes["names"], *classes["templates"]))


def SetContents(name, model, arrays, label=None, **more):  # until its users have moved
    arrays = {a: rows if isinstance(rows, RowStream) else np.asarray(rows) for a, rows in arrays.items()}
    return EmbeddedSet(name, model, arrays, label_field=label, **more)


def write_embedded_set(folder: str | Path, contents: EmbeddedSet) -> EmbeddedSet:
    return contents.save(folder)
