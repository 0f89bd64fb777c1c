"""The kinds of error that a user meets: a wrong value by field, value and remedy; a run that cannot continue."""

from __future__ import annotations

import difflib
import io
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn
from unicodedata import category


def refuse(field_name: str, value: object, remedy: str) -> NoReturn:
    """Raise the one kind of error that a wrong value gets, ValueError("FIELD = VALUE: REMEDY").

    remedy: what would be right, or what to do.
    """
    raise ValueError(without_credentials(f"{field_name} = {value!r}: {remedy}"))


def require(condition: bool, field_name: str, value: object, remedy: str) -> None:
    """Refuse a value unless the condition holds. field_name: as the user writes it; remedy: what would be right."""
    if not condition:
        refuse(field_name, value, remedy)


def others(name: str, known: Sequence[str]) -> str:
    """What to give in place of a name that is none of the known ones: those like it, or all."""
    spelt = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), spelt, 3, 0.75)
    return f"did you mean {' or '.join(spelt[other] for other in near)}?" if near else f"it has {', '.join(known)}"


_ADDRESS = re.compile(r"""(\w[\w+.-]{0,30}://)([^\s/]*@)?([^\s?'"]*)(\?[^\s'"]+)?""")
"""Scheme (of bounded length, or the search would be quadratic), user and password, place, query."""


def without_credentials(text: str) -> str:
    """Text whose addresses have no password and no query, which may hold a signature or a token."""

    def shown(found: re.Match[str]) -> str:
        scheme, user, place, query = found.groups("")
        secret = ":" in user or scheme.startswith("http")  # abfs://CONTAINER@ACCOUNT has none
        return scheme + ("" if secret else user) + place + ("?..." if query else "")

    return _ADDRESS.sub(shown, text) if "://" in text else text


def tree_without_credentials(value: Any) -> Any:
    """What a JSON file can hold, its texts without credentials; tuples become lists."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, dict):
        return {name: tree_without_credentials(of) for name, of in value.items()}
    return [*map(tree_without_credentials, value)] if isinstance(value, list | tuple) else value


_SHOWN = "\n\t\u200c\u200d"
"""Of what is no printable character: what lines and columns are made of, and joiners within words and emoji."""


def printable(text: str) -> str:
    """Text as a terminal may show it: control characters, which could command it, and such that reorder a line are
    escaped, and addresses have no credentials. Names and texts of others are in most of what is said."""
    text = without_credentials(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _SHOWN or category(c) == "Zs" else repr(c)[1:-1] for c in text)


class PrintableFormatter(logging.Formatter):
    """Messages as a terminal may show them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def escape_what_cannot_be_shown() -> None:
    """Print what the terminal's encoding lacks (a C locale), and what could command it, as an escape."""
    if logging.lastResort is not None:  # by which warnings are shown where nothing else is set up
        logging.lastResort.setFormatter(PrintableFormatter())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class RunError(RuntimeError):
    """Ends a run for a reason that its message explains."""


def require_counts(section: str, values: object, names: tuple[str, ...]) -> None:
    """Refuse a count below 1."""
    for name in names:
        require(getattr(values, name) >= 1, f"{section}.{name}", getattr(values, name), "at least 1")


class FailedElsewhere(RunError):
    """Another process failed, and says itself why."""


class LostProcess(RunError):
    """Another process ended without a word, and a collective with it."""

    @staticmethod
    def if_it_is(error: Exception) -> LostProcess | None:
        """What gloo's, NCCL's or the store's error says of another process, in a user's words."""
        ours = isinstance(error, RunError)  # it has its own words
        # By name, since torch is not imported here.
        lost = type(error).__name__ == "DistNetworkError" or any(sign in str(error) for sign in _LOST)
        return LostProcess(_LOST_MEANS) if lost and not ours else None


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_LOST_MEANS = (
    "another process has ended; if it does not say why, it was killed, as the kernel does where memory runs out. "
    "`--resume latest` resumes from the last checkpoint"
)
