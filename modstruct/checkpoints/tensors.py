"""Tensors by name in safetensors files: written one after the other, in pieces by several processes, read by ranges.

A piece is a range of a flattened tensor. What a process writes goes into one file, and an index says of every tensor
its kind, its shape, and which file has which range of it under which CRC-32. (zlib's passes 3.8 GB/s on one core where
BLAKE2b passes 0.8; it is there against bad memory, disks and copies, not against a forger.)
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from modstruct import distributed
from modstruct.files import naming

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Kinds of numbers that checkpoints hold, by safetensors' names; no complex ones."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KINDS = f"a checkpoint holds real numbers ({', '.join(DTYPES)})"
_PIECES = re.compile(r"pieces-\d{5,}\.safetensors")
CHECKED_AT_ONCE = 1 << 22
"""Elements."""


@dataclass(frozen=True)
class Piece:
    """A range of a flattened tensor of some shape."""

    values: Tensor
    """1-D."""
    start: int
    shape: tuple[int, ...]

    @staticmethod
    def whole(tensor: Tensor) -> Piece:
        return Piece(tensor.detach().reshape(-1), 0, tuple(tensor.shape))

    @staticmethod
    def share(tensor: Tensor) -> Piece:
        """This process's, of a tensor that all processes have: together they have each element once."""
        whole = Piece.whole(tensor)
        size = math.ceil(len(whole.values) / distributed.world_size())
        start = min(distributed.rank() * size, len(whole.values))
        return Piece(whole.values[start : start + size], start, whole.shape)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read, or made, when they are asked for, and not kept."""

    @abstractmethod
    def described(self) -> Mapping[str, Tensor]:
        """Tensors of the same kinds and shapes without content (of torch's meta device)."""


def described(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors to ask for kinds and shapes, without reading what is lazy."""
    return tensors.described() if isinstance(tensors, LazyTensors) else tensors


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """Write safetensors, one tensor at a time, and put the file on the disk. Returns each tensor's CRC-32.

    Raises OSError that names the path.
    """
    shapes = described(tensors)
    # Larger kinds first, as safetensors does: then every tensor is aligned.
    names = sorted(shapes, key=lambda name: -shapes[name].itemsize)
    header, end = {}, 0
    for name in names:
        start, end = end, end + shapes[name].nbytes
        header[name] = {
            "dtype": _name(shapes[name].dtype, name),
            "shape": list(shapes[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    with naming(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            content = tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data
            checksums[name] = zlib.crc32(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return checksums


def save_pieces(pieces: Mapping[str, Mapping[str, Piece]], folder: Path) -> dict:
    """Write this process's pieces, by section and name, into one file; what the index says of them, for `merged`."""
    file = f"pieces-{distributed.rank():05d}.safetensors"
    flat = {f"{section}/{name}": piece for section, named in pieces.items() for name, piece in named.items()}
    checksums = save_tensors({key: piece.values for key, piece in flat.items() if len(piece.values)}, folder / file)
    index: dict[str, dict[str, dict]] = {section: {} for section in pieces}
    for key, piece in flat.items():
        section, _, name = key.partition("/")
        end = piece.start + len(piece.values)
        places = [[file, piece.start, end, checksums[key]]] if key in checksums else []
        index[section][name] = {"dtype": _name(piece.values.dtype, name), "shape": list(piece.shape), "pieces": places}
    return index


def merged(indices: list[dict]) -> dict:
    """The index of what all processes wrote."""
    index: dict[str, dict[str, dict]] = {}
    for part in indices:
        for section, named in part.items():
            for name, entry in named.items():
                known = index.setdefault(section, {}).setdefault(name, entry | {"pieces": []})
                known["pieces"] += entry["pieces"]
    return index


@dataclass(frozen=True)
class Place:
    """Where a range [start, end) of a flattened tensor is stored."""

    file: Path
    key: str
    start: int
    end: int
    checksum: int | None


@dataclass(frozen=True)
class Entry:
    """A stored tensor: places in order, which leave nothing out."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    places: list[Place]


class Files(dict[Path, Any]):
    """safetensors files, opened when they are asked for. Their tensors are views of the files."""

    def __missing__(self, path: Path) -> Any:
        self[path] = safe_open(path, "pt")
        return self[path]


class StoredTensors(LazyTensors):
    """Tensors of a checkpoint's files, whole or by ranges."""

    def __init__(self, entries: dict[str, Entry], files: Files):
        self.entries, self._files = entries, files

    def __getitem__(self, name: str) -> Tensor:
        shape = self.entries[name].shape
        return self.range(name, 0, math.prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def described(self) -> Mapping[str, Tensor]:
        entries = self.entries.items()
        return {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries}

    def range(self, name: str, start: int, end: int) -> Tensor:
        """Elements [start, end) of the flattened tensor, on the CPU; a view of the file if they lie in one piece."""
        entry = self.entries[name]
        found = [
            self._piece(place)[max(start - place.start, 0) : end - place.start]
            for place in entry.places
            if place.start < end and start < place.end
        ]
        return found[0] if len(found) == 1 else torch.cat([torch.empty(0, dtype=entry.dtype), *found])

    def _piece(self, place: Place) -> Tensor:
        return self._files[place.file].get_tensor(place.key).view(-1)

    def check(self, name: str, place: Place) -> None:
        """Raise ValueError for a piece that is not as it was written, or has numbers that are NaN or infinite."""
        entry, piece = self.entries[name], self._piece(place)
        if piece.dtype != entry.dtype or len(piece) != place.end - place.start:
            raise ValueError(f"{place.file.name}: {place.key} is of another kind or size than the index says")
        checksum, finite = 0, True
        for block in piece.split(CHECKED_AT_ONCE):
            if place.checksum is not None:
                checksum = zlib.crc32(block.view(torch.uint8).numpy(), checksum)
            if block.is_floating_point():  # the extremes take a fifth of the time of isfinite, and keep a NaN
                finite = finite and bool(torch.stack(block.aminmax()).isfinite().all())
        if checksum != (place.checksum or 0):
            where = f"elements {place.start} to {place.end}"
            raise ValueError(f"{place.file.name}: {place.key}, {where}, differs from its checksum")
        if not finite:
            raise ValueError(f"{place.file.name}: {not_finite(place.key, piece)}")


def not_finite(name: str, tensor: Tensor) -> str:
    """How many numbers of a tensor are none, in words."""
    return f"{name} has {int((~tensor.isfinite()).sum())} of {tensor.numel()} values that are NaN or infinite"


def read_index(index: dict, folder: Path, files: Files) -> dict[str, StoredTensors]:
    """The tensors of every section of an index. Raises ValueError for one that is not sound."""
    return {
        section: StoredTensors({name: _entry(entry, name, section, folder) for name, entry in named.items()}, files)
        for section, named in index.items()
    }


def _entry(described: dict, name: str, section: str, folder: Path) -> Entry:
    shape = tuple(described["shape"])
    places = []
    for file, start, end, checksum in described["pieces"]:
        if not _PIECES.fullmatch(file):  # a name and no path: it must not lead out of the folder
            raise ValueError(f"index.json: {file!r} is no file of pieces")
        places.append(Place(folder / file, f"{section}/{name}", start, end, checksum))
    places.sort(key=lambda place: place.start)
    numbers = [*shape, *(n for place in places for n in (place.start, place.end, place.checksum))]
    if any(type(number) is not int or not 0 <= number < 1 << 48 for number in numbers):
        raise ValueError(f"index.json: {section}/{name} has sizes that are no whole numbers")
    ends = [0, *(place.end for place in places)]
    if [place.start for place in places] != ends[:-1] or ends[-1] != math.prod(shape):
        raise ValueError(f"index.json: the pieces of {section}/{name} do not make it up")
    return Entry(_kind(described["dtype"], f"index.json: {section}/{name}"), shape, places)


def _name(dtype: torch.dtype, tensor: str) -> str:
    if dtype not in _NAMES:
        raise ValueError(f"{tensor} is of kind {dtype}; {_KINDS}")
    return _NAMES[dtype]


def _kind(dtype: str, name: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(f"{name} is of kind {dtype}; {_KINDS}")
    return DTYPES[dtype]


def read_file(path: Path, files: Files) -> StoredTensors:
    """The tensors of a file that holds them whole."""
    entries = {}
    for name in files[path].keys():  # noqa: SIM118  it is no mapping
        stored = files[path].get_slice(name)
        shape = tuple(stored.get_shape())
        kind = _kind(stored.get_dtype(), f"{path.name}: {name}")
        entries[name] = Entry(kind, shape, [Place(path, name, 0, math.prod(shape), None)])
    return StoredTensors(entries, files)


def check_all(sections: Mapping[str, StoredTensors], number: int = 0, of: int = 1) -> None:
    """Check share `number` of `of` shares, which together are all. Raises ValueError, naming file and tensor."""
    found = [(t, name, place) for t in sections.values() for name, entry in t.entries.items() for place in entry.places]
    found.sort(key=lambda one: one[2].start - one[2].end)  # the large ones first, for shares of like sizes
    for tensors, name, place in found[number::of]:
        tensors.check(name, place)
