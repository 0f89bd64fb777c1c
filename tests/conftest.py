"""Lets every test write `from processes import run_on_processes`; spawned children inherit this search path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
