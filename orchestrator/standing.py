"""Where complete trials stand among each other, by the mean of what their seeds score."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from orchestrator.statistics import Interval, Sample, Spread, interval_of


@dataclass(frozen=True)
class Standing:
    """A complete trial by its seeds at the spec's own budget."""

    trial_id: int
    number: int
    seed: int
    """Its own, which screened it: whoever is best there was lucky, too."""
    val_bpb: float
    """Of the run that completed it."""
    bpb: Mapping[int, float]
    """By seed, of the runs that keep every cap."""
    over: int
    """Runs that have a score, and miss a cap."""
    taken: frozenset[int]
    """Seeds that have a run, in whatever state."""
    waits: bool
    """Whether one of its runs is open."""
    failed: int = 0
    """Runs that failed for good."""

    @cached_property
    def sample(self) -> Sample | None:
        """None where no run keeps every cap."""
        return Sample.of(list(self.bpb.values())) if self.bpb else None

    @property
    def unscreened_bpb(self) -> float | None:
        """The mean without the seed that screened it, which is fair; None before there is another."""
        further = [bpb for seed, bpb in self.bpb.items() if seed != self.seed]
        return fmean(further) if further else None

    def interval(self, spread: Spread | None) -> tuple[Interval | None, bool]:
        """Of its mean, at 95%, and whether it comes from the study's pooled spread, because one seed has none."""
        sample = self.sample
        if sample is None or (sample.count == 1 and spread is None):
            return None, False
        own = Spread(sample.sd, sample.count - 1) if sample.count > 1 else spread
        assert own is not None
        return interval_of(sample.mean, sample.count, own), sample.count == 1


def ranked(standings: Iterable[Standing]) -> list[Standing]:
    """By mean BPB, best first; those that keep the caps at no seed come last."""

    def place(standing: Standing) -> tuple[bool, float, int]:
        sample = standing.sample
        return sample is None, standing.val_bpb if sample is None else sample.mean, standing.number

    return sorted(standings, key=place)


def spread_of(standings: Iterable[Standing]) -> Spread | None:
    """The spread of BPB between seeds, pooled over the study; None before any trial has two."""
    return Spread.pooled(list(standing.bpb.values()) for standing in standings)
