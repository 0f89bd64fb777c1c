"""Leakage: images of an evaluation set that also lie, wholly or nearly, in a training source."""

from modstruct.evaluation.leakage.duplicates import Duplicates, Thresholds, find_duplicates
from modstruct.evaluation.leakage.leave_out import leave_out, read_keys, rows_kept
from modstruct.evaluation.leakage.prints import Prints, make_prints
from modstruct.evaluation.leakage.result import LEAKED_KEYS, write_result

__all__ = [
    "LEAKED_KEYS",
    "Duplicates",
    "Prints",
    "Thresholds",
    "find_duplicates",
    "leave_out",
    "make_prints",
    "read_keys",
    "rows_kept",
    "write_result",
]
