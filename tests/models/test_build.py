"""Recomputed activations and compiled trunks: the same embeddings, gradients, statistics and names. Models that start
from a run of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import batch_of_both_views, register_architectures, tiny_config, tiny_model, word_tokenizer
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from modstruct import checkpoints
from modstruct.cli import losses_of, parse_recipe_text
from modstruct.data.tokenizers import load_tokenizer
from modstruct.losses.objective import build_objective
from modstruct.models.build import (
    autocast_forward,
    build_model,
    cast_but_norms,
    compile_trunks,
    float32_products,
    initial_tokenizer,
    lay_channels_last,
    recompute_activations,
)
from modstruct.models.fusion.initial_weights import read_everything
from modstruct.models.two_tower import TwoTower

WRITTEN = Path(__file__).parents[1] / "checkpoints" / "written_by_0.1.0" / "two_tower"
TOWERS = [("clip", None, 16), ("bert", None, 16), ("clip", "tiny-resnet", 64), ("clip", "tiny-timm", 160)]


@pytest.fixture(autouse=True)
def architectures(tmp_path):
    register_architectures(tmp_path)


def model(architecture: str, name: str | None, head: str = "linear", dropout: float = 0.0) -> TwoTower:
    config = tiny_config(architecture, name=name, independent_head=head)
    config.text.dropout = dropout
    return tiny_model(config, word_tokenizer(), independent=True).train()


def gradients(model: TwoTower, size: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    made = model(batch_of_both_views(word_tokenizer(), size))
    sum((z * torch.linspace(-1, 2, z.numel()).reshape(z.shape)).sum() for z in made.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == right.keys()
    one, other = (torch.cat([gradient[key].flatten() for key in right]) for gradient in (found, right))
    assert (one - other).norm() <= tolerance * other.norm()


def saved_bytes(model: TwoTower, size: int) -> int:
    """Size of what autograd keeps of a forward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = model(batch_of_both_views(word_tokenizer(), size))
    assert made["image"].requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("architecture", "name", "size"), TOWERS)
def test_recomputation_keeps_less_and_gives_the_same(architecture, name, size):
    plain, switched = (model(architecture, name, dropout=0.1 * (architecture == "bert")) for _ in range(2))
    recompute_activations(switched)
    right, found = gradients(plain, size), gradients(switched, size)
    assert_same(found, right, 1e-6)
    for before, now in zip(plain.buffers(), switched.buffers(), strict=True):
        torch.testing.assert_close(now, before)  # BatchNorm's statistics have moved once
    assert plain.state_dict().keys() == switched.state_dict().keys()
    assert saved_bytes(switched, size) < 0.7 * saved_bytes(plain, size)


def test_recomputation_serves_a_resnet_with_attention_pools():
    plain, switched = (model("clip", "tiny-resnet", "attention_pool") for _ in range(2))
    recompute_activations(switched)
    right, found = gradients(plain, 64), gradients(switched, 64)
    assert_same(found, right, 1e-6)


def test_a_tower_that_cannot_recompute_is_refused_by_name():
    normed, bare = (model("clip", None) for _ in range(2))
    normed.image["trunk"].append_norm = torch.nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match=r"train.activation_checkpointing = True: the image tower's BatchNorm"):
        recompute_activations(normed)
    bare.text["trunk"].set_grad_checkpointing = lambda enable: None
    with pytest.raises(ValueError, match=r"train.activation_checkpointing = True: the text tower has no such switch"):
        recompute_activations(bare)


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # inductor runs the C++ compiler
)
@pytest.mark.parametrize(("architecture", "name", "size"), TOWERS[:3])
@pytest.mark.parametrize("recompute", [False, True])
def test_compilation_gives_the_same(architecture, name, size, backend, recompute):
    if recompute and name == "tiny-resnet":
        pytest.skip("refused, as another test shows")
    plain, compiled = (model(architecture, name, dropout=0.1 * (architecture == "bert")) for _ in range(2))
    if recompute:
        recompute_activations(compiled)
    compile_trunks(compiled, zero_stage=2, backend=backend)
    right, found = gradients(plain, size), gradients(compiled, size)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert_same(found, right, 1e-4)


@pytest.mark.parametrize("architecture", ["clip", "bert"])
def test_a_transformers_layers_are_compiled_once(architecture):
    def operations(layers: int) -> int:
        torch._dynamo.reset()
        counted = CompileCounterWithBackend("aot_eager")
        config = tiny_config(architecture)
        config.vision.layers = config.text.layers = layers
        compiled = tiny_model(config, word_tokenizer()).train()
        compile_trunks(compiled, zero_stage=2, backend=counted)
        gradients(compiled, 16)
        return counted.op_count

    assert 0 < operations(2) == operations(5)


def test_compilation_at_stage_3_is_refused_by_name():
    with pytest.raises(ValueError, match=r"train.compile = True: ZeRO stage 3"):
        compile_trunks(model("clip", None), zero_stage=3)


def test_compilation_of_a_recomputed_resnet_is_refused_by_name():
    resnet = model("clip", "tiny-resnet")
    recompute_activations(resnet)
    with pytest.raises(ValueError, match=r"train.compile = True: torch cannot compile a CLIP ResNet"):
        compile_trunks(resnet, zero_stage=2)


def test_a_resnet_works_with_channels_innermost_and_gives_the_same():
    plain, innermost = model("clip", "tiny-resnet"), model("clip", "tiny-resnet")
    lay_channels_last(innermost)
    seen = []
    trunk = innermost.image["trunk"]
    trunk.layer4.register_forward_hook(lambda module, inputs, made: seen.extend([*inputs, made]))
    assert_same(gradients(innermost, 64), gradients(plain, 64), 1e-4)
    assert len(seen) == 2
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in seen)
    assert all(parameter.grad.is_contiguous() for parameter in innermost.parameters())


@pytest.mark.parametrize("tf32", [True, False, None])
def test_tf32_is_set_inside_alone(tf32):
    def settings() -> tuple[str, str]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    def fail() -> None:
        with float32_products(tf32):
            inside.append(settings())
            raise KeyError

    before, inside = settings(), []
    with pytest.raises(KeyError):
        fail()
    assert inside == [before if tf32 is None else ("tf32",) * 2 if tf32 else ("ieee",) * 2]
    assert settings() == before


@pytest.mark.parametrize(("architecture", "name", "size"), TOWERS)
def test_bfloat16_keeps_norms_and_the_scale_in_float32_and_half_the_bytes(architecture, name, size):
    """Half of what float32 keeps, parameters aside, for weights in bfloat16; autocast keeps copies of weights too."""
    exact, cast, mixed = (model(architecture, name) for _ in range(3))
    names = cast.state_dict().keys()
    cast_but_norms(cast, torch.bfloat16)
    autocast_forward(mixed, torch.bfloat16)
    assert cast.state_dict().keys() == mixed.state_dict().keys() == names
    kept = {name for name, p in cast.named_parameters() if p.dtype == torch.float32}
    assert "logit_scale" in kept
    assert all(p.dtype == torch.bfloat16 for name, p in cast.named_parameters() if name not in kept)
    norms = [n for n, m in cast.named_modules() if "Norm" in type(m).__name__ and [*m.parameters(recurse=False)]]
    assert kept == {"logit_scale"} | {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}
    weights = sum(p.numel() * p.element_size() for p in exact.parameters())
    assert saved_bytes(cast, size) < 0.55 * saved_bytes(exact, size)
    assert saved_bytes(mixed, size) < 0.75 * saved_bytes(exact, size) + weights
    right = gradients(exact, size)
    for half in (cast, mixed):
        found = {name: gradient.float() for name, gradient in gradients(half, size).items()}
        assert half(batch_of_both_views(word_tokenizer(), size))["image"].dtype == torch.float32
        assert_same(found, right, 0.25)  # a ResNet's BatchNorm over four images is far from smooth


def test_a_run_of_ours_is_a_start_and_brings_its_tokenizer(caplog):
    """Separation has independent heads in that run; a new loss has a learnt number of its own."""
    folder = next((WRITTEN / "checkpoints").iterdir())
    recipe = parse_recipe_text((folder / "recipe.yaml").read_text())
    recipe.model.pretrained, recipe.losses = str(WRITTEN), losses_of("siglip", {})
    tokenizer = initial_tokenizer(recipe)
    assert tokenizer.model == load_tokenizer(folder / "tokenizer").model
    with caplog.at_level("INFO", logger="modstruct"):
        model = build_model(recipe, tokenizer, build_objective(recipe.losses))
    given = checkpoints.read_weights(folder)
    own = model.state_dict()
    assert own.keys() - given.keys() == {"logit_bias"}
    assert all(torch.equal(value, given[name]) for name, value in own.items() if name in given)
    assert "Started from" in caplog.text
    assert "new: logit_bias" in caplog.text
    assert model.new_weights == {"logit_bias"}
    recipe.model.embed_dim += 1
    with pytest.raises(ValueError, match=r"model\.pretrained = .*belongs to another model.*image\.head\.weight"):
        build_model(recipe, tokenizer, build_objective(recipe.losses))
    recipe.model.pretrained = "runs/nowhere"
    with pytest.raises(ValueError, match=r"model\.pretrained = 'runs/nowhere': no such folder"):
        build_model(recipe, tokenizer, build_objective(recipe.losses))
    build_model(recipe, tokenizer, build_objective(recipe.losses), read_weights=False)  # a checkpoint's follow


@pytest.mark.parametrize("given", ["fusion", "snli_ve"])
def test_a_fusion_model_is_no_start_of_two_towers_and_is_called_one(given):
    recipe = parse_recipe_text(next((WRITTEN / "checkpoints").glob("*/recipe.yaml")).read_text())
    recipe.model.pretrained = str(WRITTEN.with_name(given))
    with pytest.raises(ValueError, match=r"^model\.pretrained = .*: a model of framework fusion; .* two_tower$"):
        build_model(recipe, initial_tokenizer(recipe), build_objective(recipe.losses))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("switch", [cast_but_norms, autocast_forward])
@pytest.mark.parametrize(("architecture", "name", "size"), TOWERS)
def test_on_a_gpu_products_are_bfloat16_and_norms_float32(architecture, name, size, switch, monkeypatch):
    monkeypatch.setattr("modstruct.distributed.device", lambda: torch.device("cuda"))
    half = model(architecture, name).cuda()
    lay_channels_last(half)
    switch(half, torch.bfloat16)
    products: set[torch.dtype] = set()
    for module in half.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(lambda module, inputs, made: products.add(made.dtype))
        if "Norm" in type(module).__name__:
            assert {p.dtype for p in module.parameters(recurse=False)} <= {torch.float32}
    made = half({key: rows.cuda() for key, rows in batch_of_both_views(word_tokenizer(), size).items()})
    sum(z.sum() for z in made.values()).backward()
    assert products == {torch.bfloat16}
    assert {z.dtype for z in made.values()} == {torch.float32}
    assert half.logit_scale.grad.dtype == torch.float32


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_starts_another_with_the_weights_that_it_measures_and_exports(tmp_path, monkeypatch, ema):
    path = checkpoints.step_folder(tmp_path, 3)
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump({"schema": 5, "evaluation": {"ema": ema}}))
    monkeypatch.setattr(checkpoints, "read_weights", lambda folder, section: {"momentum.a": torch.zeros(1)})
    monkeypatch.setattr(checkpoints, "read_measured", lambda folder, ema: {"a": torch.full((1,), float(ema))})
    assert read_everything(str(tmp_path), "model.pretrained") == {"a": float(ema), "momentum.a": 0.0}
