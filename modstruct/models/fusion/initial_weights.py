"""Where a model's first weights come from: a run, checkpoint or export of ours, or ALBEF's published file."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modstruct import checkpoints
from modstruct.checkpoints import read_weight_file
from modstruct.config import TokenizerConfig
from modstruct.config.migrations import is_fine_tuning, migrate_checkpoint
from modstruct.data.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from modstruct.distributed import main_first
from modstruct.errors import refuse, require
from modstruct.files import read_yaml
from modstruct.models.fusion.ema import EMA, EmaModel
from modstruct.models.fusion.published import QUEUE, fit_positions, from_albef, is_albef

if TYPE_CHECKING:
    from modstruct.models.fusion.pretraining import FusionModel

log = logging.getLogger("modstruct")
KINDS = "a run, checkpoint or export of ours, or a file of weights by our names or ALBEF's"
LOADS_IT = "loads this folder; give modstruct the run it was made from, or that run's `export`"
OTHER_FORMS = {
    "open_clip_config.json": "two towers exported in open_clip's form: give their run or checkpoint, or an export of a "
    "fusion model",
    "config.json": f"transformers' AutoModel {LOADS_IT}",
    "modstruct_onnx.json": f"onnxruntime {LOADS_IT}",
}
"""By the file that tells it, what to give in place of a folder in a form that is not read here."""
EXPORTED, EXPORTED_CONFIG = "modstruct_model.safetensors", "modstruct_config.json"


@dataclass
class Initial:
    """Weights to start from and the tokenizer that they know."""

    tokenizer: Tokenizer
    weights: dict[str, Tensor] | None
    """By our names, or ALBEF's; None to start from nothing."""
    path: Path | None = None


def find_folder(init: str, option: str = "--init") -> Path | None:
    """The checkpoint or export that `init` names; None if it is a file. option: that named it, for the error."""
    path = Path(init).expanduser()
    if not path.is_dir():
        return None
    ours = (path / EXPORTED).is_file() or checkpoints.folder(path).is_dir() or (path / "state.json").is_file()
    for name, remedy in OTHER_FORMS.items():
        require(ours or not (path / name).is_file(), option, init, remedy)
    found = path if (path / EXPORTED).is_file() else checkpoints.find(str(path), path, option)
    require(found is not None, option, init, "this run has no checkpoint yet")
    return found


def read_everything(init: str, option: str) -> dict[str, Tensor]:
    """All weights by our names, those that start with `momentum.` and `queue.` included.

    init: a run, checkpoint or export of ours, or a file of weights by our names or ALBEF's. option: that named it.
    """
    folder = find_folder(init, option)
    if folder is None:
        require(Path(init).expanduser().is_file(), option, init, f"no such file or folder; give {KINDS}")
        weights = read_weight_file(init, option)
        return from_albef(weights) if is_albef(weights) else weights
    if (folder / EXPORTED).is_file():
        return read_weight_file(folder / EXPORTED, option)
    return {**_measured(folder, init, option), **checkpoints.read_weights(folder, "momentum")}


def _measured(folder: Path, init: str, option: str) -> dict[str, Tensor]:
    """The weights of a checkpoint that its run measures and exports, so that it and its export start alike."""
    ema = bool(recipe_of(init, option).get("evaluation", {}).get("ema"))
    if ema:
        log.info("%s: starts from the EMA weights of %s, which its run measures (evaluation.ema)", option, init)
    return dict(checkpoints.read_measured(folder, ema))


def tokenizer_of(init: str | None, option: str = "fusion.init") -> Tokenizer | None:
    """The tokenizer that a run, checkpoint or export of ours knows; None for a file of weights, or for nothing."""
    folder = init and find_folder(init, option)
    return load_tokenizer(folder / "tokenizer") if folder else None


def start_pretraining(model: FusionModel, init: str) -> None:
    """Weights of fusion.init into a pre-training model, its EMA weights and, if it has the same size, its queue.

    Positions are fitted to the model's. Missing EMA weights start from the weights; missing heads keep their
    initialisation, as the log says. Raises ValueError naming fusion.init where the weights belong to another model.
    """
    recipe_of(init, "fusion.init", "fusion")
    given = {
        name: value.float() if value.is_floating_point() else value
        for name, value in read_everything(init, "fusion.init").items()
    }
    given = fit_positions(given, model.backbone)
    weights = {name: value for name, value in given.items() if not name.startswith((EMA, QUEUE))}
    expected = model.state_dict()
    wrong = [name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape]
    wrong += [name for name in expected.keys() - weights.keys() if name.startswith("backbone.")]
    # What its losses alone had, heads and learnt numbers, may go.
    wrong += [name for name in weights.keys() - expected.keys() if "independent_head" not in name and "." in name]
    if wrong:
        remedy = (
            "belongs to another model: give fusion.* the sizes, and tokenizer.* the tokenizer, that it was made with"
        )
        refuse("fusion.init", init, f"{remedy}; they differ in {', '.join(sorted(wrong)[:5])}")
    new = sorted(expected.keys() - weights.keys())
    model.new_weights = frozenset(new)
    started = expected | {name: value for name, value in weights.items() if name in expected}
    model.load_state_dict(started)
    ema = {f"{EMA}{name}": value for name, value in started.items()}
    ema |= {name: value for name, value in given.items() if name in ema and value.shape == ema[name].shape}
    queue = {name: value for name, value in given.items() if name.startswith(QUEUE)}
    own = {name: value for name, value in model.ema_state_dict().items() if name.startswith(QUEUE)}
    same = queue.keys() == own.keys() and all(own[name].shape == value.shape for name, value in queue.items())
    model.load_ema_state_dict(ema | (queue if same else {}))
    log.info("Started from %s%s", init, f"; new: {', '.join(new)}" if new else "")
    if queue and not same:
        log.info("The queue of %s has another size than fusion.queue and starts empty", init)


def recipe_of(init: str, option: str = "--init", framework: str | None = None) -> dict:
    """The recipe that a run, checkpoint or export of ours was made with; empty for a file of weights.

    Raises ValueError, naming the option, where it cannot be read, or is of another framework than the one wanted.
    """
    folder = find_folder(init, option)
    if folder is None:
        return {}
    exported = (folder / EXPORTED).is_file()
    path = folder / (EXPORTED_CONFIG if exported else "recipe.yaml")
    try:
        recipe = json.loads(path.read_bytes())["recipe"] if exported else read_yaml(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        refuse(option, init, f"the recipe in {path} cannot be read ({' '.join(str(error).split())[:200]})")
    if not isinstance(recipe, dict):
        refuse(option, init, f"the recipe in {path} must hold fields (name: value)")
    found = "fusion" if is_fine_tuning(recipe) else recipe.get("framework", framework)
    remedy = f"a model of framework {found}; give one of framework {framework}"
    require(framework in (None, found), option, init, remedy)
    return migrate_checkpoint(recipe)


def find_initial(init: str | None, config: TokenizerConfig, cache: str, tokenizer: Tokenizer | None = None) -> Initial:
    """Read `init`. tokenizer: of a checkpoint to resume from, whose weights follow: then none are read.

    Raises ValueError, naming --init, for what is neither a folder of ours nor a file of weights, and naming
    tokenizer.path where the weights bring no tokenizer and the recipe names none.
    """
    if tokenizer is not None:
        return Initial(tokenizer, None)
    folder = init and find_folder(init)
    if folder:
        exported = folder / EXPORTED
        published = exported.is_file()
        weights = read_weight_file(exported, "--init") if published else _measured(folder, str(init), "--init")
        return Initial(load_tokenizer(folder / "tokenizer"), weights, folder)
    if init is not None and not Path(init).expanduser().is_file():
        refuse("--init", init, "no such file or folder; give a run, checkpoint or export of ours, or ALBEF's .pth")

    def no_captions():
        if init is None:
            refuse("--init", None, f"nothing to start from: give {KINDS}, or tokenizer.path to start from nothing")
        refuse("tokenizer.path", config.path, "name the tokenizer that the weights of --init know, or BERT's vocab.txt")

    built = main_first(lambda: build_tokenizer(config, no_captions, cache, "none"))
    return Initial(built, read_weight_file(init, "--init") if init else None, Path(init) if init else None)


def start_from(model: EmaModel, initial: Initial) -> None:
    """Weights of pre-training into a downstream model and its EMA weights, as far as both have them.

    `starting_weights` of the model maps them (an answer decoder starts from the fusion layers, say). Positions of the
    image encoder are interpolated. Logs what was missing and keeps its initialisation.
    """
    weights = initial.weights
    if weights is None:
        return
    if is_albef(weights):
        weights = from_albef(weights, len(model.backbone.text.layer))
    weights = {name: value.float() for name, value in weights.items() if not name.startswith(EMA)}
    weights = fit_positions(weights, model.backbone)
    weights = model.starting_weights(weights)
    expected = model.state_dict()
    wrong = sorted(n for n in expected.keys() & weights.keys() if expected[n].shape != weights[n].shape)
    missing = sorted(n for n in expected if n.startswith("backbone.") and n not in weights)
    if wrong or missing:
        remedy = "belongs to another model: give the sizes and the tokenizer it was made with; they differ in"
        refuse("--init", str(initial.path), f"{remedy} {', '.join([*wrong, *missing][:5])}")
    with torch.no_grad():
        model.load_state_dict({name: value for name, value in weights.items() if name in expected}, strict=False)
    if model.ema:
        model.ema.module.load_state_dict(model.state_dict())
    model.new_weights = frozenset(expected.keys() - weights.keys())
    new = sorted({name.split(".")[0] for name in model.new_weights})
    log.info("Started from %s%s", initial.path, f"; new: {', '.join(new)}" if new else "")
