"""TensorBoard, as far as it can be written: a full disk costs the curves, not the run.

What the disk has no room for is said once. The next checkpoint, which needs room too, ends the run with a clear error.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

log = logging.getLogger("modstruct")


class Curves:
    """One TensorBoard writer. purge_step: first step of which earlier entries no longer count."""

    def __init__(self, folder: Path, purge_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        _leave_the_word_to_us()

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._try(lambda writer, name=name, value=value: writer.add_scalar(name, value, step))

    def image(self, name: str, picture: Tensor, step: int) -> None:
        """image: uint8 (3, H, W)."""
        self._try(lambda writer: writer.add_image(name, picture, step))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, action: Callable) -> None:
        if self.writer is None:
            return
        try:
            action(self.writer)
        except OSError as error:
            self.writer = None
            log.warning("%s cannot be written (%s): the run goes on without curves", self.folder, error)


def _leave_the_word_to_us() -> None:
    """Hide the traceback of TensorBoard's writing thread: `Curves` meets its error at the next call."""
    before = threading.excepthook

    def hook(failed) -> None:
        if not (type(failed.thread).__name__ == "_AsyncWriterThread" and issubclass(failed.exc_type, OSError)):
            before(failed)

    threading.excepthook = hook


class LogFile(logging.FileHandler):
    """A log file that a full disk leaves incomplete, without a word: the screen shows the same."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass
