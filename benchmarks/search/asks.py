"""What a proposal costs: milliseconds of CPU of a warm ask by sampler and trials so far, and a cold start on SQLite.

A warm ask follows one more finished trial. A cold start reads the whole history from the database and proposes. CPU
time, not wallclock: other work on the machine does not count.

Run: OMP_NUM_THREADS=1 .venv/bin/python benchmarks/search/asks.py [--samplers caddie,tpe] [--sizes 100,1000,10000]
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from sqlalchemy import insert

from orchestrator import store
from orchestrator.database import Database
from orchestrator.feasibility import predict
from orchestrator.history import History
from orchestrator.lifecycle import StudyState, TrialState
from orchestrator.points import Domain
from orchestrator.proposer import Proposer
from orchestrator.study import NewStudy, Study, Suggestion, Trial
from orchestrator.tables import TrialRow
from worker.recipes import load_recipe
from worker.report import TrialResult
from worker.spec import GangConfig

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPACE: dict[str, Any] = {
    "sharing.lora.rank": {"low": 0, "high": 16}, "sharing.unique_blocks": {"low": 1, "high": 6},
    "sharing.tying": {"families": ["cycle", "sequence", "palindrome", "tail"]},
    "model.width": {"low": 48, "high": 192, "step": 6}, "optimizer.matrix_lr": {"low": 0.005, "high": 0.2, "log": True},
    "schedule.warmdown_fraction": {"low": 0.1, "high": 0.8},
}  # fmt: skip
GRID = {**SPACE, "optimizer.matrix_lr": {"choice": [0.01, 0.02, 0.04]}, "schedule.warmdown_fraction": {"choice": [0.6]}}
WARM = 7  # asks, of which the median counts
GP_AT_MOST = 1000  # trials; it sees 150 of them, however many there are
ARMS = ("surrogate", "exploit", "tpe", "random")


def study_of(sampler: str) -> Study:
    definition = NewStudy.model_validate(
        {"name": "asks", "base": load_recipe("laptop"), "space": GRID if sampler == "grid" else SPACE,
         "sampler": sampler, "max_trials": 20_000, "cap_bytes": 400_000}
    )  # fmt: skip
    return Study(1, "asks", StudyState.RUNNING, definition, 0, 0, None, NOW, NOW)


def history_of(study: Study, count: int) -> list[Trial]:
    """So many finished trials at random points, with scores that a search can learn from."""
    domain, rng, trials, seen = Domain(study.definition.base, study.definition.space), random.Random(0), [], set()
    while len(trials) < count:
        point = domain.random(rng)
        try:
            spec = domain.spec(point, GangConfig())
        except ValueError:
            continue
        if spec.canonical_hash in seen:
            continue
        seen.add(spec.canonical_hash)
        prediction = predict(spec)
        result = _result(3 - 0.1 * log(prediction.parameters) + rng.gauss(0, 0.01), prediction.artifact_bytes)
        number, hashed = len(trials), spec.canonical_hash
        trial = Trial(
            number + 1, 1, number, TrialState.COMPLETE, "proposed", spec, hashed, point, prediction, "fits", None,
            result, NOW, NOW, NOW, Suggestion(arm=rng.choice(ARMS)), True,
        )  # fmt: skip
        trials.append(trial)
    return trials


def _result(val_bpb: float, artifact_bytes: int) -> TrialResult:
    return TrialResult(
        val_bpb=val_bpb, val_bpb_prequant=val_bpb, val_loss=val_bpb, parameters=1, model_bytes=artifact_bytes - 45_000,
        code_bytes=45_000, artifact_bytes=artifact_bytes, artifact_sha256="0" * 64, steps=100, tokens=100_000,
        train_seconds=10.0, evaluate_seconds=1.0, pack_seconds=0.1, step_seconds=0.1, stopped=False,
        bytes_by_class={}, diagnostics={},
    )  # fmt: skip


def warm(study: Study, history: Sequence[Trial], count: int) -> float:
    """Milliseconds of an ask when one more trial has finished, the median of some."""
    proposer, times = Proposer(study), list[float]()
    proposer.propose(history[: count - WARM - 1], GangConfig())
    for size in range(count - WARM, count + 1):
        started = time.process_time()
        proposer.propose(history[:size], GangConfig())
        times.append(time.process_time() - started)
    return 1000 * median(times)


def cold(study: Study, history: Sequence[Trial], folder: Path) -> tuple[float, float]:
    """Seconds to read the history from SQLite, and to propose from it first."""
    database = Database(f"sqlite:///{folder / 'caddie.db'}")
    database.migrate()
    with database.write() as session:
        stored = store.create_study(session, study.definition, NOW)
        session.execute(insert(TrialRow), [_row(trial, stored.id) for trial in history])
    started = time.process_time()
    with database.read() as session:
        read = History(stored.id).read(session)
    done = time.process_time()
    Proposer(replace(study, id=stored.id)).propose(read, GangConfig())
    database.close()
    return done - started, time.process_time() - done


def _row(trial: Trial, study_id: int) -> dict[str, Any]:
    assert trial.result is not None and trial.suggestion is not None
    return {
        "study_id": study_id, "number": trial.number, "state": trial.state.value, "origin": trial.origin,
        "spec": trial.spec.model_dump(mode="json"), "spec_hash": trial.spec_hash, "params": trial.params,
        "prediction": asdict(trial.prediction), "verdict": trial.verdict,
        "result": trial.result.model_dump(mode="json"),
        "val_bpb": trial.result.val_bpb, "artifact_bytes": trial.result.artifact_bytes, "feasible": True,
        "suggestion": trial.suggestion.model_dump(mode="json"), "created_at": NOW, "started_at": NOW,
        "finished_at": NOW,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", default="caddie,tpe,gp,nsga2,random,qmc,grid")
    parser.add_argument("--sizes", default="100,1000,10000")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sizes = [int(size) for size in options.sizes.split(",")]
    histories = {name: history_of(study_of(name), max(sizes)) for name in ("caddie",)}
    print("| sampler | " + " | ".join(f"{size:,} trials, ms" for size in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for name in options.samplers.split(","):
        study = study_of(name)
        history = histories["caddie"] if name != "grid" else history_of(study, min(max(sizes), 1000))
        told = [f"{warm(study, history, size):.0f}" if size <= len(history) else "" for size in sizes]
        print(f"| {name} | {' | '.join(told)} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        read, proposed = cold(study_of("caddie"), histories["caddie"], Path(folder))
    print(
        f"\nCold start at {max(sizes):,} trials: {read:.1f} s of CPU to read, {proposed:.1f} s to the first proposal."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
