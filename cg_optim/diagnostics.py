"""What the optimizer does to each LoRA pair, computed when somebody asks.

Nothing here runs, and nothing is kept, during training: every number follows from the
optimizer's state and the gradients that are in ``.grad`` at the moment of the call.  The
step is found by taking it on copies, so it is the step of whatever rule is in use.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cg_optim.damped import DampedGram, DampedInput
from cg_optim.input_curvature import DenseCurvature, InputCurvature, LowRankCurvature
from cg_optim.linalg import effective_rank
from cg_optim.pair_step import FactorWork, PairWork, step_pairs
from cg_optim.rule import Moments, hidden_whitening
from cg_optim.summary import aligned

UNKNOWN = math.nan


@dataclass(frozen=True)
class LayerDiagnostics:
    """One LoRA pair at one moment; NaN where there is nothing to compute a number from.

    Everything about the step needs gradients: it describes the update that
    ``optimizer.step()`` would now make with the gradients in ``.grad``, weight decay left
    aside.  ``A`` has shape ``(r, n)``, ``B`` has ``(m, r)``.

    Attributes:
        name: The pair's name, as in ``optimizer.summary()``.
        seen: Whether its hooks have seen an input yet; False for pairs that have no hooks,
            before the first step, and where a fused kernel bypasses the module.
        curvature_updates: Number of steps whose inputs went into the curvature.
        missed_steps: Steps of the optimizer in which the pair was left as it was, because
            it had no gradient or one that was not finite.
        damping: Damping of the curvature, relative to its mean eigenvalue.
        mean_curvature: ``tr(X) / n`` for ``X = E[x x^T]``: the mean square of an input.
        effective_rank: Exponential of the entropy of X's normalised eigenvalues (Roy and
            Vetterli 2007), between 1 and ``n``.
        input_condition: Condition number of the damped ``X``.
        hidden_condition: Condition number of the damped ``P = A X A^T``, the largest one of
            several experts.
        relative_step_A: ``|dA| / |A|`` in the Frobenius norm; the inverse of what LARS and
            LAMB call the trust ratio.
        relative_step_B: ``|dB| / |B|``; NaN while ``B`` is zero.
        update_size_A: Root mean square entry of ``dA`` in units of the learning rate: 1
            where every entry moves by ``lr``, as in Adam's first step; the bound on the
            spectral norm makes it shorter.
        update_size_B: The same of ``dB``.
        predicted_decrease: ``-<G_A, dA> - <G_B, dB>``: by how much the loss falls to first
            order, in units of the loss.
    """

    name: str
    seen: bool
    curvature_updates: int
    missed_steps: int
    damping: float
    mean_curvature: float = UNKNOWN
    effective_rank: float = UNKNOWN
    input_condition: float = UNKNOWN
    hidden_condition: float = UNKNOWN
    relative_step_A: float = UNKNOWN
    relative_step_B: float = UNKNOWN
    update_size_A: float = UNKNOWN
    update_size_B: float = UNKNOWN
    predicted_decrease: float = UNKNOWN


@torch.no_grad()
def look_at(
    name: str, work: PairWork, curvature: InputCurvature | None, missed_steps: int
) -> LayerDiagnostics:
    """Everything about one pair; ``work`` and ``curvature`` stay as they are.

    Args:
        name: Its name.
        work: What the next step would be given.
        curvature: Its undamped input curvature, None where it has none.
        missed_steps: Number of steps in which it was left alone.
    """
    updates = 0 if curvature is None else int(curvature.updates)
    numbers: dict[str, float] = {}
    if curvature is not None and updates:
        numbers["mean_curvature"] = float(curvature.trace) / curvature.features
        numbers["effective_rank"] = effective_rank(_spectrum(curvature))
    if work.damped is not None and updates:
        numbers["input_condition"] = _condition(work.damped)
    down = work.a.value.to(work.a.state.exp_avg.dtype)
    whitening = hidden_whitening(down, work.damped, work.damping).matrix
    numbers["hidden_condition"] = float(torch.linalg.cond(whitening.double()).max()) ** 2
    return LayerDiagnostics(
        name=name,
        seen=updates > 0,
        curvature_updates=updates,
        missed_steps=missed_steps,
        damping=work.damping,
        **numbers,
        **_step(work),
    )


def _step(work: PairWork) -> dict[str, float]:
    """The numbers about the step, from a step of length one taken on copies."""
    trial = PairWork(_copy(work.a), _copy(work.b), work.damped, work.damping)
    if trial.a.grad is None and trial.b.grad is None:
        return {}
    step_pairs([trial])
    numbers: dict[str, float] = {}
    decrease = 0.0
    for letter, before, after in (("A", work.a, trial.a), ("B", work.b, trial.b)):
        if before.grad is None:
            continue
        direction = (after.value - before.value.to(after.value.dtype)).double()
        length, size = float(direction.norm()), float(before.value.double().norm())
        lr = float(before.lr)
        numbers[f"relative_step_{letter}"] = lr * length / size if size else UNKNOWN
        numbers[f"update_size_{letter}"] = length / math.sqrt(direction.numel())
        decrease -= lr * float((before.grad.double() * direction).sum())
    numbers["predicted_decrease"] = decrease
    return numbers


def _copy(factor: FactorWork) -> FactorWork:
    """A factor whose step is the direction itself: learning rate 1 and no decay.

    At the real learning rate the difference of two parameters would be mostly rounding.
    """
    precision = factor.state.exp_avg.dtype
    return FactorWork(
        factor.value.to(precision, copy=True),
        factor.grad,
        Moments(*(tensor.clone() for tensor in factor.state)),
        lr=1.0,
        weight_decay=0.0,
        settings=factor.settings,
    )


def _spectrum(curvature: InputCurvature) -> Tensor:
    """The ``n`` eigenvalues of an undamped curvature, in float64."""
    if isinstance(curvature, DenseCurvature):
        gram = curvature.gram.double()
        eigenvalues: Tensor = torch.linalg.eigvalsh(0.5 * (gram + gram.mT))
        return eigenvalues.clamp_min(0)
    assert isinstance(curvature, LowRankCurvature)
    kept = torch.linalg.svdvals(curvature.factor.double()).square()
    others = curvature.features - curvature.rank
    tail = (curvature.trace.double() - kept.sum()).clamp_min(0) / others
    return torch.cat([kept, tail.expand(others)])


def _condition(damped: DampedInput) -> float:
    if isinstance(damped, DampedGram):
        eigenvalues = torch.linalg.eigvalsh(damped.matrix.double())
    else:
        inside = torch.linalg.eigvalsh(damped.core.double())
        eigenvalues = torch.cat([inside, damped.tail.reshape(1).double()])
    return float(eigenvalues.max() / eigenvalues.min())


# ------------------------------------------------------------------------ all layers

_COLUMNS = {
    "updates": "curvature_updates",
    "missed": "missed_steps",
    "effective rank": "effective_rank",
    "cond(X)": "input_condition",
    "cond(P)": "hidden_condition",
    "step of A": "relative_step_A",
    "step of B": "relative_step_B",
    "predicted": "predicted_decrease",
}


def table(layers: Sequence[LayerDiagnostics]) -> str:
    """What one wants to read of each layer, as a table to print; ``-`` is unknown.

    Args:
        layers: From ``optimizer.layer_diagnostics()``.

    Returns:
        One line for each layer: ``curvature_updates``, ``missed_steps``,
        ``effective_rank``, ``input_condition``, ``hidden_condition``, ``relative_step_A``,
        ``relative_step_B`` and ``predicted_decrease``.
    """
    rows = [["layer", *_COLUMNS]]
    for layer in layers:
        values = [getattr(layer, field) for field in _COLUMNS.values()]
        rows.append([layer.name, *("-" if math.isnan(v) else f"{v:.3g}" for v in values)])
    return "\n".join(aligned(rows))


def scalars(
    layers: Sequence[LayerDiagnostics], events: Iterable[int] = (), prefix: str = "cg/"
) -> dict[str, float]:
    """A few numbers that say how all layers fare, for a logger; unknown ones are left out.

    Args:
        layers: From ``optimizer.layer_diagnostics()``.
        events: Counts of numerical events, ``optimizer.diagnostics().values()``.
        prefix: Put before every name.

    Returns:
        ``predicted_decrease`` (sum), ``relative_step`` (median over all factors),
        ``relative_step_max``, ``update_size`` (median), ``input_condition_max``,
        ``hidden_condition_max``, ``effective_rank`` (median), ``unseen_pairs``,
        ``missed_steps`` (sum) and ``events`` (sum).
    """
    steps = [s for layer in layers for s in (layer.relative_step_A, layer.relative_step_B)]
    sizes = [s for layer in layers for s in (layer.update_size_A, layer.update_size_B)]
    numbers = {
        "predicted_decrease": _over(sum, [layer.predicted_decrease for layer in layers]),
        "relative_step": _over(statistics.median, steps),
        "relative_step_max": _over(max, steps),
        "update_size": _over(statistics.median, sizes),
        "input_condition_max": _over(max, [layer.input_condition for layer in layers]),
        "hidden_condition_max": _over(max, [layer.hidden_condition for layer in layers]),
        "effective_rank": _over(statistics.median, [layer.effective_rank for layer in layers]),
        "unseen_pairs": float(sum(not layer.seen for layer in layers)),
        "missed_steps": float(sum(layer.missed_steps for layer in layers)),
        "events": float(sum(events)),
    }
    return {prefix + name: value for name, value in numbers.items() if not math.isnan(value)}


def _over(reduce: Callable[[list[float]], float], values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(reduce(known)) if known else UNKNOWN


# ----------------------------------------------------------------- predicted and actual


class Decrease(NamedTuple):
    """By how much one step lowered the loss of its own batch, in units of the loss.

    Attributes:
        predicted: ``-<gradient, step>`` over all parameters, the first-order prediction.
        actual: The loss before minus the loss after.
    """

    predicted: float
    actual: float

    @property
    def ratio(self) -> float:
        """Actual over predicted: near 1 for short steps, negative when the loss rose."""
        return self.actual / self.predicted if self.predicted else UNKNOWN


def step_and_compare(optimizer: Optimizer, loss_fn: Callable[[], Tensor]) -> Decrease:
    """One training step of any optimizer, and what it did to the loss of the same batch.

    Costs one more forward pass and a copy of the parameters.  Dropout takes the same masks
    in both passes.

    Args:
        optimizer: Takes the step.
        loss_fn: Returns the loss of one batch, a scalar; called twice.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    optimizer.zero_grad()
    with torch.random.fork_rng(devices=devices):
        before = loss_fn()
    before.backward()
    held = [(p, p.detach().clone()) for p in parameters if p.grad is not None]
    optimizer.step()
    predicted = -sum(
        float((p.grad.double() * (p.detach().double() - old.double())).sum()) for p, old in held
    )
    with torch.no_grad():
        after = loss_fn()
    return Decrease(predicted, float(before.detach()) - float(after))
