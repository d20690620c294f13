"""What a spec says about turning trained weights into bytes."""

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from worker.shape import FieldError, Frozen

CodecName = Literal["zlib", "zstd", "brotli", "lzma", "ans", "auto"]
LEVELS: dict[str, tuple[int, int, int]] = {  # lowest, highest, and what none means
    "zlib": (1, 9, 9),
    "zstd": (1, 22, 22),
    "brotli": (0, 11, 11),
    "lzma": (0, 9, 9),
}
GRID = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # the quantiles that the clip `grid` tries


class ClassBits(Frozen):
    """Bits of a symbol by tensor class; none means what `quantisation.bits` says."""

    embedding: int | None = Field(default=None, ge=4, le=8)
    attention: int | None = Field(default=None, ge=4, le=8)
    mlp: int | None = Field(default=None, ge=4, le=8)
    bigram: int | None = Field(default=None, ge=4, le=8)
    value_embedding: int | None = Field(default=None, ge=4, le=8)


class ClassSigmas(Frozen):
    """Clips in standard deviations of a row, by tensor class; none means what `quantisation.clip_sigmas` says."""

    embedding: float | None = Field(default=None, gt=0, le=100)
    attention: float | None = Field(default=None, gt=0, le=100)
    mlp: float | None = Field(default=None, gt=0, le=100)
    bigram: float | None = Field(default=None, gt=0, le=100)
    value_embedding: float | None = Field(default=None, gt=0, le=100)


class QuantisationConfig(Frozen):
    """How the trained weights become bytes: symmetric integers with an fp16 scale a row, then a codec.

    Matrices with more than `half_below` elements are quantised; every other tensor is kept in half precision.
    """

    bits: int = Field(default=6, ge=4, le=8)
    class_bits: ClassBits = ClassBits()
    clip: Literal["amax", "quantile", "sigmas", "grid"] = "amax"
    """What lands on a row's largest symbol: its largest magnitude, a quantile of its magnitudes, so many standard
    deviations (1394), or whichever of a few quantiles gives the matrix the least squared error (GPTQ-lite, 857)."""
    clip_quantile: float = Field(default=0.9999984, gt=0.5, le=1)
    clip_sigmas: float = Field(default=12.85, gt=0, le=100)
    class_sigmas: ClassSigmas = ClassSigmas()
    rounding: Literal["nearest", "gptq"] = "nearest"
    """To the nearest symbol, or column by column with the error carried to the columns that are left (Frantar et al.,
    2022), by the second moments of each matrix's inputs on training data."""
    calibration_tokens: int = Field(default=65_536, ge=2)
    """Training tokens behind those moments and behind sensitivities, in windows of data.sequence_length."""
    high_fraction: float = Field(default=0.0, ge=0, le=1)
    """The share of rows, those with the largest gradients on calibration data, that get 8 bits (FTLE-lite, 167)."""
    low_fraction: float = Field(default=0.0, ge=0, le=1)
    """The share of rows, those with the smallest, that get 4 bits."""
    prune: float = Field(default=0.0, ge=0, lt=1)
    """The share of each quantised matrix's values, the smallest magnitudes, that become zero first."""
    qat_from: float | None = Field(default=None, ge=0, lt=1)
    """From this share of the budget on, the forward pass sees pruned and quantised weights, by the clip and the bits of
    each class, rounded to the nearest, and gradients pass straight through."""
    codec: CodecName = "zstd"
    """A byte compressor, ans (an entropy coder over the symbols), or auto: the smallest of all."""
    level: int | None = None
    """The byte compressor's; none means its best."""
    half_below: int = Field(default=65_536, ge=0)
    target_bytes: int | None = Field(default=None, ge=1)
    """The artifact's bytes, code included, to come close to and never exceed: quantisation steps are then solved for
    after training, and bits, class_bits, clip and its values decide only what training sees from `qat_from` on.
    By ans a handful of packings, each of a second at full size; zstd takes up to twenty, each of a minute or two."""

    @model_validator(mode="after")
    def _check(self) -> "QuantisationConfig":
        if self.level is not None:
            if self.codec not in LEVELS:
                raise FieldError("level", self.level, f"the codec {self.codec!r} has no levels")
            lowest, highest, _ = LEVELS[self.codec]
            if not lowest <= self.level <= highest:
                raise FieldError("level", self.level, f"{self.codec} goes from {lowest} to {highest}")
        if self.high_fraction + self.low_fraction > 1:
            raise FieldError("low_fraction", self.low_fraction, "and high_fraction must add up to at most 1")
        if self.target_bytes is not None and self.high_fraction + self.low_fraction:
            raise FieldError("target_bytes", self.target_bytes, "needs high_fraction and low_fraction 0")
        return self

    @property
    def best_level(self) -> int:
        """The level in force, 0 where the codec has none."""
        if self.level is not None:
            return self.level
        return LEVELS[self.codec][2] if self.codec in LEVELS else 0

    @property
    def calibrates(self) -> bool:
        """Whether packing reads training data."""
        return self.rounding == "gptq" or self.target_bytes is not None or self.high_fraction + self.low_fraction > 0

    def bits_of(self, tensor_class: str) -> int:
        """Bits of a symbol of a tensor of this class."""
        return getattr(self.class_bits, tensor_class, None) or self.bits

    def sigmas_of(self, tensor_class: str) -> float:
        """The clip of a tensor of this class, in standard deviations."""
        return getattr(self.class_sigmas, tensor_class, None) or self.clip_sigmas

    def canonical(self, quantised: Collection[str]) -> "QuantisationConfig":
        """This packing with the fields that change nothing, where these tensor classes have quantised matrices, at one
        value each. Equal results pack alike."""
        same: dict[str, object] = {"level": self.best_level}
        clip = self.clip if quantised else "amax"
        if self.target_bytes is not None and self.qat_from is None:  # steps are solved for, and seen in packing alone
            clip, quantised = "amax", ()
        same |= {"clip": clip, "bits": 8, "class_bits": ClassBits(**{name: self.bits_of(name) for name in quantised})}
        if clip != "quantile":
            same["clip_quantile"] = 1.0
        same |= {"clip_sigmas": 1.0, "class_sigmas": ClassSigmas()}
        if clip == "sigmas":
            same["class_sigmas"] = ClassSigmas(**{name: self.sigmas_of(name) for name in quantised})
        if not self.calibrates:
            same["calibration_tokens"] = 0
        return self.model_copy(update=same)
