"""What a run shows: the progress bar, TensorBoard, the log. Only the main process writes.

TensorBoard is written as far as it can be: a full disk costs the curves, not the run. What the disk has no room for is
said once. The next checkpoint, which needs room too, ends the run with a clear error.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import resource
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from modstruct import __version__, distributed
from modstruct.config import FinetuneRecipe, Recipe
from modstruct.config.recipe_files import leaves, recipe_to_dict, recipe_to_yaml
from modstruct.errors import PrintableFormatter, refuse, tree_without_credentials, without_credentials
from modstruct.evaluation.examples import ProjectedPoints
from modstruct.files import disk_error
from modstruct.training.step import StepReport
from modstruct.training.timing import StepClock

log = logging.getLogger("modstruct")


def start_logging(output: Path) -> None:
    """Messages to the screen, above the progress bar, and to OUTPUT/log.txt; of other processes only warnings.

    What libraries say goes into the log alone, their errors to the screen too. A resumed run adds to its log.
    """
    log.setLevel(logging.DEBUG)
    log.propagate = False
    handler = _AboveTheBar()
    rank = "" if distributed.is_main() else f"[process {distributed.rank()}] "
    handler.setFormatter(PrintableFormatter(f"{rank}%(message)s"))
    handler.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)
    log.handlers = [handler]
    libraries = _AboveTheBar(logging.ERROR)
    libraries.setFormatter(PrintableFormatter(f"{rank}%(name)s: %(message)s"))
    logging.root.handlers = [libraries]
    logging.captureWarnings(True)
    if distributed.is_main():
        output.mkdir(parents=True, exist_ok=True)
        to_file = LogFile(output / "log.txt")
        to_file.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)
        logging.root.addHandler(to_file)
    quiet_libraries()
    log.debug(
        "Started: %s (modstruct %s, torch %s, Python %s, process 0 of %d on %s)",
        shlex.join(sys.argv),
        __version__,
        torch.__version__,
        platform.python_version(),
        distributed.world_size(),
        platform.node(),
    )


def quiet_libraries() -> None:
    """Send to the log what the libraries imported so far would write on the screen."""
    for name, library in list(logging.root.manager.loggerDict.items()):
        if isinstance(library, logging.Logger) and library.handlers and library is not log:
            ours = name.partition(".")[0] == log.name
            screens = [h for h in library.handlers if getattr(h, "stream", None) in (sys.stdout, sys.stderr)]
            for screen in () if ours else screens:
                library.removeHandler(screen)
                library.propagate = True


class _AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


class Telemetry:
    """Progress bar and TensorBoard of one run, and Weights & Biases where logging.wandb names a project.

    first_step: where this process starts (after a resume, not 0); what TensorBoard holds beyond it is dropped.
    """

    def __init__(self, recipe: Recipe | FinetuneRecipe, first_step: int, steps: int):
        main = distributed.is_main()
        self.folder = Path(recipe.output) / "tensorboard"
        self.global_batch, self.steps = recipe.train.global_batch, steps
        if main and recipe.logging.wandb:
            start_wandb(recipe)
        self.curves = Curves(self.folder, purge_step=first_step + 1) if main else None
        if self.curves is not None:
            self.curves.describe(recipe)
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            disable=not main,
            dynamic_ncols=True,
            desc="train",
            smoothing=0.1,
        )
        self.clock = StepClock()
        self._since = (time.perf_counter(), first_step)

    def step(
        self, step: int, report: StepReport, every: int, learning_rate: float, more: Callable[[], dict[str, float]]
    ) -> None:
        """After step `step` (counted from 1). more: further scalars; all processes call it."""
        self.bar.update(1)
        if step % every and step != self.steps:
            return
        now, (then, before) = time.perf_counter(), self._since
        self._since = (now, step)
        rate = self.global_batch * (step - before) / max(now - then, 1e-9)
        seconds = self.clock.read(step - before)
        extra = more()
        if self.curves is None:
            return
        loss = report.total.item()
        samples = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
        self.bar.set_postfix({"loss": f"{loss:.4f}", "samples/s": samples})
        scalars = {"loss/total": loss} | {f"loss/{name}": value.item() for name, value in report.terms.items()}
        scalars |= {
            "train/learning_rate": learning_rate,
            "train/samples_per_second": rate,
            "memory/process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if "logit_scale" in report.outputs:
            scalars["train/logit_scale"] = report.outputs["logit_scale"].item()
        scalars |= {f"seconds/{phase}": value for phase, value in seconds.items()}
        if report.gradient_norm is not None:
            scalars["train/gradient_norm"] = float(report.gradient_norm)
        if distributed.on_gpu():
            scalars["memory/gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.scalars(scalars | extra, step)
        shown = {"loss": loss} | {name: value.item() for name, value in report.terms.items()}
        told = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
        log.debug("step %d of %d: %s; rate %.3g, %s samples/s", step, self.steps, told, learning_rate, samples)

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.curves is not None:
            self.curves.scalars(values, step)

    def measured(self, name: str, metrics: dict[str, float], step: int) -> None:
        """Metrics of a split: curves, and a line of the log."""
        self.scalars({f"{name}/{key}": value for key, value in metrics.items()}, step)
        log.debug("%s after step %d: %s", name, step, ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))

    def image(self, name: str, image: Tensor, step: int) -> None:
        """image: uint8 (3, H, W)."""
        if self.curves is not None:
            self.curves.image(name, image, step)

    def embeddings(self, name: str, points: ProjectedPoints, step: int) -> None:
        if self.curves is not None:
            self.curves.embeddings(name, points, step)

    def pause(self) -> None:
        """Time from here to `resume` (evaluation, checkpoint) does not count as training throughput.

        What was written goes to the disk: a killed run resumes from this checkpoint, and would leave a gap in
        its curves before it.
        """
        if self.curves is not None:
            self.curves.flush()
        self._paused = time.perf_counter()

    def resume(self) -> None:
        then, step = self._since
        self._since = (then + time.perf_counter() - self._paused, step)

    def close(self) -> None:
        self.bar.close()
        if self.curves is not None:
            self.curves.close()


def start_wandb(recipe: Recipe | FinetuneRecipe) -> None:
    """Let Weights & Biases take what TensorBoard is given, under the same names; a resumed run goes on in its own.

    Raises ValueError naming logging.wandb where the package is missing.
    """
    try:
        import wandb
    except ImportError:
        refuse("logging.wandb", recipe.logging.wandb, "needs a package that is missing: pip install wandb, or null")
    output = Path(recipe.output).resolve()
    try:
        wandb.init(
            project=recipe.logging.wandb,
            name=output.name,
            id=hashlib.blake2b(str(output).encode(), digest_size=8).hexdigest(),
            resume="allow",
            config=tree_without_credentials(recipe_to_dict(recipe)),
            dir=str(output),
            sync_tensorboard=True,
        )
    except Exception as error:  # its package has many
        cause = " ".join(str(error).split())[:200]
        refuse("logging.wandb", recipe.logging.wandb, f"cannot be started ({cause}): log in by `wandb login`, or null")


class Curves:
    """One TensorBoard writer. purge_step: first step of which earlier entries no longer count."""

    def __init__(self, folder: Path, purge_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer: SummaryWriter | None = None
        try:
            self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        except OSError as error:
            self._give_up(error)
        _leave_the_word_to_us()

    def describe(self, recipe: Recipe | FinetuneRecipe) -> None:
        """The recipe as text, and, for comparing runs (HPARAMS), what of it differs from the defaults."""
        from torch.utils.tensorboard.summary import hparams

        text = "".join(f"    {line}\n" for line in without_credentials(recipe_to_yaml(recipe)).splitlines())
        self._try(lambda writer: writer.add_text("recipe", text))
        ours, defaults = (leaves(recipe_to_dict(one)) for one in (recipe, type(recipe)()))
        changed = {
            name: value if isinstance(value, (bool, int, float)) else without_credentials(str(value))
            for name, value in ours.items()
            if value != defaults.get(name) and name not in ("output", "schema")
        }
        ways = ("text_to_image", "image_to_text")
        named = {f"eval/retrieval/{way}/recall_at_1": None for way in ways}
        for summary in hparams(changed, named | {"loss/total": None}):
            self._try(lambda writer, summary=summary: writer.file_writer.add_summary(summary))

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._try(lambda writer, name=name, value=value: writer.add_scalar(name, value, step))

    def image(self, name: str, image: Tensor, step: int) -> None:
        """image: uint8 (3, H, W)."""
        self._try(lambda writer: writer.add_image(name, image, step))

    def embeddings(self, name: str, points: ProjectedPoints, step: int) -> None:
        columns = [[kind, " ".join(caption.split())] for kind, caption in points.labels]
        self._try(
            lambda writer: writer.add_embedding(
                points.rows, columns, points.images, step, name, metadata_header=["modality", "caption"]
            )
        )

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
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.writer = None
        log.warning("%s cannot be written (%s): the run continues without curves", self.folder, disk_error(error))


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
