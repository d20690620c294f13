"""The model's shape: the frozen base of every spec part, and the config of one transformer."""

from collections.abc import Sequence
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError


class FieldError(ValueError):
    """Bad input: which field (a dotted path), the value it has, and what would be right."""

    def __init__(self, path: str, value: object, expected: str) -> None:
        super().__init__(f"{path} is {value!r}: {expected}")
        self.path = path
        self.value = value
        self.expected = expected


class Frozen(BaseModel):
    """A frozen value that refuses unknown keys, NaN, infinity, and true and false where numbers are asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, data: Any) -> Any:
        if isinstance(data, dict):  # pydantic would take true for 1
            found = [name for name, value in data.items() if type(value) in _SUSPECTS and name in _numbers(cls)]
            wrong = [InitErrorDetails(type=_NO_NUMBER, loc=(name,), input=data[name])
                     for name in found if _has_truth(data[name])]  # fmt: skip
            if wrong:
                raise ValidationError.from_exception_data(cls.__name__, wrong)
        return data


_SUSPECTS = (bool, list, tuple)
_NO_NUMBER = PydanticCustomError("number", "must be a number, and true and false are none")


def _has_truth(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_truth, value)))


def keys_at(place: Sequence[int | str], kind: Any) -> tuple[str, ...]:
    """The keys that the part of a model at this place may have; none where that cannot be told."""
    for step in place:
        fields = _fields(kind)
        kind = fields[str(step)].annotation if str(step) in fields else kind  # else it is inside a list or a mapping
    return tuple(_fields(kind))


def _fields(kind: Any) -> dict[str, FieldInfo]:
    """Those of the first model that a type speaks of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_fields
    return next(filter(None, map(_fields, get_args(kind))), {})


@cache
def _numbers(model: type[BaseModel]) -> frozenset[str]:
    """The fields that hold a number, or a list of numbers."""
    return frozenset(name for name, field in model.model_fields.items() if _is_number(field.annotation))


def _is_number(kind: Any) -> bool:
    parts = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    if get_origin(kind) is dict or bool in parts:
        return False
    return all(map(_is_number, parts)) if parts else kind in (int, float, NoneType, ...) or type(kind) is int


class ModelConfig(Frozen):
    """One transformer without its sharing: widths in values, not bytes.

    The defaults are the parameter-golf baseline (OpenAI, 2026): grouped-query attention with RMS-normalised queries and
    keys, rotary positions, a squared-ReLU MLP, additive U-Net skips, a tied embedding and a tanh logit soft-cap. The
    rest is what later systems add; the pull request that a component is from is named beside it.
    """

    vocab_size: int = Field(default=1024, ge=8, le=65_536)
    width: int = Field(default=512, ge=8, le=16_384)
    heads: int = Field(default=8, ge=1)
    kv_heads: int = Field(default=4, ge=1)
    query_rank: int = Field(default=0, ge=0)
    """Rank of the query projection, a product of two matrices (167); 0 is one full matrix."""
    mlp_multiple: float = Field(default=2.0, gt=0, le=16)
    activation: Literal["relu2", "leaky_relu2", "swiglu"] = "relu2"
    """relu(z)² · leaky_relu(z, 0.5)² (857) · silu(z₁)·z₂ with two thirds of the hidden units (167)."""
    rope_base: float = Field(default=10_000.0, gt=1)
    rope_width: int | None = Field(default=None, ge=2)
    """How many values of a head are rotated, from the first; none means all."""
    rope_train_length: int | None = Field(default=None, ge=2)
    """Longer sequences raise the base: base · (T / this)^(r / (r - 2)), r rotated values (NTK; 857). None: never."""
    qk_gain: float = Field(default=1.5, gt=0)
    xsa_last: int = Field(default=0, ge=0)
    """So many last virtual layers drop each head's component along its own position's value (XSA); any more is all."""
    attention_gate: bool = False
    """Each head's output times σ(½·w·x[:gate_inputs]) (1855)."""
    ln_scale: Literal["none", "block", "first_layer", "layer"] = "none"
    """Sub-layer inputs / √(i + 1), i the block's number (1394), its first virtual layer (857) or the layer (2090)."""
    logit_softcap: float = Field(default=30.0, gt=0)
    embedding_init_std: float = Field(default=0.005, gt=0)
    init: Literal["uniform", "orthogonal"] = "uniform"
    """Of matrices: ±1/√fan_in, or orthogonal where both sides are at least 64; outputs start at zero in both."""
    unet_skips: bool = True
    skip_gates: bool = False
    """Skips blend: σ(g)·x + (1 - σ(g))·w·skip instead of x + w·skip (2090)."""
    lanes_from: int | None = Field(default=None, ge=1)
    """The first block, by first use, with two residual lanes: attention reads one, the MLP the other (1855)."""
    bigram_buckets: int = Field(default=0, ge=0, le=1_000_000)
    bigram_width: int = Field(default=128, ge=1)
    bigram_hash: Literal["product", "xor"] = "product"
    """(104729·previous + current) mod buckets (433), or an exclusive or with a learned scale from 0.05 (857)."""
    smear_gate: bool = False
    smear_place: Literal["before_norm", "after_norm", "window"] = "before_norm"
    """Where each position takes a share of the one before: before the stem's norm (433), after it (857), or before it
    by a gate that reads the first `gate_inputs` values and never crosses a document's start (1855)."""
    gate_inputs: int = Field(default=12, ge=1)
    value_embedding_width: int = Field(default=0, ge=0)
    value_embedding_layers: tuple[int, ...] = ()
    """A second embedding added to the values of these virtual layers (857); width 0 leaves it out."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.width % self.heads:
            raise FieldError("heads", self.heads, f"must divide the width, {self.width}")
        if self.head_width % 2:
            raise FieldError("heads", self.heads, f"must leave an even head width, not {self.head_width}")
        if self.heads % self.kv_heads:
            raise FieldError("kv_heads", self.kv_heads, f"must divide heads, {self.heads}")
        if self.mlp_width < 1:
            raise FieldError("mlp_multiple", self.mlp_multiple, "must give at least one hidden unit")
        if self.query_rank > self.width:
            raise FieldError("query_rank", self.query_rank, f"must be at most the width, {self.width}")
        if self.rotated_width % 2 or self.rotated_width > self.head_width:
            message = f"must be even and at most the head width, {self.head_width}"
            raise FieldError("rope_width", self.rope_width, message)
        if self.rope_train_length is not None and self.rotated_width < 4:
            raise FieldError("rope_train_length", self.rope_train_length, "needs a rope_width of at least 4")
        if self.bigram_hash == "xor" and self.bigram_buckets == 1:
            raise FieldError("bigram_buckets", 1, "must be 0 or at least 2: the xor hash keeps one for first positions")
        if self.skip_gates and not self.unet_skips:
            raise FieldError("skip_gates", True, "needs unet_skips")
        gated = self.attention_gate or (self.smear_gate and self.smear_place == "window")
        if gated and self.gate_inputs > self.width:
            raise FieldError("gate_inputs", self.gate_inputs, f"must be at most the width, {self.width}")
        if bool(self.value_embedding_width) != bool(self.value_embedding_layers):
            message = "must name layers exactly when value_embedding_width is above 0"
            raise FieldError("value_embedding_layers", list(self.value_embedding_layers), message)
        if len(set(self.value_embedding_layers)) != len(self.value_embedding_layers):
            raise FieldError("value_embedding_layers", list(self.value_embedding_layers), "must name each layer once")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def rotated_width(self) -> int:
        return self.head_width if self.rope_width is None else self.rope_width

    @property
    def mlp_width(self) -> int:
        """Hidden units. SwiGLU, with three matrices, has two thirds of them, rounded up to a multiple of 8."""
        if self.activation == "swiglu":
            return -(-int(self.mlp_multiple * self.width * 2 / 3) // 8) * 8
        return int(self.mlp_multiple * self.width)

    def canonical(self, tying_map: tuple[int, ...], longest: int) -> "ModelConfig":
        """This shape with the fields that change nothing under a tying map, in sequences of at most `longest`, at one
        value each, which need not be a valid one. Equal results are one model."""
        layers, firsts = len(tying_map), [tying_map.index(block) for block in sorted(set(tying_map))]
        same: dict[str, object] = {
            "mlp_multiple": self.mlp_width / self.width,
            "rope_width": self.rotated_width,
            "xsa_last": min(self.xsa_last, layers),
            "value_embedding_layers": tuple(sorted(self.value_embedding_layers)),
        }
        if self.rope_train_length is not None and longest <= self.rope_train_length:
            same["rope_train_length"] = None
        if self.ln_scale == "layer" and len(firsts) == layers:
            same["ln_scale"] = "block"
        if self.ln_scale == "first_layer" and firsts == list(range(len(firsts))):
            same["ln_scale"] = "block"
        if layers == 1:
            same |= {"unet_skips": False, "skip_gates": False}
        if not self.bigram_buckets:
            same |= {"bigram_width": 0, "bigram_hash": "product"}
        if not self.smear_gate:
            same["smear_place"] = "before_norm"
        if not self.attention_gate and not (self.smear_gate and self.smear_place == "window"):
            same["gate_inputs"] = 0
        return self.model_copy(update=same)
