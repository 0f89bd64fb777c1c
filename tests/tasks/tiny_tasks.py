"""Tiny tasks: a folder of built-in files, recipes, stand-ins for a model, whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from modstruct.config import (
    CheckpointConfig,
    FinetuneRecipe,
    FusionConfig,
    FusionTextConfig,
    FusionVisionConfig,
    OptimizerConfig,
    TaskConfig,
    TaskDataConfig,
    TaskEvaluationConfig,
    TaskFiles,
    TokenizerConfig,
    TrainConfig,
    ViewsConfig,
)
from modstruct.data.synthetic.task_files import SceneTaskSizes, nlvr2_files, snli_ve_files, vqa_files, write_scene_tasks
from modstruct.data.tokenizers import WordPieceTokenizer
from modstruct.tasks import Task, build_task

SIZE = 32
WORDS = ["a", "the", "red", "blue", "green", "star", "left", "right", "picture", "image", "shows", "both", "more", "in"]
VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])


def write_files(root: Path) -> Path:
    """A few entries of every built-in task; returns root."""
    sizes = SceneTaskSizes(
        train_questions=24,
        evaluation_questions=12,
        train_statements=24,
        evaluation_statements=16,
        train_hypotheses=60,
        evaluation_hypotheses=60,
        train_captioned=23,
        evaluation_captioned=20,
    )
    write_scene_tasks(root, 0, sizes, SIZE)
    (root / "vocab.txt").write_text(VOCABULARY)
    return root


def files_of(root: Path, task: str, split: str) -> TaskFiles:
    if task == "nlvr2":
        statements, images = nlvr2_files(root, split)
        return TaskFiles(images=str(images), statements=str(statements))
    if task == "vqa":
        questions, annotations = vqa_files(root, split)
        images = root / "vqa" / "images"
        return TaskFiles(images=str(images), questions=str(questions), annotations=str(annotations))
    if task == "snli_ve":
        hypotheses, images = snli_ve_files(root, split)
        return TaskFiles(images=str(images), hypotheses=str(hypotheses))
    return TaskFiles(images=str(root / "karpathy" / "images"), captions=str(root / "karpathy" / "dataset_coco.json"))


def tiny_task_recipe(root: Path, task: str, output: str = "runs/none", **changes) -> FinetuneRecipe:
    """Odd widths, so that parameters do not divide by the number of processes. changes: of the recipe's fields."""
    splits = {split: files_of(root, task, split) for split in ("train", "validation", "test")}
    fields = {
        "output": output,
        "task": TaskConfig(name=task, alpha=0.0 if task == "text_assignment" else 0.4, ramp_steps=2, rerank=3),
        "data": TaskDataConfig(source="files", workers=0, cache=str(root / "cache"), **splits),
        "tokenizer": TokenizerConfig(kind="bert_wordpiece", path=str(root / "vocab.txt"), context_length=16),
        "views": ViewsConfig(plain="crop_flip", flip=False),
        "fusion": FusionConfig(
            vision=FusionVisionConfig(image_size=SIZE, patch_size=16, width=18, layers=1, heads=2),
            text=FusionTextConfig(text_layers=1, fusion_layers=2, width=14, heads=2),
        ),
        # A large eps: some true gradients are 0 (the bias of attention's keys), and AdamW would blow their rounding up.
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=1, clip_norm=5.0, eps=1e-4),
        "train": TrainConfig(global_batch=12, steps=4),
        "evaluation": TaskEvaluationConfig(batch=6),
        "checkpoints": CheckpointConfig(every_steps=2, keep_last=9),
    }
    return FinetuneRecipe(**fields | changes)


def tiny_task(root: Path, task: str, **changes) -> Task:
    return build_task(tiny_task_recipe(root, task, **changes), WordPieceTokenizer(VOCABULARY.encode(), 16))


class Knowing:
    """In the place of a model: says the batch's own labels."""

    def __init__(self, classes: int):
        self.classes = classes

    def classify(self, batch: dict[str, Tensor]) -> Tensor:
        return F.one_hot(batch["label"], self.classes).float()


class Stubborn(Knowing):
    """Says the first class of everything."""

    def classify(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.eye(self.classes)[0].expand(len(batch["text"]), -1)


def zero3_that_shards_all(folder: Path) -> str:
    """DeepSpeed's file of stage 3, which otherwise leaves weights as small as these whole on every process."""
    config = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / "zero3.json"
    path.write_text(json.dumps(config))
    return str(path)


def fine_tune(root: str, task: str, output: str, ds_config: str, resume: str | None = None, init: str | None = None):
    """A whole run, as `launch_scripts/finetune.py` makes it; returns its metrics. Every process calls it."""
    from modstruct.training.finetune import Finetuning

    recipe = replace(tiny_task_recipe(Path(root), task, output), init=init)
    run = Finetuning(recipe, ds_config, resume).build()
    with run.heartbeat:
        run.train()
        return {metric: result.to_json() for metric, result in run.finish().items()}


def fine_tune_several(root: str, runs: list[dict]) -> list[dict]:
    return [fine_tune(root, **run) for run in runs]
