"""Plain values and byte arrays out of a pickle, without unpickling: its instructions are read, and nothing is called.

Unpickling may run any code. Here a small machine follows the few instructions that dictionaries, lists, texts, numbers
and numpy's arrays of bytes are written with, by Python 2 or 3; whatever else is in a file ends it.
"""

from __future__ import annotations

import io
import math
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

VALUES = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PASSED_OVER = ("PROTO", "FRAME")


class PickledArray:
    """What a pickle makes by numpy's _reconstruct or dtype: the arguments of the call, and the state set on it."""

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
    """The value in a pickle; arrays in it are PickledArrays, byte strings of Python 2 are Latin-1 texts.

    Raises ValueError that says what is wrong with it, or OSError. Memory: three times the file.
    """
    try:
        return _Machine().run(io.BytesIO(path.read_bytes()))
    except OSError:
        raise
    except Exception as error:  # of a damaged one, an instruction may find nearly anything on the stack
        raise ValueError(f"{type(error).__name__}: {error}") from None


class _Machine:
    """The stack of a pickle, by parts: each mark begins another."""

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
        elif name not in PASSED_OVER:
            raise ValueError(f"it has the instruction {name}")

    def since_mark(self) -> list[Any]:
        """Drops the part of the stack since the last mark and returns the one below, which goes on."""
        self.stack = self.below.pop()
        return self.stack


class _Maker:
    """Stands for one of the functions that arrays are made by."""

    def __init__(self, encodes: bool):
        self.encodes = encodes

    def make(self, arguments: tuple) -> PickledArray | bytes:
        if not self.encodes:
            return PickledArray(arguments)
        text, encoding = arguments  # bytes, as Python 3 writes them for Python 2
        if encoding != "latin1":
            raise ValueError(f"bytes are encoded by {encoding!r}")
        return _of_kind(text, str).encode("latin-1")


def _maker(module: str, name: str) -> _Maker:
    if (module, name) == ("_codecs", "encode"):
        return _Maker(encodes=True)
    if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
        return _Maker(encodes=False)
    raise ValueError(f"it asks for {module}.{name}")


def _entries(values: list[Any]) -> dict[Any, Any]:
    """Keys and values in turn. Keys are plain: a few tuples of tuples would take for ever to hash."""
    if any(type(key) not in (str, bytes, int) for key in values[::2]):
        raise ValueError("a key is neither text nor number")
    return dict(zip(values[::2], values[1::2], strict=True))


def _of_kind(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} belongs")
    return value
