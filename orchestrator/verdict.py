"""Whether a trial sets a record: better by a margin, at seeds that nobody had seen when it was chosen.

The challenge's rule: better than the standing record by at least 0.005 nats, at p < 0.01 (Welch's test, one-sided),
every seed within the byte cap and both time limits. What makes the p mean what it says:

- The run that screened the trial is left out: the best of many is the luckiest of many.
- A trial is declared by its second seed, before anyone can have seen what that scores. The k-th declared trial of a
  study has 6/(π²k²) of the 0.01, so that all of them together have 0.01, however many there are.
- The test is made once the study's list of seeds is done, not whenever it looks good. With twice as many seeds it may
  be made again, and so on; look j has 0.8 · 0.2^(j-1) of the trial's share.
- The champion's sample is fixed too: its first seeds beyond its own, as many as the study's list has, at every look.
  Once a look is made its p never changes, however many seeds the champion still gets.
- Choosing the champion gains nothing: whatever other trial was asked for all its seeds before the champion has to be
  beaten as well. So a false record against any of several is one against the first of them.
- A seed that diverged counts against the trial: what is left would be the seeds at which it went well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import ceil, pi

from orchestrator.lifecycle import RunState
from orchestrator.statistics import Sample, Spread, Welch, numbers_needed, welch
from orchestrator.study import ReplicationConfig, Run

MARGIN_NATS = 0.005
ALPHA = 0.01
FIRST_LOOK = 0.8
FEWEST_SEEDS = 2  # without two a sample has no spread
GONE = frozenset({RunState.FAILED, RunState.CANCELLED})


@dataclass(frozen=True)
class Champion:
    """What a trial is held against: losses in nats, one a seed. There is no test before it has the `planned` ones."""

    name: str
    sample: Sample
    planned: int = FEWEST_SEEDS
    asked: int | None = None
    """The id of the run at the last of its planned seeds; None where they were not all asked for."""

    @classmethod
    def of(cls, number: int, runs: Sequence[Run], own: int, planned: int, scale: float = 1.0) -> "Champion":
        """A trial of the study by its first seeds but for the screening one, as far as they are done."""
        kept = [run for run in _further(runs, own) if run.state not in GONE and run.state is not RunState.STOPPED]
        asked = kept[:planned]
        losses = [run.scores.val_loss * scale for run in takewhile(_finished, asked) if run.scores is not None]
        return cls(f"trial {number}", Sample.of(losses), planned, asked[-1].id if len(asked) == planned else None)


@dataclass(frozen=True)
class RecordVerdict:
    """Whether a trial sets a record and, where it does not, what is missing. Losses are in nats per token."""

    record: bool
    declared: int
    """Which of the study's declared trials it is, from 1."""
    look: int
    """How often the test could have been made on it so far."""
    alpha: float
    """What the p of this look, or of the next where there was none, has to stay below."""
    seeds: tuple[int, ...]
    """Those that the test is made on, in the order in which they were asked for."""
    failed: tuple[int, ...]
    """Seeds that were left out because their run failed or was cancelled."""
    planned: int
    """How many seeds a look takes."""
    sample: Sample | None
    champion: Champion
    test: Welch | None
    """None where no test can be made yet, or a cap rules the record out."""
    settle: int | None
    """How many seeds beyond the screening one would settle it, 80 times in 100; None where none would, or it is."""
    missing: tuple[str, ...]

    @property
    def ahead_nats(self) -> float | None:
        return None if self.test is None or self.sample is None else self.champion.sample.mean - self.sample.mean


def share(declared: int, look: int) -> float:
    """The alpha of this look at this trial. Over all of both it adds up to ALPHA."""
    return ALPHA * 6 / (pi * declared) ** 2 * FIRST_LOOK * (1 - FIRST_LOOK) ** (look - 1)


def planned_seeds(terms: ReplicationConfig | None, own: int) -> int:
    """How many seeds beyond its own a trial of the study is meant to have."""
    return max(FEWEST_SEEDS, sum(seed != own for seed in (terms or ReplicationConfig()).seeds))


def judge_record(
    runs: Sequence[Run],
    own: int,
    planned: int,
    declared: int,
    champion: Champion,
    others: Sequence[Champion] = (),
    diverged: frozenset[int] = frozenset(),
) -> RecordVerdict:
    """The verdict on the trial of these runs, whose own seed screened it. `others` are the study's further declared
    trials; `diverged` are those of the failed seeds whose training did."""
    further = _further(runs, own)
    failed = tuple(run.seed for run in further if run.state in GONE)
    finished = list(takewhile(_finished, (run for run in further if run.state not in GONE)))
    look = len(finished) // planned
    tested = finished[: look * planned]
    losses = [run.scores.val_loss for run in tested if run.scores is not None]
    sample = Sample.of(losses) if losses else None
    before = [other for other in others if other.asked and champion.asked and other.asked < champion.asked]
    missing = [*_seeds_missing(len(finished), planned, failed, [champion, *before]), *_caps_missed(runs)]
    missing += [f"seed {seed} diverged, which counts against it" for seed in failed if seed in diverged]
    missing += [f"seed {run.seed} was stopped before its end" for run in further if run.state is RunState.STOPPED]
    alpha = share(declared, max(look, 1))
    test, settle = None, planned if look == 0 and not diverged else None
    if not missing and sample is not None:
        test = welch(sample, champion.sample, MARGIN_NATS)
        ahead = champion.sample.mean - sample.mean
        if ahead < MARGIN_NATS:
            missing.append(f"it is {ahead:.4f} nats ahead, and a record is by {MARGIN_NATS} at least")
        elif test.p >= alpha:
            settle = _settle(sample, champion, share(declared, look + 1), look, planned)
            missing.append(f"p = {test.p:.2g} is not below {alpha:.2g}")
        missing += _not_beaten(sample, before, alpha)
    return RecordVerdict(
        record=not missing, declared=declared, look=look, alpha=alpha, seeds=tuple(run.seed for run in tested),
        failed=failed, planned=planned, sample=sample, champion=champion, test=test, settle=settle,
        missing=tuple(missing),
    )  # fmt: skip


def _further(runs: Sequence[Run], own: int) -> list[Run]:
    """The runs beyond the screening one, in the order in which they were asked for."""
    return sorted((run for run in runs if run.rung == 0 and run.seed != own), key=lambda run: run.id)


def _finished(run: Run) -> bool:
    return run.state is RunState.SUCCEEDED and run.scores is not None


def _seeds_missing(finished: int, planned: int, failed: Sequence[int], champions: Sequence[Champion]) -> list[str]:
    missing = []
    if finished < planned:
        instead = f"; {len(failed)} failed or were cancelled, and others can be submitted instead" if failed else ""
        missing.append(f"it has {finished} of the {planned} seeds, beyond its own, that the test is made on{instead}")
    waiting = [champion for champion in champions if champion.sample.count < champion.planned]
    held = "seeds that it is held against"
    return [*missing, *(f"{one.name}: {one.sample.count} of the {one.planned} {held}" for one in waiting)]


def _not_beaten(sample: Sample, others: Sequence[Champion], alpha: float) -> list[str]:
    missing = []
    for other in others:
        ahead, p = other.sample.mean - sample.mean, welch(sample, other.sample, MARGIN_NATS).p
        if ahead < MARGIN_NATS or p >= alpha:
            why = f"{other.name} had its seeds before and has to be beaten too"
            missing.append(f"{why}: {ahead:.4f} nats ahead of it, p = {p:.2g}")
    return missing


def _caps_missed(runs: Sequence[Run]) -> list[str]:
    over = [run.seed for run in runs if run.rung == 0 and run.scores is not None and not run.scores.feasible]
    return [f"seed {seed} misses a cap of the study" for seed in over]


def _settle(sample: Sample, champion: Champion, alpha: float, look: int, planned: int) -> int | None:
    """Seeds until a later look decides, in whole looks, were the difference to stay what it is."""
    other = champion.sample
    degrees = sample.count + other.count - 2
    squares = sample.sd**2 * (sample.count - 1) + other.sd**2 * (other.count - 1)
    spread = Spread((squares / degrees) ** 0.5, degrees)
    ahead = other.mean - sample.mean - MARGIN_NATS
    needed = numbers_needed(ahead, spread, other.count, alpha)
    return None if needed is None else planned * max(look + 1, ceil(needed / planned))
