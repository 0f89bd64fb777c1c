"""How much of each built-in task is made."""

from __future__ import annotations

from dataclasses import dataclass

from modstruct.errors import require

QUESTIONS_PER_PICTURE = 2
STATEMENTS_PER_SET = 8  # two sentences about four pairs of images
HYPOTHESES_PER_PICTURE = 3  # one of each label


@dataclass(frozen=True)
class SceneTaskSizes:
    """Items of each task; writing the default takes about 40 s."""

    train_questions: int = 12_000
    evaluation_questions: int = 1_000
    """Of validation and of test each, here and below."""
    train_statements: int = 8_000
    evaluation_statements: int = 1_000
    train_hypotheses: int = 9_000
    evaluation_hypotheses: int = 999
    train_captioned: int = 6_000
    """Images with two to five captions."""
    evaluation_captioned: int = 1_000

    def __post_init__(self):
        divisors = {
            "questions": QUESTIONS_PER_PICTURE,
            "statements": STATEMENTS_PER_SET,
            "hypotheses": HYPOTHESES_PER_PICTURE,
            "captioned": 1,
        }
        for name, value in vars(self).items():
            divisor = divisors[name.partition("_")[2]]
            require(
                value >= divisor and value % divisor == 0,
                f"scene_tasks.{name}",
                value,
                f"a multiple of {divisor} above 0",
            )

    def of(self, task: str, split: str) -> int:
        """Items of a task (questions, …) in a split (train, validation, test)."""
        return getattr(self, f"{'train' if split == 'train' else 'evaluation'}_{task}")
