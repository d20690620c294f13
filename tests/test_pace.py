"""Seconds before a trial runs: unknown until measured, then by the arithmetic of the spec and the kind of device."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from orchestrator.caps import Caps
from orchestrator.feasibility import Predictor, judge, predict
from orchestrator.fill import NothingFits, fill_to
from orchestrator.lifecycle import TrialState
from orchestrator.study import Origin, Prediction, Trial
from worker.recipes import load_recipe
from worker.report import Hardware, TrialResult
from worker.spec import TrialSpec, override, parse_spec

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def laptop(**changes: object) -> TrialSpec:
    """A small spec with fields replaced: model__width for model.width."""
    paths = {name.replace("__", "."): value for name, value in changes.items()}
    return parse_spec(override(load_recipe("laptop"), {"model.heads": 4, "model.kv_heads": 2, **paths}))


def timed(
    number: int, spec: TrialSpec, step_seconds: float, evaluate_seconds: float = 2.0, device: str | None = None,
    state: TrialState = TrialState.COMPLETE, origin: Origin = "proposed", ranks: int | None = None,
) -> Trial:  # fmt: skip
    hardware = None if device is None else Hardware(
        device=device, node="n", node_devices=8, ranks=ranks or spec.gang.ranks, clocks_mhz=(), clock_limit_mhz=None,
        torch="2", cuda=None, probe_seconds=(1.0,), probe_after_seconds=(1.0,),
    )  # fmt: skip
    result = TrialResult(
        val_bpb=1.5, val_bpb_prequant=1.4, val_loss=2.5, parameters=1, model_bytes=200_000, code_bytes=0,
        artifact_bytes=200_000, artifact_sha256="0" * 64, steps=100, tokens=1000, train_seconds=100 * step_seconds,
        evaluate_seconds=evaluate_seconds, pack_seconds=1.0, step_seconds=step_seconds, stopped=False,
        bytes_by_class={}, diagnostics={}, hardware=hardware,
    )  # fmt: skip
    return Trial(
        number + 1, 1, number, state, origin, spec, spec.canonical_hash, {}, Prediction(1, 1, 1, 1, 1), "fits", None,
        result, NOW, NOW, NOW,
    )  # fmt: skip


def seconds_of(prediction: Prediction) -> tuple[float | None, ...]:
    return prediction.step_seconds, prediction.train_seconds, prediction.evaluate_seconds


def test_nothing_is_known_of_a_cpu_before_it_was_measured() -> None:
    assert seconds_of(predict(laptop())) == (None, None, None)
    assert predict(laptop()).steps == 120
    assert predict(laptop(budget={"seconds": 30})).steps is None


@pytest.mark.parametrize("trial", [
    timed(0, laptop(), 0.1, origin="imported"), replace(timed(0, laptop(), 0.1), result=None),
])  # fmt: skip
def test_what_was_made_elsewhere_or_left_no_result_shows_no_speed(trial: Trial) -> None:
    assert seconds_of(predict(laptop(), [trial])) == (None, None, None)


def test_a_gpu_has_a_first_guess_that_the_systems_of_the_literature_lie_in() -> None:
    for recipe, milliseconds in (
        ("naive-baseline", 43.54), ("ebls", 131.24), ("late-loop-3-5", 121.6), ("loop-4-5", 117.9),
        ("bi-tied-15l", 116), ("prism-standard11", 780),
    ):  # fmt: skip
        spec = parse_spec(override(load_recipe(recipe), {"budget": {"steps": 1000}}))
        said = predict(spec)
        assert said.train_seconds_low is not None and said.train_seconds_high is not None
        assert said.train_seconds_low <= milliseconds <= said.train_seconds_high
        assert said.evaluate_seconds is None


@pytest.mark.parametrize(
    ("budget", "steps", "seconds"),
    [
        ({"steps": 50}, 50, 5.0), ({"seconds": 3.0}, 30, 3.0), ({"tokens": 1536 * 20 + 1}, 21, 2.1),
        ({"steps": 50, "seconds": 3.0}, 30, 3.0), ({"steps": 20, "seconds": 3.0}, 20, 2.0),
    ],
)  # fmt: skip
def test_the_first_limit_of_the_budget_ends_training(budget: dict[str, Any], steps: int, seconds: float) -> None:
    said = predict(laptop(budget=budget), [timed(number, laptop(), 0.1) for number in range(30)])
    assert said.step_seconds == pytest.approx(0.1, rel=0.01)
    assert said.steps == pytest.approx(steps, abs=1)
    assert said.train_seconds == pytest.approx(seconds, rel=0.01)


def test_seconds_follow_depth_width_and_batch() -> None:
    history = [timed(number, laptop(), 0.1) for number in range(5)]
    for larger in (
        laptop(sharing__virtual_layers=12), laptop(model__width=192), laptop(data__batch_tokens=3072),
        laptop(data__sequence_length=512),
    ):  # fmt: skip
        said = predict(larger, history).step_seconds
        assert said is not None and said > 0.1


def test_scoring_in_overlapping_windows_or_while_adapting_takes_its_multiple() -> None:
    history = [timed(number, laptop(), 0.1) for number in range(5)]
    plain, sliding, adapting = (
        predict(spec, history).evaluate_seconds
        for spec in (laptop(), laptop(evaluation__stride=16), laptop(evaluation__ttt={"chunk_tokens": 1024}))
    )
    assert plain == pytest.approx(2.0, rel=0.01)
    assert sliding is not None and sliding > 4
    assert adapting is not None and adapting > 4


def test_each_kind_of_device_has_a_pace_of_its_own_and_the_latest_counts() -> None:
    slow = [timed(number, laptop(), 0.4, device="old") for number in range(5)]
    fast = [timed(number, laptop(), 0.1, device="new") for number in range(5, 8)]
    assert predict(laptop(), slow).step_seconds == pytest.approx(0.4, rel=0.01)
    assert predict(laptop(), [*slow, *fast]).step_seconds == pytest.approx(0.1, rel=0.01)


def test_a_pruned_trial_shows_a_step_but_no_evaluation() -> None:
    said = predict(laptop(), [timed(number, laptop(), 0.1, state=TrialState.PRUNED) for number in range(3)])
    assert said.step_seconds == pytest.approx(0.1, rel=0.01)
    assert said.evaluate_seconds is None


def test_a_trial_pruned_at_a_rung_shows_a_step_on_the_ranks_that_it_had_there() -> None:
    wide = laptop(gang__ranks=4)
    pruned = [timed(number, wide, 0.4, device="chip", state=TrialState.PRUNED, ranks=1) for number in range(3)]
    said = predict(wide, pruned)
    assert said.step_seconds == pytest.approx(0.1, rel=0.01)
    assert judge(said, Caps(cap_train_seconds=20), wide)[0] != "cannot_fit"
    assert predict(laptop(), pruned).step_seconds == pytest.approx(0.4, rel=0.01)


def test_a_pruned_trial_of_unknown_ranks_shows_no_speed_and_no_bytes() -> None:
    wide = laptop(gang__ranks=4)
    pruned = timed(0, wide, 0.4, state=TrialState.PRUNED)
    assert predict(wide, [pruned]) == predict(wide)


@pytest.mark.parametrize(
    ("caps", "verdict"),
    [
        (Caps(), "fits"), (Caps(cap_train_seconds=12.1), "grey"), (Caps(cap_evaluate_seconds=1.99), "grey"),
        (Caps(cap_train_seconds=6), "cannot_fit"), (Caps(cap_evaluate_seconds=1), "cannot_fit"),
    ],
)  # fmt: skip
def test_seconds_are_judged_like_bytes(caps: Caps, verdict: str) -> None:
    said = predict(laptop(), [timed(number, laptop(), 0.1 + 0.001 * (number % 5)) for number in range(30)])
    found, reason = judge(said, caps, laptop())
    assert found == verdict
    assert (reason is None) == (verdict == "fits")
    assert verdict != "cannot_fit" or "over the cap of" in str(reason)


def test_a_value_that_is_certain_to_take_too_long_is_not_filled_though_its_bytes_fit() -> None:
    def at_width(width: Any) -> TrialSpec:
        return laptop(model__width=width)

    widths = range(32, 513, 16)
    predictor = Predictor.of([timed(number, laptop(), 0.1) for number in range(5)])
    for caps in (Caps(cap_train_seconds=40), Caps(cap_evaluate_seconds=6)):
        found = fill_to(predictor, caps, 0.9)(at_width, widths)
        specs = {width: at_width(width) for width in widths}
        verdicts = {width: judge(predictor.predict(spec), caps, spec)[0] for width, spec in specs.items()}
        assert found == max(width for width, verdict in verdicts.items() if verdict != "cannot_fit")
        assert verdicts[widths[-1]] == "cannot_fit"
        assert predictor.quantile(specs[widths[-1]], 0.9) < caps.cap_bytes
    with pytest.raises(NothingFits):
        fill_to(predictor, Caps(cap_train_seconds=0.1), 0.9)(at_width, widths)


def test_a_budget_in_seconds_is_judged_before_anything_was_measured() -> None:
    for seconds, verdict in ((599.5, "fits"), (600, "fits"), (601, "cannot_fit")):
        spec = laptop(budget={"seconds": seconds})
        assert judge(predict(spec), Caps(), spec)[0] == verdict


def test_the_same_trials_in_any_order_make_the_same_predictor() -> None:
    widths = (64, 96, 128)
    trials = [
        timed(number, laptop(model__width=widths[number % 3]), 0.1 + 0.01 * (number % 7)) for number in range(230)
    ]
    learned = Predictor()
    for trial in [*trials[1::2], *trials[::2]]:
        learned.learn(trial)
        if trial.number % 20 == 0:
            learned.predict(laptop())
    assert learned.predict(laptop()) == Predictor.of(trials).predict(laptop())
