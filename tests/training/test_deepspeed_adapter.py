"""What is said where DeepSpeed compiles an operator."""

from __future__ import annotations

import errno
import logging
import os
import time

import pytest

from modstruct.training import deepspeed_adapter


class Builder:
    name = "cpu_adam"


def test_compiling_is_said_with_its_time(monkeypatch, caplog):
    monkeypatch.setattr(deepspeed_adapter, "SECONDS_OF_A_LOAD", 0.02)
    monkeypatch.setattr(deepspeed_adapter, "SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(logging.getLogger("modstruct"), "propagate", True)
    with caplog.at_level(logging.INFO, "modstruct"):
        deepspeed_adapter._announced(lambda builder, verbose: time.sleep(0.5))(Builder())
    assert len(caplog.messages) >= 3
    assert caplog.messages[0] == "DeepSpeed compiles its operator cpu_adam, once on a machine: 0 s so far"


def test_a_folder_for_what_is_compiled_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/nowhere")

    def full(builder, verbose):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/nowhere/cpu_adam")

    with pytest.raises(ValueError, match=r"^TORCH_EXTENSIONS_DIR = '/nowhere': Read-only file system: /nowhere/cpu"):
        deepspeed_adapter._announced(full)(Builder())
