"""Proposals for one study: Optuna samples, what is known of specs and bytes refuses. Our tables hold all the state."""

import hashlib
import random
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf, prod
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy  # the storage contract names it, though nothing exports it
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from orchestrator.feasibility import Predictor, judge
from orchestrator.lifecycle import OPEN_TRIALS, TrialState
from orchestrator.optuna_view import ReadOnlyStorage, distributions_of, frozen_trial
from orchestrator.points import Domain
from orchestrator.space import Parameter, apply, as_category
from orchestrator.study import NewTrial, Study, Trial
from worker.spec import GangConfig, InvalidSpec, TrialSpec

SAMPLES = 32  # of the study's sampler in one call; it costs more with every finished trial
UNIFORM_SAMPLES = 500  # after them, where the space is too large to go through
SMALL_SPACE = 4096  # points that are gone through one by one when samples keep being refused

Refusal = Literal["invalid", "known", "cannot_fit"]


@dataclass(frozen=True)
class Proposed:
    """A trial to add, or the reason why there is none. `refused` samples were drawn and thrown away on the way."""

    trial: NewTrial | None
    refused: int
    reason: str | None


class Proposer:
    """The search of one study. What it keeps is a cache: a new one, given the same history, proposes the same trial.

    What each trial teaches the sampler:
    - complete: its BPB, and by how much it misses the cap; pruned: where it was when it was stopped
    - infeasible: that nothing fits there
    - queued and running: to stay away meanwhile (the constant liar; Ginsbourger et al., 2010)
    - failed and cancelled: nothing, but like every other they are not proposed again
    - submitted: the same, if it is a point of the space, seed and gang aside. One that only resembles the space, some
      parameters in it or other fields unlike the base, is the outcome of another search and is left out.

    Two specs that differ in seed or gang alone are one point, so a point is proposed once, for whichever gang asks.
    """

    def __init__(self, study: Study) -> None:
        self._study_id, self._definition = study.id, study.definition
        self._space = study.definition.space
        self._distributions = distributions_of(Domain(study.definition.base, self._space))
        counts = [parameter.count for parameter in self._space.values()]
        self._points = inf if inf in counts else prod(counts)
        self._forget()

    def propose(self, history: Sequence[Trial], gang: GangConfig) -> Proposed:
        """The next trial for a gang of this shape, given every trial of the study by number, open ones included.

        It is valid, no trial so far has its canonical hash, and its artifact may fit the cap. The same history and
        study seed give the same proposal. Where there is none to make, asking again with the same history refuses
        nothing more.
        """
        self._learn(history)
        progress = (len(history), sum(trial.state not in OPEN_TRIALS for trial in history))
        if gang in self._gave_up and self._gave_up[gang][0] == progress:
            return Proposed(None, 0, self._gave_up[gang][1])
        refused, taught = Counter[Refusal](), len(self._replay)
        try:
            found = self._first(self._samples(len(history)), gang, refused)
        finally:
            self._replay.cut(taught)
        reasons = refused
        if found is None and self._points <= SMALL_SPACE:
            reasons = Counter[Refusal]()
            found = self._first(self._all_points(len(history)), gang, reasons)
        if found is not None:
            return Proposed(found, refused.total(), None)
        self._gave_up[gang] = (progress, self._sentence(reasons))
        return Proposed(None, refused.total(), self._gave_up[gang][1])

    def _forget(self) -> None:
        self._replay = _Replay()
        self._optuna_study = optuna.load_study(study_name=_Replay.NAME, storage=self._replay)
        self._states: dict[int, TrialState] = {}  # by number, in order
        self._positions: dict[int, int] = {}  # number -> position in the replay
        self._predictor = Predictor()
        self._known: set[str] = set()  # canonical hashes that are trials
        self._gangs: set[GangConfig] = set()  # that those trials are for
        self._gave_up: dict[GangConfig, tuple[tuple[int, int], str]] = {}

    def _learn(self, history: Sequence[Trial]) -> None:
        """Take over what is new or has changed. A history that does not continue the last one starts afresh."""
        numbers = [trial.number for trial in history]
        assert numbers == sorted(numbers), "a history is ordered by number"
        if numbers[: len(self._states)] != list(self._states):
            self._forget()
        for trial in history:
            assert trial.study_id == self._study_id, "a proposer serves one study"
            if self._states.get(trial.number) is not trial.state:
                self._take(trial)

    def _take(self, trial: Trial) -> None:
        if trial.number not in self._states:
            self._known.add(trial.spec_hash)
            self._gangs.add(trial.spec.gang)
            if self._is_in_space(trial):
                self._positions[trial.number] = len(self._replay)
        self._states[trial.number] = trial.state
        if trial.state not in OPEN_TRIALS:
            self._predictor.learn(trial)
        position = self._positions.get(trial.number)
        if position is not None:
            self._replay.put(self._frozen(trial, position))

    def _is_in_space(self, trial: Trial) -> bool:
        """Whether the trial is what the base becomes under its parameters, all of which lie in the space."""
        if trial.origin == "proposed":
            return True
        if set(trial.params) != set(self._space):
            return False
        if not all(self._space[path].contains(value) for path, value in trial.params.items()):
            return False
        spec = self._spec(trial.params, trial.spec.gang)
        return spec is not None and spec.canonical_hash == trial.spec_hash

    def _frozen(self, trial: Trial, position: int) -> FrozenTrial:
        curve: Mapping[int, float] = {}
        if trial.state is TrialState.PRUNED and trial.result is not None:
            curve = {trial.result.steps: trial.result.val_bpb}
        placed = replace(trial, id=position, number=position)
        frozen = frozen_trial(placed, self._distributions, self._definition, curve)
        if trial.state in OPEN_TRIALS:  # Optuna's samplers pass over trials that wait
            frozen.state = OptunaState.RUNNING
        return frozen

    def _first(
        self, candidates: Iterator[dict[str, Any]], gang: GangConfig, refused: Counter[Refusal]
    ) -> NewTrial | None:
        """The first candidate that is a trial to add; those before it are counted by why they are not."""
        for params in candidates:
            spec = self._spec(params, gang)
            if spec is None:
                refused["invalid"] += 1
            elif self._is_known(spec):
                refused["known"] += 1
            else:
                prediction = self._predictor.predict(spec)
                verdict, reason = judge(prediction, self._definition, spec)
                if verdict != "cannot_fit":
                    return NewTrial(spec, params, "proposed", prediction, verdict, reason)
                refused["cannot_fit"] += 1
        return None

    def _is_known(self, spec: TrialSpec) -> bool:
        gangs = self._gangs | {spec.gang}
        return any(spec.model_copy(update={"gang": gang}).canonical_hash in self._known for gang in gangs)

    def _spec(self, params: Mapping[str, Any], gang: GangConfig) -> TrialSpec | None:
        """The base under these parameters, for a gang of this shape; None where that is no valid spec."""
        try:
            return apply({**self._definition.base, "gang": gang.model_dump()}, params)
        except InvalidSpec:
            return None

    def _samples(self, count: int) -> Iterator[dict[str, Any]]:
        """Samples of the study's sampler, each of which stays in the replay as a running trial to keep the next away.

        Each is seeded on its own by the study's seed, the number of trials and its place in line. Where the space is
        too large to go through, uniform samples follow.
        """
        uniform = UNIFORM_SAMPLES if self._points > SMALL_SPACE else 0
        for attempt in range(SAMPLES + uniform):
            seed = _seed(self._definition.seed, count, attempt)
            if self._definition.sampler == "random" or attempt >= SAMPLES:
                self._optuna_study.sampler = RandomSampler(seed)
            else:
                self._optuna_study.sampler = _FixedSpaceTpe(self._distributions, seed)
            asked = self._optuna_study.ask(self._distributions).params
            yield {path: _value(parameter, asked[path]) for path, parameter in self._space.items()}

    def _all_points(self, count: int) -> Iterator[dict[str, Any]]:
        """Every point of a small space, in an order drawn from the study's seed and the number of trials."""
        points = list(product(*map(_values, self._space.values())))
        random.Random(_seed(self._definition.seed, count, SAMPLES)).shuffle(points)
        return (dict(zip(self._space, point, strict=True)) for point in points)

    def _sentence(self, refused: Counter[Refusal]) -> str:
        """Why nothing is left to propose, with the numbers."""
        why: dict[Refusal, str] = {
            "known": "tried already, or equal to one that was",
            "invalid": "not a valid spec",
            "cannot_fit": f"certain not to fit the cap of {self._definition.cap_bytes:,} bytes",
        }
        counts = ", ".join(f"{refused[kind]} {why[kind]}" for kind in why if refused[kind])
        if self._points <= SMALL_SPACE:
            return f"the space has no point left to try: of {self._points} points {counts}"
        return f"no new point was found in {refused.total()} samples: {counts}"


class _FixedSpaceTpe(TPESampler):
    """TPE over all parameters jointly (Watanabe, 2023), with the constant liar, in a space known beforehand.

    Optuna would infer the space from every past trial at each ask. Every trial in the replay has every parameter, so
    that inference, and grouping parameters by co-occurrence, could only find this space again.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution], seed: int) -> None:
        super().__init__(seed=seed, multivariate=True, constant_liar=True)
        self._known_space = {path: each for path, each in distributions.items() if not each.single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._known_space


class _Replay(ReadOnlyStorage):
    """One study in memory: what our trials teach the sampler, and behind it the trials being asked for."""

    NAME = "replay"

    def __init__(self) -> None:
        self._trials: list[FrozenTrial] = []

    def __len__(self) -> int:
        return len(self._trials)

    def put(self, trial: FrozenTrial) -> None:
        """Add a trial at the end, or replace the one at its position."""
        self._trials[trial.number : trial.number + 1] = [trial]

    def cut(self, length: int) -> None:
        """Forget all but the first `length` trials."""
        del self._trials[length:]

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        number = len(self._trials)
        self._trials.append(FrozenTrial(number, OptunaState.RUNNING, None, None, None, {}, {}, {}, {}, {}, number))
        return number

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        trial = self._trials[trial_id]
        trial.params[param_name] = distribution.to_external_repr(param_value_internal)
        trial.distributions[param_name] = distribution

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._trials[trial_id].system_attrs[key] = value

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._trials[trial_id]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[OptunaState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]

    def get_study_id_from_name(self, study_name: str) -> int:
        return 0

    def get_study_name_from_id(self, study_id: int) -> str:
        return self.NAME

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return [StudyDirection.MINIMIZE]

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def get_all_studies(self) -> list[FrozenStudy]:
        return [FrozenStudy(self.NAME, StudyDirection.MINIMIZE, {}, {}, 0)]


def _seed(*parts: int) -> int:
    """A 32-bit seed that differs wherever any part does."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def _values(parameter: Parameter) -> tuple[Any, ...]:
    """Every value of a parameter that takes finitely many."""
    return tuple(parameter.value_at(index) for index in range(int(parameter.count)))


def _value(parameter: Parameter, sampled: Any) -> Any:
    """A sampled value as it stands in the space: Optuna has JSON text for lists, and rounding errors in steps."""
    if parameter.choice is not None:
        return next(value for value in parameter.choice if as_category(value) == sampled)
    assert parameter.low is not None and parameter.high is not None
    if parameter.step is None:  # a logarithm there and back may end a little outside
        return min(max(sampled, parameter.low), parameter.high)
    return parameter.value_at(round(parameter.steps_to(sampled)))
