"""Texts of samples: the caption or captions of KEY.txt, the metadata of KEY.json.

KEY.txt holds one caption (img2dataset), whatever line breaks it has, or several, one a line (the retrieval sets of
CLIP_benchmark). Which of the two a source is made by is looked up in a sample of it, by `look`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modstruct.data.faults import BadSample
from modstruct.data.shards.sample_table import SourceRows
from modstruct.data.shards.sources import is_pipe
from modstruct.files import RepeatedKey, atomic_write, parse_json

# Levels of KEY.json. Deeper ones would pass the parser, but break the pickling to another process.
DEEPEST_METADATA = 32
TEXT_FILE = "txt"
"""KEY.txt in data.caption_fields, whose other names are fields of KEY.json."""
SEVERAL_SHARE = 0.9
"""Fraction of them that must hold several lines."""


def parse_caption(content: bytes, where: str) -> str:
    """The whole text of KEY.txt, stripped, never empty. Raises BadSample."""
    try:
        caption = content.removeprefix(codecs.BOM_UTF8).decode().strip()
    except UnicodeDecodeError:
        raise BadSample("undecodable text", where) from None
    if not caption:
        raise BadSample("empty caption", where)
    return caption


def caption_lines(caption: str) -> tuple[str, ...]:
    """The lines of a text that are not empty, stripped."""
    return tuple(stripped for line in caption.split("\n") if (stripped := line.strip()))


def parse_metadata(content: bytes, where: str) -> dict:
    """The object of KEY.json. Raises BadSample."""
    try:
        metadata = parse_json(content)
    except RepeatedKey as error:
        raise BadSample("malformed metadata", f"{where}: {error}") from None
    except (ValueError, RecursionError):
        raise BadSample("malformed metadata", where) from None
    # Walking the values takes longer than parsing them, and few brackets cannot nest deeply.
    shallow = content.count(b"{") + content.count(b"[") <= DEEPEST_METADATA
    if not isinstance(metadata, dict) or not (shallow or _is_shallow(metadata)):
        raise BadSample("malformed metadata", where)
    return metadata


def texts_of(metadata: dict, field: str) -> list[str]:
    """The texts of a field that is a text or a list of texts, stripped; what is empty or no text is left out."""
    value = metadata.get(field)
    texts = value if isinstance(value, list) else [value]
    return [stripped for text in texts if isinstance(text, str) and (stripped := text.strip())]


def _is_shallow(metadata: dict) -> bool:
    level: list[dict | list] = [metadata]
    for _ in range(DEEPEST_METADATA):
        values = [value for node in level for value in (node.values() if isinstance(node, dict) else node)]
        level = [value for value in values if isinstance(value, (dict, list))]
    return not level


@dataclass(frozen=True)
class Look:
    """What a sample of a source's KEY.txt looks like."""

    texts: int
    """Read."""
    several: int
    """Of these, texts of several lines."""
    whole: int
    """Of these, texts that KEY.json holds as a whole, line breaks included: one caption each."""

    @property
    def lines_are_captions(self) -> bool:
        """Nearly every text has several lines, and no KEY.json says that they are one caption."""
        return self.whole == 0 and self.several > 0 and self.several >= SEVERAL_SHARE * self.texts


Reading = Callable[[Sequence[int]], Iterable[tuple[bytes, bytes]]]
"""Content of KEY.txt and of KEY.json, empty if there is none, of samples by number, without those that are bad."""


def kept_looks(path: Path, sources: Sequence[SourceRows], wanted: Sequence[bool | str], read: Reading) -> list[Look]:
    """Each source as it looks, kept in a file, so that it is decided once.

    wanted: "auto" where it matters. Elsewhere no pipe is fetched for it, and the look is empty, as of a source of which
    nothing can be read.
    """
    known: list[list[int] | None] = json.loads(path.read_text()) if path.exists() else [None] * len(sources)
    before = list(known)
    for number, (source, want) in enumerate(zip(sources, wanted, strict=True)):
        if known[number] is None and (want == "auto" or not is_pipe(source.shards[0])):
            found = look(read(source.looked_at().tolist()))
            known[number] = [found.texts, found.several, found.whole] if found.texts else None
    if known != before:
        with suppress(OSError), atomic_write(path) as file:  # a cache that cannot be written is no reason to stop
            file.write(json.dumps(known).encode())
    return [Look(*(counts or (0, 0, 0))) for counts in known]


def look(samples: Iterable[tuple[bytes, bytes]]) -> Look:
    """Look at KEY.txt and KEY.json of samples of a source; those that cannot be read do not count."""
    texts = several = whole = 0
    for text, metadata in samples:
        with suppress(BadSample):
            caption = parse_caption(text, "")
            texts += 1
            if len(caption_lines(caption)) > 1:
                several += 1
                whole += _holds(parse_metadata(metadata, ""), caption) if metadata else 0
    return Look(texts, several, whole)


def _holds(metadata: dict, caption: str) -> bool:
    """Whether a field of the metadata is this text; white space may differ."""
    words = caption.split()
    return any(isinstance(value, str) and value.split() == words for value in metadata.values())
