"""A model whose large tensors are made one at a time, later: what makes them is noted and run again for each.

A model that is sharded over processes (ZeRO stage 3) need not lie whole on any of them. But open_clip, timm and
transformers make a layer's weights twice, in the layer and in the model around it, and a weight's random numbers depend
on all that were drawn before. So the model is constructed without the memory of its large tensors (torch's `meta`
device); each operation on them is noted with the state of the random generator, which is advanced as the operation
would; and `Deferred.value` runs what a tensor depends on. Values are those of the plain construction, bit for bit.
"""

from __future__ import annotations

import ctypes
import warnings
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.serialization import config as serialization

SMALL = 2**16
"""Tensors of fewer elements are made at once."""
META = torch.device("meta")
OVERWRITES = {f"aten::{name}_" for name in ("normal", "uniform", "zero", "fill", "copy")}


def free_memory() -> None:
    """Give what was freed back to the system: glibc keeps large blocks that lie between others."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Operation(NamedTuple):
    function: Any
    args: tuple
    kwargs: dict
    results: Any
    reads: frozenset[int]
    """Storages, by key, of what goes in."""
    writes: frozenset[int]
    """Of what it changes or makes."""
    begins: frozenset[int]
    """Of what it writes whole, so that nothing before matters."""
    random_state: Tensor | None


class Deferred(TorchDispatchMode):
    """A context in which models are constructed on the CPU. small: tensors of fewer elements are made at once.

    What reads a deferred tensor's numbers in Python (`.item()`) has them made for it, and lets them go. Files that
    torch.load reads are mapped into memory, as safetensors' are, and read when a tensor's numbers are made.
    """

    def __init__(self, small: int | None = None):
        super().__init__()
        self.small = SMALL if small is None else small
        self._operations: list[_Operation] = []
        self._noted: set[int] = set()

    def __enter__(self) -> Self:
        self._settings = ExitStack()
        self._settings.enter_context(serialization.patch("load.mmap", True))  # type: ignore[attr-defined]
        self._settings.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")  # which is noted here
        self._settings.enter_context(_AsIfMade())
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._settings.close()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # which _AsIfMade is
            return self._defer_or_run(function, args, kwargs or {})

    def _defer_or_run(self, function: Any, args: tuple, kwargs: dict) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(_is_deferred(tensor) for tensor in given):
            changed = _changed(function, args, kwargs)
            if not all(_is_deferred(tensor) for tensor in changed) or not _gives_tensors(function):
                return function(*self._made(args), **self._made(kwargs))
        elif given or not self._is_large(function, args, kwargs):
            return function(*args, **kwargs)
        on_meta = kwargs | ({"device": META} if "device" in kwargs or not given else {})
        shaped = tree_map_only(Tensor, _as_meta, (args, on_meta))
        results = function(*shaped[0], **shaped[1])
        self._note(function, args, kwargs, results)
        return results

    def value(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor that was made in the context: itself, or, where it was deferred, made now."""
        with torch._C.DisableTorchFunction():
            if not _is_deferred(tensor):
                return tensor
            state = torch.get_rng_state()
            made = self._run(tensor)
            torch.set_rng_state(state)
            return made

    def _run(self, tensor: Tensor) -> Tensor:
        wanted, needed = {_key(tensor)}, []
        for operation in reversed(self._operations):
            if operation.writes & wanted:
                needed.append(operation)
                wanted = wanted - operation.begins | operation.reads - operation.begins
        storages: dict[int, torch.UntypedStorage] = {}

        def real(other: Tensor) -> Tensor:
            if not _is_deferred(other):
                return other
            if _key(other) not in storages:  # what begins it writes it whole
                storages[_key(other)] = torch.UntypedStorage(other.untyped_storage().nbytes())
            place = (other.storage_offset(), other.size(), other.stride())
            return torch.empty(0, dtype=other.dtype).set_(storages[_key(other)], *place)

        with torch.no_grad():
            for operation in reversed(needed):
                if operation.random_state is not None:
                    torch.set_rng_state(operation.random_state)
                args, kwargs = tree_map_only(Tensor, real, (operation.args, operation.kwargs))
                results = operation.function(*args, **kwargs)
                for noted, made in zip(tree_leaves(operation.results), tree_leaves(results), strict=True):
                    storages.setdefault(_key(noted), made.untyped_storage())
            return real(tensor)

    def _note(self, function: Any, args: tuple, kwargs: dict, results: Any) -> None:
        reads = frozenset(_key(leaf) for leaf in tree_leaves((args, kwargs)) if _is_deferred(leaf))
        changed = frozenset(_key(tensor) for tensor in _changed(function, args, kwargs))
        writes = changed | (frozenset(_key(result) for result in tree_leaves(results)) - reads)
        if not writes:
            return  # a view: what takes it says where in the storage it lies
        if not reads <= self._noted:  # torch made it itself, below what is seen here
            raise NotImplementedError(f"{function} with a number for a deferred tensor: give it a tensor")
        self._noted |= writes
        begins = writes - reads
        if function._schema.name in OVERWRITES and args[0].nbytes == args[0].untyped_storage().nbytes():
            begins = writes - {_key(leaf) for leaf in tree_leaves(args[1:]) if _is_deferred(leaf)}
        state = None
        if torch.Tag.nondeterministic_seeded in function.tags:
            state = torch.get_rng_state()
            # Drawn and dropped, so that what comes next is drawn as it would be.
            shaped = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="cpu"), (args, kwargs))
            function(*shaped[0], **shaped[1])
            del shaped
            free_memory()
        # What is small may change before it is asked for; what is large is a file's, and is not copied.
        given, named, made = tree_map_only(Tensor, self._held, (args, kwargs, results))
        self._operations.append(_Operation(function, given, named, made, reads, writes, begins, state))

    def _held(self, tensor: Tensor) -> Tensor:
        elements = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor.clone() if not _is_deferred(tensor) and elements < self.small else tensor.detach()

    def _made(self, tree: Any) -> Any:
        return tree_map_only(Tensor, self.value, tree)

    def _is_large(self, function: Any, args: tuple, kwargs: dict) -> bool:
        """Whether a function of no tensors makes a large one."""
        if "device" not in kwargs and not any(argument.name == "device" for argument in function._schema.arguments):
            return False
        made = function(*args, **kwargs | {"device": META})
        return any(result.numel() >= self.small for result in tree_leaves(made) if isinstance(result, Tensor))


class _AsIfMade(TorchFunctionMode):
    """Deferred tensors look as if they were there: torch's own initialisations leave `meta` tensors alone."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        if function == Tensor.device.__get__ and _is_deferred(args[0]):
            return torch.device("cpu")
        if function == Tensor.__setitem__ and not isinstance(args[2], Tensor):
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))  # else made where it is not seen
        return function(*args, **kwargs or {})


def _is_deferred(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.device == META


def _as_meta(tensor: Tensor) -> Tensor:
    return (
        tensor
        if _is_deferred(tensor)
        else torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)
    )


def _key(tensor: Tensor) -> int:
    """Of its storage, which the notes keep alive."""
    return tensor.untyped_storage()._cdata


def _changed(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """Arguments that a function writes into."""
    named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
    written = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for name in written for leaf in tree_leaves(named.get(name)) if isinstance(leaf, Tensor)]


def _gives_tensors(function: Any) -> bool:
    return all("Tensor" in str(result.type) for result in function._schema.returns)
