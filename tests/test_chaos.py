"""Whatever is killed while a sweep runs, at most the attempts that ran on it are lost: never a result."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos import Sweep, check, endings, plan, results, table
from cluster import Cluster

SEED = int(os.environ.get("CHAOS_SEED", "1"))
SMALL = {
    "model.vocab_size": 512,
    "model.width": 48,
    "data.dataset": "topics_sp512",
    "data.sequence_length": 64,
    "data.batch_tokens": 1024,
    "evaluation.validation_tokens": 1024,
    "quantisation.level": 3,
}


@pytest.fixture
def cluster(tmp_path: Path, small_data_root: Path) -> Iterator[Cluster]:
    running = Cluster(tmp_path, small_data_root)
    try:
        running.start()
        yield running
    finally:
        running.close()


def bodies(trials: int, steps: int) -> list[dict[str, Any]]:
    """Trials to submit, all different; every other has two ranks."""
    return [
        {
            "recipe": "laptop",
            "overrides": {
                **SMALL,
                "budget.steps": steps,
                "optimizer.matrix_lr": round(0.01 + number / 1000, 4),
                "seed": 7 * number,
                "gang.ranks": 2 if number % 2 else 1,
            },
        }
        for number in range(trials)
    ]


@pytest.mark.parametrize(
    ("trials", "steps", "kills"),
    [
        pytest.param(8, 10, 6, id="short", marks=[pytest.mark.soak, pytest.mark.timeout(600)]),
        pytest.param(66, 30, 30, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(0)]),
    ],
)
def test_kills_at_random_moments_cost_no_result_and_leave_nothing_behind(
    cluster: Cluster, trials: int, steps: int, kills: int
) -> None:
    print(f"CHAOS_SEED={SEED}")
    submitted = bodies(trials, steps)
    calm = Sweep(cluster, "calm", submitted, [])
    calm.run(patience_seconds=60 + 10 * trials)
    wild = Sweep(cluster, "wild", submitted, list(plan(SEED, trials, kills)))
    wild.run(patience_seconds=90 + 15 * trials)
    print(f"{wild.story()}\n{table(wild, calm.seconds, endings(cluster, 'wild'))}")

    assert len(wild.blows) == kills
    check(cluster, "calm", trials)
    check(cluster, "wild", trials)
    assert results(cluster, "wild") == results(cluster, "calm")

    idle = cluster.books()
    assert {name.rpartition("-")[0] for name in idle.pids} <= set(idle.groups), "a rank without a reservation"
    assert cluster.members["orchestrator"].stop() == 0
    books = cluster.books()
    assert (books.pids, books.groups) == ({}, {}), "the orchestrator was stopped for good"
    assert cluster.stop() == []
