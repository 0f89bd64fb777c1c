"""Every loss over 1, 2 and 4 processes: one value, and gradients whose mean over the processes is its gradient."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from processes import run_on_processes
from torch import Tensor
from torch.nn.functional import normalize

from modstruct import distributed
from modstruct.config import BridgeConfig, ContrastiveConfig, GeometryConfig, LossesConfig, SeparationConfig
from modstruct.config.losses import AlignmentConfig, SigmoidConfig
from modstruct.distributed import collectives
from modstruct.embeddings import Outputs
from modstruct.losses.objective import build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.pairwise import torch_tiles

PAIRS, FEATURES = 24, 10
OFF = ContrastiveConfig(weight=0.0)
OBJECTIVES = {
    "clip": LossesConfig(contrastive=ContrastiveConfig(weight=1.0)),
    "clip_inmodal": LossesConfig(contrastive=ContrastiveConfig(weight=1.0, in_modal=True)),
    "clip_2v": LossesConfig(contrastive=ContrastiveConfig(weight=1.0, second_view=True)),
    "separation": LossesConfig(contrastive=OFF, separation=SeparationConfig(weight=1.0)),
    "bridge": LossesConfig(contrastive=OFF, bridge=BridgeConfig(weight=1.0, t=None)),
    "geometry": LossesConfig(contrastive=OFF, geometry=GeometryConfig(weight=1.0)),
    "geometry of pairs": LossesConfig(contrastive=OFF, geometry=GeometryConfig(weight=1.0, normalize="pairs")),
    "sigmoid": LossesConfig(contrastive=OFF, sigmoid=SigmoidConfig(weight=1.0)),
    "align": LossesConfig(contrastive=OFF, alignment=AlignmentConfig(weight=1.0)),
    "align_uniform": LossesConfig(
        contrastive=ContrastiveConfig(weight=1.0, in_modal=True),
        alignment=AlignmentConfig(weight=1.0, form="distance", uniformity_weight=1.0),
    ),
    "all": LossesConfig(
        contrastive=ContrastiveConfig(weight=1.0, in_modal=True),
        separation=SeparationConfig(weight=1.0),
        bridge=BridgeConfig(weight=1.0),
        geometry=GeometryConfig(weight=0.25),
    ),
}
# Embedding widths below and above the number of pairs, for the closed form and the form with an N x N matrix, each with
# the rows of a tile of logits: 5 divides none of the processes' 24, 12 and 6 rows; 24 makes one tile of them.
WIDTHS = {8: 5, 32: 24}
HEADS = ("image", "text", "image_independent", "text_independent")


def parameters(width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)
    weights = {n: torch.randn(FEATURES, width, dtype=torch.float64, generator=generator) for n in HEADS}
    weights["log_scale"] = torch.tensor([2.5], dtype=torch.float64)
    weights["bias"] = torch.tensor([-7.0], dtype=torch.float64)
    return {name: weight.to(dtype).requires_grad_() for name, weight in weights.items()}


def embeddings(weights: dict[str, Tensor], dtype: torch.dtype, spoiled: bool) -> Outputs:
    """This process's rows of the one global batch, through linear towers."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(PAIRS, FEATURES, dtype=torch.float64, generator=generator)
    inputs = {}
    for name in ("image", "text", "image_augmented", "text_augmented"):
        noise = torch.randn(PAIRS, FEATURES, dtype=torch.float64, generator=generator)
        inputs[name] = (content + 0.5 * noise).to(dtype)
    if spoiled:
        inputs["image"][PAIRS - 1] = torch.nan  # a row of the last process
    processes = distributed.world_size() if distributed.is_distributed() else 1
    own = PAIRS // processes
    rows = slice(distributed.rank() * own, (distributed.rank() + 1) * own) if processes > 1 else slice(PAIRS)
    made = {}
    for view, features in inputs.items():
        modality = view.split("_")[0]
        made[view] = normalize(features[rows] @ weights[modality])
        independent = view.replace(modality, f"{modality}_independent")
        made[independent] = normalize(features[rows] @ weights[f"{modality}_independent"])
    return made | {"logit_scale": weights["log_scale"].exp(), "logit_bias": weights["bias"]}


def losses_and_gradients(dtype_name: str, spoiled: bool = False) -> dict[str, dict[str, Tensor]]:
    """For each objective: its terms here, and the mean over the processes of the parameters' gradients."""
    dtype = getattr(torch, dtype_name)
    processes = distributed.world_size() if distributed.is_distributed() else 1
    results = {}
    for width, tile_rows in WIDTHS.items():
        for name, config in OBJECTIVES.items():
            weights = parameters(width, dtype)
            with mock.patch.dict(torch_tiles.TILE_ELEMENTS, cpu=tile_rows * PAIRS):
                total, terms = build_objective(config, LossSettings(seed=1))(
                    embeddings(weights, dtype, spoiled), step=7
                )
                total.backward()
            result = {f"term {term}": value for term, value in terms.items()}
            for parameter, weight in weights.items():
                if weight.grad is not None:
                    result[f"gradient of {parameter}"] = distributed.sum_over_processes(weight.grad) / processes
            results[f"{name}, width {width}"] = {"total": total.detach(), **result}
    return results


@pytest.fixture(scope="module")
def in_one_process() -> dict[str, dict[str, Tensor]]:
    return losses_and_gradients("float32")


@pytest.fixture(scope="module")
def in_float64() -> dict[str, dict[str, Tensor]]:
    return losses_and_gradients("float64")


def assert_within(found: dict, right: dict, tolerance: float) -> None:
    assert found.keys() == right.keys()
    for objective, parts in right.items():
        assert found[objective].keys() == parts.keys()
        for part, value in parts.items():
            error = (found[objective][part].double() - value.double()).norm() / value.double().norm()
            assert error < tolerance, f"{objective}, {part}: relative error {error:.1e}"


def test_one_process_in_float32_agrees_with_float64(in_one_process, in_float64):
    assert_within(in_one_process, in_float64, 1e-5)
    scale_moves = [name for name, parts in in_float64.items() if "gradient of log_scale" in parts]
    assert len(scale_moves) == 2 * 7  # clip, clip_inmodal, clip_2v, separation, sigmoid, align_uniform, all


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_one(processes, in_one_process, in_float64):
    for found in run_on_processes(losses_and_gradients, processes, "float32"):
        assert_within(found, in_one_process, 1e-5)
        assert_within(found, in_float64, 1e-5)


def spoiled_totals() -> dict[str, Tensor]:
    return {name: parts["total"] for name, parts in losses_and_gradients("float32", spoiled=True).items()}


def test_nan_on_one_process_reaches_the_value_on_all():
    for totals in run_on_processes(spoiled_totals, 2):
        assert all(total.isnan() for total in totals.values()), totals


def collectives_of_a_step() -> dict[str, dict[str, int]]:
    """For each objective, how often each collective is called in a forward and a backward after the first."""
    counts = {}
    for name, config in OBJECTIVES.items():
        weights = parameters(8, torch.float32)
        objective = build_objective(config)
        objective(embeddings(weights, torch.float32, False), step=0)  # agrees on the number of rows
        called = dict.fromkeys(("all_reduce", "gather", "reduce_scatter"), 0)

        def counted(kind: str, function, called=called):
            def call(*args, **options):
                called[kind] += 1
                return function(*args, **options)

            return call

        with (
            mock.patch.object(collectives.dist, "all_reduce", counted("all_reduce", collectives.dist.all_reduce)),
            mock.patch.object(collectives, "_all_gather", counted("gather", collectives._all_gather)),
            mock.patch.object(collectives, "_reduce_scatter", counted("reduce_scatter", collectives._reduce_scatter)),
        ):
            total, _ = objective(embeddings(weights, torch.float32, False), step=7)
            total.backward()
        counts[name] = called
    return counts


def test_all_losses_share_one_gather_a_modality_and_one_reduction():
    for counts in run_on_processes(collectives_of_a_step, 2):
        for name, called in counts.items():
            assert called["gather"] <= 2, name
            assert called["reduce_scatter"] <= 2, name
            assert called["all_reduce"] == 2, name  # forward and backward
