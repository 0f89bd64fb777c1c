"""Thumbnails and hashes of a whole source, computed once and kept; an interrupted run is resumed.

FOLDER/
    manifest.json       written last: a folder without it is unfinished
    thumbnails.npy      (n, 3, 24, 24) uint8, 1,728 bytes an image
    hashes.npy          (n, 6) uint64, a hash of each view (see perceptual_hash)
    indices.npy         (n,) int64, number of each image in its source
    keys.jsonl          one JSON text an image
    part-000000.npz, …  until it is complete
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from modstruct.data.faults import BadSampleCounter
from modstruct.data.shards.evaluation_samples import EvaluationBatch, EvaluationSamples, evaluation_loader
from modstruct.evaluation.embeddings.set_files import RowStream, write_array
from modstruct.evaluation.leakage.perceptual_hash import SIDE, VIEWS, ThumbnailViews, image_hashes
from modstruct.files import atomic_write, locked, sync_folder

FORMAT = 1
"""Of the files and of the hashes: to be raised when either changes."""
MANIFEST = "manifest.json"
BATCH = 64
PART_SAMPLES = 8192
"""Most samples that an interrupted run loses."""


@dataclass
class Prints:
    """Every readable image of a source, in its order; rows are memory-mapped."""

    thumbnails: np.ndarray
    """(n, 3, SIDE, SIDE) uint8."""
    hashes: np.ndarray
    """(n, V) uint64."""
    keys: list[str]
    indices: np.ndarray
    """(n,) int64, number of each image in its source."""
    source_fingerprint: str = ""
    skipped: int = 0
    """Samples that could not be read."""

    def __len__(self) -> int:
        return len(self.thumbnails)

    @classmethod
    def of_thumbnails(cls, thumbnails: np.ndarray, keys: list[str]) -> Prints:
        """Prints of images in memory."""
        return cls(thumbnails, image_hashes(thumbnails), keys, np.arange(len(keys)))

    @classmethod
    def open(cls, folder: Path) -> Prints:
        """Raises FileNotFoundError if there are none, ValueError if they are damaged or of another format."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there are no finished hashes; make them again")
        try:
            manifest = json.loads(path.read_bytes())
            rows = {name: np.load(folder / f"{name}.npy", "r", allow_pickle=False) for name in ("thumbnails", "hashes")}
            rows["indices"] = np.load(folder / "indices.npy", allow_pickle=False)
            with open(folder / "keys.jsonl", encoding="utf-8") as file:
                keys = [json.loads(line) for line in file]
            found = (manifest["format"], rows["thumbnails"].shape, rows["hashes"].shape, len(keys))
            count = manifest["rows"]
            sound = found == (FORMAT, (count, 3, SIDE, SIDE), (count, len(VIEWS)), count)
            if not sound or len(rows["indices"]) != count:
                raise ValueError(f"format, shapes and keys are {found}")
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"{folder}: the hashes are damaged ({error}): remove the folder") from None
        return cls(keys=keys, source_fingerprint=manifest["source_fingerprint"], skipped=manifest["skipped"], **rows)


def make_prints(
    samples: EvaluationSamples, folder: Path, field: str, workers: int | None = None, progress: bool = False
) -> Prints:
    """Thumbnails and hashes of all images of a source, kept in `folder`; what is there already is used.

    samples: an EvaluationSamples, or a set of labelled images. field: what the source is called in messages.
    workers: loader processes, by default the samples' data.workers. Raises TooManyBadSamples above data.max_bad_share,
    and ValueError if the folder holds damaged hashes or those of another source, or if no image is usable.
    """
    fingerprint = samples.fingerprint
    with locked(folder / "lock"):
        if not (folder / MANIFEST).exists():
            _Writer(samples, folder, fingerprint, field).finish(workers, progress)
    prints = Prints.open(folder)
    if prints.source_fingerprint != fingerprint:
        raise ValueError(f"{folder}: holds the hashes of another source than {field}; name another folder")
    return prints


def rows_by_key(prints: Prints, keys: list[str], rows: np.ndarray) -> np.ndarray:
    """Rows (n, D) of an embedded set in the order of prints, zeros where an image is not in the set.

    keys: of the rows; repeated keys are matched in order. `rows` itself is returned if the keys are equal. Raises
    ValueError if no key is shared.
    """
    if keys == prints.keys:
        return rows
    place = {key: row for row, key in enumerate(_numbered(keys))}
    found = np.array([place.get(key, -1) for key in _numbered(prints.keys)], dtype=np.int64)
    if (found < 0).all():
        raise ValueError(
            f"no image of the source is in the embedded set (the keys are like {prints.keys[0]!r} and "
            f"{keys[0] if keys else None!r}): embed the same source"
        )
    ordered = np.zeros((len(found), rows.shape[1]), dtype=rows.dtype)
    ordered[found >= 0] = rows[found[found >= 0]]
    return ordered


def _numbered(keys: list[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered


class _Writer:
    """The parts of a source's prints, finished and missing ones."""

    def __init__(self, samples: EvaluationSamples, folder: Path, fingerprint: str, field: str):
        self.samples, self.folder, self.fingerprint, self.field = samples, folder, fingerprint, field
        self.starts = range(0, len(samples), PART_SAMPLES)

    def finish(self, workers: int | None, progress: bool) -> None:
        parts = {start: self._part(start) for start in self.starts}
        missing = [start for start in self.starts if parts[start] is None]
        counter = BadSampleCounter(self.field, self.samples.config.max_bad_share)
        numbers = [n for start in missing for n in self._numbers(start)]
        views = ThumbnailViews()  # which makes no augmented view, and none is wanted
        loader = evaluation_loader(self.samples, views, BATCH, numbers, workers=workers)  # type: ignore[arg-type]
        title = f"hashing {self.field}"
        with tqdm(
            total=len(self.samples), initial=len(self.samples) - len(numbers), desc=title, disable=not progress
        ) as bar:
            batches = iter(loader)
            for start in missing:
                part = []
                # A part has whole batches: PART_SAMPLES is a multiple of BATCH, and the last part ends the source.
                for batch in (next(batches) for _ in range(0, len(self._numbers(start)), BATCH)):
                    counter.add(batch.faults, batch.tried)
                    part.append(batch)
                    bar.update(batch.tried)
                self._write_part(start, part)
        paths = [self._path(start) for start in self.starts]
        counts = [len(_load(path)["indices"]) for path in paths]
        skipped = len(self.samples) - sum(counts)
        counter.check(skipped, len(self.samples), fewest=1)
        if sum(counts) == 0:
            raise ValueError(f"{self.field}: none of its {len(self.samples)} samples could be used")
        self._assemble(paths, sum(counts), skipped)

    def _numbers(self, start: int) -> range:
        return range(start, min(start + PART_SAMPLES, len(self.samples)))

    def _path(self, start: int) -> Path:
        return self.folder / f"part-{start // PART_SAMPLES:06d}.npz"

    def _part(self, start: int) -> Path | None:
        """The part's file if it is complete and of this source."""
        path = self._path(start)
        try:
            complete = bytes(_load(path)["source"]) == self._source
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return path if complete else None

    @property
    def _source(self) -> bytes:
        return json.dumps([FORMAT, self.fingerprint]).encode()

    def _write_part(self, start: int, batches: list[EvaluationBatch]) -> None:
        thumbnails = np.concatenate([batch.image.numpy() for batch in batches])
        keys = json.dumps([key for batch in batches for key in batch.keys]).encode()
        with atomic_write(self._path(start)) as file:
            np.savez(
                file,
                thumbnails=thumbnails,
                hashes=image_hashes(thumbnails),
                indices=np.concatenate([batch.indices.numpy() for batch in batches]),
                keys=np.frombuffer(keys, dtype=np.uint8),
                source=np.frombuffer(self._source, dtype=np.uint8),
            )

    def _assemble(self, paths: list[Path], rows: int, skipped: int) -> None:
        shapes = {"thumbnails": ((3, SIDE, SIDE), np.uint8), "hashes": ((len(VIEWS),), np.uint64)}
        for name, (shape, dtype) in (shapes | {"indices": ((), np.int64)}).items():
            write_array(self.folder / f"{name}.npy", RowStream((rows, *shape), np.dtype(dtype), _pieces(paths, name)))
        with atomic_write(self.folder / "keys.jsonl") as file:
            for keys in _pieces(paths, "keys"):
                file.write("".join(json.dumps(key) + "\n" for key in json.loads(keys.tobytes())).encode())
        about = {"format": FORMAT, "source_fingerprint": self.fingerprint, "rows": rows, "skipped": skipped}
        with atomic_write(self.folder / MANIFEST) as file:
            file.write(json.dumps(about, indent=1).encode())
        sync_folder(self.folder)
        for path in paths:
            path.unlink()


def _load(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        return dict(np.load(file, allow_pickle=False))


def _pieces(paths: list[Path], name: str) -> Iterator[np.ndarray]:
    return (_load(path)[name] for path in paths)
