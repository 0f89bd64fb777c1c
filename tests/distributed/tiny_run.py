"""A run small enough for the tests: two tiny towers, a few hundred scenes, all three structure losses."""

from __future__ import annotations

from pathlib import Path

from modstruct.config import (
    BridgeConfig,
    CheckpointConfig,
    ContrastiveConfig,
    DataConfig,
    EvaluationConfig,
    FusionConfig,
    FusionTextConfig,
    FusionVisionConfig,
    GeometryConfig,
    LoggingConfig,
    LossesConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    ScenesConfig,
    SeparationConfig,
    TextConfig,
    TokenizerConfig,
    TrainConfig,
    ViewsConfig,
    VisionConfig,
)

ROOT = Path(__file__).parents[2]


def ds_config(name: str) -> str:
    return str(ROOT / "ds_configs" / f"{name}.json")


def tiny_recipe(output: Path | str, cache: Path | str, steps: int = 4, precision: str = "fp32", **train) -> Recipe:
    """Odd widths, so that parameters do not divide by the number of processes."""
    return Recipe(
        output=str(output),
        data=DataConfig(
            validation=None,
            eval=None,
            zero_shot=None,
            cache=str(cache),
            workers=0,
            scenes=ScenesConfig(train_samples=96, validation_samples=12, test_samples=24),
        ),
        tokenizer=TokenizerConfig(vocab_size=256, context_length=24),
        views=ViewsConfig(auto_augment=False),
        model=ModelConfig(
            embed_dim=15,
            vision=VisionConfig(image_size=32, patch_size=8, width=18, layers=1, head_width=9),
            text=TextConfig(width=14, layers=1, heads=2),
        ),
        fusion=FusionConfig(
            embed_dim=15,
            vision=FusionVisionConfig(image_size=32, patch_size=8, width=18, layers=1, heads=2),
            text=FusionTextConfig(text_layers=1, fusion_layers=1, width=14, heads=2),
            momentum=0.8,
            queue=17,  # no multiple of the batch; full in the second step
        ),
        losses=LossesConfig(
            contrastive=ContrastiveConfig(weight=1.0, in_modal=True),
            separation=SeparationConfig(weight=1.0),
            bridge=BridgeConfig(weight=1.0, t=None),
            geometry=GeometryConfig(weight=0.25),
        ),
        # A large eps: some true gradients are 0 (the bias of attention's keys), and AdamW would blow their rounding up.
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=5.0, eps=1e-4),
        train=TrainConfig(global_batch=12, steps=steps, precision=precision, **train),
        evaluation=EvaluationConfig(batch=16),
        checkpoints=CheckpointConfig(every_steps=2, keep_last=9),
        logging=LoggingConfig(every_steps=2, images=4),
    )
