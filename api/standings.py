"""What the API answers about who leads, and whether a trial sets a record."""

from collections.abc import Sequence

from pydantic import BaseModel

from orchestrator.standing import Standing
from orchestrator.statistics import Spread
from orchestrator.study import Scores, Trial
from orchestrator.verdict import MARGIN_NATS, RecordVerdict
from worker.tying import TyingMap


class LeaderboardRow(BaseModel):
    """A complete trial, by the mean BPB of its seeds that keep every cap. Without such a seed it has no rank, and comes
    after all that have one."""

    rank: int | None
    number: int
    mean_bpb: float | None
    low_bpb: float | None
    """Of the mean's 95% interval (Student); None before any trial of the study has two seeds."""
    high_bpb: float | None
    pooled: bool
    """Whether the interval comes from the spread of all the study's seeds, because one seed has none of its own."""
    seeds: int
    """How many the mean is of."""
    unscreened_bpb: float | None
    """The mean without the seed that screened the trial. The best of many are lucky there; this one is fair."""
    seeds_over: int
    """Further seeds that miss a cap, which rules out a record."""
    val_bpb: float
    """Of the run that completed the trial, as everything below."""
    val_bpb_prequant: float
    artifact_bytes: int
    parameters: int
    tying_map: TyingMap
    lora_rank: int
    ranks: int
    train_seconds: float

    @classmethod
    def of(cls, trial: Trial, standing: Standing, place: int, spread: Spread | None) -> "LeaderboardRow":
        result, sharing, sample = trial.result, trial.spec.sharing, standing.sample
        assert result is not None, "a complete trial has a result"
        interval, pooled = standing.interval(spread)
        return cls(
            rank=place if sample else None, number=trial.number, mean_bpb=sample.mean if sample else None,
            low_bpb=interval.low if interval else None, high_bpb=interval.high if interval else None, pooled=pooled,
            seeds=len(standing.bpb), unscreened_bpb=standing.unscreened_bpb, seeds_over=standing.over,
            val_bpb=result.val_bpb, val_bpb_prequant=result.val_bpb_prequant,
            artifact_bytes=result.artifact_bytes, parameters=result.parameters, tying_map=sharing.tying_map,
            lora_rank=sharing.lora.rank, ranks=trial.spec.gang.ranks, train_seconds=result.train_seconds,
        )  # fmt: skip


class LeaderboardOut(BaseModel):
    """Complete trials by mean BPB, best first."""

    study: str
    cap_bytes: int
    seed_sd: float | None
    """The SD of BPB between seeds of one trial, pooled over the study; None before any trial has two."""
    rows: list[LeaderboardRow]


class VerdictOut(BaseModel):
    """Whether a trial sets a record against another trial, or given losses; and what is missing, where it does not.

    A record is better by at least `margin_nats` with `p` below `alpha` (Welch's test, one-sided, of nats per token),
    the screening seed left out, every seed within all caps.
    """

    study: str
    trial: int
    record: bool
    missing: list[str]
    settle_seeds: int | None
    """How many seeds beyond its own would settle it, 80 times in 100; None where none would, or where it is settled."""
    against: str
    against_trial: int | None
    margin_nats: float
    mean_nats: float | None
    """Of the tested seeds."""
    sd_nats: float | None
    seeds: list[int]
    """Those that are tested, in the order in which they were asked for."""
    failed_seeds: list[int]
    """Left out, because their run failed or was cancelled."""
    planned_seeds: int
    """How many the test is made on: the study's list, or twice as many, and so on."""
    against_mean_nats: float | None
    against_sd_nats: float | None
    against_seeds: int
    ahead_nats: float | None
    p: float | None
    """None where no test can be made yet, or a cap rules the record out."""
    alpha: float
    declared: int
    """Which of the study's declared trials it is: each has its own share of the 0.01, smaller than that before."""
    look: int
    """How many looks its seeds are enough for; each has its own share of the trial's alpha."""
    mean_bpb: float | None
    ahead_bpb: float | None
    bpb_per_nat: float
    """Of the trial's tokenizer."""

    @classmethod
    def of(cls, study: str, trial: int, against: int | None, found: RecordVerdict, scores: Scores) -> "VerdictOut":
        sample, champion, ahead = found.sample, found.champion, found.ahead_nats
        per_nat = scores.val_bpb / scores.val_loss
        held = champion.sample if champion.sample.count else None
        return cls(
            study=study, trial=trial, record=found.record, missing=list(found.missing), settle_seeds=found.settle,
            against=champion.name, against_trial=against, margin_nats=MARGIN_NATS,
            mean_nats=sample.mean if sample else None, sd_nats=sample.sd if sample else None, seeds=list(found.seeds),
            failed_seeds=list(found.failed), planned_seeds=found.planned,
            against_mean_nats=held.mean if held else None, against_sd_nats=held.sd if held else None,
            against_seeds=champion.sample.count, ahead_nats=ahead, p=found.test.p if found.test else None,
            alpha=found.alpha, declared=found.declared, look=found.look,
            mean_bpb=sample.mean * per_nat if sample else None, ahead_bpb=None if ahead is None else ahead * per_nat,
            bpb_per_nat=per_nat,
        )  # fmt: skip


def rows_of(trials: Sequence[Trial], standings: Sequence[Standing], spread: Spread | None) -> list[LeaderboardRow]:
    """The rows of the best standings, best first: who has a rank comes before who has none, so places are ranks."""
    by_number = {trial.number: trial for trial in trials}
    return [
        LeaderboardRow.of(by_number[standing.number], standing, place, spread)
        for place, standing in enumerate(standings, 1)
    ]
