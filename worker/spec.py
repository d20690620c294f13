"""TrialSpec: everything one trial is, as one frozen value that cannot be invalid."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from worker.inventory import is_quantised, require_compatible, tensor_inventory
from worker.packing import QuantisationConfig
from worker.scoring import EvaluationConfig
from worker.shape import FieldError, Frozen, ModelConfig, keys_at
from worker.sharing import SharingConfig


class OptimizerConfig(Frozen):
    """Muon for matrices, AdamW for the rest. Learning rates are peaks; the schedule multiplies all of them."""

    matrix_lr: float = Field(default=0.04, gt=0)
    embedding_lr: float = Field(default=0.05, gt=0)
    scalar_lr: float = Field(default=0.04, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    muon_momentum_start: float = Field(default=0.85, ge=0, lt=1)
    muon_momentum_warmup_steps: int = Field(default=500, ge=0)
    muon_iterations: int = Field(default=5, ge=1, le=20)
    muon_weight_decay: float = Field(default=0.0, ge=0)
    muon_coefficients: Literal["constant", "per_iteration"] = "constant"
    """Of the Newton-Schulz polynomial: Jordan's, the same five times, or five of their own (1855)."""
    row_normalise: bool = False
    """Rows of a matrix's update get norm 1 before it is orthogonalised (MuonEq-R; 1394, 2090)."""
    table_lr: float | None = Field(default=None, gt=0)
    """Of the bigram and value-embedding tables; none means scalar_lr."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    adam_weight_decay: float = Field(default=0.0, ge=0)
    embedding_weight_decay: float | None = Field(default=None, ge=0)
    """Of the embedding and the tables; none means adam_weight_decay."""
    gradient_clip: float = Field(default=0.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 clips nothing."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.muon_coefficients == "per_iteration" and self.muon_iterations != 5:
            raise FieldError("muon_iterations", self.muon_iterations, "must be 5 with muon_coefficients per_iteration")
        return self


class ScheduleConfig(Frozen):
    """The learning-rate multiplier: 1, then linear to 0 at the end of the budget, but never below `min_multiplier`.

    `warmdown_steps` is the length of the descent in steps, converted to seconds by the mean step time where the budget
    is wallclock (baseline); `warmdown_fraction` is its share of the budget (PRISM and later). One of the two.
    """

    warmdown_steps: int | None = Field(default=None, ge=0)
    warmdown_fraction: float | None = Field(default=None, ge=0, le=1)
    min_multiplier: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        if (self.warmdown_steps is None) == (self.warmdown_fraction is None):
            raise FieldError(
                "warmdown_steps", self.warmdown_steps, "set exactly one of warmdown_steps and warmdown_fraction"
            )
        return self

    @property
    def descends(self) -> bool:
        """Whether the multiplier ever falls below 1."""
        return bool(self.warmdown_steps or self.warmdown_fraction)


class DataConfig(Frozen):
    """What a trial reads: a dataset by its name in the data root's manifest.

    `batch_tokens` is the global batch of a step.
    """

    dataset: str = Field(default="stdlib_sp1024", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    sequence_length: int = Field(default=1024, ge=2, le=65_536)
    batch_tokens: int = Field(default=524_288, ge=2)
    micro_batch_sequences: int = Field(default=64, ge=1)
    """Sequences a rank holds in one forward pass at the most; the rest of its share is accumulated."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.batch_tokens % self.sequence_length:
            raise FieldError(
                "batch_tokens", self.batch_tokens, f"must be a multiple of sequence_length, {self.sequence_length}"
            )
        return self

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.sequence_length


class BudgetConfig(Frozen):
    """When training stops: after this many steps, seconds (training only) or tokens, whichever comes first."""

    steps: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "BudgetConfig":
        if self.steps is None and self.seconds is None and self.tokens is None:
            raise FieldError("steps", None, "set at least one of steps, seconds and tokens")
        return self


class ObjectiveConfig(Frozen):
    """What training minimises besides cross-entropy. The scores never include it."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    nuclear_norm: float = Field(default=0.0, ge=0)
    """Every `nuclear_norm_every` steps each quantised matrix's singular values shrink by this times the learning-rate
    multiplier: a proximal step on the sum of singular values (167)."""
    nuclear_norm_every: int = Field(default=50, ge=1)


class AveragingConfig(Frozen):
    """Averages of the weights over training, each scored; `apply` says which is packed.

    EMA: after every step, from the initial weights on. SWA: the mean of snapshots every `swa_every` steps, once the
    learning-rate multiplier is at most `swa_from`. 0 leaves an average out.
    """

    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    swa_every: int = Field(default=0, ge=0)
    swa_from: float = Field(default=0.4, gt=0, le=1)
    apply: Literal["none", "ema", "swa"] = "none"

    @model_validator(mode="after")
    def _check(self) -> "AveragingConfig":
        if self.apply == "ema" and not self.ema_decay:
            raise FieldError("apply", "ema", "needs an ema_decay above 0")
        if self.apply == "swa" and not self.swa_every:
            raise FieldError("apply", "swa", "needs a swa_every above 0")
        return self


class GangConfig(Frozen):
    """The processes that train one attempt together."""

    ranks: Literal[1, 2, 4, 8] = 1
    device: Literal["cpu", "gpu"] = "cpu"


class LimitsConfig(Frozen):
    """How long an attempt may take before its gang is replaced, how slow it may be before it is repeated, and what it
    leaves to the next. No part of what it computes, nor of the hash."""

    patience_seconds: float = Field(default=600.0, ge=1)
    """Of training: the longest step, with the validation and the checkpoint that may come with it."""
    silence_seconds: float = Field(default=3600.0, ge=1)
    """Of any other phase: ranks that start, read data, compile, score or pack say nothing until they are done."""
    attempt_seconds: float | None = Field(default=None, ge=1)
    """Of all phases together; none: no limit."""
    checkpoint_seconds: float | None = Field(default=None, gt=0)
    """Of training between two checkpoints, for the next attempt to go on from; none: it starts over."""
    cold: bool = False
    """Train in processes that have run nothing before, as a record has to."""
    slow_percent: float | None = Field(default=None, gt=0)
    """How much slower than its kind a success may be before its timing is void; none: it may be as slow as it is."""


class TrialSpec(Frozen):
    """One configuration to train. On one machine's CPU equal specs give bit-identical losses and artifacts, unless
    their budget is in seconds."""

    schema_version: Literal[1] = 1
    sharing: SharingConfig = SharingConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig(warmdown_steps=1200)
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig(seconds=600.0)
    objective: ObjectiveConfig = ObjectiveConfig()
    averaging: AveragingConfig = AveragingConfig()
    quantisation: QuantisationConfig = QuantisationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = Field(default=1337, ge=0, lt=2**63)
    gang: GangConfig = GangConfig()
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _check(self) -> "TrialSpec":
        require_compatible(self.model, self.sharing)
        if self.data.batch_sequences % self.gang.ranks:
            raise FieldError(
                "gang.ranks",
                self.gang.ranks,
                f"must divide the {self.data.batch_sequences} sequences of data.batch_tokens",
            )
        quantisation, window = self.quantisation, self.data.sequence_length
        if quantisation.calibrates and quantisation.calibration_tokens < window:
            message = f"must be at least a window, data.sequence_length, {window}"
            raise FieldError("quantisation.calibration_tokens", quantisation.calibration_tokens, message)
        averaging, lowest = self.averaging, self.schedule.min_multiplier if self.schedule.descends else 1.0
        if averaging.swa_every and averaging.swa_from < lowest:
            message = f"must be at least {lowest:g}, the least multiplier of the schedule"
            raise FieldError("averaging.swa_from", averaging.swa_from, message)
        stride, scored = self.evaluation.stride, self.evaluated_length
        if stride is not None and stride > scored:
            raise FieldError("evaluation.stride", stride, f"must be at most the window, {scored}")
        ttt = self.evaluation.ttt
        if ttt is not None and ttt.chunk_tokens < scored:
            raise FieldError("evaluation.ttt.chunk_tokens", ttt.chunk_tokens, f"must be at least a window, {scored}")
        return self

    @property
    def evaluated_length(self) -> int:
        """Tokens of a validation window."""
        return self.evaluation.sequence_length or self.data.sequence_length

    @property
    def canonical_hash(self) -> str:
        """SHA-256 (hex) of the configuration without seed and limits: equal for one model trained in one way."""
        return hashlib.sha256(json.dumps(_canonical(self), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an input: the dotted path, the value there, and what would be right."""

    field: str
    value: Any
    message: str
    kind: Literal["unknown", "missing", "value", "rule"] = "rule"
    """An unknown key, one that must be given, a value wrong in itself, or a rule that other fields have a part in."""

    def within(self, path: str) -> "Problem":
        """The same problem in a larger input, where this one lies at `path`."""
        return replace(self, field=f"{path}.{self.field}" if path else self.field)

    def __str__(self) -> str:
        got = "" if self.kind == "missing" else f" (got {self.value!r})"
        return f"{self.field}: {self.message}{got}"


MOST_SAID = 50


class InvalidSpec(ValueError):
    """Input that is no TrialSpec. `problems` holds every one found; nothing was built."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        more = f"; and {len(problems) - MOST_SAID} more" if len(problems) > MOST_SAID else ""
        super().__init__("; ".join(str(problem) for problem in problems[:MOST_SAID]) + more)
        self.problems = problems


def parse_spec(data: Any) -> TrialSpec:
    """The TrialSpec that plain data (from JSON or YAML) says. Raises InvalidSpec, which names each field."""
    try:
        return TrialSpec.model_validate(data)
    except ValidationError as error:
        raise InvalidSpec(problems_of(error, TrialSpec)) from None


def problems_of(
    error: ValidationError, model: type[BaseModel] | None = None, whole: str = "spec"
) -> tuple[Problem, ...]:
    """A pydantic error as problems with dotted paths; of the `whole`, where what is wrong has no path. An unknown key
    comes with what would be right where the `model` is given that the input was to be."""
    return tuple(
        problem
        for detail in error.errors(include_url=False)
        for problem in problems_at(detail["loc"], detail, model, whole)
    )


def problems_at(
    place: Sequence[int | str], detail: Mapping[str, Any], model: type[BaseModel] | None = None, whole: str = "spec"
) -> Iterator[Problem]:
    """The same for one of its details, with the place of that in the input."""
    path, value, cause = ".".join(map(str, place)), detail["input"], detail.get("ctx", {}).get("error")
    if isinstance(cause, InvalidSpec):
        yield from (problem.within(path) for problem in cause.problems)
    elif isinstance(cause, FieldError):
        yield Problem(cause.path, cause.value, cause.expected).within(path)
    elif cause is not None:
        yield Problem(path or whole, value, str(cause))
    elif detail["type"] == "extra_forbidden":
        yield Problem(path, value, f"is not a known key{_hint(str(place[-1]), keys_at(place[:-1], model))}", "unknown")
    elif detail["type"] == "missing":
        yield Problem(path, None, "is missing", "missing")
    elif detail["type"] in ("dict_type", "model_type", "model_attributes_type"):
        yield Problem(path or whole, value, "must be a mapping", "value")
    else:
        yield Problem(path or whole, value, detail["msg"], "value")


def _hint(name: str, keys: Sequence[str]) -> str:
    close = get_close_matches(name, keys, 1)
    return f": did you mean {close[0]}?" if close else f": must be one of {', '.join(keys)}" if keys else ""


def override(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a spec's plain data with dotted paths replaced in order, e.g. {"sharing.lora.rank": 4}.

    Parts on a path that are missing or null are made. Raises InvalidSpec for a path through something else that has no
    parts, such as a tying pattern's bare name, for an empty part, and for what JSON does not have, such as a date.
    Validates nothing more.
    """
    changed: dict[str, Any] = _copy(data, "")
    for path, value in changes.items():
        *parents, last = path.split(".")
        if not all((*parents, last)):
            message = "is no path: must be names with one dot between, such as sharing.lora.rank"
            raise InvalidSpec((Problem(path, value, message, "unknown"),))
        place = changed
        for depth, name in enumerate(parents, 1):
            if place.get(name) is None:
                place[name] = {}
            if not isinstance(place[name], dict):
                parent = ".".join(parents[:depth])
                message = f"has no parts, so {path} cannot be set: give {parent} as a mapping"
                raise InvalidSpec((Problem(parent, place[name], message, "value"),))
            place = place[name]
        place[last] = _copy(value, path)
    return changed


def _copy(value: Any, path: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise InvalidSpec(tuple(_not_json(value, path))) from None
    except ValueError:  # YAML can say that
        raise InvalidSpec((Problem(path or "spec", value, "must not contain itself", "value"),)) from None


def _not_json(value: Any, path: str) -> Iterator[Problem]:
    """What in a value JSON does not have."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str | int | float | None):
                yield Problem(path or "spec", key, "must have keys that are text", "value")
            yield from _not_json(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _not_json(part, f"{path}.{index}" if path else str(index))
    elif not isinstance(value, str | int | float | None):
        message = f"must be text, a number, true, false, null, a list or a mapping, not a {type(value).__name__}"
        yield Problem(path or "spec", value, message, "value")


def _canonical(spec: TrialSpec) -> dict[str, Any]:
    """The configuration with everything that changes nothing removed."""
    longest = max(spec.data.sequence_length, spec.evaluated_length)
    inventory = tensor_inventory(spec.model, spec.sharing)
    quantised = {each.tensor_class for each in inventory if is_quantised(each, spec.quantisation.half_below)}
    update = {
        "sharing": spec.sharing.canonical(),
        "model": spec.model.canonical(spec.sharing.tying_map, longest),
        "optimizer": _canonical_optimizer(spec),
        "quantisation": spec.quantisation.canonical(sorted(quantised)),
        "evaluation": _canonical_evaluation(spec),
    }
    if not spec.schedule.descends:
        update["schedule"] = ScheduleConfig(warmdown_fraction=0)
    if not spec.objective.nuclear_norm:
        update["objective"] = spec.objective.model_copy(update={"nuclear_norm_every": 1})
    if not spec.averaging.swa_every:
        update["averaging"] = spec.averaging.model_copy(update={"swa_from": 1.0})
    return spec.model_copy(update=update).model_dump(mode="json", exclude={"seed", "limits"})


def _canonical_optimizer(spec: TrialSpec) -> OptimizerConfig:
    optimizer = spec.optimizer
    tables = spec.model.bigram_buckets or spec.model.value_embedding_width
    same: dict[str, object] = {"table_lr": (optimizer.table_lr or optimizer.scalar_lr) if tables else None}
    if optimizer.embedding_weight_decay is None:
        same["embedding_weight_decay"] = optimizer.adam_weight_decay
    if not optimizer.muon_momentum_warmup_steps or optimizer.muon_momentum_start == optimizer.muon_momentum:
        same |= {"muon_momentum_warmup_steps": 0, "muon_momentum_start": optimizer.muon_momentum}
    return optimizer.model_copy(update=same)


def _canonical_evaluation(spec: TrialSpec) -> EvaluationConfig:
    evaluation, length = spec.evaluation, spec.evaluated_length
    same: dict[str, object] = {"sequence_length": length}
    if evaluation.stride == length:
        same["stride"] = None
    if spec.sharing.unique_blocks == spec.sharing.virtual_layers:
        same["extra_recurrence"] = 0  # no block is tied
    return evaluation.model_copy(update=same)
