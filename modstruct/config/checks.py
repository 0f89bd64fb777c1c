"""The one kind of error that a wrong recipe gets: field, value, remedy."""

from __future__ import annotations


def refuse(field_name: str, value: object, remedy: str) -> None:
    """Raise the one kind of error that a wrong recipe gets: field, value, remedy."""
    raise ValueError(f"{field_name} = {value!r}: {remedy}")


def require(condition: bool, field_name: str, value: object, remedy: str) -> None:
    if not condition:
        refuse(field_name, value, remedy)


class RunError(RuntimeError):
    """Ends a run for a reason that its message explains."""


def require_counts(section: str, values: object, names: tuple[str, ...]) -> None:
    """Refuse a count below 1."""
    for name in names:
        require(getattr(values, name) >= 1, f"{section}.{name}", getattr(values, name), "at least 1")
