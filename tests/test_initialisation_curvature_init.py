"""``curvature_init_`` on models of every kind: what changes, what must not, what it refuses."""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cg_optim import CGLoRAOptimizer, curvature_init_, errors, find_lora_pairs
from tests.models import LoRALinear, assert_equal, batch, loss_of, parameters_of, tagger, train
from tests.strategies import relative_error
from tests.test_hooks_lifetime import hook_count

MODES = ("keep", "newton", "shift")
BATCHES = [batch(seed, padded=True) for seed in range(4)]


def fresh_tagger(seed: int = 0, **arguments: Any) -> nn.Module:
    model = tagger(seed, **arguments)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


# ------------------------------------------------------------------------ kinds of layers

peft = pytest.importorskip("peft")
conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
N, M = 10, 14


def two_layers(kind: Callable[[int, int], nn.Module] = nn.Linear) -> nn.Module:
    return nn.Sequential(kind(N, M), nn.Tanh(), kind(M, N))


def adapted(base: nn.Module, **arguments: Any) -> nn.Module:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"], **arguments}
    return peft.get_peft_model(base, peft.LoraConfig(**config))


def with_loralib() -> nn.Module:
    loralib = pytest.importorskip("loralib")
    return nn.Sequential(
        loralib.Linear(N, M, r=4, lora_alpha=8), nn.Tanh(), loralib.Linear(M, N, r=4)
    )


def home_made() -> nn.Module:
    layers = LoRALinear(N, M, r=4), LoRALinear(M, N, r=4)
    for layer in layers:
        nn.init.zeros_(layer.lora_B.weight)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


KINDS: dict[str, Callable[[], nn.Module]] = {
    "peft": lambda: adapted(two_layers()),
    "conv1d": lambda: adapted(two_layers(lambda n, m: conv1d(m, n)), fan_in_fan_out=True),
    "rslora": lambda: adapted(two_layers(), use_rslora=True),
    "ranks": lambda: adapted(two_layers(), rank_pattern={"0": 7}, alpha_pattern={"2": 3}),
    "dora": lambda: adapted(two_layers(), use_dora=True),
    "bf16": lambda: adapted(two_layers().bfloat16()),
    "loralib": with_loralib,
    "home-made": home_made,
}


def regression(seed: int = 0, rows: int = 60) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, N, generator=source), torch.randn(rows, N, generator=source)


def squares(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x = data[0].to(next(p for p in model.parameters() if not p.requires_grad).dtype)
    return 0.5 * (model(x).float() - data[1]).square().sum(-1).mean()


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_keep_changes_a_alone_and_no_output_bit(kind: str) -> None:
    model = built(kind)
    data = [regression(seed) for seed in range(2)]
    x = data[0][0].to(next(p for p in model.parameters() if not p.requires_grad).dtype)
    before, outputs = state(model), model(x)
    report = curvature_init_(model, data, squares)
    assert torch.equal(model(x), outputs)
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_A" in name}
    for name in changed:
        torch.testing.assert_close(model.state_dict()[name].norm(), before[name].norm())
    assert len(report.layers) == 2
    assert not report.left_out


@pytest.mark.parametrize("kind", KINDS)
def test_newton_lowers_the_loss_of_the_last_batch_and_leaves_the_base_alone(kind: str) -> None:
    model = built(kind)
    data = [regression(seed) for seed in range(2)]
    before = state(model)
    report = curvature_init_(model, data, squares, mode="newton")
    assert report.length is not None
    assert report.loss_after is not None
    assert report.loss_before is not None
    with torch.no_grad():
        torch.testing.assert_close(float(squares(model, data[-1])), report.loss_after)
    assert report.loss_after < report.loss_before
    for name, value in state(model).items():
        assert torch.equal(value, before[name]) != ("lora_A" in name or "lora_B" in name)


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


def train_once(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    squares(model, data).backward()
    optimizer.step()


def weight_of(pair: Any, model: nn.Module) -> Tensor:
    base = getattr(pair.input_module, "base_layer", pair.input_module)
    transposed = isinstance(base, conv1d)
    return base.weight.data.T if transposed else base.weight.data


@pytest.mark.parametrize("kind", ["peft", "rslora", "loralib", "home-made", "conv1d"])
def test_a_full_newton_step_does_not_depend_on_where_the_gradient_is_seen(kind: str) -> None:
    """Hooks on B's module see ``s g``, those on the layer ``g``; ``s B A`` must be the same."""
    model = built(kind)
    reference = built("home-made" if kind == "peft" else "peft")
    copy_base(model, reference)
    steps = []
    for each in (model, reference):
        curvature_init_(each, [regression()], squares, mode="newton", length=0.1)
        first = find_lora_pairs(each).pairs[0]
        down, up = first.as_matrices(first.A.detach(), first.B.detach())
        steps.append(first.scaling * up @ down)
    assert relative_error(*steps) < 1e-3


def copy_base(source: nn.Module, target: nn.Module) -> None:
    pairs = zip(find_lora_pairs(source).pairs, find_lora_pairs(target).pairs, strict=True)
    for one, two in pairs:
        weight_of(two, target).copy_(weight_of(one, source))
        bases = [getattr(p.input_module, "base_layer", p.input_module) for p in (one, two)]
        bases[1].bias.data.copy_(bases[0].bias.data)


# ------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [False, True])
def test_gradients_hooks_and_random_state_are_as_before(mode: str, fails: bool) -> None:
    model = fresh_tagger(p=0.2)
    loss_of(model, BATCHES[0]).backward()
    kept = {name: p.grad for name, p in model.named_parameters()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    random_state, hooks = torch.get_rng_state(), hook_count(model)

    def loss(model: nn.Module, data: Any) -> Tensor:
        if fails and data is BATCHES[2]:
            raise RuntimeError("out of memory")
        return loss_of(model, data)

    before = parameters_of(model)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            curvature_init_(model, BATCHES, loss, mode=mode)
        assert_equal(parameters_of(model), before)
    else:
        curvature_init_(model, BATCHES, loss, mode=mode)
    assert all(p.grad is kept[name] for name, p in model.named_parameters())
    assert required == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert hook_count(model) == hooks


def test_an_error_in_the_search_leaves_the_adapters_as_they_were() -> None:
    model = fresh_tagger()
    before = parameters_of(model)
    searched = 0

    def loss(model: nn.Module, data: Any) -> Tensor:
        nonlocal searched
        searched += not torch.is_grad_enabled()
        if searched == 2:
            raise KeyboardInterrupt
        return loss_of(model, data)

    with pytest.raises(KeyboardInterrupt):
        curvature_init_(model, BATCHES, loss, mode="newton")
    assert_equal(parameters_of(model), before)


@pytest.mark.parametrize("mode", MODES)
def test_the_seed_decides(mode: str) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        model = fresh_tagger(p=0.2)
        torch.rand(seed + 1)
        curvature_init_(model, BATCHES, loss_of, mode=mode, seed=seed)
        return parameters_of(model)

    assert_equal(run(3), run(3))
    one, other = run(3), run(4)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_only_the_active_adapter_changes() -> None:
    model = built("peft")
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["0", "2"]))
    model.set_adapter("two")
    before = state(model)
    report = curvature_init_(model, [regression()], squares)
    assert [layer.rank for layer in report.layers] == [2, 2]
    for name, value in state(model).items():
        assert torch.equal(value, before[name]) != ("lora_A.two" in name)


def test_scale_of_the_loss_does_not_matter_to_keep() -> None:
    results = []
    for scale in (1.0, 2.0**20):
        model = fresh_tagger()
        curvature_init_(model, BATCHES, lambda m, b, s=scale: s * loss_of(m, b))
        results.append(parameters_of(model))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_nothing(checkpointing: str) -> None:
    results = []
    for how in (None, checkpointing):
        model = fresh_tagger(checkpointing=how)
        curvature_init_(model, BATCHES, loss_of, mode="newton", length=0.1)
        results.append(parameters_of(model))
    assert_equal(*results)


def test_padding_does_not_count() -> None:
    results = []
    for padded in (False, True):
        model = fresh_tagger()
        tokens, mask, labels = batch(0)
        if padded:
            more = torch.zeros(4, 3, dtype=tokens.dtype)
            tokens, mask = torch.cat([tokens, more], 1), torch.cat([mask, more.bool()], 1)
            labels = torch.cat([labels, more - 100], 1)
        report = curvature_init_(
            model, [(tokens, mask, labels)], loss_of, mode="newton", length=0.1
        )
        results.append(parameters_of(model))
    assert report.length == 0.1
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_a_layer_without_gradient_keeps_its_start() -> None:
    model = nn.ModuleList([home_made(), home_made()])
    before = parameters_of(model[1])
    report = curvature_init_(
        model, [regression()], lambda m, data: squares(m[0], data), mode="newton"
    )
    assert set(report.left_out) == {"1.0", "1.2"}
    assert "no gradient" in report.left_out["1.0"]
    assert_equal(parameters_of(model[1]), before)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = home_made()
    before = parameters_of(model)
    report = curvature_init_(model, [regression()], lambda m, d: torch.nan * squares(m, d))
    assert_equal(parameters_of(model), before)
    assert len(report.left_out) == 2


def test_b_stays_zero_where_no_length_helps() -> None:
    model = home_made()

    def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        value = squares(model, data)
        return value if torch.is_grad_enabled() else -value

    with pytest.warns(errors.NumericalWarning, match="no step along the Newton direction"):
        report = curvature_init_(model, [regression()], loss, mode="shift")
    assert report.length == 0.0
    assert not report.moved
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_training_goes_on_from_every_start() -> None:
    for mode in MODES:
        model = fresh_tagger()
        curvature_init_(model, BATCHES, loss_of, mode=mode)
        optimizer = CGLoRAOptimizer(model, lr=1e-2)
        before = float(loss_of(model, BATCHES[0]).detach())
        train(model, optimizer, [0] * 20, padded=True)
        assert float(loss_of(model, BATCHES[0]).detach()) < before - 0.05
        assert not any(optimizer.diagnostics().values())


def test_the_report_prints_a_table() -> None:
    report = curvature_init_(home_made(), [regression()], squares, mode="newton")
    lines = str(report).splitlines()
    assert "mode 'newton'" in lines[0]
    assert len(lines) == 4
    for layer in report.layers:
        assert 0 < layer.captured_energy <= 1
        assert layer.effective_rank >= 1
        assert layer.suggested_rank >= 1


@pytest.mark.parametrize("wanted", [True, False])
def test_every_pass_moves_the_bar(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Bar(contextlib.nullcontext[Any]):
        def __init__(self, total: int, delay: float, **_: Any) -> None:
            super().__init__(self)
            seen.append(total)
            assert delay > 0

        def update(self) -> None:
            seen[0] -= 1

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    curvature_init_(fresh_tagger(), BATCHES, loss_of, progress=wanted)
    assert seen == ([0] if wanted else [])


def test_works_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert curvature_init_(home_made(), [regression()], squares).layers


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "shfit"}, "mode is 'shfit'; expected one of keep, newton, shift"),
        ({"length": 0.0}, "length is 0.0"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"curvature": None}, "curvature is None"),
        ({"curvature": "full"}, "curvature is 'full'"),
    ],
)
def test_refuses_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.HyperparameterError, match=message):
        curvature_init_(home_made(), [regression()], squares, **arguments)


@pytest.mark.parametrize("mode", MODES)
def test_refuses_a_trained_adapter(mode: str) -> None:
    model = home_made()
    train_once(model, regression())
    before = parameters_of(model)
    with pytest.raises(errors.InitialisationError, match="0: its B is not zero"):
        curvature_init_(model, [regression()], squares, mode=mode)
    assert_equal(parameters_of(model), before)


def test_refuses_a_rank_that_the_layer_does_not_have() -> None:
    model = adapted(two_layers(), rank_pattern={"2": N + 1})
    with pytest.raises(errors.InitialisationError, match=f"rank {N + 1} is too large.*most {N} "):
        curvature_init_(model, [regression()], squares)


def test_refuses_a_model_without_adapters_and_data_without_batches() -> None:
    with pytest.raises(errors.InitialisationError, match="no LoRA layer of this Sequential"):
        curvature_init_(two_layers(), [regression()], squares)
    with pytest.raises(errors.InitialisationError, match="no batch"):
        curvature_init_(home_made(), [], squares)


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


def test_cross_entropy_with_labels_of_the_models_own() -> None:
    """The way to use ``sampled_loss_fn`` for a classifier."""

    def sampled(model: nn.Module, data: Any) -> Tensor:
        tokens, mask, labels = data
        logits = model(tokens, mask).flatten(0, 1)
        drawn = logits.detach().softmax(-1).multinomial(1).squeeze(-1)
        return functional.cross_entropy(logits, drawn.where(labels.flatten() >= 0, -100))

    model = fresh_tagger()
    report = curvature_init_(model, BATCHES, loss_of, mode="newton", sampled_loss_fn=sampled)
    assert report.loss_after is not None
    assert report.loss_before is not None
    assert report.loss_after < report.loss_before
