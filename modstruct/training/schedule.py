"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from modstruct.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of a run of `steps`: linear warm-up, then half a cosine to the final rate."""
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        rise = config.learning_rate - config.initial_learning_rate
        return config.initial_learning_rate + rise * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    share = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.final_learning_rate + share * (config.learning_rate - config.final_learning_rate)
