"""``curvature_init_`` in mode "shift": the frozen weights move, and move back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cg_optim import curvature_init_, errors, find_lora_pairs
from tests.initialisation_models import (
    KINDS,
    built,
    home_made,
    peft,
    regression,
    squares,
    state,
    train_once,
    weight_of,
)
from tests.models import assert_equal


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dora", "bf16")])
def test_shift_keeps_the_function_and_moves_back_exactly(kind: str) -> None:
    model = built(kind)
    data = [regression(0)]
    before, outputs = state(model), model(data[0][0]).detach()
    report = curvature_init_(model, data, squares, mode="shift")
    torch.testing.assert_close(model(data[0][0]), outputs, rtol=1e-4, atol=1e-5)
    names = [layer.name for layer in report.layers]
    assert set(report.moved) == set(names)
    train_once(model, data[0])
    trained = model(data[0][0]).detach()
    pairs = {pair.name: pair for pair in find_lora_pairs(model).pairs}
    wide = {
        name: report.on_restored_base(name, *pairs[name].as_matrices(pairs[name].A, pairs[name].B))
        for name in names
    }
    report.restore_base_()
    for name, value in state(model).items():
        if "lora" not in name:
            assert torch.equal(value, before[name])
    # The factors of rank 2 r say on the old base what the trained ones said on the moved one.
    with torch.no_grad():
        for name, (down, up) in wide.items():
            pairs[name].B.zero_()
            weight = weight_of(pairs[name], model)
            weight += pairs[name].scaling * up @ down
    torch.testing.assert_close(model(data[0][0]), trained, rtol=1e-4, atol=1e-5)


def test_a_base_in_bf16_keeps_the_function_as_well_as_it_can_and_moves_back_exactly() -> None:
    model = built("bf16")
    data = regression(0)
    before, loss = state(model), float(squares(model, data).detach())
    report = curvature_init_(model, [data], squares, mode="shift")
    assert len(report.moved) == 2
    assert report.loss_before is not None
    assert report.loss_after is not None
    change = abs(float(squares(model, data).detach()) - loss)
    # What is kept is so but for the rounding of the base weights, far from what B A would change.
    assert change < 0.1 * (report.loss_before - report.loss_after)
    report.restore_base_()
    assert_equal(
        {name: value for name, value in state(model).items() if "lora" not in name},
        {name: value for name, value in before.items() if "lora" not in name},
    )


def test_b_stays_zero_where_no_length_helps() -> None:
    model = home_made()

    def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        value = squares(model, data)
        return value if torch.is_grad_enabled() else value + 1  # whatever the length

    with pytest.warns(errors.NumericalWarning, match="no step along the Newton direction"):
        report = curvature_init_(model, [regression()], loss, mode="shift")
    assert report.length == 0.0
    assert not report.moved
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_refuses_to_shift_a_quantized_base_before_anything_is_changed() -> None:
    model = home_made()
    model[2].base_layer.weight.quant_state = object()
    before = state(model)
    with pytest.raises(errors.InitialisationError, match="2: its base weight is quantized"):
        curvature_init_(model, [regression()], squares, mode="shift")
    assert_equal(state(model), before)
    curvature_init_(model, [regression()], squares, mode="newton")  # needs no base weight


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_bitsandbytes_holds_is_kept_and_refused(bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from benchmarks.peft_kinds import WIDTH, quantized

    def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return model(data[0]).square().sum(-1).mean()

    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["first", "second"])
    model = peft.get_peft_model(quantized(bits)(), config)
    given = torch.randn(20, WIDTH), torch.zeros(())
    outputs = model(given[0]).detach()
    with pytest.raises(errors.InitialisationError, match=r"quantized \(torch.u?int8\)"):
        curvature_init_(model, [given], loss, mode="shift")
    curvature_init_(model, [given], loss)
    assert torch.equal(model(given[0]), outputs)
    report = curvature_init_(model, [given], loss, mode="newton")
    assert report.loss_after is not None
    assert report.loss_before is not None
    assert report.loss_after < report.loss_before
