from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import CAPTIONS, word_tokenizer
from torch import Tensor
from torch.nn import functional as F

from modstruct.config import (
    FinetuneRecipe,
    FusionConfig,
    FusionTextConfig,
    FusionVisionConfig,
    LossesConfig,
    MatchingConfig,
    Recipe,
    TaskConfig,
)
from modstruct.losses.objective import build_objective
from modstruct.models.build import compile_trunks
from modstruct.models.fusion.classifier import PairClassifier, PairLayers
from modstruct.models.fusion.initial_weights import Initial, start_from
from modstruct.models.fusion.pretraining import FusionModel
from modstruct.models.fusion.published import to_albef

HEADS, TEXT_WIDTH, IMAGE_WIDTH, SIZE = 2, 18, 16, 16
VISION = FusionVisionConfig(image_size=SIZE, patch_size=8, width=IMAGE_WIDTH, layers=1, heads=2)
FUSION = FusionConfig(vision=VISION, text=FusionTextConfig(width=TEXT_WIDTH, heads=HEADS))


def classifier(classes: int = 2, alpha: float = 0.4, fusion: FusionConfig = FUSION) -> PairClassifier:
    torch.manual_seed(0)
    model = PairClassifier(FinetuneRecipe(fusion=fusion, task=TaskConfig(alpha=alpha)), word_tokenizer(), classes)
    with torch.no_grad():  # no bias 0, no norm 1: nothing may be left out unseen
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if model.ema:
        model.ema.module.load_state_dict(model.state_dict())
    return model


def batch(label: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (len(CAPTIONS), 2, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    made = {"image": image, "text": word_tokenizer()(CAPTIONS)}
    return made | {"label": torch.tensor([0, 1, 1, 0])} if label else made


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(weights: dict, own: str, keys: str, x: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
    """own: whose query and output are used; keys: whose key and value."""

    def heads(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    query = heads(linear(x, weights, f"{own}.self.query"))
    key, value = (heads(linear(seen, weights, f"{keys}.self.{name}")) for name in ("key", "value"))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    return norm(linear(mixed, weights, f"{own}.output.dense") + x, weights, f"{own}.output.LayerNorm")


def doubled_blocks(weights: dict[str, Tensor], text: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The paper's figure, line by line; weights by the names of PairLayers."""
    x = text
    for number in sorted({name.split(".")[1] for name in weights}, key=int):
        for side, image in (("left", left), ("right", right)):
            block, shared = f"{side}.{number}", f"left.{number}.crossattention"
            x = attend(weights, f"{block}.attention", f"{block}.attention", x, x, mask)
            x = attend(weights, f"{block}.crossattention", shared, x, image, None)
            inner = F.gelu(linear(x, weights, f"{block}.intermediate.dense"))
            x = norm(linear(inner, weights, f"{block}.output.dense") + x, weights, f"{block}.output.LayerNorm")
    return x


@pytest.fixture
def in_float64() -> tuple[PairLayers, dict[str, Tensor], tuple[Tensor, ...]]:
    """Layers, their weights as leaves of another graph, and what they are given."""
    layers = classifier().backbone.fusion.double()
    weights = {name: value.clone().requires_grad_() for name, value in layers.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    text, left, right = (
        torch.randn(3, length, width, dtype=torch.float64, generator=generator)
        for length, width in ((7, TEXT_WIDTH), (5, IMAGE_WIDTH), (5, IMAGE_WIDTH))
    )
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    return layers, weights, (text, mask, left, right)


def test_the_forward_pass_is_that_of_the_paper(in_float64):
    layers, weights, given = in_float64
    torch.testing.assert_close(layers(*given), doubled_blocks(weights, *given), rtol=0, atol=1e-12)


def test_the_gradient_of_a_shared_projection_comes_from_both_images(in_float64):
    layers, weights, given = in_float64
    direction = torch.randn(3, 7, TEXT_WIDTH, dtype=torch.float64)
    (layers(*given) * direction).sum().backward()
    (doubled_blocks(weights, *given) * direction).sum().backward()
    for name, parameter in layers.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=0, atol=1e-11, msg=name)
    # A bias of all keys alike changes no attention; every other weight counts.
    assert all(p.grad.abs().max() > 1e-6 for n, p in layers.named_parameters() if not n.endswith("key.bias"))


def test_the_logits_are_the_head_s_of_the_first_token():
    model, given = classifier().double(), batch()
    backbone, weights = model.backbone, dict(model.backbone.fusion.state_dict())
    left, right = (backbone.encode_image(given["image"][:, side]) for side in (0, 1))
    fused = doubled_blocks(weights, backbone.encode_text(given["text"]), given["text"] != 0, left, right)
    head = model.head.state_dict()
    hidden = (fused[:, 0] @ head["0.weight"].T + head["0.bias"]).clamp(min=0)
    torch.testing.assert_close(model.classify(given), (hidden @ head["2.weight"].T + head["2.bias"]).float())


def test_of_one_image_twice_each_pre_trained_block_runs_twice():
    layers = pretrained().backbone.fusion
    pair = PairLayers(copy.deepcopy(layers))
    text, image = torch.randn(2, 5, TEXT_WIDTH), torch.randn(2, 4, IMAGE_WIDTH)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected = text
    for block in layers.layer.values():
        for _ in range(2):
            expected = block(expected, mask[:, None, None, :], image, None)
    assert torch.equal(pair(text, mask, image, image), expected)


def test_swapping_the_images_changes_the_answer():
    model, given = classifier(), batch()
    swapped = given | {"image": given["image"].flip(1)}
    assert (model.classify(given) - model.classify(swapped)).abs().min() > 1e-4


def is_shared(model: PairClassifier) -> bool:
    """One module of both blocks, which is a part of the first alone."""
    fusion = model.backbone.fusion
    pairs = [(fusion.left[n].crossattention.self, fusion.right[n].crossattention.self) for n in fusion.left]
    one = all(getattr(first, name) is getattr(second, name) for first, second in pairs for name in ("key", "value"))
    return one and not any({"key", "value"} & second._modules.keys() for _, second in pairs)


def test_shared_projections_are_one_module_that_is_listed_once():
    model = classifier()
    assert is_shared(model)
    listed = list(model.named_parameters(remove_duplicate=False))
    assert len(listed) == len({id(parameter) for _, parameter in listed})
    assert model.state_dict().keys() == {name for name, _ in listed}
    modules = list(model.named_modules(remove_duplicate=False))
    assert len(modules) == len({id(module) for _, module in modules})
    kept = sorted(name for name, _ in listed if name.endswith(".crossattention.self.key.weight"))
    assert kept == [f"backbone.fusion.left.{number}.crossattention.self.key.weight" for number in "23"]


def test_copies_and_the_ema_model_share_among_themselves_and_with_nobody_else():
    model = classifier()
    for made in (model.ema.module, copy.deepcopy(model), copy.deepcopy(model).bfloat16()):
        assert is_shared(made)
        own = {parameter.data_ptr() for parameter in model.parameters()}
        assert own.isdisjoint(parameter.data_ptr() for parameter in made.parameters())


def test_the_ema_model_averages_a_shared_projection_once():
    model = classifier()
    with torch.no_grad():
        model.backbone.fusion.left["2"].crossattention.self.key.weight.add_(1)
    key = model.backbone.fusion.left["2"].crossattention.self.key
    copied = model.ema.module.backbone.fusion.right["2"].crossattention.self.key
    before = copied.weight.clone()
    model.update_ema({}, {}, 0)
    expected = torch.lerp(before, key.weight.detach(), 1 - 0.995)
    assert torch.equal(copied.weight, expected)
    assert not torch.equal(copied.weight, before)


def test_weights_saved_are_weights_loaded(tmp_path):
    from safetensors.torch import load_file, save_file  # refuses tensors that share memory

    model, other = classifier(), classifier()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other.classify(batch()), model.classify(batch()))


def test_recomputed_and_compiled_layers_give_the_same():
    plain, recomputed = classifier(), classifier()
    recomputed.trunks()["fusion"].set_grad_checkpointing(True)
    for model in (plain, recomputed):
        model.classify(batch()).square().sum().backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    compiled = classifier()
    compile_trunks(compiled, zero_stage=2, backend="eager")
    torch.testing.assert_close(compiled.classify(batch()), plain.classify(batch()))


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_training_gives_what_the_objective_takes(alpha):
    model = classifier(alpha=alpha)
    outputs = model(batch(label=True))
    assert outputs["logits"].shape == (4, 2)
    assert outputs["labels"].tolist() == [0, 1, 1, 0]
    assert outputs["entries"].tolist() == [4]
    assert ("logits_ema" not in outputs) == (alpha == 0)
    assert alpha == 0 or not outputs["logits_ema"].requires_grad
    assert model(batch()).keys() == {"logits"}


def test_a_half_precision_model_has_a_float32_ema_model():
    model = classifier().bfloat16()
    made = model(batch(label=True))
    assert made["logits"].dtype == torch.float32
    assert {p.dtype for p in model.ema.module.parameters()} == {torch.float32}
    torch.testing.assert_close(made["logits"], made["logits_ema"].float(), rtol=0.1, atol=0.1)


def pretrained(fusion: FusionConfig = FUSION) -> FusionModel:
    torch.manual_seed(5)
    losses = LossesConfig(matching=MatchingConfig(1.0))
    recipe = Recipe(framework="fusion", fusion=fusion, losses=losses)
    return FusionModel(recipe, word_tokenizer(), build_objective(losses))


def test_a_pre_trained_layer_becomes_both_blocks(tmp_path):
    source, model = pretrained(), classifier()
    weights = source.state_dict() | source.ema_state_dict()
    start_from(model, Initial(word_tokenizer(), weights, tmp_path))
    assert model.new_weights == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    for which in (model, model.ema.module):
        own = which.state_dict()
        for name, value in source.state_dict().items():
            if name.startswith("backbone.fusion.layer."):
                for side in ("left", "right"):
                    doubled = name.replace("fusion.layer.", f"fusion.{side}.")
                    shared = side == "right" and (".self.key." in name or ".self.value." in name) and "cross" in name
                    assert shared == (doubled not in own)
                    assert shared or torch.equal(own[doubled], value)
            elif name.startswith("backbone."):
                assert torch.equal(own[name], value)
        assert is_shared(which)


def test_the_published_names_become_both_blocks(tmp_path):
    source, by_ours, by_theirs = pretrained(), classifier(), classifier()
    start_from(by_ours, Initial(word_tokenizer(), source.state_dict(), tmp_path))
    start_from(by_theirs, Initial(word_tokenizer(), to_albef(source.state_dict()), tmp_path))
    assert torch.equal(by_ours.classify(batch()), by_theirs.classify(batch()))


def test_a_smaller_pre_trained_image_fits(tmp_path):
    larger = replace(FUSION, vision=replace(VISION, image_size=24))
    model = classifier(fusion=larger)
    start_from(model, Initial(word_tokenizer(), pretrained().state_dict(), tmp_path))
    assert model.backbone.image.pos_embed.shape[1] == 1 + 9


def test_text_assignment_hands_on_all_but_its_head(tmp_path):
    source, model = classifier(classes=3), classifier(classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_from(model, Initial(word_tokenizer(), source.state_dict(), tmp_path))
    for name, value in model.state_dict().items():
        expected = before[name] if name.startswith("head.") else source.state_dict()[name]
        assert torch.equal(value, expected), name


def test_a_head_stays_with_its_task_alone(tmp_path):
    again, model = classifier(classes=3), classifier(classes=3)
    with torch.no_grad():
        again.head[2].bias.fill_(7.0)
    start_from(model, Initial(word_tokenizer(), again.state_dict(), tmp_path))
    assert model.head[2].bias.tolist() == [7.0] * 3
    # SNLI-VE has three classes too, but they are others: its layers are single.
    entailment = pretrained().state_dict() | {f"head.{n}": v + 1 for n, v in again.head.state_dict().items()}
    fresh = classifier(classes=3)
    before = fresh.head[2].bias.clone()
    start_from(fresh, Initial(word_tokenizer(), entailment, tmp_path))
    assert torch.equal(fresh.head[2].bias, before)


def test_weights_of_other_sizes_are_refused(tmp_path):
    wider = replace(FUSION, text=replace(FUSION.text, width=20))
    with pytest.raises(ValueError, match=r"--init = .*belongs to another model"):
        start_from(classifier(), Initial(word_tokenizer(), pretrained(wider).state_dict(), tmp_path))
    deeper = replace(FUSION, text=replace(FUSION.text, fusion_layers=1))
    with pytest.raises(ValueError, match=r"--init = .*backbone\.fusion\.left\.3\."):
        start_from(classifier(), Initial(word_tokenizer(), pretrained(deeper).state_dict(), tmp_path))
