"""Optuna's samplers over the points of a space: a replay of what the memory selects, and one seeded ask at a time."""

import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy  # the storage contract names it, though nothing exports it
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from orchestrator.lesson import Lesson
from orchestrator.optuna_view import ReadOnlyStorage, distributions_of, frozen_trial
from orchestrator.points import Domain
from orchestrator.space import Parameter, as_category
from orchestrator.study import NewStudy

POPULATION = 20  # of nsga2: the best so far that children are made of
SEEN_BY_GP = 150  # trials: its cost grows with their cube
GENERATION = f"{NSGAIISampler.__name__}:generation"  # where the sampler looks for a trial's


class OptunaSampler:
    """One of Optuna's samplers for one study. All its state is what it is given at an ask."""

    def __init__(self, name: str, domain: Domain, definition: NewStudy) -> None:
        self._name, self._domain, self._definition = name, domain, definition
        self._distributions = distributions_of(domain)
        self._replay = _Replay(len(definition.objectives))
        self._frozen: dict[int, tuple[Lesson, FrozenTrial]] = {}  # by number, of the lessons of the last ask

    @contextmanager
    def taught(self, lessons: Sequence[Lesson]) -> Iterator[None]:
        """While it is open, asks know these lessons, and what was asked before them within it."""
        if self._name == "gp":
            lessons = lessons[-SEEN_BY_GP:]
        frozen = [self._freeze(lesson) for lesson in lessons]
        self._frozen = {lesson.number: (lesson, each) for lesson, each in zip(lessons, frozen, strict=True)}
        self._replay.load(frozen)
        try:
            yield
        finally:
            self._replay.load([])

    def ask(self, seed: int) -> dict[str, Any]:
        """A canonical point, which stays in the replay as a running trial to keep the next one away."""
        study = optuna.load_study(study_name=_Replay.NAME, storage=self._replay, sampler=self._sampler(seed))
        trial, point = study.ask(), dict[str, Any]()
        for dimension in self._domain.dimensions:
            if self._domain.is_active(dimension.name, point):
                asked = _suggest(trial, dimension.name, self._distributions[dimension.name])
                point[dimension.name] = _value(dimension.parameter, asked)
        return self._domain.canonical(point)

    def _sampler(self, seed: int) -> BaseSampler:
        if self._name == "gp":
            return GPSampler(seed=seed, independent_sampler=RandomSampler(seed), warn_independent_sampling=False)
        if self._name == "nsga2":
            return NSGAIISampler(population_size=POPULATION, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # of grouping, which conditional spaces need
            return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)

    def _freeze(self, lesson: Lesson) -> FrozenTrial:
        known = self._frozen.get(lesson.number)
        if known is not None and known[0] is lesson:
            return known[1]
        curve: Mapping[int, float] = {}
        if lesson.kind == "stopped" and lesson.trial.result is not None:
            curve = {lesson.trial.result.steps: lesson.values[0]}
        placed = replace(lesson.trial, params=dict(lesson.point))
        frozen = frozen_trial(placed, self._distributions, self._definition, curve)
        if lesson.kind == "open":  # Optuna's samplers pass over trials that wait
            frozen.state = OptunaState.RUNNING
        frozen.system_attrs[GENERATION] = 0  # so that the next generation's parents are the best of all
        return frozen


class _Replay(ReadOnlyStorage):
    """One study in memory: what lessons teach the sampler, and behind it the trials being asked for."""

    NAME = "replay"

    def __init__(self, objectives: int) -> None:
        self._directions = [StudyDirection.MINIMIZE] * objectives
        self.load([])

    def load(self, trials: Sequence[FrozenTrial]) -> None:
        """Hold these trials alone, numbered by their place."""
        self._trials = list(trials)
        for number, trial in enumerate(self._trials):
            trial.number = trial._trial_id = number
        self._attributes: dict[str, Any] = {}

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

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:  # type: ignore[override]
        self._attributes[key] = value

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
        return self._directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._attributes

    def get_all_studies(self) -> list[FrozenStudy]:
        return [FrozenStudy(self.NAME, None, {}, {}, 0, directions=self._directions)]


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, FloatDistribution | optuna.distributions.IntDistribution)
    low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
    if isinstance(distribution, FloatDistribution):
        return trial.suggest_float(name, low, high, step=step, log=log)
    return trial.suggest_int(name, int(low), int(high), step=int(step or 1), log=log)


def _value(parameter: Parameter, sampled: Any) -> Any:
    """A sampled value as it stands in the space: Optuna has JSON text for lists, and rounding errors in steps."""
    if parameter.choice is not None:
        return next(value for value in parameter.choice if as_category(value) == sampled)
    assert parameter.low is not None and parameter.high is not None
    if parameter.step is None:  # a logarithm there and back may end a little outside
        return min(max(sampled, parameter.low), parameter.high)
    return parameter.value_at(round(parameter.steps_to(sampled)))
