"""DeepSpeed's JSON file, and the optimizer of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from modstruct.config import FinetuneRecipe, OptimizerConfig, Recipe
from modstruct.errors import others, refuse, require
from modstruct.files import RepeatedKey, parse_json
from modstruct.models.layers import rate_factors
from modstruct.models.protocol import TrainableModel

AUTO = "auto"
BUCKETS = {
    1: ("reduce_bucket_size", "allgather_bucket_size"),
    2: ("reduce_bucket_size", "allgather_bucket_size"),
    3: ("reduce_bucket_size", "stage3_prefetch_bucket_size"),
}
"""By ZeRO stage, what DeepSpeed collects before it sends, in elements."""
SMALLEST_BUCKET, LARGEST_BUCKET = 1_000_000, 50_000_000
BUCKETS_OF_A_MODEL = 16
ALIGNED = 8
"""Elements of which each tensor begins at a multiple, where they lie behind one another: 16 bytes of half precision,
without which a GPU's kernels read one element at a time."""


HALF_STATE = "master weights and moments are kept in float32"
FIXED: dict[tuple[str, ...], tuple[object, str]] = {
    ("zero_optimization", "round_robin_gradients"): (
        False,
        "DeepSpeed reorders the weights without saying where they lie, and checkpoints would be scrambled",
    ),
    ("zero_optimization", "compute_grad_norm"): (True, "training needs it"),
    ("bf16", "bf16_master_weights_and_grads"): (False, HALF_STATE),
    ("bf16", "bf16_optimizer_states"): (False, HALF_STATE),
    ("fp16", "fp16_master_weights_and_grads"): (False, HALF_STATE),
    ("gradient_allreduce_op",): ("mean", "a sum would be as many times too large as there are processes"),
    ("gradient_predivide_factor",): (1, "at stage 3 DeepSpeed does not always multiply by it again"),
    ("managed_gradient_accumulation",): (True, "train.micro_batch needs it"),
}
"""What a file may say no otherwise than by its one right value, and why."""
KEYS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
gradient_clipping bf16 fp16 zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print
wall_clock_breakdown memory_breakdown dump_state log_level disable_python_gc vocabulary_size communication_data_type
seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
disable_allgather sequence_parallel_size data_parallel_size tensor_parallel expert_parallel
use_data_before_expert_parallelism pipeline activation_checkpointing checkpoint datastates_ckpt dataloader_drop_last
data_efficiency comms_logger flops_profiler timers tensorboard wandb csv_monitor comet aio autotuning compile
hybrid_engine weight_quantization optimizer scheduler amp bfloat16 torch_autocast data_types nebula compression_training
quantize_training sparse_gradients eigenvalue sparse_attention elasticity graph_harvesting curriculum_learning
progressive_layer_drop
"""
"""What DeepSpeed 0.19 looks for at the top of its file: it says nothing of other keys, among them misspelt ones. From
nebula on, of earlier releases, of which it says itself what became."""


def read_ds_config(path: str) -> dict:
    """The DeepSpeed JSON file as a dictionary. Raises ValueError that names what is wrong with it."""
    try:
        config = parse_json(Path(path).read_bytes())
    except OSError as e:
        refuse("--ds_config", path, f"cannot be read ({e.strerror}); ds_configs/ holds zero0 to zero3 and offload")
    except RepeatedKey as e:
        refuse("--ds_config", path, str(e))
    except (ValueError, RecursionError) as e:
        refuse("--ds_config", path, f"is not JSON: {e}")
    require(isinstance(config, dict), "--ds_config", path, "must hold one JSON object")
    return config


def resolve_ds_config(config: dict, recipe: Recipe | FinetuneRecipe, world_size: int) -> dict:
    """Fill every "auto" from the recipe; refuse what contradicts it.

    DeepSpeed itself resolves no "auto". One that the recipe does not decide is left out, which means DeepSpeed's own
    default. Raises ValueError that names the JSON key.
    """
    train = recipe.train
    require(
        train.global_batch % world_size == 0,
        "train.global_batch",
        train.global_batch,
        f"must be a multiple of the number of processes, {world_size}",
    )
    config = json.loads(json.dumps(config))
    known = KEYS.split()
    for key in config:
        require(key in known, f"--ds_config: {key}", "…", f"no key of DeepSpeed's; {others(key, known)}")
    # DeepSpeed has null for what is left out, but for one number, where it could mean another.
    config = {key: value for key, value in config.items() if value is not None or key == "gradient_clipping"}
    decided_elsewhere = {"optimizer": "the `optimizer` section", "scheduler": "the `optimizer` section"}
    decided_elsewhere |= dict.fromkeys(("amp", "bfloat16", "torch_autocast", "data_types"), "train.precision")
    for section, where in decided_elsewhere.items():
        if section in config:
            refuse(f"--ds_config: {section}", "…", f"leave it out; {where} of the recipe decides")
    zero = config.setdefault("zero_optimization", {})
    require(isinstance(zero, dict), "--ds_config: zero_optimization", zero, 'must be an object, as {"stage": 2}')
    stage = zero.get("stage", 0)
    in_range = type(stage) is int and 0 <= stage <= 3  # true is no stage
    require(in_range, "--ds_config: zero_optimization.stage", stage, "must be 0, 1, 2 or 3")
    for part, from_stage in ("offload_optimizer", 1), ("offload_param", 3):
        name, offload = f"--ds_config: zero_optimization.{part}", zero.get(part)
        if offload is None:
            zero.pop(part, None)
            continue
        require(isinstance(offload, dict), name, offload, 'must be an object, as {"device": "cpu"}')
        where = offload.get("device", "none")
        require(where in ("cpu", "none"), f"{name}.device", where, 'must be "cpu" or "none"')
        useless = where == "cpu" and stage < from_stage
        require(not useless, name, offload, f"has no effect below stage {from_stage}, and the stage is {stage}")
    for bucket in BUCKETS.get(stage, ()):
        size = zero.get(bucket, AUTO)
        if size != AUTO:
            whole = type(size) in (int, float) and size >= 0 and size % 1 == 0
            require(
                whole, f"--ds_config: zero_optimization.{bucket}", size, 'must be a whole number of elements, or "auto"'
            )
            zero[bucket] = int(size)  # of 5e8 too
    batch, precision = f"train.global_batch = {train.global_batch}", f"train.precision = {train.precision}"
    decided: dict[tuple[str, ...], tuple[object, str]] = {
        ("train_batch_size",): (train.global_batch, batch),
        ("train_micro_batch_size_per_gpu",): (train.global_batch // world_size, f"{batch}, {world_size} processes"),
        ("gradient_accumulation_steps",): (1, "train.micro_batch divides a step"),
        ("gradient_clipping",): (recipe.optimizer.clip_norm, "optimizer.clip_norm"),
        ("bf16", "enabled"): (train.precision == "bf16", precision),
        ("fp16", "enabled"): (train.precision == "fp16", precision),
    }
    for path, (value, field) in decided.items():
        place = config
        for key in path[:-1]:
            place = place.setdefault(key, {})
            require(isinstance(place, dict), f"--ds_config: {key}", place, "must be an object, as DeepSpeed has it")
        given = place.get(path[-1], AUTO)
        if given not in (AUTO, value):
            remedy = f'the recipe says {value!r} ({field}); write "auto" or the same'
            refuse(f"--ds_config: {'.'.join(path)}", given, remedy)
        place[path[-1]] = value
    for path, (right, why) in FIXED.items():
        given = (config.get(path[0], {}) if path[1:] else config).get(path[-1], AUTO)
        require(given in (AUTO, right), f"--ds_config: {'.'.join(path)}", given, f"leave it out; {why}")
    sent_as = config.get("communication_data_type")
    require(
        str(sent_as).lower() != "fp16" or train.precision == "fp16",
        "--ds_config: communication_data_type",
        sent_as,
        'small gradients would vanish, which only train.precision fp16 scales up; write "fp32", "bf16" or leave it out',
    )
    if stage >= 2 and train.micro_batch and train.gradient_sums == "sharded":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    # Without it DeepSpeed would let a non-finite bfloat16 gradient into the weights.
    config["bf16"]["check_grad_overflow"] = True
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's fused AdamW serves on the CPU too
    return _without_auto(config)


def zero_stage(config: dict) -> int:
    """ZeRO's stage in a configuration."""
    return config.get("zero_optimization", {}).get("stage", 0)


def size_buckets(config: dict, elements: int) -> dict:
    """The buckets that a resolved configuration leaves open, as a sixteenth of the model's elements each.

    DeepSpeed's own 500 million elements are more than a ViT-L has: nothing would be sent before the last gradient, and
    buffers of that size would lie on every process. From 1 million, below which messages are too short to pay, to 50.
    """
    zero = config.get("zero_optimization", {})
    size = min(max(elements // BUCKETS_OF_A_MODEL, SMALLEST_BUCKET), LARGEST_BUCKET)
    return config | {"zero_optimization": dict.fromkeys(BUCKETS.get(zero_stage(config), ()), size) | zero}


def _without_auto(section: dict) -> dict:
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in section.items() if v != AUTO}


def parameter_groups(model: TrainableModel, config: OptimizerConfig) -> list[dict]:
    """Mostly two groups: matrices, kernels, tables of tokens and positions with decay, as in CLIP's and CyCLIP's code;
    norms, biases, open_clip's class token (timm's, of three dimensions, has decay) and the logit scale without.

    With optimizer.layer_decay, two for each factor of the learning rate (`rate_factor`). What stays float32 in a
    half-precision model has groups of its own: DeepSpeed flattens a group into one tensor. So have weights that wait
    while only new ones learn (`waits`: optimizer.new_first_steps). They wait at a learning rate of 0, which moves and
    decays nothing, instead of out of the groups, which DeepSpeed divides once for the whole run.
    """
    factors = rate_factors(model, config.layer_decay) if config.layer_decay < 1 else {}
    first = model.new_weights | ({"logit_scale"} if config.new_first_scale else set())
    groups: dict[tuple[str, float, int], list[nn.Parameter]] = {("decay", 1.0, 0): [], ("no_decay", 1.0, 0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed's, where it is sharded
            kind = "no_decay" if dimensions < 2 or name == "logit_scale" else "decay"
            if parameter.dtype == torch.float32 != model.dtype:
                kind += "_float32"
            waits = 0 if name in first else config.new_first_steps
            groups.setdefault((kind, factors.get(name, 1.0), waits), []).append(parameter)
    return [
        {
            # DeepSpeed lays them behind one another, so what is no multiple goes last: behind a scale of one element
            # LayerNorm's forward took twice as long on an H100.
            "params": sorted(kept, key=lambda p: getattr(p, "ds_numel", p.numel()) % ALIGNED != 0),
            "weight_decay": 0.0 if kind.startswith("no_decay") else config.weight_decay,
            "name": kind + ("" if factor == 1 else f" x {factor:.6g}") + (f" after {waits}" if waits else ""),
            "rate_factor": factor,
            "waits": waits,
            "rises": config.warmup_steps,
        }
        for (kind, factor, waits), kept in groups.items()
        if kept
    ]


def build_optimizer(model: TrainableModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; its rate is set before every step (some of DeepSpeed's optimizers take an empty step at their start)."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
