"""Lets every test import the helpers of other folders (processes, tiny_models); spawned children inherit this path."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("distributed", "models"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
