"""TrialSpec: everything one trial is, as one frozen value that cannot be invalid."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from worker.shape import FieldError, Frozen, ModelConfig
from worker.sharing import LoraConfig, SharingConfig, TyingConfig


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
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    adam_weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=0.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 clips nothing."""


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


class QuantisationConfig(Frozen):
    """How the trained weights become bytes: symmetric integers with an fp16 scale a row, then a byte codec.

    Matrices with more than `half_below` elements are quantised; every other tensor is kept in half precision.
    """

    bits: int = Field(default=6, ge=4, le=8)
    codec: Literal["zstd", "zlib"] = "zstd"
    level: int = Field(default=22, ge=1, le=22)
    half_below: int = Field(default=65_536, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "QuantisationConfig":
        if self.codec == "zlib" and self.level > 9:
            raise FieldError("level", self.level, "zlib goes from 1 to 9")
        return self


class EvaluationConfig(Frozen):
    """Scoring in bits per byte over non-overlapping windows of the training sequence length."""

    validations: int = Field(default=4, ge=0, le=1000)
    """Validations during training, at equal fractions of the budget."""
    validation_tokens: int | None = Field(default=None, ge=2)
    """Validation tokens of those intermediate scores; none means all, as the final scores always use."""
    batch_sequences: int = Field(default=64, ge=1)


class GangConfig(Frozen):
    """The processes that train one attempt together."""

    ranks: Literal[1, 2, 4, 8] = 1
    device: Literal["cpu", "gpu"] = "cpu"


class TrialSpec(Frozen):
    """One configuration to train. Equal specs on one machine give bit-identical losses and artifacts."""

    schema_version: Literal[1] = 1
    sharing: SharingConfig = SharingConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig(warmdown_steps=1200)
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig(seconds=600.0)
    quantisation: QuantisationConfig = QuantisationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = Field(default=1337, ge=0, lt=2**63)
    gang: GangConfig = GangConfig()

    @model_validator(mode="after")
    def _check(self) -> "TrialSpec":
        if self.sharing.lora.rank > self.model.width:
            raise FieldError(
                "sharing.lora.rank", self.sharing.lora.rank, f"must be at most model.width, {self.model.width}"
            )
        if self.data.batch_sequences % self.gang.ranks:
            raise FieldError(
                "gang.ranks",
                self.gang.ranks,
                f"must divide the {self.data.batch_sequences} sequences of data.batch_tokens",
            )
        return self

    @property
    def canonical_hash(self) -> str:
        """SHA-256 (hex) of the configuration without its seed: equal for specs that train one model in one way."""
        return hashlib.sha256(json.dumps(_canonical(self), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an input: the dotted path, the value there, and what would be right."""

    field: str
    value: Any
    message: str
    kind: Literal["unknown", "value", "rule"] = "rule"
    """An unknown key, a value wrong in itself, or a rule that other fields have a part in."""

    def within(self, path: str) -> "Problem":
        """The same problem in a larger input, where this one lies at `path`."""
        return replace(self, field=f"{path}.{self.field}" if path else self.field)

    def __str__(self) -> str:
        return f"{self.field}: {self.message} (got {self.value!r})"


class InvalidSpec(ValueError):
    """Input that is no TrialSpec. `problems` holds every one found; nothing was built."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = problems


def parse_spec(data: Any) -> TrialSpec:
    """The TrialSpec that plain data (from JSON or YAML) says. Raises InvalidSpec, which names each field."""
    try:
        return TrialSpec.model_validate(data)
    except ValidationError as error:
        raise InvalidSpec(problems_of(error)) from None


def problems_of(error: ValidationError) -> tuple[Problem, ...]:
    """A pydantic error as problems with dotted paths."""
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        path = ".".join(str(part) for part in detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, InvalidSpec):
            problems += [problem.within(path) for problem in cause.problems]
        elif isinstance(cause, FieldError):
            problems.append(Problem(cause.path, cause.value, cause.expected).within(path))
        elif detail["type"] == "extra_forbidden":
            problems.append(Problem(path, detail["input"], "is not a known key", "unknown"))
        elif cause is not None:
            problems.append(Problem(path, detail["input"], str(cause)))
        else:
            problems.append(Problem(path or "spec", detail["input"], detail["msg"], "value"))
    return tuple(problems)


def override(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a spec's plain data with dotted paths replaced in order, e.g. {"sharing.lora.rank": 4}.

    Parts on a path that are missing or null are made. Raises InvalidSpec for a path through something else that has no
    parts, such as a tying pattern's bare name, and for what JSON does not have, such as a date. Validates nothing more.
    """
    changed: dict[str, Any] = _copy(data, "")
    for path, value in changes.items():
        *parents, last = path.split(".")
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
    sharing = spec.sharing
    same: dict[str, Any] = {"tying": TyingConfig(pattern="explicit", map=sharing.tying_map)}
    if not sharing.lora.rank:
        same["lora"] = LoraConfig()
    else:
        same["lora"] = sharing.lora.model_copy(update={"paths": tuple(sorted(sharing.lora.paths))})
    if sharing.unique_blocks == sharing.virtual_layers:
        same |= {"scales": "block", "mixes": "block"}
    model = spec.model if spec.model.bigram_buckets else spec.model.model_copy(update={"bigram_width": 0})
    canonical = spec.model_copy(update={"sharing": sharing.model_copy(update=same), "model": model})
    return canonical.model_dump(mode="json", exclude={"seed"})
