"""Rows and small values of every process, brought together in the order of the source."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modstruct.distributed import (
    FailedElsewhere,
    broadcast_object,
    fail_together,
    gather,
    gather_objects,
    is_main,
    max_over_processes,
    own_store,
    rank,
    world_size,
)

T = TypeVar("T")
Found = TypeVar("Found")
ROWS_AT_ONCE = 1 << 14
STORE_TIMEOUT_SECONDS = 60.0
_number = itertools.count()
_alone = ContextVar("alone", default=False)
"""Whether what runs now runs on this process alone, within `on_main` or `share_out`."""


def rounds_of(batches: int) -> int:
    """Forward passes that every process makes so that together they cover so many batches."""
    return math.ceil(batches / world_size())


def my_batches(batches: int) -> range:
    """This process's contiguous run of the batches; the processes' runs, in order of rank, are all of them.

    A batch holds the same samples whatever the number of processes, so its embeddings are the same too.
    """
    rounds = rounds_of(batches)
    return range(min(rank() * rounds, batches), min((rank() + 1) * rounds, batches))


@torch.no_grad()
def collect_rows(
    embed: Callable[[Tensor], Tensor],
    inputs: Iterator[Tensor],
    filler: Tensor,
    batches: int,
    batch_size: int,
    title: str,
) -> np.ndarray:
    """Embed this process's batches and bring the rows of all processes to the main one.

    embed: (b, …) -> (b, D), collective. inputs: the batches of `my_batches(batches)`, each of 0 to batch_size rows, on
    the device of the processes' collectives. filler: (1, …), embedded where a process has no row, because under ZeRO-3
    all processes must make the same number of forward passes. title: what the main process's progress bar says.
    Returns (n, D) float32 on the main process, in the order of the batches; (0, D) elsewhere.
    """
    rounds, mine = rounds_of(batches), []
    collected: list[list[np.ndarray]] = [[] for _ in range(world_size())]
    for _ in tqdm(range(rounds), desc=title, unit="batch", leave=False, disable=not is_main()):
        batch = next(inputs, filler[:0])
        mine.append(len(batch))
        embedded = embed(batch if len(batch) else filler)[: len(batch)].float()
        padded = embedded.new_zeros((batch_size, embedded.shape[1]))
        padded[: len(batch)] = embedded
        everyone = gather(padded)  # (W batch_size, D)
        if is_main():
            for process, rows in enumerate(everyone.split(batch_size)):
                collected[process].append(rows.cpu().numpy())
    counts = gather(torch.tensor([mine], device=filler.device)).cpu()  # (W, rounds)
    if not is_main():
        return np.empty((0, embedded.shape[1]), dtype=np.float32)
    in_order = zip(chain.from_iterable(collected), counts.flatten().tolist(), strict=True)
    return np.concatenate([rows[:n] for rows, n in in_order])


@torch.no_grad()
def collect_tokens(
    encode: Callable[[Tensor], Tensor],
    inputs: Iterator[Tensor],
    filler: Tensor,
    batches: int,
    batch_size: int,
    store: torch.device,
    title: str,
) -> Tensor:
    """As `collect_rows` with rows of any shape, (n, …) in the precision that encode gives, on every process.

    store: the device that keeps them.
    """
    rounds, mine = rounds_of(batches), []
    collected: list[list[Tensor]] = [[] for _ in range(world_size())]
    for _ in tqdm(range(rounds), desc=title, unit="batch", leave=False, disable=not is_main()):
        batch = next(inputs, filler[:0])
        mine.append(len(batch))
        encoded = encode(batch if len(batch) else filler)[: len(batch)]
        padded = encoded.new_zeros((batch_size, *encoded.shape[1:]))
        padded[: len(batch)] = encoded
        for process, rows in enumerate(gather(padded).split(batch_size)):
            collected[process].append(rows.to(store))
    counts = gather(torch.tensor([mine], device=filler.device)).flatten().tolist()
    return torch.cat([rows[:n] for rows, n in zip(chain.from_iterable(collected), counts, strict=True)])


def rows_to_main(rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Rows (n, …) of each process, in order of rank, on the main process; every process calls it.

    device: where collectives run. Elsewhere the result has the same shape and holds NaN, and takes no memory.
    """
    counts = gather(torch.tensor([len(rows)], device=device)).tolist()
    shape = (sum(counts), *rows.shape[1:])
    found = np.empty(shape, rows.dtype) if is_main() else np.broadcast_to(np.array(np.nan, rows.dtype), shape)
    starts = np.cumsum([0, *counts])
    for first in range(0, max(counts), ROWS_AT_ONCE):
        padded = torch.zeros((min(ROWS_AT_ONCE, max(counts) - first), *rows.shape[1:]), device=device)
        some = torch.from_numpy(rows[first : first + len(padded)])
        padded = padded.to(some.dtype)
        padded[: len(some)] = some.to(device)
        for process, gathered in enumerate(gather(padded).split(len(padded))):
            own = min(max(counts[process] - first, 0), len(padded))
            if is_main():
                found[starts[process] + first : starts[process] + first + own] = gathered[:own].cpu().numpy()
    return found


def collect_values(value: Any, device: torch.device) -> list[Any]:
    """A small value of plain JSON kinds from every process, on every process, in order of rank.

    As JSON text and not as pickles: keys, captions and metadata come from files.
    """
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([len(content)], device=device)
    padded = content.new_zeros((1, int(max_over_processes(length))))
    padded[0, : len(content)] = content
    everyone, lengths = gather(padded).cpu().numpy(), gather(length).tolist()
    return [json.loads(row[:n].tobytes()) for row, n in zip(everyone, lengths, strict=True)]


def _by_itself(measure: Callable[[], T]) -> T:
    token = _alone.set(True)
    try:
        return measure()
    finally:
        _alone.reset(token)


def on_main(measure: Callable[[], Any]) -> Any:
    """What the main process measures, on every process; its error too, so that none waits for ever.

    Within it `on_main`, `share_out` and `together` are this process's alone, so that measure may be what else all
    processes call, such as a metric of a set whose rows the main process alone has.
    """
    if _alone.get():
        return measure()
    outcome: dict[str, Any] = {}
    error: Exception | None = None
    if is_main():
        try:
            outcome = {"measured": _by_itself(measure)}
        except Exception as e:  # raised below, here as it is and elsewhere by its text
            error, outcome = e, {"error": f"{type(e).__name__}: {e}"}
    outcome = broadcast_object(outcome)
    if error is not None:
        raise error
    if "error" in outcome:
        raise FailedElsewhere(f"the main process failed first: {outcome['error']}")
    return outcome["measured"]


def on_each(measure: Callable[[], Found]) -> Found:
    """What each process measures itself, alone as within `on_main`; what it raises on one process is raised on all."""
    if _alone.get():
        return measure()
    found: list[Found] = []
    error: Exception | None = None
    try:
        found.append(_by_itself(measure))
    except Exception as e:  # raised below, here as it is and elsewhere by its text
        error = e
    fail_together(error, f"process {rank()}: {type(error).__name__}: {error}")
    return found[0]


def share_out(items: Sequence[T], measure: Callable[[T], Found], title: str = "") -> list[Found]:
    """measure(item) of every item, in order, on every process; strided by world size, each is measured once.

    items: the same on every process. measure: calls no collective but `on_main` and `share_out`, which within it are
    this process's alone, and gives the same wherever it runs: seeds belong to items, not to processes. What it raises
    on one process is raised on all. title: what the main process's progress bar says of its own; none without.
    """
    if _alone.get():
        return [measure(item) for item in items]
    own = tqdm(items[rank() :: world_size()], title, leave=False, disable=not (title and is_main()))
    mine = on_each(lambda: [measure(item) for item in own])
    everyone = gather_objects(mine)
    return [everyone[number % world_size()][number // world_size()] for number in range(len(items))]


def together(work: Callable[[Callable[[int], None]], None], title: str, total: int) -> None:
    """Do this process's share of some work; returns when all have done theirs. Every process calls it alike.

    work: calls `done(n)` for each n of the `total` that all do; the main process shows them. An error of one process
    ends the work of all, at their next `done`: there it is raised as it is, and elsewhere FailedElsewhere.
    """
    shared = world_size() > 1 and not _alone.get()
    store = own_store(f"together {next(_number)}", STORE_TIMEOUT_SECONDS) if shared else None
    error: Exception | None = None
    with tqdm(total=total, desc=title, leave=False, disable=not is_main()) as bar:

        def done(more: int) -> None:
            bar.update(more if store is None else store.add("done", more) - bar.n)
            if store is not None and store.check(["failed"]):
                raise FailedElsewhere(f"another process failed first: {store.get('failed').decode()}")

        try:
            work(done)
        except Exception as caught:  # reported to the others first
            error = caught
            if store is not None and not isinstance(error, FailedElsewhere):
                store.set("failed", f"{type(error).__name__}: {error}")
    if shared:
        fail_together(error, f"{type(error).__name__}: {error}")
    elif error is not None:
        raise error
