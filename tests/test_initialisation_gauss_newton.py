"""Deep linear models with squared errors: there the factored curvature is exact.

Every layer's Jacobian is constant, so the Gauss-Newton block of a weight is exactly
``X (x) J^T J``; with the labels' own gradients instead (the empirical factor) it is not.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from cg_optim import curvature_init_
from tests.models import LoRALinear
from tests.strategies import relative_error
from tests.test_initialisation_low_rank import distance, root_and_inverse

WIDTHS = (6, 5, 7, 8)
LAYER, RANK, ROWS = 1, 2, 40
DAMPING = 1e-10

Data = tuple[Tensor, Tensor]


class DeepLinear(nn.Sequential):
    """Three linear layers; LoRA on the middle one, or on all."""

    def __init__(self, adapted: tuple[int, ...] = (LAYER,)) -> None:
        torch.manual_seed(0)
        layers = [LoRALinear(n, m, r=RANK) for n, m in itertools.pairwise(WIDTHS)]
        super().__init__(*(layers[i] if i in adapted else layers[i].base_layer for i in range(3)))
        self.double()
        for i in adapted:
            nn.init.zeros_(layers[i].lora_B.weight)


def data() -> Data:
    source = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTHS[0], WIDTHS[0], generator=source, dtype=torch.float64)
    x = torch.randn(ROWS, WIDTHS[0], generator=source, dtype=torch.float64) @ mixing
    return x, 3.0 + torch.randn(ROWS, WIDTHS[-1], generator=source, dtype=torch.float64)


def loss(model: nn.Module, batch: Data) -> Tensor:
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(-1).mean()


def loss_of_sampled_labels(model: nn.Module, batch: Data) -> Tensor:
    """Labels of unit covariance around the predictions: all 2 m points of a quadrature."""
    outputs = WIDTHS[-1]
    noise = outputs**0.5 * torch.eye(outputs, dtype=torch.float64)
    x = batch[0].repeat(2 * outputs, 1)
    labels = model(x).detach() + torch.cat([noise, -noise]).repeat_interleave(ROWS, 0)
    return loss(model, (x, labels))


def gauss_newton(model: DeepLinear, batch: Data) -> Tensor:
    """``mean_t J_t^T J_t`` of the middle weight by automatic differentiation, ``(m n, m n)``."""
    weight = model[LAYER].base_layer.weight

    def outputs(value: Tensor) -> Tensor:
        middle = model[0](batch[0]) @ value.T + model[LAYER].base_layer.bias
        return model[2](middle)

    jacobian = torch.autograd.functional.jacobian(outputs, weight.detach()).flatten(2)
    return torch.einsum("toi,toj->ij", jacobian, jacobian) / ROWS


def rows_of(model: DeepLinear, batch: Data, sampled: bool) -> tuple[Tensor, Tensor]:
    """Inputs and, per term of the loss, output gradients of the middle layer."""
    seen: list[Tensor] = []
    handle = model[LAYER].register_forward_hook(
        lambda _, args, out: (seen.append(args[0].detach()), out.register_hook(seen.append))[0]
    )
    (loss_of_sampled_labels if sampled else loss)(model, batch).backward()
    handle.remove()
    x, d = seen[-2:]
    return x, len(x) * d


def kronecker(x: Tensor, g: Tensor) -> Tensor:
    """``S (x) X`` in the row-major order of the weight's entries."""
    return torch.kron(g.mT @ g / len(g), x.mT @ x / len(x))


def test_kfac_with_sampled_labels_is_the_gauss_newton_block_and_the_empirical_one_is_not() -> None:
    model, batch = DeepLinear(), data()
    block = gauss_newton(model, batch)
    assert relative_error(kronecker(*rows_of(model, batch, sampled=True)), block) < 1e-12
    assert relative_error(kronecker(*rows_of(model, batch, sampled=False)), block) > 0.5


@pytest.mark.parametrize("sampled", [True, False])
def test_the_unshifted_start_is_the_best_low_rank_approximation(sampled: bool) -> None:
    """Of the Newton step in the metric of the Gauss-Newton block, all computed densely."""
    model, batch = DeepLinear(), data()
    block = gauss_newton(model, batch)
    m, n = model[LAYER].base_layer.weight.shape
    x, g = rows_of(model, batch, sampled=False)
    gradient = g.mT @ x / ROWS
    model.zero_grad()
    target = -torch.linalg.solve(block, gradient.flatten()).view(m, n)
    # The factors of the block by partial traces; X may take all of the scale.
    four = block.view(m, n, m, n)
    x_curvature = torch.einsum("inim->nm", four)
    s_curvature = torch.einsum("injn->ij", four) / x_curvature.trace()
    (x_root, x_inverse), (s_root, s_inverse) = (
        root_and_inverse(x_curvature),
        root_and_inverse(s_curvature),
    )
    left, values, right = torch.linalg.svd(s_root @ target @ x_root, full_matrices=False)
    best = s_inverse @ (left[:, :RANK] * values[:RANK]) @ right[:RANK] @ x_inverse

    report = curvature_init_(
        model, [batch], loss, mode="newton", length=1.0, damping=DAMPING, curvature="dense",
        sampled_loss_fn=loss_of_sampled_labels if sampled else None,
    )  # fmt: skip
    layer = model[LAYER]
    start = (layer.scaling * layer.lora_B.weight @ layer.lora_A.weight).detach()
    if sampled:
        assert relative_error(start, best) < 1e-6
        energy = values.square()
        (entry,) = report.layers
        assert entry.captured_energy == pytest.approx(float(energy[:RANK].sum() / energy.sum()))
        share = energy / energy.sum()
        assert entry.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()))
    else:
        assert relative_error(start, best) > 0.1
    # And that is what it does: nothing of its rank comes nearer to the exact minimum.
    excess = distance(start, target, x_curvature, s_curvature)
    least = float(values[RANK:].square().sum())
    assert (excess < least * (1 + 1e-6)) == sampled


def test_one_adapter_of_full_rank_reaches_the_minimum_in_one_step() -> None:
    """The loss is quadratic in one weight, so the full Newton step solves it."""
    torch.manual_seed(0)
    model = DeepLinear()
    n, m = WIDTHS[LAYER], WIDTHS[LAYER + 1]
    full = LoRALinear(n, m, r=min(m, n)).double()
    full.base_layer = model[LAYER].base_layer
    nn.init.zeros_(full.lora_B.weight)
    model[LAYER] = full
    batch = data()
    curvature_init_(
        model, [batch], loss, mode="newton", length=1.0, damping=DAMPING, curvature="dense",
        sampled_loss_fn=loss_of_sampled_labels,
    )  # fmt: skip
    product = full.scaling * full.lora_B.weight @ full.lora_A.weight
    weight = (full.base_layer.weight + product).detach().requires_grad_()
    output = model[2](model[0](batch[0]) @ weight.T + full.base_layer.bias)
    (0.5 * (output - batch[1]).square().sum(-1).mean()).backward()
    assert float(weight.grad.abs().max()) < 1e-6
