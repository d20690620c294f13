"""Proposals for one study: a sampler draws points, what is known of specs and caps refuses. Our tables hold it all."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.gate import Gate, Passed, Refusal
from orchestrator.lesson import key_of
from orchestrator.memory import Memory
from orchestrator.mix import Candidate, Mix
from orchestrator.points import Domain
from orchestrator.samplers import OptunaSampler
from orchestrator.sequences import Grid, Halton, walk
from orchestrator.study import NewTrial, Study, Suggestion, Trial
from worker.spec import GangConfig

SAMPLES = 32  # of an Optuna sampler in one call
SAMPLES_OF_GP = 4  # each costs as much as a hundred others
WALKED = 512  # points of a sequence in one call
UNIFORM_SAMPLES = 500  # after the sampler's own, where the space is too large to go through
WALKS = ("qmc", "grid")  # samplers that come from position to position
SMALL_SPACE = 4096  # points that are gone through one by one when samples keep being refused


@dataclass(frozen=True)
class Proposed:
    """A trial to add, or the reason why there is none. `refused` points were drawn on the way that no cap let
    through: each counts once in the life of its Proposer, and what was tried before, or is no valid spec, does not."""

    trial: NewTrial | None
    refused: int
    reason: str | None


class Proposer:
    """The search of one study. What it keeps is a cache: a new one, given the same history, proposes the same trial.

    What each trial teaches the sampler:
    - complete: its objectives, and by how much it misses each cap; pruned: where it was when it was stopped
    - infeasible: that nothing fits there
    - queued and running: to stay away meanwhile (the constant liar; Ginsbourger et al., 2010). A pruned trial that was
      promoted is one of them
    - failed and cancelled: nothing, but like every other they are not proposed again
    - submitted and imported: the same, if it is a point of the space, seed and gang aside. One that only resembles the
      space, some parameters in it or other fields unlike the base, is the outcome of another search and is left out.

    Two specs that differ in seed or gang alone are one point, so a point is proposed once, for whichever gang asks.
    Of a long history samplers see the best, the latest and all open trials; nothing is proposed twice for that.
    """

    def __init__(self, study: Study) -> None:
        self._definition = definition = study.definition
        self._domain = Domain(definition.base, definition.space)
        self._memory = Memory(study, self._domain)
        self._candidates = _sampler(study, self._domain)
        self._refused: set[str] = set()
        self._gave_up: dict[GangConfig, tuple[int, str]] = {}

    def propose(self, history: Sequence[Trial], gang: GangConfig) -> Proposed:
        """The next trial for a gang of this shape, given every trial of the study by number, open ones included.

        It is valid, no trial so far has its canonical hash, and its artifact may fit the cap. The same history and
        study seed give the same proposal. Where there is none to make, asking again with the same history refuses
        nothing more.
        """
        memory = self._memory
        memory.learn(history)
        if gang in self._gave_up and self._gave_up[gang][0] == memory.revision:
            return Proposed(None, 0, self._gave_up[gang][1])
        gate, why, before = Gate(memory, gang), Counter[Refusal](), len(self._refused)
        found = self._first(self._candidates(gate, self._seed), gate, why)
        if found is None and self._domain.count <= SMALL_SPACE:
            why.clear()
            found = self._first(self._all_points(), gate, why)
        elif found is None:
            found = self._first(self._uniform(), gate, why)
        refused = len(self._refused) - before
        if found is not None:
            return Proposed(found, refused, None)
        self._gave_up[gang] = (memory.revision, self._sentence(why))
        return Proposed(None, refused, self._gave_up[gang][1])

    def _first(self, candidates: Iterator[Candidate], gate: Gate, why: Counter[Refusal]) -> NewTrial | None:
        """The first candidate that may become a trial; those before it are counted by why they may not."""
        for point, suggestion in candidates:
            checked = gate.check(point)
            if isinstance(checked, Passed):
                return NewTrial(
                    checked.spec, dict(point), "proposed", checked.prediction, checked.verdict, checked.reason,
                    suggestion=suggestion,
                )  # fmt: skip
            why[checked] += 1
            if checked not in ("known", "invalid"):
                self._refused.add(key_of(point))
        return None

    def _seed(self, attempt: int) -> int:
        """A 32-bit seed that differs wherever the study's, the number of trials or the attempt does."""
        parts = (self._definition.seed, self._memory.count, attempt)
        return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")

    def _all_points(self) -> Iterator[Candidate]:
        """Every point of a small space, in an order drawn from the study's seed and the number of trials."""
        points = list(self._domain.points())
        random.Random(self._seed(SAMPLES)).shuffle(points)
        return ((point, Suggestion(arm="rest", position=self._walked_to())) for point in points)

    def _uniform(self) -> Iterator[Candidate]:
        rng = random.Random(self._seed(SAMPLES))
        told = Suggestion(arm="random", position=self._walked_to())
        return ((self._domain.random(rng), told) for _ in range(UNIFORM_SAMPLES))

    def _walked_to(self) -> int | None:
        """How far a walk has come once it found nothing: noted by the trial found elsewhere, or it would stay there."""
        return self._memory.position + WALKED if self._definition.sampler in WALKS else None

    def _sentence(self, counted: Counter[Refusal]) -> str:
        """Why nothing is left to propose, with the numbers."""
        study = self._definition
        why: dict[Refusal, str] = {
            "known": "tried already, or equal to one that was",
            "invalid": "not a valid spec",
            "cannot_fit": f"with no value of {self._domain.fill_path} that fits the caps",
            "target": "certain not to fit their quantisation.target_bytes",
            "bytes": f"certain not to fit the cap of {study.cap_bytes:,} bytes",
            "training": f"certain to train for longer than the cap of {study.cap_train_seconds:,g} s",
            "evaluation": f"certain to be evaluated for longer than the cap of {study.cap_evaluate_seconds:,g} s",
        }
        counts = ", ".join(f"{counted[kind]} {why[kind]}" for kind in why if counted[kind])
        if self._domain.count <= SMALL_SPACE:
            return f"the space has no point left to try: of {counted.total()} points {counts}"
        return f"no new point was found in {counted.total()} samples: {counts}"


Candidates = Callable[[Gate, Callable[[int], int]], Iterator[Candidate]]


def _sampler(study: Study, domain: Domain) -> Candidates:
    """The study's sampler, as what draws candidates for one proposal."""
    definition = study.definition
    name = definition.sampler
    if name == "caddie":
        return Mix(domain, definition).candidates
    if name == "random":
        return lambda gate, seed: _drawn(domain, seed)
    if name in WALKS:
        sequence = Halton(domain, definition.seed) if name == "qmc" else Grid(domain, definition.seed)
        return lambda gate, seed: _walked(name, sequence, gate)
    sampler = OptunaSampler(name, domain, definition)
    samples = SAMPLES_OF_GP if name == "gp" else SAMPLES
    return lambda gate, seed: _sampled(name, sampler, samples, gate, seed)


def _drawn(domain: Domain, seed: Callable[[int], int]) -> Iterator[Candidate]:
    for attempt in range(SAMPLES):
        yield domain.random(random.Random(seed(attempt))), Suggestion(arm="random")


def _walked(name: str, sequence: Halton | Grid, gate: Gate) -> Iterator[Candidate]:
    for position, point in walk(sequence, gate.memory.position + 1, WALKED):
        yield point, Suggestion(arm=name, position=position)


def _sampled(
    name: str, sampler: OptunaSampler, samples: int, gate: Gate, seed: Callable[[int], int]
) -> Iterator[Candidate]:
    with sampler.taught(gate.memory.selected()):
        for attempt in range(samples):
            yield sampler.ask(seed(attempt)), Suggestion(arm=name)
