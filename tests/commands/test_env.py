"""`modstruct env` tells what is there and what is missing."""

from __future__ import annotations

import sys

import pytest
import torch

from modstruct import __version__
from modstruct.commands import env


def test_it_tells_versions_extension_and_disks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["modstruct", "env"])
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    env.main()
    told = capsys.readouterr().out
    for line in (__version__, f"torch {torch.__version__.partition('+')[0]}", "_C: ", "NCCL_DEBUG=INFO", "GiB free"):
        assert line in told


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(env, "PACKAGES", ["torch", "no-such-package"])
    monkeypatch.setattr(env, "EITHER", {"torch"})
    missing = "\n".join(env.described()["missing"])
    assert "g++: installing" in missing
    assert "no-such-package: pip install -e ." in missing
    assert "torch" not in missing


def test_another_command_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["modstruct", "train"])
    with pytest.raises(SystemExit):
        env.main()
    assert "modstruct env" in capsys.readouterr().err
