"""Optuna's view of our tables: its studies and trials, live and read-only. There is no second copy to keep in step."""

import copy
import threading
from collections.abc import Container, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy  # the storage contract names it, though nothing exports it
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from orchestrator import store
from orchestrator.caps import excess, refused_by
from orchestrator.curves import list_curves
from orchestrator.database import Database
from orchestrator.errors import NotFound
from orchestrator.lifecycle import OPEN_TRIALS, TrialState
from orchestrator.points import Domain
from orchestrator.reopening import list_reopened
from orchestrator.space import Parameter, as_category
from orchestrator.study import NewStudy, Study, Trial

OBJECTIVE = "val_bpb"
CHUNK = 500  # trials read by one query: databases limit its variables

OPTUNA_STATES: Mapping[TrialState, OptunaState] = {
    TrialState.QUEUED: OptunaState.WAITING,
    TrialState.RUNNING: OptunaState.RUNNING,
    TrialState.COMPLETE: OptunaState.COMPLETE,
    TrialState.PRUNED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
    TrialState.CANCELLED: OptunaState.FAIL,
    # With its violated constraint: samplers learn where nothing fits, and no list of complete trials ever holds it.
    TrialState.INFEASIBLE: OptunaState.PRUNED,
}


class ReadOnlyError(RuntimeError):
    """Someone tried to write through a view. Nothing was changed."""


def distribution_of(parameter: Parameter) -> BaseDistribution:
    """A parameter as Optuna's distribution; a choice has its categories (space.as_category) as choices."""
    if parameter.choice is not None:
        return CategoricalDistribution(tuple(as_category(value) for value in parameter.choice))
    assert parameter.low is not None and parameter.high is not None
    high: float = parameter.high
    if parameter.step is not None:  # Optuna warns of a last step that is cut short
        high = parameter.value_at(int(parameter.count) - 1)
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(high), log=parameter.log, step=int(parameter.step or 1))
    step_size = None if parameter.step is None else float(parameter.step)
    return FloatDistribution(float(parameter.low), float(high), log=parameter.log, step=step_size)


def distributions_of(domain: Domain) -> dict[str, BaseDistribution]:
    """The dimensions of a study's points as Optuna's distributions, by name."""
    return {each.name: distribution_of(each.parameter) for each in domain.dimensions}


def frozen_trial(
    trial: Trial, distributions: Mapping[str, BaseDistribution], study: NewStudy, curve: Mapping[int, float]
) -> FrozenTrial:
    """A trial as Optuna knows one: state, values, the dimensions of its point, constraint, attributes, scores by step.

    The constraints are what the result has above each cap of the study; where the trial was refused as infeasible, what
    was predicted above them, one at least violated; before that, none. They stand under the keys that Optuna 5 writes
    and in the list that Optuna's dashboard reads. Scores by step are those of a single objective: Optuna has none
    beside several.
    """
    state = OPTUNA_STATES[trial.state]
    params = {path: as_category(value) for path, value in trial.params.items() if path in distributions}
    over: dict[str, float] = {}
    if trial.state is TrialState.INFEASIBLE:
        over = refused_by(trial, study)
    elif trial.result is not None:
        over = excess(trial.result, study)
    values: list[float] | None = None
    if state is OptunaState.COMPLETE and trial.result is not None:
        values = [float(getattr(trial.result, objective)) for objective in study.objectives]
    return FrozenTrial(
        number=trial.number,
        trial_id=trial.id,
        state=state,
        value=None,
        values=values,
        datetime_start=None if state is OptunaState.WAITING else _local(trial.started_at or trial.created_at),
        datetime_complete=_local(trial.finished_at),
        params=params,
        distributions={path: distributions[path] for path in params},
        user_attrs=_attributes(trial),
        system_attrs=_constraints(over),
        intermediate_values=dict(curve) if len(study.objectives) == 1 else {},
    )


def _constraints(over: Mapping[str, float]) -> dict[str, Any]:
    by_name = {f"constraints:{name}": value for name, value in over.items()}
    return {**by_name, "constraints": list(over.values())} if over else {}


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether no constraint of the trial is violated."""
    return all(value <= 0 for value in trial.constraints.values())


class ReadOnlyStorage(BaseStorage):
    """An Optuna storage that refuses every write."""

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> NoReturn:
        _refuse("create a study")

    def delete_study(self, study_id: int) -> NoReturn:
        _refuse("delete a study")

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> NoReturn:
        _refuse(f"set the study attribute {key!r}")

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> NoReturn:
        _refuse(f"set the study attribute {key!r}")

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        _refuse("create a trial")

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        _refuse(f"set the parameter {param_name!r}")

    def set_trial_state_values(
        self, trial_id: int, state: OptunaState, values: Sequence[float] | None = None
    ) -> NoReturn:
        _refuse("end a trial")

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> NoReturn:
        _refuse("report a value")

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> NoReturn:
        _refuse(f"set the trial attribute {key!r}")

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        _refuse(f"set the trial attribute {key!r}")


class StudyView(ReadOnlyStorage):
    """Every study of a database as an Optuna storage. Ids are those of our tables; safe to share between threads.

    Finished trials change only where they go on, so each is kept until then; a poll reads the states and the
    open trials.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._finished: dict[int, dict[int, FrozenTrial]] = {}  # by study id, then number
        self._reopened_until: dict[int, int] = {}  # study id -> the last event that was followed
        self._studies: dict[int, int] = {}  # trial id -> study id
        self._distributions: dict[int, dict[str, BaseDistribution]] = {}  # by study id
        self._lock = threading.Lock()

    def get_study_id_from_name(self, study_name: str) -> int:
        with self._database.read() as session:
            try:
                return store.get_study(session, study_name).id
            except NotFound as error:
                raise KeyError(str(error)) from None

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._study(study_id).name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return _directions(self._study(study_id).definition)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return _frozen_study(self._study(study_id)).user_attrs

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return _frozen_study(self._study(study_id)).system_attrs

    def get_all_studies(self) -> list[FrozenStudy]:
        with self._database.read() as session:
            return [_frozen_study(study) for study in store.list_studies(session)]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[OptunaState] | None = None
    ) -> list[FrozenTrial]:
        """The study's trials by number. Raises KeyError where there is no such study."""
        trials = self._load(self._study(study_id))
        if states is not None:
            trials = [trial for trial in trials if trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """The trial of this id. Raises KeyError."""
        known = self._studies.get(trial_id)
        for study_id in self._study_ids() if known is None else [known]:
            for trial in self.get_all_trials(study_id, deepcopy=False):
                if trial._trial_id == trial_id:
                    return trial
        raise KeyError(f"no trial {trial_id}")

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """The complete trial of the lowest BPB among those that fit. Raises ValueError where none does."""
        complete = self.get_all_trials(study_id, deepcopy=False, states=(OptunaState.COMPLETE,))
        feasible = [trial for trial in complete if is_feasible(trial)]
        if not feasible:
            raise ValueError(f"of {len(complete)} complete trials none fits under the cap")
        return min(feasible, key=lambda trial: trial.values)

    def _study_ids(self) -> list[int]:
        with self._database.read() as session:
            return [study.id for study in store.list_studies(session)]

    def _study(self, study_id: int) -> Study:
        with self._database.read() as session:
            for study in store.list_studies(session):
                if study.id == study_id:
                    return study
        raise KeyError(f"no study {study_id}")

    def _distributions_of(self, study: Study) -> Mapping[str, BaseDistribution]:
        if study.id not in self._distributions:  # a definition never changes
            definition = study.definition
            self._distributions[study.id] = distributions_of(Domain(definition.base, definition.space))
        return self._distributions[study.id]

    def _load(self, study: Study) -> list[FrozenTrial]:
        while True:
            trials = self._look(study)
            if trials is not None:
                return trials

    def _look(self, study: Study) -> list[FrozenTrial] | None:
        """The trials of one snapshot; None where another thread has meanwhile followed promotions that it lacks."""
        with self._lock:
            finished = self._finished.setdefault(study.id, {})
            known, followed = set(finished), self._reopened_until.get(study.id, 0)
        with self._database.read() as session:
            reopened, last = list_reopened(session, study.id, followed)
            known -= reopened
            wanted = [number for number in store.list_states(session, study.id) if number not in known]
            trials: list[Trial] = []
            curves: dict[int, dict[int, float]] = {}
            for start in range(0, len(wanted), CHUNK):
                numbers = wanted[start : start + CHUNK]
                trials += store.list_trials(session, study.id, numbers=numbers)
                curves |= list_curves(session, study.id, OBJECTIVE, numbers)
        distributions = self._distributions_of(study)
        fresh = {
            trial.number: (
                trial.state,
                frozen_trial(trial, distributions, study.definition, curves.get(trial.number, {})),
            )
            for trial in trials
        }
        with self._lock:
            if last < self._reopened_until.get(study.id, 0):
                return None
            self._reopened_until[study.id] = last
            for number in reopened:
                finished.pop(number, None)
            finished.update({n: frozen for n, (state, frozen) in fresh.items() if state not in OPEN_TRIALS})
            self._studies.update({frozen._trial_id: study.id for _, frozen in fresh.values()})
            merged = {**{n: frozen for n, (_, frozen) in fresh.items()}, **finished}
        return [merged[number] for number in sorted(merged)]


class DashboardView(StudyView):
    """The view for Optuna's dashboard, which insists on a best trial as soon as any is complete.

    While every complete trial is over the cap there is none, so they are shown as pruned until the first one fits.
    """

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[OptunaState] | None = None
    ) -> list[FrozenTrial]:
        trials = super().get_all_trials(study_id, deepcopy)
        complete = [trial for trial in trials if trial.state is OptunaState.COMPLETE]
        if complete and not any(is_feasible(trial) for trial in complete):
            trials = [_as_pruned(trial) if trial.state is OptunaState.COMPLETE else trial for trial in trials]
        return [trial for trial in trials if states is None or trial.state in states]


def _refuse(what: str) -> NoReturn:
    raise ReadOnlyError(f"Optuna's view is read-only and cannot {what}; use Caddie's API, which owns the tables")


def _frozen_study(study: Study) -> FrozenStudy:
    definition = study.definition
    attributes = {
        "state": study.state.value,
        "cap_bytes": definition.cap_bytes,
        "sampler": definition.sampler,
        "seed": definition.seed,
        "max_trials": definition.max_trials,
        "refused": study.refused,
    }
    system = {"study:metric_names": list(definition.objectives)}
    return FrozenStudy(study.name, None, attributes, system, study.id, directions=_directions(definition))


def _directions(definition: NewStudy) -> list[StudyDirection]:
    return [StudyDirection.MINIMIZE] * len(definition.objectives)


def _attributes(trial: Trial) -> dict[str, Any]:
    sharing, result = trial.spec.sharing, trial.result
    attributes: dict[str, Any] = {
        "state": trial.state.value,
        "origin": trial.origin,
        "verdict": trial.verdict,
        "parameters": trial.prediction.parameters,
        "virtual_layers": sharing.virtual_layers,
        "unique_blocks": sharing.unique_blocks,
        "tying_map": list(sharing.tying_map),
        "lora_rank": sharing.lora.rank,
        "predicted_artifact_bytes": trial.prediction.artifact_bytes,
    }
    if trial.reason:
        attributes["reason"] = trial.reason
    if trial.suggestion is not None:
        attributes |= {
            f"proposed_by_{name}": said for name, said in trial.suggestion.model_dump(exclude_none=True).items()
        }
    if result is not None:
        attributes |= {
            "val_bpb": result.val_bpb,
            "val_bpb_prequant": result.val_bpb_prequant,
            "artifact_bytes": result.artifact_bytes,
            "steps": result.steps,
            "train_seconds": result.train_seconds,
            "evaluate_seconds": result.evaluate_seconds,
        }
    return attributes


def _as_pruned(trial: FrozenTrial) -> FrozenTrial:
    pruned = copy.copy(trial)
    pruned.state = OptunaState.PRUNED
    return pruned


def _local(moment: datetime | None) -> datetime | None:
    """As Optuna has its datetimes: in local time, without a zone."""
    return None if moment is None else moment.astimezone().replace(tzinfo=None)
