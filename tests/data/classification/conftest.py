"""What the tests of labelled sets share."""

from __future__ import annotations

import pytest


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision without its checksums, which no tiny set has."""
    for module in ("cifar", "flowers102", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
