"""Lets every test import the helpers of other folders (processes, tiny_models); spawned children inherit this path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import settings

for folder in sorted(path for path in Path(__file__).parent.rglob("*") if path.is_dir() and path.name != "__pycache__"):
    sys.path.insert(0, str(folder))

# No deadlines: a busy machine is slow, not wrong. In CI the same examples every time.
settings.register_profile("modstruct", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("modstruct")
