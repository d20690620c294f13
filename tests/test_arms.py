"""What proposed a study's trials: the account that the page and the API give of arms and of guided rules."""

from datetime import datetime, timedelta
from typing import Any

from claims import NewStudies, NewTrials, Results

from orchestrator import leases, store
from orchestrator.arms import arms
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome
from orchestrator.study import AttemptResult, Suggestion
from worker.spec import GangConfig

TTL = timedelta(minutes=1)


def test_arms_are_judged_by_new_bests_and_guided_trials_by_the_trial_they_came_from(
    database: Database, new_study: NewStudies, new_trial: NewTrials, trial_result: Results, now: datetime
) -> None:
    over = 16_000_001
    made: list[tuple[str, Suggestion | None, dict[str, Any]]] = [
        ("submitted", None, {"val_bpb": 2.0}),
        ("proposed", Suggestion(arm="surrogate"), {"val_bpb": 2.2}),
        ("proposed", Suggestion(arm="guided", rule="lora_off", parent=1, why="γ"), {"val_bpb": 1.9}),
        ("proposed", Suggestion(arm="guided", rule="lora_off", parent=0, why="γ"), {"val_bpb": 2.5}),
        ("proposed", Suggestion(arm="surrogate"), {"val_bpb": 1.0, "artifact_bytes": over}),
    ]
    with database.write() as session:
        study = store.create_study(session, new_study(), now)
        for origin, suggestion, fields in made:
            store.add_trial(session, study.id, new_trial(origin=origin, suggestion=suggestion), now)
            claim = leases.claim(session, GangConfig(), "host", now, TTL)
            assert claim is not None
            ended = AttemptResult(Outcome.SUCCEEDED, result=trial_result(**fields))
            leases.finish(session, claim.lease, ended, now)
    with database.read() as session:
        by_arm, by_rule = arms(session, study.id)
    assert [(arm.name, arm.trials, arm.bests, arm.best_bpb) for arm in by_arm] == [
        ("guided", 2, 1, 1.9), ("submitted by hand", 1, 1, 2.0), ("surrogate", 2, 0, 2.2),
    ]  # fmt: skip
    (rule,) = by_rule
    assert (rule.name, rule.better, [round(gain, 6) for gain in rule.gains]) == ("lora_off", 1, [0.3, -0.5])
