"""The plan: bracketing, refinement, knobs, order, budgets, and that it ends."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import sweep
from benchmarks.cells import Result
from benchmarks.sweep import Entry, Ledger, Study

CENTRE = -8  # 1e-2


def study(*entries, **changes):
    options = {"work": "w", "preset": "p", "task": "t", "recipe": "r", "steps": 100, **changes}
    return Study(entries=entries, **options)


def finished(cell, loss, status="ok"):
    return Result(cell=cell, status=status, final={"choose": loss, "report": loss})


def play(a_study, loss_of, rounds=200):
    """Run the plan to its end with made-up losses; ``None`` is a failure."""
    results, stages = [], []
    for _ in range(rounds):
        requests = sweep.plan(a_study, results)
        if not requests:
            return results, stages
        for request in requests:
            loss = loss_of(request.cell)
            status = "failed" if loss is None else "ok" if math.isfinite(loss) else "diverged"
            results.append(finished(request.cell, math.nan if loss is None else loss, status))
            stages.append(request.stage)
    raise AssertionError("the plan does not end")


def bowl(best, method_best=None, steepness=0.05):
    def loss(cell):
        target = (method_best or {}).get(cell.method, best)
        shorter = 0.5 * (1 - cell.steps / 100)
        return 1.0 + steepness * math.log10(cell.lr / target) ** 2 + shorter + 0.001 * cell.seed

    return loss


def test_grid_prints_exactly_and_is_dense_enough():
    assert sweep.rate(CENTRE) == 1e-2
    assert [sweep.rate(i) for i in (-9, -7)] == [5.62e-3, 1.78e-2]
    for index in range(-24, 8):
        assert sweep.place(sweep.rate(index)) == index
        assert sweep.rate(index + 1) / sweep.rate(index) < 2
    assert sweep.place(1.2e-2) is None
    assert sweep.nearest(1.1e-2) == CENTRE


def test_starts_with_three_widens_then_refines():
    assert sweep.wanted_places({}, CENTRE) == [-8, -10, -6]
    at_edge = {-10: 3.0, -8: 2.0, -6: 1.0}
    assert sweep.wanted_places(at_edge, CENTRE) == [-4]
    bracketed = {**at_edge, -4: 1.5}
    assert sweep.wanted_places(bracketed, CENTRE) == [-7, -5]
    assert sweep.wanted_places(bracketed, CENTRE, refine=False) == []
    assert sweep.wanted_places({**bracketed, -7: 1.1, -5: 1.2}, CENTRE) == []
    # The best of the fine grid moved: its own neighbours are missing, the coarse ones are there.
    assert sweep.wanted_places({**bracketed, -7: 1.1, -5: 0.9}, CENTRE) == []


def test_a_diverged_edge_brackets_and_divergence_everywhere_goes_down():
    assert sweep.wanted_places({-10: 2.0, -8: 1.0, -6: math.inf}, CENTRE, refine=False) == []
    everywhere = {-10: math.inf, -8: math.inf, -6: math.inf}
    assert sweep.wanted_places(everywhere, CENTRE) == [-12]
    assert sweep.wanted_places({i: math.inf for i in range(-18, -5, 2)}, CENTRE) == []


@settings(deadline=None, max_examples=60)
@given(best=st.floats(-3.9, -0.1))
def test_tuning_brackets_any_optimum_within_a_factor_of_two(best):
    entry = Entry("adamw", 1e-2)
    a_study = sweep.without_extras(study(entry))
    optimum = 10**best
    results, _ = play(a_study, bowl(optimum))
    choice = Ledger(a_study, results).choice(entry)
    assert max(choice.lr / optimum, optimum / choice.lr) < 1.8
    losses = Ledger(a_study, results).losses(entry, None)
    assert {choice.place - 1, choice.place + 1} <= set(losses)


def test_reporting_seeds_never_tune_and_tuning_seeds_never_report():
    entry = Entry("adamw", 1e-2)
    a_study = sweep.without_extras(study(entry, tuning_seeds=(0, 9), reporting_seeds=(1, 2, 3)))
    results, stages = play(a_study, bowl(1e-2))
    seeds = {"tune": set(), "report": set()}
    for result, stage in zip(results, stages, strict=True):
        seeds[stage].add(result.cell.seed)
    assert seeds == {"tune": {0, 9}, "report": {1, 2, 3}}
    choice = Ledger(a_study, results).choice(entry)
    reported = [r.cell for r, s in zip(results, stages, strict=True) if s == "report"]
    assert {(cell.lr, cell.steps) for cell in reported} == {(choice.lr, 100)}


def test_every_value_of_the_knob_gets_its_own_sweep():
    entry = Entry("lora+", 1e-2, knobs=(None, 4.0))
    a_study = sweep.without_extras(study(entry))

    def loss(cell):
        return bowl(1e-3)(cell) - (0.1 if cell.knob == 4.0 else 0.0)

    results, _ = play(a_study, loss)
    ledger = Ledger(a_study, results)
    assert ledger.choice(entry).knob == 4.0
    for knob in entry.knobs:
        assert sweep.wanted_places(ledger.losses(entry, knob), ledger.centre(entry, knob)) == []


def test_initialisations_follow_adamw_with_three_values():
    base, follower = Entry("adamw", 1e-2), Entry("eva", 1.0, follows="adamw", priority=4)
    a_study = sweep.without_extras(study(base, follower))
    assert not any(r.cell.method == "eva" for r in sweep.plan(a_study, []))
    results, _ = play(a_study, bowl(1e-2))
    ledger = Ledger(a_study, results)
    assert set(ledger.losses(follower, None)) == {-10, -8, -6}
    assert ledger.choice(follower).lr == 1e-2


def test_urgent_methods_are_finished_first_and_extras_come_last():
    first, second = Entry("adamw", 1e-2, default=1e-3, priority=0), Entry("soap", 1e-2, priority=1)
    requests = sweep.plan(study(first, second), [])
    methods = [r.cell.method for r in requests if r.stage == "tune"]
    assert methods == ["adamw"] * 3 + ["soap"] * 3
    assert requests[-1].stage == "default"


def test_width_leaves_both_bands():
    adamw, other = Entry("adamw", 1e-2, priority=0), Entry("soap", 1e-2)
    a_study = study(adamw, other, short=False, defaults=False)
    results, stages = play(a_study, bowl(1e-2, steepness=0.02))
    assert "width" in stages
    ledger = Ledger(a_study, results)
    for entry in (adamw, other):
        losses = ledger.losses(entry, None)
        level = ledger.choice(entry).loss * sweep.BAND
        assert losses[min(losses)] > level
        assert losses[max(losses)] > level


def test_shortest_budget_is_found_by_bisection():
    adamw, better = Entry("adamw", 1e-2, priority=0), Entry("cg", 1e-2)
    a_study = study(adamw, better, width=False, defaults=False)

    def loss(cell):
        return bowl(1e-2)(cell) - (0.21 if cell.method == "cg" else 0.0)

    results, stages = play(a_study, loss)
    passed, following = sweep.shortest(Ledger(a_study, results), better)
    assert following is None
    # 0.5 (1 - fraction) <= 0.21 from 58 % of the budget on.
    assert min(fraction for fraction, good in passed.items() if good) == 0.6
    assert passed[0.5] is False
    assert stages.count("short") == 3 * len(passed)
    assert len(passed) <= 3


def test_no_short_budgets_for_methods_that_lose():
    adamw, worse = Entry("adamw", 1e-2, priority=0), Entry("soap", 1e-2)
    a_study = study(adamw, worse, width=False, defaults=False)
    _, stages = play(a_study, lambda c: bowl(1e-2)(c) + (0.1 if c.method == "soap" else 0))
    assert "short" not in stages


def test_no_short_budgets_where_adamw_itself_diverged():
    adamw, other = Entry("adamw", 1e-2), Entry("soap", 1e-2)
    a_study = study(adamw, other, width=False, defaults=False)
    results, stages = play(a_study, bowl(1e-2))
    for result, stage in zip(results, stages, strict=True):
        if stage == "report" and result.cell.method == "adamw":
            result.status = "diverged"
    assert sweep.shortest(Ledger(a_study, results), other) == ({}, None)


def test_a_broken_method_is_given_up_and_the_others_go_on():
    adamw, broken = Entry("adamw", 1e-2), Entry("kron", 1e-2)
    a_study = study(adamw, broken)
    results, _ = play(a_study, lambda c: None if c.method == "kron" else bowl(1e-2)(c))
    failed = [r for r in results if r.cell.method == "kron"]
    assert sweep.ENOUGH_FAILURES <= len(failed) <= sweep.ENOUGH_FAILURES + 1
    assert Ledger(a_study, results).choice(adamw) is not None


def test_one_failure_among_successes_does_not_stop_a_method():
    entry = Entry("adamw", 1e-2)
    a_study = sweep.without_extras(study(entry))
    results, _ = play(a_study, lambda c: None if c.lr > 2e-2 else bowl(1e-2)(c))
    assert Ledger(a_study, results).choice(entry).lr == 1e-2


def test_results_of_other_recipes_and_revisions_do_not_count():
    entry = Entry("cg", 1e-2, revision="new")
    a_study = sweep.without_extras(study(entry))
    ledger = Ledger(a_study, [])
    cell = ledger.cell(entry, 1e-2, None, 0)
    for changes in ({"recipe": "old"}, {"revision": "old"}, {"task": "x"}, {"steps": 50}):
        other = finished(replace(cell, **changes), 1.0)
        assert any(r.cell == cell for r in sweep.plan(a_study, [other]))
    assert not any(r.cell == cell for r in sweep.plan(a_study, [finished(cell, 1.0)]))


@settings(deadline=None, max_examples=25)
@given(stop=st.integers(0, 25), best=st.sampled_from([1e-3, 5e-3, 3e-2]))
def test_stopping_anywhere_gives_the_same_cells_in_the_end(stop, best):
    entries = (Entry("adamw", 1e-2, default=1e-3, priority=0), Entry("cg", 1e-2, knobs=(None, 1.0)))
    a_study = study(*entries)
    loss = bowl(best, {"cg": best * 3})
    whole = {r.cell for r in play(a_study, loss)[0]}
    results = []
    while len(results) < stop and (requests := sweep.plan(a_study, results)):
        results.append(finished(requests[0].cell, loss(requests[0].cell)))
    while requests := sweep.plan(a_study, results):
        results.append(finished(requests[0].cell, loss(requests[0].cell)))
    cells = [r.cell for r in results]
    assert len(cells) == len(set(cells))
    assert set(cells) == whole


def test_forecast_counts_what_a_smooth_run_needs_and_shrinks():
    a_study = study(Entry("adamw", 1e-2, default=1e-3, priority=0), Entry("soap", 1e-2))
    before = sweep.forecast(a_study, [])
    assert len(before) == len(set(before)) > 10
    first = finished(sweep.plan(a_study, [])[0].cell, 1.0)
    after = sweep.forecast(a_study, [first])
    assert first.cell not in after
    complete, _ = play(a_study, bowl(1e-2))
    assert sweep.forecast(a_study, complete) == []


def test_wanted_budget_bisects():
    assert sweep.wanted_budget({}) == 0.6
    assert sweep.wanted_budget({0.6: True}) == 0.4
    assert sweep.wanted_budget({0.6: False}) == 0.8
    assert sweep.wanted_budget({0.6: True, 0.4: False, 0.5: False}) is None


def test_mean_is_unknown_while_a_seed_is_missing_and_infinite_with_a_bad_one():
    entry = Entry("adamw", 1e-2)
    a_study = study(entry, tuning_seeds=(0, 1))
    cells = [Ledger(a_study, []).cell(entry, 1e-2, None, seed) for seed in (0, 1)]
    good = finished(cells[0], 1.0)
    assert Ledger(a_study, [good]).tuning_loss(entry, 1e-2, None) is None
    both = Ledger(a_study, [good, finished(cells[1], 2.0)])
    assert both.tuning_loss(entry, 1e-2, None) == pytest.approx(1.5)
    bad = Ledger(a_study, [good, finished(cells[1], 0.5, "diverged")])
    assert bad.tuning_loss(entry, 1e-2, None) == math.inf
