"""Replay real outcomes as a study: how many trials each sampler needs to reach the best 1% of what fits.

First table: benchmarks/search/table.jsonl, trained by Caddie's own worker (table.py). The byte cap is the one that 40%
of its configurations miss. `caddie` and the lines "through Caddie" are the proposer of production: what it refuses, and
what it has tried, costs nothing. The other lines are Optuna's samplers alone: what does not fit is told as complete
with its violated constraint and costs a trial, and so does what is drawn again. Caddie's space says maps by pattern
and number of blocks, Optuna's as one choice: any pattern of six blocks is the untied map, so `random` through Caddie
draws that more often than others. Size says a lot here, which `largest that fits first` shows.

Second table: sharing_sweep_343.csv, published runs of somebody else's scripts, as a pool: a trial of a configuration
gives one of its real outcomes, drawn, and the best twentieth by mean outcome is to be reached. There is no cap, and its
parameters make none of Caddie's specs, so what is compared is the surrogate arm alone, over the bare numbers. Each
configuration is tried once; Optuna asks for numbers, and what is nearest of those that are left is tried.

Run: OMP_NUM_THREADS=1 .venv/bin/python benchmarks/search/replay.py [--seeds 50]
"""

import argparse
import csv
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from orchestrator.caps import scores_of
from orchestrator.lifecycle import StudyState, TrialState
from orchestrator.proposer import Proposer
from orchestrator.study import NewStudy, NewTrial, Study, Trial
from orchestrator.surrogate import Surrogate
from worker.recipes import load_recipe
from worker.report import TrialResult
from worker.source import code_bytes
from worker.spec import GangConfig, TrialSpec, override

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from table import LAYERS, OVERRIDES, RANKS, TABLE, WIDTHS  # noqa: E402

POOL = HERE.parents[1].parent / "shared" / "data" / "sharing_sweep_343.csv"
TOP_OF_POOL = 0.05
MISS = 0.4  # of the configurations, which do not fit
TOP = 0.01  # of those that fit: what is to be reached
MOST = 1000  # trials after which a search counts as that long
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TYINGS: tuple[Any, ...] = (
    "cycle", "sequence", "palindrome", "tail", [0, 1, 1, 1, 1, 2], [0, 1, 2, 1, 2, 3], [0, 1, 1, 1, 1, 0],
)  # fmt: skip
"""With 1, 2, 3, 4 or 6 blocks these say every map of the table and no other."""


@dataclass(frozen=True)
class Outcomes:
    """The table: a row for each configuration, the cap, and which of them are to be reached."""

    rows: Mapping[tuple[Any, ...], Mapping[str, Any]]
    cap_bytes: int
    best: frozenset[tuple[Any, ...]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], miss: float = MISS) -> "Outcomes":
        by_key = {_key(row["map"], row["rank"], row["width"]): row for row in rows if row["seed"] == 1}
        weights = sorted(row["model_bytes"] + code_bytes() for row in by_key.values())
        cap_bytes = weights[min(ceil((1 - miss) * len(weights)), len(weights)) - 1]
        fits = [key for key, row in by_key.items() if row["model_bytes"] + code_bytes() <= cap_bytes]
        fits.sort(key=lambda key: by_key[key]["val_bpb"])
        return cls(by_key, cap_bytes, frozenset(fits[: ceil(TOP * len(fits))]))

    @property
    def fitting(self) -> int:
        return sum(row["model_bytes"] + code_bytes() <= self.cap_bytes for row in self.rows.values())


def _key(tying_map: Sequence[int], rank: int, width: int) -> tuple[Any, ...]:
    return (tuple(tying_map), rank, width)


def key_of(spec: TrialSpec) -> tuple[Any, ...]:
    return _key(spec.sharing.tying_map, spec.sharing.lora.rank, spec.model.width)


def study_of(outcomes: Outcomes, sampler: str, seed: int) -> Study:
    space = {
        "sharing.lora.rank": {"choice": RANKS}, "model.width": {"choice": WIDTHS},
        "sharing.unique_blocks": {"choice": [1, 2, 3, 4, 6]}, "sharing.tying": {"choice": TYINGS},
    }  # fmt: skip
    base = override(load_recipe("laptop"), {**OVERRIDES, "sharing.virtual_layers": LAYERS})
    definition = NewStudy.model_validate(
        {"name": "replay", "base": base, "space": space, "sampler": sampler, "seed": seed,
         "cap_bytes": outcomes.cap_bytes}
    )  # fmt: skip
    return Study(1, "replay", StudyState.RUNNING, definition, 0, 0, None, NOW, NOW)


def trial_of(number: int, new: NewTrial, row: Mapping[str, Any] | None, study: Study) -> Trial:
    """The proposal, trained as the table says; one that the table does not have yet is cancelled."""
    result = None if row is None else _result(row)
    state = TrialState.CANCELLED if row is None else TrialState.COMPLETE
    return Trial(
        number + 1, 1, number, state, new.origin, new.spec, new.spec.canonical_hash, new.params, new.prediction,
        new.verdict, new.reason, result, NOW, NOW, NOW, new.suggestion,
        None if result is None else scores_of(result, study.definition).feasible,
    )  # fmt: skip


def _result(row: Mapping[str, Any]) -> TrialResult:
    return TrialResult(
        val_bpb=row["val_bpb"], val_bpb_prequant=row["val_bpb_prequant"], val_loss=row["val_bpb"],
        parameters=row["parameters"], model_bytes=row["model_bytes"], code_bytes=code_bytes(),
        artifact_bytes=row["model_bytes"] + code_bytes(), artifact_sha256="0" * 64, steps=row["steps"],
        tokens=row["steps"] * 1024, train_seconds=row["steps"] * row["step_seconds"], evaluate_seconds=1.0,
        pack_seconds=0.1, step_seconds=row["step_seconds"], stopped=False, bytes_by_class=row["bytes_by_class"],
        diagnostics={"gammas": row["gammas"], "block_influence": row["block_influence"],
                     "contraction": {"changes": row["contraction"]}},
    )  # fmt: skip


def through_caddie(outcomes: Outcomes, sampler: str, seed: int) -> int:
    """Trials until one is among the best, by a sampler of Caddie's proposer."""
    study = study_of(outcomes, sampler, seed)
    proposer, history, paid = Proposer(study), list[Trial](), 0
    while (proposed := proposer.propose(history, GangConfig())).trial is not None:
        key = key_of(proposed.trial.spec)
        row = outcomes.rows.get(key)
        history.append(trial_of(len(history), proposed.trial, row, study))
        paid += row is not None
        if key in outcomes.best:
            return paid
    raise AssertionError(f"{sampler} gave up: {proposed.reason}")


def alone(outcomes: Outcomes, sampler: Callable[[int], BaseSampler], seed: int) -> int:
    """Trials until one is among the best, by Optuna alone: maps are one choice, ranks and widths are in order."""
    maps = sorted({key[0] for key in outcomes.rows})
    study, paid = optuna.create_study(sampler=sampler(seed)), 0
    while paid < MOST:
        trial = study.ask()
        key = (
            maps[trial.suggest_categorical("map", range(len(maps)))],
            RANKS[trial.suggest_int("rank", 0, len(RANKS) - 1)],
            WIDTHS[trial.suggest_int("width", 0, len(WIDTHS) - 1)],
        )
        row = outcomes.rows.get(key)
        paid += 1
        if row is None:  # of a table that is not complete yet
            trial.set_constraint("artifact_bytes", float(outcomes.cap_bytes))
            study.tell(trial, max(row["val_bpb"] for row in outcomes.rows.values()))
            continue
        if key in outcomes.best:
            return paid
        trial.set_constraint("artifact_bytes", float(row["model_bytes"] + code_bytes() - outcomes.cap_bytes))
        study.tell(trial, row["val_bpb"])
    return MOST


def largest_first(outcomes: Outcomes, seed: int) -> int:
    """No search at all: what fits, in the order of its real bytes."""
    fits = {key: row["model_bytes"] for key, row in outcomes.rows.items()
            if row["model_bytes"] + code_bytes() <= outcomes.cap_bytes}  # fmt: skip
    order = sorted(fits, key=lambda key: -fits[key])
    return next(count for count, key in enumerate(order, 1) if key in outcomes.best)


LINES: Mapping[str, Callable[[Outcomes, int], int]] = {
    "caddie": lambda outcomes, seed: through_caddie(outcomes, "caddie", seed),
    "TPE, Optuna's defaults": lambda outcomes, seed: alone(outcomes, lambda seed: TPESampler(seed=seed), seed),
    "TPE through Caddie": lambda outcomes, seed: through_caddie(outcomes, "tpe", seed),
    "GP, Optuna's defaults": lambda outcomes, seed: alone(outcomes, lambda seed: GPSampler(seed=seed), seed),
    "random alone": lambda outcomes, seed: alone(outcomes, lambda seed: RandomSampler(seed=seed), seed),
    "random through Caddie": lambda outcomes, seed: through_caddie(outcomes, "random", seed),
    "largest that fits first": largest_first,
}
SLOW = {"GP, Optuna's defaults": 5}  # one seed in so many is run


# The pool


@dataclass(frozen=True)
class Pool:
    """Configurations as rows of numbers, each from 0 to 1, and what each has given."""

    rows: NDArray[np.float64]
    outcomes: Sequence[Sequence[float]]

    @classmethod
    def read(cls, path: Path) -> "Pool":
        found: dict[tuple[float, ...], list[float]] = {}
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                key = tuple(float(value) for name, value in row.items() if name not in ("order", "val_bpb"))
                found.setdefault(key, []).append(float(row["val_bpb"]))
        rows = np.array(list(found))
        levels = [np.unique(column) for column in rows.T]  # by rank: learning rates and counts alike
        ranks = [
            np.searchsorted(level, column) / max(len(level) - 1, 1)
            for level, column in zip(levels, rows.T, strict=True)
        ]
        return cls(np.array(ranks).T, list(found.values()))

    @property
    def best(self) -> frozenset[int]:
        means = [fmean(each) for each in self.outcomes]
        order = sorted(range(len(means)), key=means.__getitem__)
        return frozenset(order[: ceil(TOP_OF_POOL * len(order))])


def by_surrogate(pool: Pool, seed: int) -> int:
    rng, tried, values = random.Random(seed), list[int](), list[float]()
    groups = [str(column) for column in range(pool.rows.shape[1])]
    while True:
        left = [place for place in range(len(pool.rows)) if place not in tried]
        if len(tried) < 3:
            place = rng.choice(left)
        else:
            surrogate = Surrogate(pool.rows[tried], np.array(values), groups, pool.rows, size_effect=0.0)
            place = left[int(surrogate.improvement(pool.rows[left], min(values)).argmax())]
        tried.append(place)
        values.append(rng.choice(pool.outcomes[place]))
        if place in pool.best:
            return len(tried)


def by_optuna(pool: Pool, sampler: BaseSampler, seed: int) -> int:
    rng, study, left = random.Random(seed), optuna.create_study(sampler=sampler), list(range(len(pool.rows)))
    while True:
        trial = study.ask()
        asked = np.array([trial.suggest_float(str(column), 0, 1) for column in range(pool.rows.shape[1])])
        place = left.pop(int(((pool.rows[left] - asked) ** 2).sum(axis=1).argmin()))
        if place in pool.best:
            return len(pool.rows) - len(left)
        study.tell(trial, rng.choice(pool.outcomes[place]))


def once_at_random(pool: Pool, seed: int) -> int:
    order = random.Random(seed).sample(range(len(pool.rows)), len(pool.rows))
    return next(count for count, place in enumerate(order, 1) if place in pool.best)


POOL_LINES: Mapping[str, Callable[[Pool, int], int]] = {
    "surrogate of caddie": by_surrogate,
    "TPE, Optuna's defaults": lambda pool, seed: by_optuna(pool, TPESampler(seed=seed), seed),
    "random": once_at_random,
}


def replay_pool(path: Path, seeds: int) -> None:
    if not path.is_file():
        print(f"\nThe second table is skipped: there is no {path}.")
        return
    pool = Pool.read(path)
    print(f"\n{len(pool.rows)} published configurations, {sum(map(len, pool.outcomes))} outcomes; "
          f"to be reached: one of the best {len(pool.best)}.\n")  # fmt: skip
    counts, seconds = list[tuple[str, Sequence[int]]](), dict[str, float]()
    for name, line in POOL_LINES.items():
        started = time.perf_counter()
        counts.append((name, [line(pool, seed) for seed in range(seeds)]))
        seconds[name] = (time.perf_counter() - started) / seeds
    table(counts, seconds)


def interval(counts: Sequence[int], of: Callable[[Sequence[int]], float]) -> tuple[float, float]:
    """The middle 95% of a statistic over 2,000 resamples."""
    rng = random.Random(0)
    drawn = sorted(of(rng.choices(counts, k=len(counts))) for _ in range(2000))
    return drawn[50], drawn[1949]


def table(lines: Sequence[tuple[str, Sequence[int]]], seconds: Mapping[str, float]) -> None:
    print("| sampler | seeds | trials, mean | 95% interval | median | of TPE's defaults | seconds a seed |")
    print("|---|---|---|---|---|---|---|")
    base = dict(lines).get("TPE, Optuna's defaults")
    for name, counts in lines:
        low, high = interval(counts, fmean)
        share = f"{fmean(counts) / fmean(base):.2f}" if base else ""
        print(
            f"| {name} | {len(counts)} | {fmean(counts):.1f} | {low:.1f}–{high:.1f} | {median(counts):g} | {share} "
            f"| {seconds[name]:.1f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--pool", type=Path, default=POOL)
    parser.add_argument("--miss", type=float, default=MISS, help="the share of configurations that do not fit")
    parser.add_argument("--only", help="lines whose names contain one of these, with commas between")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = [json.loads(line) for line in options.table.read_text(encoding="utf-8").splitlines()]
    outcomes = Outcomes.of(rows, options.miss)
    print(
        f"{len(outcomes.rows)} configurations; cap {outcomes.cap_bytes:,} bytes, which {outcomes.fitting} keep; "
        f"to be reached: one of the best {len(outcomes.best)} of these.\n"
    )
    counts: list[tuple[str, Sequence[int]]] = []
    seconds: dict[str, float] = {}
    for name, line in LINES.items():
        if options.only and not any(part in name for part in options.only.split(",")):
            continue
        seeds = range(options.first, options.first + max(options.seeds // SLOW.get(name, 1), 1))
        started = time.perf_counter()
        counts.append((name, [line(outcomes, seed) for seed in seeds]))
        seconds[name] = (time.perf_counter() - started) / len(seeds)
    table(counts, seconds)
    if not options.only:
        replay_pool(options.pool, options.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
