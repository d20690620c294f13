"""What clients send: the shape of each body, and the domain value that it means. Unknown keys are refused."""

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from api.context import STUDY_NAME
from orchestrator.check import never_legal_values, rest_problems
from orchestrator.families import BLOCKS, FAMILIES, FAMILY, LAYERS, TYING
from orchestrator.labels import MOST_TAGS
from orchestrator.points import Domain, value_at
from orchestrator.space import Parameter
from orchestrator.study import (
    CAP_BYTES,
    CAP_SECONDS,
    NewStudy,
    Objective,
    PromotionConfig,
    ReplicationConfig,
    SamplerName,
    SpendingConfig,
    StoppingConfig,
)
from worker.recipes import Size, load_recipe, require_full
from worker.report import TrialResult
from worker.shape import FieldError, Frozen
from worker.spec import GangConfig, InvalidSpec, Problem, TrialSpec, override, parse_spec, problems_of

ALLOWING = "allow_duplicate (--allow-duplicate)"
"""What lets a configuration in again, over HTTP and on the command line."""


class Input(Frozen):
    """A body that refuses what a Frozen does."""


class StudyBody(Input):
    """What a study to create and a clone may say alike."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="Dotted paths of the base spec, with new values."
    )
    space: dict[str, Parameter] = Field(default_factory=dict)
    sampler: SamplerName = "caddie"
    objectives: tuple[Objective, ...] = ("val_bpb",)
    seed: int = Field(default=0, ge=0, lt=2**31)
    max_trials: int = Field(default=100, ge=0, le=1_000_000)
    cap_bytes: int = Field(default=CAP_BYTES, ge=1, le=2**53)
    tolerance_bytes: int = Field(default=0, ge=0, le=2**53)
    cap_train_seconds: float = Field(default=CAP_SECONDS, gt=0)
    cap_evaluate_seconds: float = Field(default=CAP_SECONDS, gt=0)
    stopping: StoppingConfig | None = None
    promotion: PromotionConfig | None = None
    replication: ReplicationConfig | None = None
    spending: SpendingConfig = SpendingConfig()
    gangs: tuple[GangConfig, ...] = Field(default=(), max_length=16)


class StudyIn(StudyBody):
    """A study to create: a base spec (or a recipe), with overrides, and the paths that vary."""

    recipe: str | None = None
    size: Size = Field(default="full", description="Of the recipe: as published, or tiny, for one CPU core.")
    base: dict[str, Any] | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: Any, handler: ModelWrapValidatorHandler["StudyIn"]) -> "StudyIn":
        try:
            return handler(data)
        except ValidationError as error:
            raise InvalidSpec((*problems_of(error, cls, "body"), *_rest_problems(data))) from None

    def definition(self) -> NewStudy:
        """The study that this body defines. Raises InvalidSpec, naming each field as the body has it."""
        if (self.recipe is None) == (self.base is None):
            raise InvalidSpec((Problem("base", self.base, "give exactly one of base and recipe"),))
        if self.recipe is None:
            require_full(self.size)
        base = load_recipe(self.recipe, self.size) if self.recipe is not None else self.base
        assert base is not None
        fields = self.model_dump(exclude={"recipe", "size", "base", "overrides"}, exclude_none=True)
        try:
            study = NewStudy.model_validate({**fields, "base": override(base, self.overrides)})
        except ValidationError as error:
            found = problems_of(error)
        except InvalidSpec as error:
            found = tuple(problem.within("base") for problem in error.problems)
        else:
            found = tuple(never_legal_values(study.base, study.space))
            if not found:
                return study
        raise InvalidSpec(tuple(_placed(problem, "base", {"overrides": self.overrides}) for problem in found))


class SpendingChange(Input):
    """What is to change of a study's budget; what is left out stays, and null lifts a limit."""

    gpu_hours: float | None = Field(default=None, gt=0, le=1e6, strict=True)
    dollars: float | None = Field(default=None, gt=0, le=1e6, strict=True)
    gpu_hour_dollars: float = Field(default=2.5, ge=0, le=1e6, strict=True)
    wall_hours: float | None = Field(default=None, gt=0, le=1e6, strict=True)
    target_bpb: float | None = Field(default=None, gt=0, le=100, strict=True)

    def over(self, spending: SpendingConfig) -> SpendingConfig:
        """The budget with these changes. Raises InvalidSpec, naming each field as the body has it."""
        try:
            return SpendingConfig.model_validate({**spending.model_dump(), **self.model_dump(exclude_unset=True)})
        except ValidationError as error:
            found = problems_of(error, SpendingConfig)
            raise InvalidSpec(tuple(problem.within("spending") for problem in found)) from None


class StudyChange(Input):
    """What is to change of a study; what is left out stays."""

    state: Literal["running", "paused", "stopped"] | None = None
    max_trials: int | None = Field(default=None, ge=0, le=1_000_000, description="At least what was proposed already.")
    spending: SpendingChange | None = None
    priority: int | None = Field(default=None, ge=-1000, le=1000, description="Higher before lower; 0 to begin with.")


class CloneIn(StudyBody):
    """A new study made from another one: what is left out is as it is there."""

    def definition(self, source: NewStudy) -> NewStudy:
        """The new study. Raises InvalidSpec, naming each field as the body has it."""
        said = {name: getattr(self, name) for name in self.model_fields_set}
        try:
            return StudyIn.model_validate({**dict(source), **said}).definition()
        except ValidationError as error:
            raise InvalidSpec(problems_of(error)) from None


def _rest_problems(data: Any) -> Iterator[Problem]:
    """What else is wrong with a study's body that could not be read as a whole, so that all is said at once."""
    body = data if isinstance(data, Mapping) else {}
    overrides = body.get("overrides", {})
    try:
        base = load_recipe(body["recipe"], body.get("size", "full")) if "recipe" in body else body["base"]
        changed = override(base, overrides)
    except (AttributeError, KeyError, TypeError, ValueError):  # which is said already, or has nothing to be judged on
        return
    for problem in rest_problems({**body, "base": changed}):
        yield _placed(problem, "base", {"overrides": overrides})


class SpecIn(Input):
    """A configuration: `spec`, `recipe` or `params`, each with overrides, or overrides alone, of the study's base."""

    spec: dict[str, Any] | None = Field(
        default=None, description="A whole TrialSpec; what is left out has its default."
    )
    recipe: str | None = Field(default=None, description="The name of a recipe.")
    size: Size = Field(default="full", description="Of the recipe: as published, or tiny, for one CPU core.")
    params: dict[str, Any] | None = Field(
        default=None, description="A point of the study's space, by dimension, over its base."
    )
    overrides: dict[str, Any] = Field(default_factory=dict, description="Dotted paths of the spec, with new values.")

    def build(self, study: NewStudy | None) -> TrialSpec:
        """The spec that this body says, in this study. Raises InvalidSpec, naming each field as the body has it."""
        base, params = self._base(study), self._checked_params(study)
        said = [*params, TYING, LAYERS, BLOCKS] if FAMILY in params else [*params]
        changes = {"overrides": self.overrides, "params": set(said)}
        prefix = "" if self.spec is None else "spec"
        try:
            if study is None or not params:
                return parse_spec(override(base, self.overrides))
            domain, at_base = Domain(study.base, study.space), parse_spec(study.base)
            path = domain.fill_path or ""
            filled = params.get(path, value_at(at_base, path))  # a person says it, or means the base's
            return domain.spec(params, at_base.gang, lambda _build, _values: filled, self.overrides)
        except InvalidSpec as error:
            found = (problem.within(prefix) for problem in error.problems)
            raise InvalidSpec(tuple(_placed(problem, prefix, changes) for problem in found)) from None

    def _base(self, study: NewStudy | None) -> dict[str, Any]:
        given = [name for name in ("spec", "recipe", "params") if getattr(self, name) is not None]
        if len(given) > 1:
            message = "give exactly one of spec, recipe and params, not " + " and ".join(given)
            raise InvalidSpec((Problem(given[1], getattr(self, given[1]), message),))
        if self.recipe is not None:
            return load_recipe(self.recipe, self.size)
        require_full(self.size)
        if self.spec is not None:
            return self.spec
        if study is not None and (given or self.overrides):
            return study.base
        wanted = "spec, recipe, params, or overrides of the study's base" if study else "spec or recipe, or a study"
        raise InvalidSpec((Problem("spec", None, f"give {wanted}"),))

    def _checked_params(self, study: NewStudy | None) -> dict[str, Any]:
        if self.params is None:
            return {}
        assert study is not None, "without a study there was no base to change"
        problems = tuple(_point_problems(self.params, study))
        if problems:
            raise InvalidSpec(problems)
        return self.params


class TrialIn(SpecIn):
    """A trial to submit."""

    allow_duplicate: bool = Field(default=False, description="Add it even where the study has the same configuration.")


class BatchIn(Input):
    """Trials to submit together: all of them, or none."""

    trials: tuple[TrialIn, ...] = Field(min_length=1, max_length=100)

    def build_all(self, study: NewStudy) -> tuple[TrialSpec, ...]:
        """The specs, in their order. Raises InvalidSpec, naming every wrong field of every trial, and each trial that
        is the same as one before it and may not be."""
        specs: list[TrialSpec] = []
        problems: list[Problem] = []
        for place, trial in enumerate(self.trials):
            try:
                specs.append(trial.build(study))
            except InvalidSpec as error:
                problems += (problem.within(f"trials.{place}") for problem in error.problems)
            except FieldError as error:
                problems.append(Problem(error.path, error.value, error.expected).within(f"trials.{place}"))
        if problems:
            raise InvalidSpec(tuple(problems))
        first: dict[str, int] = {}
        for place, (trial, spec) in enumerate(zip(self.trials, specs, strict=True)):
            same = first.setdefault(spec.canonical_hash, place)
            if same != place and not trial.allow_duplicate:
                message = f"has the same configuration as trials.{same}; {ALLOWING} adds another"
                problems.append(Problem(f"trials.{place}", spec.canonical_hash[:16], message))
        if problems:
            raise InvalidSpec(tuple(problems))
        return tuple(specs)


class ImportIn(SpecIn):
    """A trial that was trained elsewhere, as `caddie trial --json` or `python -m worker --json` prints it."""

    result: TrialResult = Field(description="What came of it; it must be this spec's own.")


class PreviewIn(SpecIn):
    """A configuration to predict without running it; in a study, by what its trials have shown, against its cap."""

    study: str | None = Field(default=None, pattern=f"^{STUDY_NAME.pattern}$")
    cap_bytes: int | None = Field(default=None, ge=1, le=2**53)


Tag = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._:/-]{0,63}$")]


class TagsIn(Input):
    """All the tags that a trial is to have."""

    tags: tuple[Tag, ...] = Field(max_length=MOST_TAGS)


class TagsChange(Input):
    """Tags to give a trial and to take from it; it keeps its others. One that is in both is taken."""

    add: tuple[Tag, ...] = Field(default=(), max_length=MOST_TAGS)
    remove: tuple[Tag, ...] = Field(default=(), max_length=MOST_TAGS)


class SeedsIn(Input):
    """Further seeds for a complete trial: these, or so many of those that its study lists and the trial has not had."""

    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63, strict=True)], ...] = Field(default=(), max_length=64)
    count: int = Field(default=0, ge=0, le=64, strict=True)

    @model_validator(mode="after")
    def _check(self) -> "SeedsIn":
        if bool(self.seeds) == bool(self.count):
            raise FieldError("seeds", list(self.seeds), "give either seeds, or how many as count")
        return self


class NoteIn(Input):
    """A note about a trial: plain text."""

    text: str = Field(min_length=1, max_length=10_000)


def _point_problems(point: Mapping[str, Any], study: NewStudy) -> Iterator[Problem]:
    """What is wrong with a point of a study's space, of which what is left out has the base's value."""
    domain = Domain(study.base, study.space)
    parameters = {each.name: each.parameter for each in domain.dimensions}
    if domain.fill_path is not None and domain.fill is not None:
        parameters[domain.fill_path] = domain.fill.range
    for name, value in point.items():
        parameter = parameters.get(name)
        if parameter is None:
            known = ", ".join(parameters) or "no parameters"
            yield Problem(f"params.{name}", value, f"is not in the study's space, which has {known}")
        elif not parameter.contains(value):
            yield Problem(f"params.{name}", value, f"must be {_range(parameter)}")
        elif not domain.is_active(name, point):
            yield Problem(f"params.{name}", value, f"does not apply: {_why_not(name, point, study)}")


def _why_not(name: str, point: Mapping[str, Any], study: NewStudy) -> str:
    parameter, family = study.space.get(TYING if name == FAMILY else name), point.get(FAMILY)
    if any(family == each and name in FAMILIES[each].sets for each in FAMILIES):
        return f"the family {family} sets it"
    if parameter is not None and parameter.when is not None:
        return f"it does when {parameter.when}"
    return f"it belongs to another family of tying maps than {family}, or to a layer that is not there"


def _placed(problem: Problem, prefix: str, changes: Mapping[str, Collection[str]]) -> Problem:
    """The problem at the place in the body where its value came from: an override names itself, not what it changed."""
    field = problem.field.removeprefix(f"{prefix}.") if prefix else problem.field
    parts = field.split(".")
    places = {".".join(parts[: end + 1]) for end in range(len(parts))}
    for name, paths in changes.items():
        if any(place in paths for place in places):
            return Problem(f"{name}.{field}", problem.value, problem.message, problem.kind)
    return problem


def _range(parameter: Parameter) -> str:
    if parameter.choice is not None:
        return "one of " + ", ".join(repr(value) for value in parameter.choice)
    kind = "a whole number" if parameter.whole else "a number"
    step = f" in steps of {parameter.step}" if parameter.step is not None else ""
    return f"{kind} from {parameter.low} to {parameter.high}{step}"
