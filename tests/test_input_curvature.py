"""Running estimates of the input curvature against explicit sums."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cg_optim import CGLoRAOptimizer, host, stacks
from cg_optim.damped import DampedLowRank
from cg_optim.input_curvature import (
    DenseCurvature,
    InputCurvature,
    LowRankCurvature,
    damp_together,
    new_input_curvature,
    nystrom,
    state_shapes,
    update_together,
)
from cg_optim.linalg import Rung, recorded_rungs
from tests.models import tagger, train
from tests.strategies import (
    gaussian,
    generator,
    orthogonal,
    relative_error,
    seeds,
    semidefinite,
)

quick = settings(max_examples=20, deadline=None)
N, K = 12, 4
LIKE = torch.zeros(1, dtype=torch.float64)
DECAY = 0.9


def fresh(kind: str, like: Tensor = LIKE) -> InputCurvature:
    return DenseCurvature(N, like) if kind == "dense" else LowRankCurvature(N, like, K)


def feed(curvature: InputCurvature, rows: Tensor, mask: Tensor | None = None) -> None:
    everything = torch.ones(len(rows), dtype=torch.bool)
    curvature.accumulate(rows, everything if mask is None else mask)


def matrix(curvature: InputCurvature, damping: float = 1e-9) -> Tensor:
    """The estimate as a dense matrix, as the step sees it (mean eigenvalue 1)."""
    damped = curvature.damped(damping)
    assert damped is not None
    return damped.hidden_gram(torch.eye(N, dtype=curvature.dtype))


kinds = pytest.mark.parametrize("kind", ["dense", "low rank"])


@quick
@given(seeds, st.integers(1, 5))
def test_dense_mean_is_bias_corrected(seed: int, updates: int) -> None:
    source, curvature = generator(seed), fresh("dense")
    total, weights = torch.zeros(N, N, dtype=torch.float64), 0.0
    for _ in range(updates):
        rows = gaussian(source, 5, N)
        feed(curvature, rows)
        assert curvature.update(DECAY)
        total, weights = DECAY * total + rows.mT @ rows / 5, DECAY * weights + 1
    assert isinstance(curvature, DenseCurvature)
    assert relative_error(curvature.gram, total / weights) < 1e-12


@quick
@given(seeds, st.integers(1, K))
def test_low_rank_equals_dense_when_the_data_has_no_more_directions(seed: int, rank: int) -> None:
    source = generator(seed)
    rows = gaussian(source, 40, rank) @ torch.linalg.qr(gaussian(source, N, rank)).Q.mT
    low, dense = fresh("low rank"), fresh("dense")
    for curvature in (low, dense):
        # Without memory: the damped core of the first, random basis leaves an error that
        # the basis of the second update no longer has.
        for _ in range(3):
            feed(curvature, rows)
            assert curvature.update(0.0)
    assert relative_error(matrix(low), matrix(dense)) < 1e-3


def test_low_rank_converges_to_the_leading_eigenpairs() -> None:
    values = torch.tensor([100.0, 60.0, 30.0, 15.0] + [0.1] * (N - K), dtype=torch.float64)
    vectors = torch.linalg.qr(gaussian(generator(1), N, N)).Q
    rows = (vectors * (N * values).sqrt()).mT.contiguous()
    curvature = LowRankCurvature(N, LIKE, K)
    for _ in range(30):
        feed(curvature, rows)
        curvature.update(DECAY)
    found = torch.linalg.svdvals(curvature.factor).square()
    torch.testing.assert_close(found, values[:K], rtol=1e-3, atol=0)
    projector = curvature.basis @ curvature.basis.mT
    assert relative_error(projector, vectors[:, :K] @ vectors[:, :K].mT) < 1e-3


@quick
@given(seeds, st.integers(1, 5), st.floats(1e-3, 10))
def test_trace_is_kept(seed: int, updates: int, damping: float) -> None:
    source = generator(seed)
    for kind in ("dense", "low rank"):
        curvature = fresh(kind)
        for _ in range(updates):
            feed(curvature, gaussian(source, 30, N))
            curvature.update(DECAY)
        assert float(matrix(curvature, damping).trace()) == pytest.approx(N, rel=1e-6)


@quick
@given(seeds)
def test_nystrom_is_exact_on_an_invariant_subspace(seed: int) -> None:
    x = semidefinite(generator(seed), N, condition=100.0)
    basis = torch.linalg.eigh(x)[1][:, -K:].contiguous()
    q, factor = nystrom(basis, x @ basis)
    assert relative_error(q.mT @ q, torch.eye(K, dtype=torch.float64)) < 1e-10
    found = torch.linalg.svdvals(factor).square()
    torch.testing.assert_close(found, torch.linalg.eigvalsh(x)[-K:].flip(0), rtol=1e-4, atol=0)


@quick
@given(seeds, st.integers(1, 6))
def test_no_basis_of_the_span_is_better_than_another(seed: int, updates: int) -> None:
    """The estimate is that of directions rotated to eigenvectors in each update."""
    source, curvature = generator(seed), fresh("low rank")
    assert isinstance(curvature, LowRankCurvature)
    basis, values, weights = curvature.basis.clone(), torch.zeros(K, dtype=torch.float64), 0.0
    for _ in range(updates):
        rows = gaussian(source, 9, N)
        feed(curvature, rows)
        assert curvature.update(DECAY)
        weights = DECAY * weights + 1
        fresh_part = rows.mT @ (rows @ basis) / len(rows)
        sketch = torch.lerp(basis * values, fresh_part, 1 / weights)
        basis, factor = nystrom(basis, sketch)
        values, vectors = torch.linalg.eigh(factor @ factor.mT)
        basis = basis @ vectors
    mine = curvature.basis @ curvature.factor
    assert relative_error(mine @ mine.mT, (basis * values) @ basis.mT) < 1e-8


SPECTRA = {
    "condition 1e12": torch.logspace(0, -12, K, dtype=torch.float64),
    "rank deficient": torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64),
    "clustered": torch.tensor([1.0, 1.0, 1.0 - 1e-9, 1e-9], dtype=torch.float64),
    "zero": torch.zeros(K, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_damped_estimate_is_that_of_eigh_in_double_precision(
    name: str, scale: float, dtype: torch.dtype
) -> None:
    """Matrices are compared, not vectors, which clusters leave undetermined."""
    values, vectors = SPECTRA[name], orthogonal(generator(0), N)[:, :K]
    rows = (scale * (vectors * values.sqrt()) @ vectors.mT).to(dtype)
    curvature = LowRankCurvature(N, torch.zeros(1, dtype=dtype), K)
    for _ in range(4):
        feed(curvature, rows)
        assert curvature.update(0.0)
    exact, kept = torch.linalg.eigh(rows.double().mT @ rows.double() / N)
    x = (kept[:, -K:] * exact[-K:]) @ kept[:, -K:].mT
    mean = x.trace() / N if bool(values.any()) else torch.ones(())
    x = x / mean if bool(values.any()) else torch.eye(N, dtype=torch.float64)
    expected = (x + 0.3 * torch.eye(N, dtype=torch.float64)) / 1.3
    # The sketch's damped core is what limits float64, rounding what limits float32.
    assert relative_error(matrix(curvature, 0.3), expected) < 2e-5
    whitening = curvature.damped(0.3).whitening()
    k = whitening.apply(torch.eye(N, dtype=dtype)).double()
    assert relative_error(k @ expected @ k.mT, torch.eye(N, dtype=torch.float64)) < 1e-4


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_little_damping_of_much_curvature_stays_an_inverse(
    dtype: torch.dtype, at_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the core is kept in float32, rounding alone is far above such a damping."""
    if not at_hand:
        monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    rows = gaussian(generator(0), 30, N) * torch.logspace(0, -5, N, dtype=torch.float64)
    curvature = LowRankCurvature(N, torch.zeros(1, dtype=dtype), K)
    for _ in range(4):
        feed(curvature, rows.to(dtype))
        assert curvature.update(DECAY)
    with recorded_rungs() as rungs:
        damped = curvature.damped(1e-6)
    assert isinstance(damped, DampedLowRank)
    assert all(int(rung.max()) < Rung.JITTER for rung in rungs)
    root, core = damped.root.double(), damped.core.double()
    identity = torch.eye(K, dtype=torch.float64)
    assert relative_error(root.mT @ core @ root, identity) < (
        0.1 if dtype == torch.float32 else 1e-9
    )


def test_an_update_that_cannot_be_computed_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    curvature = fresh("low rank")
    rows = gaussian(generator(0), 20, N)
    feed(curvature, rows)
    assert curvature.update(DECAY)
    before = {name: tensor.clone() for name, tensor in curvature.state().items()}
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "qr", lambda matrix: (matrix * torch.nan, matrix[..., :K, :]))
        feed(curvature, rows)
        assert not curvature.update(DECAY)
    for name, tensor in curvature.state().items():
        assert torch.equal(tensor, before[name])
    feed(curvature, rows)
    assert curvature.update(DECAY)


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize("most", [stacks.MOST_ELEMENTS, 2 * N * K])
def test_inputs_updated_together_are_updated_like_alone(
    most: int, at_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two kinds and ages; one gets nothing, one what is not finite, one masked rows only."""
    monkeypatch.setattr(stacks, "MOST_ELEMENTS", most)
    if not at_hand:
        monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    several = [fresh(kind) for kind in ("low rank", "dense", *5 * ["low rank"], "dense")]
    for step in range(3):
        for index, one in enumerate(several[step:]):
            feed(one, gaussian(generator(10 * step + index), 20, N))
        for one in several:
            one.update(DECAY)
    alone = [one.clone() for one in several]
    for curvatures in (several, alone):
        for index, one in enumerate(curvatures):
            rows = gaussian(generator(index), 20, N)
            if index == 3:
                rows[0, 0] = torch.inf
            if index != 2:
                feed(one, rows, torch.full((20,), index != 4))
    together = update_together(several, DECAY)
    assert [bool(each.update(DECAY)) for each in alone] == [not bool(bad) for bad in together]
    assert [i for i, bad in enumerate(together) if bad] == [3]
    for one, other in zip(several, alone, strict=True):
        assert not one.touched
        for name, value in one.state().items():
            torch.testing.assert_close(value, other.state()[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at_hand", [True, False])
def test_inputs_damped_together_are_damped_like_alone(
    at_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sizes, dense ones between them, one not seen yet, and one wanted twice."""
    if not at_hand:
        monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    source = generator(0)
    inputs = [fresh(kind) for kind in ("dense", "low rank", "low rank", "low rank")]
    inputs += [LowRankCurvature(2 * N, LIKE, K), LowRankCurvature(2 * N, LIKE, K)]
    for one in inputs[:-1]:
        feed(one, gaussian(source, 20, one.features))
        one.update(DECAY)
    alone = [[one.clone().damped(damping) for damping in (0.3, 0.01)] for one in inputs]
    damp_together([(one, damping) for one in (*inputs, inputs[1]) for damping in (0.3, 0.01)])
    for one, expected in zip(inputs, alone, strict=True):
        for damping, model in zip((0.3, 0.01), expected, strict=True):
            for mine, its in zip(one.damped(damping), model, strict=True):
                torch.testing.assert_close(mine, its)


@kinds
def test_splitting_order_and_masked_rows_change_nothing(kind: str) -> None:
    rows = gaussian(generator(0), 20, N)
    one, many = fresh(kind), fresh(kind)
    feed(one, rows)
    feed(many, rows[10:].flip(0))
    padded = torch.cat([rows[:10], torch.full((3, N), float("nan"), dtype=torch.float64)])
    feed(many, padded, torch.arange(13) < 10)
    assert one.update(DECAY)
    assert many.update(DECAY)
    assert relative_error(matrix(many), matrix(one)) < 1e-9


@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_sums_that_are_not_finite_are_dropped(kind: str, bad: float) -> None:
    curvature = fresh(kind, torch.zeros(1))
    rows = gaussian(generator(0), 20, N, dtype=torch.float32)
    feed(curvature, rows)
    assert curvature.update(DECAY)
    before = {name: tensor.clone() for name, tensor in curvature.state().items()}
    feed(curvature, torch.cat([rows, torch.full((1, N), bad)]))
    assert not curvature.update(DECAY)
    for name, tensor in curvature.state().items():
        assert torch.equal(tensor, before[name])
    feed(curvature, rows)
    assert curvature.update(DECAY)
    assert bool(torch.isfinite(matrix(curvature)).all())


@kinds
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12])
def test_scales_of_single_precision(kind: str, scale: float) -> None:
    rows = gaussian(generator(0), 20, N, dtype=torch.float32)
    curvature = fresh(kind, torch.zeros(1))
    feed(curvature, scale * rows)
    assert curvature.update(DECAY)
    damped = curvature.damped(1e-2)
    assert damped is not None
    assert bool(torch.isfinite(damped.whitening().apply(torch.eye(N))).all())


@kinds
def test_state_round_trip_is_bitwise(kind: str) -> None:
    source, curvature = generator(0), fresh(kind)
    feed(curvature, gaussian(source, 20, N))
    curvature.update(DECAY)
    other = fresh(kind)
    feed(other, gaussian(source, 20, N))
    other.update(DECAY)
    matrix(other)  # what is remembered of the old state must go
    other.load_state({name: tensor.clone() for name, tensor in curvature.state().items()})
    assert torch.equal(matrix(other), matrix(curvature))
    rows = gaussian(source, 20, N)
    for each in (curvature, other):
        feed(each, rows)
        each.update(DECAY)
    assert torch.equal(matrix(other), matrix(curvature))
    expected = state_shapes(N, "dense" if kind == "dense" else K)
    assert {name: tuple(t.shape) for name, t in other.state().items()} == expected


@kinds
def test_nothing_seen_is_nothing_known(kind: str) -> None:
    curvature = fresh(kind)
    assert curvature.update(DECAY)
    assert int(curvature.updates) == 0
    assert relative_error(matrix(curvature, 0.1), torch.eye(N, dtype=torch.float64)) < 1e-12


def test_one_feature() -> None:
    curvature = new_input_curvature(1, LIKE, "auto")
    feed(curvature, torch.ones(3, 1, dtype=torch.float64))
    assert curvature.update(DECAY)
    damped = curvature.damped(0.1)
    assert damped is not None
    assert float(damped.whitening().apply(torch.ones(1, 1, dtype=torch.float64))) == pytest.approx(
        1
    )


@pytest.mark.parametrize("curvature", ["dense", 3])
def test_a_damping_that_changes_in_every_step_leaves_nothing_behind(curvature: str | int) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature)
    train(model, optimizer, range(2))
    optimizer.remove_hooks()  # no update clears anything from here on
    sizes = set()
    for step in range(2, 6):
        optimizer.param_groups[0]["damping"] = 0.1 * step
        train(model, optimizer, [step])
        sizes.add(len(pickle.dumps(optimizer._store)))
    assert max(sizes) - min(sizes) < 100
