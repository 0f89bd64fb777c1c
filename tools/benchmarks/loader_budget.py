"""Where the processor time of the training loader goes, by part.

`read` has the time of the threads that read ahead as well, and `copy, collate` what no other part has.
"""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from unittest import mock

from modstruct.data.shards.ahead import ReadAhead

PARTS = {
    "decode": ("modstruct.data.shards.loader.decode_reduced",),
    "crop, resize": (
        "modstruct.data.transforms.image_views.ImageViews._crop_and_flip",
        "modstruct.data.transforms.image_views.centre_crop",
    ),
    "augment": ("torchvision.transforms.v2.AutoAugment.forward", "torchvision.transforms.v2.RandAugment.forward"),
    "text": (
        "modstruct.data.shards.loader.LocalBatches._text_views",
        "modstruct.data.shards.loader.LocalBatches._caption",
    ),
}
"""What is timed for each; reading, which is an iterator, comes besides."""


def budget(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of the processor by part."""
    spent = dict.fromkeys(("read", *PARTS), 0.0)

    def timed(part: str, function: Callable) -> Callable:
        def call(*arguments, **named):
            start = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[part] += time.thread_time() - start

        return call

    def read(*arguments) -> Iterator:
        taken = iter(plain_read(*arguments))
        take = timed("read", lambda: next(taken, None))
        while (sample := take()) is not None:
            yield sample

    plain_read = ReadAhead.read
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(ReadAhead, "read", read))
        for part, names in PARTS.items():
            for name in names:
                patches.enter_context(mock.patch(name, timed(part, pkgutil.resolve_name(name))))
        start, thread = time.process_time(), time.thread_time()
        work()
        thread = time.thread_time() - thread
        whole = time.process_time() - start
    spent["read"] += whole - thread
    return spent | {"copy, collate": whole - sum(spent.values()), "all": whole}


def print_budget(spent: dict[str, float]) -> None:
    print(f"\n{'budget, ms of a core a view':30}{'':>8}{'share':>9}")
    for part, milliseconds in spent.items():
        print(f"{part:30}{milliseconds:>8.3f}{milliseconds / spent['all']:>9.1%}")
