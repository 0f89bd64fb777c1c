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

from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.errors import require
from modstruct.evaluation.embeddings import set_files
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, TEXT_ARRAYS, Lines, RowStream, damaged
from modstruct.files import sync_folder, write_json

FORMAT = 2
READABLE = (1, 2)
"""Format 1 knew no equal images: each sample of such a set is an image of its own."""
MANIFEST, CLASSES_FILE, LEFT_OUT = "manifest.json", "classes.json", "left_out.jsonl"
TABLES = ("pairs", "indices", "labels", "class_prompts", "copies")
LISTS = ("keys", "metadata", "captions")
NOTED = {"source": dict, "skipped": dict, "settings": dict, "command": list, "seconds": float}
"""Entries of the manifest that are kept as they are."""


@dataclass(eq=False, repr=False)
class EmbeddedSet:
    """Made of arrays in memory, or opened by `EmbeddedSet.open`; then rows stay on the disk until they are used.

    Arrays are those of the files above; embeddings by their names, "image" at least. model: {"name", "fingerprint", …}.
    indices, keys: by default the numbers of rows. label_field: of the metadata, where labels came from it. source:
    {"name", "fingerprint"}, or empty. skipped: number of samples left out, by cause; left_out: which, for `save`.
    splits: embedded splits beside this one, "train" and "validation", which probes need. folder: where an opened set
    lies. Embeddings and lists that only `save` is to read may be streams and iterators.
    """

    name: str
    model: dict[str, Any]
    embeddings: Mapping[str, np.ndarray | RowStream]
    _: KW_ONLY
    pairs: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    copies: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    indices: np.ndarray = None  # type: ignore[assignment]  # made below
    labels: np.ndarray | None = None
    class_prompts: np.ndarray | None = None
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    label_field: str | None = None
    keys: list[str] = None  # type: ignore[assignment]  # made below
    captions: list[str] = field(default_factory=list)
    metadata: list[dict] = None  # type: ignore[assignment]  # made below
    source: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    left_out: Iterable[dict[str, str]] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()
    seconds: float = 0.0
    splits: dict[str, EmbeddedSet] = field(default_factory=dict)
    folder: Path | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        require("image" in self.embeddings, "arrays", sorted(self.embeddings), "must have image")
        self.embeddings = {
            name: rows if isinstance(rows, RowStream) or rows.dtype in ("f2", "f4") else rows.astype(np.float32)
            for name, rows in self.embeddings.items()
        }
        every = range(self.rows_of("image"))
        self.indices = np.array(every) if self.indices is None else self.indices
        self.keys = [str(n) for n in every] if self.keys is None else self.keys
        self.metadata = [{} for _ in every] if self.metadata is None else self.metadata
        for name in ("pairs", "copies", "indices", "labels"):
            if (values := getattr(self, name)) is not None:
                values = np.asarray(values)
                whole = values.dtype.kind in "iu" or not values.size
                setattr(self, name, values.astype(np.int64, copy=False) if whole else values)
        self.class_names, self.templates = list(self.class_names), list(self.templates)

    @classmethod
    def open(cls, folder: str | Path) -> EmbeddedSet:
        """Open a finished set; sizes and kinds of all arrays are checked, their contents not read.

        Raises FileNotFoundError where there is none or an unfinished one, ValueError where it is damaged.
        """
        path = (folder := Path(folder).expanduser()) / MANIFEST
        if not path.is_file():
            state = "an unfinished embedded set: `evaluate.py embed` resumes it" if folder.is_dir() else "missing"
            raise FileNotFoundError(f"{path}: {state}; embed the set first")
        found = (noted := set_files.read_json(path)).get("format")
        if found not in READABLE:
            raise ValueError(f"{path}: format {found!r}, this version reads 1 to {FORMAT}: embed the set again")
        try:
            shapes = noted["arrays"] | noted["tables"]
            known = [name for name in (*IMAGE_ARRAYS, *TEXT_ARRAYS, *TABLES) if name in shapes]
            arrays = {name: set_files.open_array(folder / f"{name}.npy", shapes[name]) for name in known}
            if not (set_files.is_set_name(noted["name"]) and isinstance(noted["model"], dict) and "image" in arrays):
                raise TypeError("name, model or image is missing or of another kind")
            more: dict[str, Any] = {name: arrays.pop(name) for name in TABLES if name in arrays}
            more |= {name: noted.get(name) or kind() for name, kind in NOTED.items()}
        except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
            damaged(path, f"{type(error).__name__}: {error}")
        images, texts = len(arrays["image"]), len(arrays.get("text", ()))
        more["keys"] = Lines(folder / "keys.jsonl", images, str)
        more["metadata"] = Lines(folder / "metadata.jsonl", images, dict)
        more["captions"] = Lines(folder / "captions.jsonl", texts, str) if texts else []
        if "labels" in more:
            classes = set_files.read_json(folder / CLASSES_FILE)
            named = [classes.get("names"), classes.get("templates")]
            if not all(isinstance(some, list) and all(isinstance(text, str) for text in some) for some in named):
                damaged(folder / CLASSES_FILE, "names and templates are lists of texts")
            more |= {"class_names": named[0], "templates": named[1], "label_field": classes.get("label")}
        return cls(noted["name"], noted["model"], arrays, folder=folder, format=noted["format"], **more)

    def save(self, folder: str | Path) -> EmbeddedSet:
        """Write the set into a folder, over one that is there, and open it; row by row where arrays are streams.

        Raises ValueError where sizes do not fit each other, or rows are not finite or not of unit norm; the folder is
        unfinished then.
        """
        folder = Path(folder).expanduser()
        require(folder != self.folder, "folder", str(folder), "is the set itself; name another")
        self.check()
        clear(folder)
        for name, rows in self.embeddings.items():
            set_files.write_array(folder / f"{name}.npy", rows, unit=name not in set_files.FEATURE_ARRAYS)
        for name, table in self._tables().items():
            set_files.write_array(folder / f"{name}.npy", table)
        if self.labels is not None:
            classes = {"names": self.class_names, "templates": self.templates, "label": self.label_field}
            write_json(folder / CLASSES_FILE, classes)
        set_files.write_lines(folder / LEFT_OUT, self.left_out)
        set_files.write_lines(folder / "keys.jsonl", self.keys, self.rows_of("image"))
        set_files.write_lines(folder / "metadata.jsonl", self.metadata, self.rows_of("image"))
        if self.rows_of("text"):
            set_files.write_lines(folder / "captions.jsonl", self.captions, self.rows_of("text"))
        write_json(folder / MANIFEST, self.manifest)
        sync_folder(folder)
        return EmbeddedSet.open(folder)

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json; "rows" has the numbers of images and texts."""
        return {
            "format": self.format,
            "name": self.name,
            "model": self.model,
            "rows": {modality: self.rows_of(modality) for modality in ("image", "text")},
            "arrays": {name: list(rows.shape) for name, rows in self.embeddings.items()},
            "tables": {name: list(table.shape) for name, table in self._tables().items()},
            "dtype": self.embeddings["image"].dtype.name,
            **{name: getattr(self, name) for name in NOTED},
        }

    def _tables(self) -> dict[str, np.ndarray]:
        """The tables that there are."""
        there = {"pairs": "text" in self.arrays, "copies": len(self.copies) > 0}
        tables = {name: getattr(self, name) for name in TABLES if there.get(name, True)}
        return {name: table for name, table in tables.items() if table is not None}

    def check(self) -> None:
        """Read what metrics read beside the embeddings; of lists only the number of values.

        Raises ValueError naming what does not fit; of an opened set the file, with the remedy.
        """
        known, dimension = (*IMAGE_ARRAYS, *TEXT_ARRAYS), self.embeddings["image"].shape[-1]
        require(self.arrays <= {*known}, "arrays", sorted(self.arrays), f"may be {', '.join(known)}")
        images, texts, classes, copies = *map(self.rows_of, ("image", "text")), len(self.class_names), len(self.copies)
        shapes: dict[str, tuple[int, ...]] = {"indices": (images,), "labels": (images,), "copies": (copies,)}
        shapes |= {"pairs": (len(self.pairs), 2), "class_prompts": (classes, len(self.templates), dimension)}
        for name, rows in self.embeddings.items():
            width = dimension if name in ("text", "image_augmented") else rows.shape[-1]
            shapes[name] = (images if name in IMAGE_ARRAYS else texts, width)
        above: dict[str, Any] = {"pairs": [images, texts], "labels": classes, "copies": images - copies}
        for name, array in {**self.embeddings, **self._tables()}.items():
            found: Any = None
            fault = ""
            if tuple(array.shape) != shapes[name]:
                found, fault = tuple(array.shape), f"must be of shape {shapes[name]}, by the rows there are"
            elif name in TABLES and name != "class_prompts":
                table, low, high = np.asarray(array), -1 if name == "labels" else 0, above.get(name, np.inf)
                if table.dtype.kind != "i" or not np.all((table >= low) & (table < high)):
                    found = [table.min(axis=0).tolist(), table.max(axis=0).tolist()]
                    fault = f"least and largest value; must be from {low} to below {high}, the rows there are"
            if fault and self.folder is not None:
                damaged(self.folder / f"{name}.npy", fault)
            require(not fault, name, found, fault)
        for lines in (self.keys, self.metadata, self.captions):
            if isinstance(lines, Lines):
                lines.check()

    @property
    def arrays(self) -> KeysView[str]:
        """Names of the embeddings there are."""
        return self.embeddings.keys()

    def rows_of(self, modality: str) -> int:
        """Number of rows of "image" or "text"."""
        return self.embeddings[modality].shape[0] if modality in self.embeddings else 0

    def rows(self, array: str) -> np.ndarray:
        """The rows of an embedding, (n, D), of an opened set a read-only memory map; ValueError where there is none."""
        has = f"{self.folder or self.name} has {', '.join(sorted(self.arrays))}"
        require(array in self.arrays, "array", array, f"{has}: embed it with --embedding.arrays '[…, {array}]'")
        rows = self.embeddings[array]
        assert isinstance(rows, np.ndarray)  # streams are for `save`
        return rows

    def distinct_rows(self, array: str) -> np.ndarray:
        """As `rows`, of images without the copies."""
        rows = self.rows(array)
        return rows[: len(rows) - len(self.copies)] if array in IMAGE_ARRAYS else rows

    @property
    def distinct_pairs(self) -> np.ndarray:
        """(p', 2) int64: `pairs` of the images that are no copies, with those of their copies."""
        return set_files.merged_pairs(self.pairs, self.image_row) if len(self.copies) else self.pairs

    @property
    def merged(self) -> bool:
        """Whether equal images were looked for; formats before the second did not."""
        return self.format > 1

    @property
    def image_row(self) -> np.ndarray:
        """(n,) int64, for each row of images the row of the same image that is no copy."""
        return np.concatenate([np.arange(self.rows_of("image") - len(self.copies)), self.copies])

    def groups(self, rows: np.ndarray) -> np.ndarray | None:
        """(r,) int64, equal where rows (r,) of images are of one image, which are no independent evidence; None where
        no two are, or all."""
        found = self.image_row[rows]
        return found if 1 < len(np.unique(found)) < len(found) else None


def clear(folder: Path) -> None:
    """Remove the files of a set, its manifest first; others in the folder stay."""
    arrays = [f"{name}.npy" for name in (*IMAGE_ARRAYS, *TEXT_ARRAYS, *TABLES)]
    for name in [MANIFEST, CLASSES_FILE, LEFT_OUT, *arrays, *(f"{name}.jsonl" for name in LISTS)]:
        (folder / name).unlink(missing_ok=True)


SET_LABEL = "label"
"""Name of the classes that a set was embedded with, where they came from no field of the metadata."""


def label_numbers(embedded: EmbeddedSet, label: str, option: str = "labels") -> tuple[np.ndarray, list[str]]:
    """Class of each image, (n,) int64, -1 for none, and the classes that occur, in alphabetical order or the set's.

    label: a field of the metadata, or the name of the classes that the set was embedded with. option: what errors call
    it. Raises ValueError for a label that no image has, or of fewer than two values, or of others than texts and whole
    numbers.
    """
    if embedded.labels is not None and label == (embedded.label_field or SET_LABEL):
        values: list = [None if number < 0 else int(number) for number in embedded.labels]
        known = sorted({number for number in values if number is not None})
        names = [embedded.class_names[number] for number in known]
    else:
        values = [record.get(label) for record in embedded.metadata]
        fields = sorted({field for record in islice(embedded.metadata, 100) for field in record})
        require(any(v is not None for v in values), option, label, f"no image has it: name one of {fields}")
        broken = next((v for v in values if not isinstance(v, str | int | bool | None)), None)
        require(broken is None, option, label, f"has the value {broken!r}: name a field of texts or whole numbers")
        known = sorted({v for v in values if v is not None}, key=lambda v: (isinstance(v, str), v))
        names = [str(value) for value in known]
    require(len(names) > 1, option, label, f"all images have the value {names[0] if names else None!r}: give two")
    place = {value: number for number, value in enumerate(known)} | {None: -1}
    return np.array([place[value] for value in values], dtype=np.int64), names


def distinct_classes(embedded: EmbeddedSet, label: str, option: str) -> np.ndarray | None:
    """As `label_numbers`, of the images that are no copies, (n,); of the set's own classes where label is empty, and
    None where it has no two of them."""
    if not label:
        if embedded.labels is None or len(np.unique(embedded.labels[embedded.labels >= 0])) < 2:
            return None
        label = embedded.label_field or SET_LABEL
    return label_numbers(embedded, label, option)[0][: embedded.rows_of("image") - len(embedded.copies)]
