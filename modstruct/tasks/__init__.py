"""Downstream tasks of the fusion model, one file each: which entries, which model, which loss, which metrics."""

from __future__ import annotations

from typing import Any

from modstruct.config import FinetuneRecipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.tasks.nlvr2 import Nlvr2
from modstruct.tasks.retrieval import Retrieval
from modstruct.tasks.snli_ve import SnliVe
from modstruct.tasks.task import Task
from modstruct.tasks.text_assignment import TextAssignment
from modstruct.tasks.vqa import Vqa

TASKS: dict[str, type[Task[Any, Any]]] = {
    "nlvr2": Nlvr2,
    "retrieval": Retrieval,
    "snli_ve": SnliVe,
    "text_assignment": TextAssignment,
    "vqa": Vqa,
}


def build_task(recipe: FinetuneRecipe, tokenizer: Tokenizer) -> Task[Any, Any]:
    return TASKS[recipe.task.name](recipe, tokenizer)
