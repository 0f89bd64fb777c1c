"""Sets published as pixel arrays: CIFAR (Krizhevsky 2009), SVHN (Netzer et al. 2011), STL-10 (Coates et al. 2011).

CIFAR is read in both published forms, "python version" and "binary version". The python version is pickles, which are
read without unpickling, since that may run any code: a small machine follows the few instructions that dictionaries,
lists, texts, numbers and numpy's arrays of bytes are written with, by Python 2 or 3, and refuses any other.
"""

from __future__ import annotations

import io
import math
import pickletools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.data.classification.labelled_images import FoundImages, ImageArray
from modstruct.data.classification.prompts import readable
from modstruct.data.classification.set_folder import SetFolder

CIFAR_SIDE = 32
CIFAR_PIXELS = 3 * CIFAR_SIDE**2
LARGEST_BATCH_BYTES = 1 << 30  # CIFAR-100's train file, the largest, takes 155 MB
STL10_SIDE = 96
VALUES = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
SKIPPED = ("PROTO", "FRAME")


@dataclass(frozen=True)
class _CifarVersion:
    """File names and layout of a set."""

    pickles: str
    """Folder of the python version."""
    binary: str
    """Folder of the binary version."""
    batches: dict[str, tuple[str, ...]]
    """Files of each split; in the binary version their names end in .bin."""
    label_key: str
    """Of the labels in a pickle."""
    names: tuple[str, str, str]
    """The pickle of class names, their key in it, and the binary version's file of names."""
    label_bytes: int
    """Before the pixels of an image in the binary version; the last of them is the label."""


_CIFAR10 = _CifarVersion(
    "cifar-10-batches-py",
    "cifar-10-batches-bin",
    {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    "labels",
    ("batches.meta", "label_names", "batches.meta.txt"),
    1,
)
_CIFAR100 = _CifarVersion(
    "cifar-100-python",
    "cifar-100-binary",
    {"train": ("train",), "test": ("test",)},
    "fine_labels",
    ("meta", "fine_label_names", "fine_label_names.txt"),
    2,
)


def read_cifar10(source: SetFolder, split: str) -> FoundImages:
    """50,000 images for training and 10,000 for test, 32 x 32, of ten classes."""
    return _read_cifar(source, split, _CIFAR10)


def read_cifar100(source: SetFolder, split: str) -> FoundImages:
    """50,000 images for training and 10,000 for test, 32 x 32, of a hundred ("fine") classes."""
    return _read_cifar(source, split, _CIFAR100)


def _read_cifar(source: SetFolder, split: str, version: _CifarVersion) -> FoundImages:
    pickled, key, listed = version.names
    if any((source.root / folder / pickled).exists() for folder in (version.pickles, ".")):
        folder = source.folder_with(pickled, version.pickles)
        names = _unpickled(source, folder / pickled).get(key)
        if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
            source.refuse(f"{folder / pickled} has no list {key!r} of names")
        classes = [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names]
        files = [folder / name for name in version.batches[split]]
    else:
        folder = source.folder_with(listed, version.binary, version.pickles)
        classes = source.lines(folder / listed)
        files = [folder / f"{name}.bin" for name in version.batches[split]]
    labels = np.concatenate([_cifar_batch(source, version, file)[1] for file in files])
    source.check_labels(labels, classes, files[0])
    store = ImageArray(partial(_cifar_pixels, source, version, files), f"{split}/")
    return FoundImages(store, labels, [readable(name) for name in classes])


def _cifar_pixels(source: SetFolder, version: _CifarVersion, files: list[Path]) -> np.ndarray:
    """(n, 32, 32, 3), from files that store each image channel by channel."""
    rows = np.concatenate([_cifar_batch(source, version, file)[0] for file in files])
    return rows.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)


def _cifar_batch(source: SetFolder, version: _CifarVersion, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 3072) and labels (n,) of a file of either version."""
    if file.suffix == ".bin":
        rows = source.byte_rows(file, version.label_bytes + CIFAR_PIXELS)
        return rows[:, version.label_bytes :], rows[:, version.label_bytes - 1]
    content = _unpickled(source, file)
    pixels, labels = content.get("data"), content.get(version.label_key)
    array = pixels.as_bytes() if isinstance(pixels, PickledArray) else None
    if array is None or array.ndim != 2 or array.shape[1] != CIFAR_PIXELS or not len(array):
        source.refuse(f"{file} has no array of bytes (images, {CIFAR_PIXELS}) by the key 'data'")
    numbers = labels if isinstance(labels, list) else []
    if len(numbers) != len(array) or not all(type(label) is int and 0 <= label < 1 << 16 for label in numbers):
        source.refuse(f"{file} has no list of {len(array)} labels by the key {version.label_key!r}")
    return array, np.array(numbers, dtype=np.int64)


def _unpickled(source: SetFolder, file: Path) -> dict[str, Any]:
    source.require_file(file, LARGEST_BATCH_BYTES)
    try:
        content = read_pickled(file)
    except (OSError, ValueError) as error:
        source.refuse(f"{file} is no pickle of plain values and arrays of bytes ({error})")
    if not isinstance(content, dict):
        source.refuse(f"{file} holds no dictionary")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def read_svhn(source: SetFolder, split: str) -> FoundImages:
    """Cropped digits, 32 x 32: 73,257 for training, 26,032 for test. The file's label 10 is the digit 0."""
    file = source.folder_with(f"{split}_32x32.mat", "svhn") / f"{split}_32x32.mat"
    (labels,) = source.matlab(file, "y")
    if not np.issubdtype(labels.dtype, np.number) or labels.ndim != 1 or not np.isin(labels, range(1, 11)).all():
        source.refuse(f"{file} has labels other than 1 to 10")
    store = ImageArray(partial(_svhn_pixels, source, file), f"{split}/")
    if len(store) != len(labels):
        source.refuse(f"{file} has {len(store)} images and {len(labels)} labels")
    return FoundImages(store, labels.astype(np.int64) % 10, [str(digit) for digit in range(10)])


def read_stl10(source: SetFolder, split: str) -> FoundImages:
    """Images of ten classes, 96 x 96: 5,000 for training, 8,000 for test."""
    folder = source.folder_with("class_names.txt", "stl10_binary")
    classes = [readable(name) for name in source.lines(folder / "class_names.txt")]
    store = ImageArray(partial(_stl10_pixels, source, folder / f"{split}_X.bin"), f"{split}/")
    file = folder / f"{split}_y.bin"
    labels = source.byte_rows(file, 1)[:, 0].astype(np.int64) - 1
    if len(labels) != len(store):
        source.refuse(f"{folder} has {len(store)} images and {len(labels)} labels of the split {split}")
    return FoundImages(store, source.check_labels(labels, classes, file), classes)


def _svhn_pixels(source: SetFolder, file: Path) -> np.ndarray:
    (pixels,) = source.matlab(file, "X")
    if pixels.ndim == 3:  # a single image
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2] != 3:
        source.refuse(f"{file} has no pixels (height, width, 3, images) of bytes")
    return pixels.transpose(3, 0, 1, 2)


def _stl10_pixels(source: SetFolder, file: Path) -> np.ndarray:
    # Channel by channel, and each channel column by column.
    rows = source.byte_rows(file, 3 * STL10_SIDE**2)
    return rows.reshape(-1, 3, STL10_SIDE, STL10_SIDE).transpose(0, 3, 2, 1)


class PickledArray:
    """A pickled call of numpy's _reconstruct or dtype: its arguments, and the state set on its result."""

    def __init__(self, arguments: tuple):
        self.arguments, self.state = arguments, None

    def as_bytes(self) -> np.ndarray | None:
        """The array of uint8 that numpy's state (version, shape, dtype, Fortran order, content) describes, or None."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return None
        _, shape, kind, fortran, content = self.state
        if not isinstance(kind, PickledArray) or kind.arguments[:1] not in ((b"u1",), ("u1",)):
            return None
        if isinstance(content, str):  # as Python 2's byte strings are read
            content = content.encode("latin-1")
        whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        if not whole or not isinstance(content, bytes) or math.prod(shape) != len(content):
            return None
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran is True else "C")


def read_pickled(path: Path) -> Any:
    """The value in a pickle; arrays in it are PickledArrays, byte strings of Python 2 are Latin-1 str.

    Raises ValueError that says what is wrong with it, or OSError. Memory: three times the file.
    """
    try:
        return _Machine().run(io.BytesIO(path.read_bytes()))
    except OSError:
        raise
    except Exception as error:  # in a damaged pickle, an instruction may find nearly anything on the stack
        raise ValueError(f"{type(error).__name__}: {error}") from None


class _Machine:
    """The stack of a pickle, in segments: each mark begins one."""

    def __init__(self):
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: io.BytesIO) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("it has no end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"):
            stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name == "TUPLE":
            self.since_mark().append(tuple(stack))
        elif name == "LIST":
            self.since_mark().append(stack)
        elif name == "DICT":
            self.since_mark().append(_entries(stack))
        elif name == "APPEND":
            value = stack.pop()
            _of_kind(stack[-1], list).append(value)
        elif name == "APPENDS":
            _of_kind(self.since_mark()[-1], list).extend(stack)
        elif name == "SETITEM":
            entry = _entries(stack[-2:])
            del stack[-2:]
            _of_kind(stack[-1], dict).update(entry)
        elif name == "SETITEMS":
            _of_kind(self.since_mark()[-1], dict).update(_entries(stack))
        elif name == "GLOBAL":
            stack.append(_maker(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            called, module = stack.pop(), stack.pop()
            stack.append(_maker(module, called))
        elif name == "REDUCE":
            arguments, maker = _of_kind(stack.pop(), tuple), stack.pop()
            stack.append(_of_kind(maker, _Maker).make(arguments))
        elif name == "BUILD":
            state = stack.pop()
            _of_kind(stack[-1], PickledArray).state = state
        elif name not in SKIPPED:
            raise ValueError(f"it has the instruction {name}")

    def since_mark(self) -> list[Any]:
        """Drop the segment since the last mark; returns the one below, which is current again."""
        self.stack = self.below.pop()
        return self.stack


class _Maker:
    """Stands for one of the functions that make arrays."""

    def __init__(self, encodes: bool):
        self.encodes = encodes

    def make(self, arguments: tuple) -> PickledArray | bytes:
        if not self.encodes:
            return PickledArray(arguments)
        text, encoding = arguments  # bytes, as Python 3 pickles them for Python 2
        if encoding != "latin1":
            raise ValueError(f"bytes are encoded by {encoding!r}")
        return _of_kind(text, str).encode("latin-1")


def _maker(module: str, name: str) -> _Maker:
    if (module, name) == ("_codecs", "encode"):
        return _Maker(encodes=True)
    if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
        return _Maker(encodes=False)
    raise ValueError(f"it calls {module}.{name}")


def _entries(values: list[Any]) -> dict[Any, Any]:
    """A dict of alternating keys and values. Only plain keys: nested tuples can take exponential time to hash."""
    if any(type(key) not in (str, bytes, int) for key in values[::2]):
        raise ValueError("a key is neither text nor number")
    return dict(zip(values[::2], values[1::2], strict=True))


def _of_kind(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}, not a {type(value).__name__}")
    return value
