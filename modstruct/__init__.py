"""modstruct: vision-language pretraining whose embeddings keep their structure."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modstruct.api import load, objective

# Before torch is imported, whose libgomp reads it then. On a busy machine threads that wait actively take the cores
# from those that work: at a load of 17 on two cores a step took 30 s instead of 2. Loader processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = ["__version__", "load", "objective"]


def __getattr__(name: str) -> Any:
    """What modstruct.api offers; imported when it is asked for, since torch takes seconds to load."""
    if name not in __all__:
        raise AttributeError(f"module 'modstruct' has no attribute {name!r}")
    from modstruct import api

    return getattr(api, name)
