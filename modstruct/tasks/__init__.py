"""Downstream tasks of the fusion model, one file each: which entries, which model, which loss, which figures."""

from __future__ import annotations

from modstruct.config import FinetuneRecipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.tasks.nlvr2 import Nlvr2
from modstruct.tasks.snli_ve import SnliVe
from modstruct.tasks.task import Task
from modstruct.tasks.text_assignment import TextAssignment

TASKS: dict[str, type[Task]] = {"nlvr2": Nlvr2, "snli_ve": SnliVe, "text_assignment": TextAssignment}


def build_task(recipe: FinetuneRecipe, tokenizer: Tokenizer) -> Task:
    return TASKS[recipe.task.name](recipe, tokenizer)
