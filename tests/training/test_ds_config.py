"""The DeepSpeed configuration that a recipe leads to, and which weights decay."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_on_processes
from tiny_models import register_architectures, tiny_config, tiny_model, word_tokenizer
from torch import nn

from modstruct import distributed
from modstruct.config import (
    ContrastiveConfig,
    LossesConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TokenizerConfig,
    TrainConfig,
    VisionConfig,
)
from modstruct.data.tokenizers import WordPieceTokenizer
from modstruct.losses.objective import build_objective
from modstruct.models.build import build_model
from modstruct.training.deepspeed_adapter import start_engine
from modstruct.training.ds_config import (
    ALIGNED,
    KEYS,
    parameter_groups,
    read_ds_config,
    resolve_ds_config,
    size_buckets,
)
from modstruct.training.pretrain import bucket_sizes

DS_CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def recipe(precision: str = "fp32", clip_norm: float = 1.5) -> Recipe:
    train = TrainConfig(steps=10, global_batch=24, precision=precision)
    return replace(Recipe(), train=train, optimizer=OptimizerConfig(clip_norm=clip_norm))


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in strings(inner)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_shipped_file_is_resolved_from_the_recipe(path, precision):
    shipped = read_ds_config(str(path))
    config = resolve_ds_config(shipped, recipe(precision), world_size=3)
    assert "auto" in strings(shipped)
    assert "auto" not in strings(config)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 3 == 24
    assert config["gradient_clipping"] == 1.5
    assert config["bf16"]["enabled"] == (precision == "bf16")
    assert config["fp16"]["enabled"] == (precision == "fp16")
    assert config["zero_optimization"] == {k: v for k, v in shipped["zero_optimization"].items() if v != "auto"}


def test_the_shipped_files_are_the_four_stages_and_offload():
    stages = {path.stem: json.loads(path.read_text())["zero_optimization"]["stage"] for path in DS_CONFIGS}
    assert stages == {"zero0": 0, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}


def test_deepspeed_itself_takes_the_resolved_configuration():
    from deepspeed.runtime.config import DeepSpeedConfig

    config = resolve_ds_config(read_ds_config(str(DS_CONFIGS[2])), recipe("bf16"), world_size=1)
    parsed = DeepSpeedConfig(config)
    assert (parsed.train_batch_size, parsed.gradient_accumulation_steps, parsed.gradient_clipping) == (24, 1, 1.5)


def test_what_a_file_leaves_out_is_filled_in_too():
    config = resolve_ds_config({}, recipe("bf16"), world_size=2)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (24, 12)
    assert config["bf16"]["enabled"]
    assert not config["fp16"]["enabled"]


def test_an_auto_that_the_recipe_does_not_decide_is_left_to_deepspeed():
    given = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "steps_per_print": "auto"}
    config = resolve_ds_config(given, recipe(), world_size=1)
    assert config["zero_optimization"] == {"stage": 2}
    assert "steps_per_print" not in config


def test_buckets_are_sized_by_the_model_unless_the_file_says_how_large():
    vit_b_32, vit_l = 151_277_313, 427_616_513
    for path in DS_CONFIGS:
        config = resolve_ds_config(read_ds_config(str(path)), recipe(), world_size=1)
        zero = size_buckets(config, vit_b_32)["zero_optimization"]
        buckets = {key: value for key, value in zero.items() if "bucket" in key}
        assert set(buckets.values()) <= {vit_b_32 // 16}
        assert len(buckets) == (2 if zero["stage"] else 0)
    of_stage_2 = {"zero_optimization": {"stage": 2}}
    assert size_buckets(of_stage_2, vit_l)["zero_optimization"]["reduce_bucket_size"] == vit_l // 16
    assert size_buckets(of_stage_2, 1_000)["zero_optimization"]["reduce_bucket_size"] == 1_000_000
    assert size_buckets(of_stage_2, 10**10)["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    given = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}
    assert size_buckets(given, vit_l)["zero_optimization"]["reduce_bucket_size"] == 7


def test_a_printed_recipe_says_the_buckets_of_its_model():
    vision = VisionConfig(width=512, layers=6, head_width=64, image_size=32, patch_size=8)
    given = replace(recipe(), model=ModelConfig(vision=vision), tokenizer=TokenizerConfig(vocab_size=300))
    given = replace(given, losses=LossesConfig(contrastive=ContrastiveConfig(weight=1.0)))
    vocabulary = WordPieceTokenizer("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(296))]).encode(), 32)
    model = build_model(given, vocabulary, build_objective(given.losses))
    sixteenth = sum(p.numel() for p in model.parameters()) // 16
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
    assert bucket_sizes(given, str(DS_CONFIGS[-2])) == dict.fromkeys(names, sixteenth)
    assert sixteenth > 1_000_000
    assert bucket_sizes(given, str(DS_CONFIGS[0])) == {}


@pytest.mark.parametrize(("processes", "right"), [("2", True), ("3", False), (None, True)])
def test_a_printed_recipe_asks_for_the_batch_of_the_launched_processes(tmp_path, monkeypatch, processes, right):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes)
    given = replace(recipe(), model=tiny_config(), losses=LossesConfig(contrastive=ContrastiveConfig(weight=1.0)))
    zero = {"stage": 2, "reduce_bucket_size": 5e8, "allgather_bucket_size": "auto"}
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 12, "zero_optimization": zero}))
    if right:
        assert str(bucket_sizes(given, str(path))["reduce_bucket_size"]) == "500000000"
    else:
        with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu = 12: the recipe says 8"):
            bucket_sizes(given, str(path))


def test_the_file_as_read_is_left_as_it_is():
    given = {"bf16": {"enabled": "auto"}}
    resolve_ds_config(given, recipe(), world_size=1)
    assert given == {"bf16": {"enabled": "auto"}}


def test_values_that_repeat_the_recipe_are_no_contradiction():
    given = {"train_batch_size": 24, "gradient_accumulation_steps": 1, "bf16": {"enabled": True}}
    given |= {"gradient_allreduce_op": "mean", "gradient_predivide_factor": 1.0, "communication_data_type": "fp32"}
    given |= {"zero_optimization": {"stage": 2, "round_robin_gradients": False}}
    config = resolve_ds_config(given, recipe("bf16"), world_size=2)
    assert config["train_micro_batch_size_per_gpu"] == 12


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"train_batch_size": 32}, "train_batch_size = 32: the recipe says 24"),
        ({"train_micro_batch_size_per_gpu": 24}, "train_micro_batch_size_per_gpu = 24: the recipe says 12"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps = 4: the recipe says 1"),
        ({"gradient_clipping": 0.1}, "gradient_clipping = 0.1: the recipe says 1.5"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True: the recipe says False (train.precision = fp32)"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = True: the recipe says False"),
        ({"gradient_clipping": None}, "gradient_clipping = None: the recipe says 1.5"),
        ({"fp16": True}, "fp16 = True: must be an object"),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm = False: leave it out",
        ),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            "round_robin_gradients = True: leave it out",
        ),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads = True: leave it out"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states = True: leave it out"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "fp16.fp16_master_weights_and_grads = True: leave it out"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op = 'sum': leave it out"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor = 2.0: leave it out"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation = False: leave it out"),
        ({"communication_data_type": "fp16"}, "communication_data_type = 'fp16': small gradients would vanish"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation = '…': no key of DeepSpeed's; did you mean zero_opti"),
        ({"gradient_cliping": 1.0}, "gradient_cliping = '…': no key of DeepSpeed's; did you mean gradient_clipping"),
        ({"zero_optimization": 2}, "zero_optimization = 2: must be an object"),
        ({"zero_optimization": True}, "zero_optimization = True: must be an object"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage = True: must be 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": -1}},
            "reduce_bucket_size = -1: must be a whole number",
        ),
        (
            {"zero_optimization": {"stage": 1, "allgather_bucket_size": 0.5}},
            "bucket_size = 0.5: must be a whole number",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "offload_param = 'cpu': must be an object"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            'offload_optimizer.device = \'nvme\': must be "cpu" or "none"',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "has no effect below stage 1, and the stage is 0",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "has no effect below stage 3, and the stage is 2",
        ),
        ({"optimizer": {"type": "AdamW"}}, "optimizer = '…': leave it out"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler = '…': leave it out"),
        ({"amp": {"enabled": True}}, "amp = '…': leave it out; train.precision"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 = '…': leave it out; train.precision"),
    ],
)
def test_what_contradicts_the_recipe_is_refused_by_its_key(given, named):
    with pytest.raises(ValueError, match="--ds_config: ") as refusal:
        resolve_ds_config(given, recipe(), world_size=2)
    assert named in str(refusal.value)


def test_a_section_of_null_is_none():
    given = dict.fromkeys(("zero_optimization", "bf16", "fp16", "optimizer", "wandb"))
    assert resolve_ds_config(given, recipe(), world_size=2) == resolve_ds_config({}, recipe(), world_size=2)
    zero = {"stage": 3, "offload_optimizer": None, "offload_param": None}
    resolved = resolve_ds_config({"zero_optimization": zero}, recipe(), world_size=2)
    assert resolved["zero_optimization"] == {"stage": 3}


def test_every_key_that_deepspeed_looks_for_is_known():
    """By its constants, so that a new release's are missed here; some names are of other places than the top."""
    from deepspeed.runtime import config, constants

    looked_up = r"(?:get_scalar_param\(param_dict, |param_dict\.get\()([A-Z_]+|\"\w+\")"
    lookups = re.findall(looked_up, inspect.getsource(config))
    names = {getattr(constants, name, name.strip('"')) for name in lookups}
    assert len(names) > 20
    assert names | config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() <= set(KEYS.split())
    read_elsewhere = {"comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "aio"}
    assert read_elsewhere <= set(KEYS.split())


def test_a_batch_that_does_not_divide_over_the_processes_is_refused():
    with pytest.raises(ValueError, match=r"train.global_batch = 24: must be a multiple of .* processes, 5"):
        resolve_ds_config({}, recipe(), world_size=5)


REFUSED_BY_DEEPSPEED: list[tuple[dict, str]] = [
    ({"sparse_gradients": True}, "sparse_gradients"),
    ({"elasticity": {"enabled": True}}, "elasticity"),
    ({"communication_data_type": "float32"}, "communication_data_type"),
    ({"prescale_gradients": True, "zero_optimization": {"stage": 2}}, "pre-scale gradients"),
    ({"zero_optimization": {"stage": 2, "legacy_stage1": True}}, "deprecated version of ZeRO Stage 1"),
    ({"zero_optimization": {"stage": 2, "reduce_buckets": 7}}, "reduce_buckets"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "reduce_bucket_size"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 1}}, "mics_shard_size"),
]


def refusals() -> list[tuple[str, bool]]:
    """What is said of each, and whether with its cause."""
    found = []
    for given, _ in REFUSED_BY_DEEPSPEED:
        model = nn.Linear(2, 2)
        config = resolve_ds_config(given, recipe(), distributed.world_size())
        try:
            start_engine(model, torch.optim.AdamW(model.parameters()), config)
        except ValueError as error:
            found.append((str(error), error.__cause__ is not None))
    return found


def test_what_deepspeed_refuses_is_one_error_in_its_words_on_every_process():
    first, second = run_on_processes(refusals, 2)
    assert first == second
    for (said, caused), (_, words) in zip(first, REFUSED_BY_DEEPSPEED, strict=True):
        assert said.startswith("--ds_config: DeepSpeed does not take it: ")
        assert words in said
        assert "\n" not in said
        assert caused


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"{stage: 2}", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "one JSON object"),
        (b'{"zero_optimization": {"stage": 2, "stage": 3}}', "the key 'stage' stands twice"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="--ds_config = ") as refusal:
        read_ds_config(str(path))
    assert str(path) in str(refusal.value)
    assert complaint in str(refusal.value)


def decay_by_name(model, weight_decay: float = 0.1) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimizerConfig(weight_decay=weight_decay))
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", [None, "tiny-resnet"])
@pytest.mark.parametrize("architecture", ["clip", "bert"])
def test_matrices_kernels_and_position_tables_decay_and_nothing_else(tmp_path, architecture, name):
    """As in CLIP's and CyCLIP's training code: norms, biases, class token and logit scale keep their size."""
    register_architectures(tmp_path)
    model = tiny_model(tiny_config(architecture, name=name), word_tokenizer(), independent=True)
    decay = decay_by_name(model)
    assert decay.keys() == dict(model.named_parameters()).keys()
    for parameter_name, value in decay.items():
        module_name, _, kind = parameter_name.rpartition(".")
        owner = type(model.get_submodule(module_name)).__name__
        exempt = "bias" in kind or "Norm" in owner or kind in ("class_embedding", "logit_scale")
        assert value == (0.0 if exempt else 0.1), parameter_name
    assert any(value == 0.1 for parameter_name, value in decay.items() if "position" in parameter_name)


def test_frozen_weights_are_in_no_group():
    model = tiny_model(tiny_config(), word_tokenizer())
    model.image["trunk"].requires_grad_(False)
    assert not [name for name in decay_by_name(model) if name.startswith("image.trunk")]


@pytest.mark.parametrize("name", [None, "tiny-resnet"])
def test_what_lies_behind_another_weight_of_its_group_is_aligned(tmp_path, name):
    """DeepSpeed lays a group's weights behind one another, and the scale of one number would move all that follow."""
    register_architectures(tmp_path)
    model = tiny_model(tiny_config(name=name), word_tokenizer(), independent=True)
    odd = [[p.numel() % ALIGNED != 0 for p in group["params"]] for group in parameter_groups(model, OptimizerConfig())]
    assert all(of_group == sorted(of_group) for of_group in odd)
    assert any(map(any, odd))
