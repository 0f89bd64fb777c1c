"""Which members of a tar are one sample: the rule for keys, and what is not used, counted by cause with examples.

A key ends at the first dot of a member's base name, as in webdataset, so 000.seg.png is another member of the sample
000. Where no member of such a sample has a known name, but several share all that precedes a known extension
(img_v1.00000.jpg, img_v1.00000.txt), the key ends at the last dot: users number their files in this way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from modstruct.data.faults import NAMED
from modstruct.data.shards.tar_headers import Member

IMAGES = ("jpg", "jpeg", "png", "webp")
KINDS = dict.fromkeys(IMAGES, "image") | {"txt": "text", "json": "metadata"}
LAYOUT = "a sample is KEY.jpg (or jpeg, png, webp), KEY.txt and optionally KEY.json, one after the other in the tar"
# Causes are names in a tar: whoever wrote it must not fill the index, the log or the memory with them.
MOST_CAUSES, LONGEST_NAME = 24, 60
OTHER = "members of other names"


class Tally:
    """Counts by cause, with up to three examples each."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, cause: str, name: str) -> None:
        if cause not in self.counts and len(self.counts) >= MOST_CAUSES:
            cause = OTHER
        self.counts[cause] += 1
        examples = self.examples.setdefault(cause, [])
        if len(examples) < NAMED:
            examples.append(printable(name))

    def merge(self, counts: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> None:
        """Add what another tally, of the same or of another process, has counted."""
        for cause, count in counts.items():
            self.counts[cause] += count
            named = self.examples.setdefault(cause, [])
            named += examples.get(cause, [])[: NAMED - len(named)]

    def described(self) -> dict[str, dict]:
        """As JSON."""
        return {"counts": dict(self.counts), "examples": self.examples}


@dataclass
class SampleMembers:
    """One sample."""

    key: str
    """Name of its members without the known extension."""
    found: dict[str, Member] = field(default_factory=dict)
    """The first member of each kind."""


class MemberGroups:
    """Groups the members of a tar, given in order, into samples.

    kinds: kind by extension. needed: kinds that a whole sample has. unused: tally of the members that are no part of
    a sample.
    """

    def __init__(self, kinds: Mapping[str, str], needed: Collection[str], unused: Tally):
        self.kinds, self.needed, self.unused = kinds, frozenset(needed), unused
        self._run = ""  # what precedes the first dot; no member's
        self._plain: SampleMembers | None = None
        self._dotted: list[tuple[SampleMembers, list[tuple[str, Member]]]] = []  # members by kind
        self._keys_have_dots = False

    def add(self, member: Member) -> list[SampleMembers]:
        """Take the next member. Returns the samples that ended before it."""
        run, extension = _parted(member.name)
        plain, dotted = self.kinds.get(extension), self.kinds.get(extension.rpartition(".")[2])
        if dotted is None:
            self.unused.add(_cause(extension), member.name)
            return []
        ended = self.end() if run != self._run else []
        self._run = run
        if plain is not None:
            self._plain = self._plain or SampleMembers(run)
            self._keep(self._plain, plain, member)
        else:
            key = member.name.rpartition(".")[0]
            if not self._dotted or self._dotted[-1][0].key != key:
                self._dotted.append((SampleMembers(key), []))
            self._dotted[-1][1].append((dotted, member))
        return ended

    def end(self) -> list[SampleMembers]:
        """The samples of the members since the last that were returned."""
        plain, dotted = self._plain, self._dotted
        self._run, self._plain, self._dotted = "", None, []
        by_first_dot = plain is not None and not self.needed.isdisjoint(plain.found)
        if not by_first_dot and dotted:
            self._keys_have_dots |= any(self._is_whole(members) for _, members in dotted)
        samples = [] if plain is None else [plain]
        for sample, members in dotted:
            if by_first_dot or not self._keys_have_dots:
                for _, member in members:
                    self.unused.add(_cause(_parted(member.name)[1]), member.name)
                continue
            for kind, member in members:
                self._keep(sample, kind, member)
            samples.append(sample)
        return samples

    def _is_whole(self, members: list[tuple[str, Member]]) -> bool:
        return self.needed <= {kind for kind, _ in members}

    def _keep(self, sample: SampleMembers, kind: str, member: Member) -> None:
        if kind in sample.found:
            self.unused.add(f"a second {kind} of a key", member.name)
        else:
            sample.found[kind] = member


def key_of(name: str) -> str:
    """The key of a sample by the name of one of its used members: all before the last dot."""
    return name.rpartition(".")[0]


def may_be_of(name: str, key: str) -> bool:
    """Whether a member of this name may belong to the sample of this key."""
    return key in (_parted(name)[0], key_of(name))


def _parted(name: str) -> tuple[str, str]:
    """What precedes the first dot of the base name, with the folder, and the extension behind it, in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    # Hidden files, such as macOS' ._000.jpg, are members of no sample.
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else (name, "")


def _cause(extension: str) -> str:
    while extension.partition(".")[0].isdigit():  # a number in the key, which differs from member to member
        extension = extension.partition(".")[2]
    return f"members named .{printable(extension[:LONGEST_NAME])}" if extension else "members hidden or without a name"


def printable(name: str) -> str:
    """A name from a tar, safe for a log: undecodable bytes and control characters escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
