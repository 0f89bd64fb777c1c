"""Bad samples: counted by cause, named in the log; the run stops when there are too many."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from modstruct.errors import RunError

Asked = TypeVar("Asked")
Found = TypeVar("Found")
log = logging.getLogger(__name__)

NAMED = 3
# The fraction of fewer samples than this is too noisy: until then the bad ones are compared with this number.
FEWEST_SAMPLES = 256


class BadSample(Exception):
    """A sample that cannot be used. cause: a short, stable string; where: shard and member."""

    def __init__(self, cause: str, where: str):
        super().__init__(cause, where)
        self.cause, self.where = cause, where

    def __str__(self) -> str:
        return f"{self.cause}: {self.where}"


def or_bad(read: Callable[[Asked], Found], asked: Asked) -> Found | BadSample:
    """What `read` finds, or the BadSample that it raises."""
    try:
        return read(asked)
    except BadSample as bad:
        return bad


class TooManyBadSamples(RunError):
    """More than data.max_bad_share of the samples could not be used."""


class BadSampleCounter:
    """Counts bad samples by cause and stops the run when they exceed the tolerated fraction.

    field: the recipe's field that the samples came from. max_bad_share: the tolerated fraction, share_field its name in
    the recipe. process: rank of this process; each process logs the first three samples of each cause that it meets.
    """

    def __init__(self, field: str, max_bad_share: float, process: int = 0, share_field: str = "data.max_bad_share"):
        self.field, self.share_field = field, share_field
        self.max_bad_share = max_bad_share
        self.process = process
        self.counts: Counter[str] = Counter()
        self.tried = 0
        self._named: dict[str, set[str]] = {}

    @property
    def bad(self) -> int:
        """Bad samples of this process so far."""
        return self.counts.total()

    def add(self, faults: Iterable[tuple[str, str]], tried: int, say: bool = True) -> None:
        """Count a batch: its (cause, where) and the number of samples tried, substitutes included. say: log it."""
        self.tried += tried
        for cause, where in faults:
            self.counts[cause] += 1
            named = self._named.setdefault(cause, set())
            if len(named) < NAMED and where not in named:
                named.add(where)
                if not say:
                    continue
                more = "; more of these are only counted" if len(named) == NAMED else ""
                log.warning("%s, process %d: sample left out: %s: %s%s", self.field, self.process, cause, where, more)

    def check(self, bad: int, tried: int, fewest: int = FEWEST_SAMPLES) -> None:
        """Raise TooManyBadSamples if `bad` of `tried` samples, each summed over the processes, are too many.

        As long as fewer than `fewest` samples were tried, the fraction is taken of `fewest`.
        """
        if bad > self.max_bad_share * max(tried, fewest):
            raise TooManyBadSamples(
                f"{self.share_field} = {self.max_bad_share}: {bad} of {tried} samples of {self.field} cannot be used "
                f"(this process: {self.summary()}); repair them or raise the share"
            )

    def summary(self) -> str:
        """Counts of this process as text, the most frequent cause first, with an example of each."""
        if not self.counts:
            return "no bad sample"
        return ", ".join(f"{n} {cause} (as {min(self._named[cause])})" for cause, n in self.counts.most_common())
