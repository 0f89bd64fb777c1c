"""Norms with float32 parameters beside activations in half precision: their values, gradients and what they keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct.models.norms import Float32BatchNorm, Float32LayerNorm, keep_norms_in_float32


def made_from(norm: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output, the gradients of x and the parameters, and the tensors kept for the backward pass."""
    kept: list[Tensor] = []
    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made = norm(x)
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(2)).bfloat16()  # as a gradient arrives
    (made.float() * weights).sum().backward()
    return made.detach(), [x.grad, *(p.grad for p in norm.parameters())], kept


def randomised(norm: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    return norm


class OldBatchNorm(Float32BatchNorm):
    """As it was when older checkpoints were trained."""

    def forward(self, x: Tensor) -> Tensor:
        statistics = (self.running_mean, self.running_var, self.weight.float(), self.bias.float())
        return F.batch_norm(x.float(), *statistics, self.training, self.momentum, self.eps).to(x.dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_batch_norm_keeps_its_input_as_it_comes_and_computes_what_it_did(dtype, autocast):
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made, gradients, kept = made_from(randomised(Float32BatchNorm(4)), x)
        right, wanted, kept_before = made_from(randomised(OldBatchNorm(4)), x)
    assert torch.equal(made, right)
    for gradient, before in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, before, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)
    assert {t.dtype for t in kept if t.numel() == x.numel()} == {dtype}
    assert {t.dtype for t in kept_before if t.numel() == x.numel()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_norm_computes_in_float32_and_keeps_its_input_as_it_comes(dtype, autocast):
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made, gradients, kept = made_from(randomised(Float32LayerNorm(8)), x)
    right, wanted, _ = made_from(randomised(nn.LayerNorm(8)), x.float())
    assert made.dtype == dtype
    assert torch.equal(made, right.to(dtype))
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, torch.float32]
    for gradient, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, exact.to(gradient.dtype))
    assert {t.dtype for t in kept if t.numel() == x.numel()} == {dtype}


def test_a_layer_norm_compiles():
    norm, x = randomised(Float32LayerNorm(8)), torch.randn(3, 8).bfloat16()
    made, gradients, _ = made_from(norm, x)
    norm.zero_grad()
    compiled, found, _ = made_from(torch.compile(norm, backend="aot_eager", fullgraph=True), x)
    assert torch.equal(compiled, made)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_norms_of_every_kind_take_half_precision_and_their_parameters_are_named():
    """One without parameters of its own, and kinds that torch refuses to mix, among them."""
    kinds = [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False)]
    kinds += [nn.GroupNorm(2, 8), nn.RMSNorm(8), Float32BatchNorm(8)]
    linear = nn.Linear(8, 8)
    model = nn.ModuleList([*kinds, linear])
    kept = keep_norms_in_float32(model)
    assert {id(p) for p in kept} == {id(p) for p in model.parameters()} - {id(p) for p in linear.parameters()}
    for norm in kinds:
        shape = (3, 8, 4, 4) if isinstance(norm, Float32BatchNorm) else (3, 8)
        made, gradients, _ = made_from(norm, torch.randn(shape).bfloat16())
        assert made.dtype == torch.bfloat16
        assert {g.dtype for g in gradients[1:]} <= {torch.float32}
