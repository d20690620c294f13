"""A run's result as text, for the terminal. Torch-free."""

from collections.abc import Iterable, Iterator
from typing import Any

from worker.report import TrialResult
from worker.spec import TrialSpec


def summarise(spec: TrialSpec, result: TrialResult) -> str:
    """The scores, the bytes, the shape, the times and whichever diagnostics there are: a line for each."""
    return "\n".join(f"{name:<15} {text}" for name, text in _lines(spec, result))


def _lines(spec: TrialSpec, result: TrialResult) -> Iterator[tuple[str, str]]:
    shown = result.diagnostics
    order0 = f"; byte frequencies alone {shown['order0_bpb']:.4f}" if shown.get("order0_bpb") is not None else ""
    yield "bits per byte", f"{result.val_bpb:.4f}  (before quantisation {result.val_bpb_prequant:.4f}{order0})"
    yield from _named("scores", shown.get("scores"))
    yield from _named("averages", shown.get("averages"), "before quantisation")
    code = f"model {result.model_bytes:,} + code {result.code_bytes:,}"
    yield "artifact", f"{result.artifact_bytes:,} bytes = {code}, by {shown.get('codec', spec.quantisation.codec)}"
    classes = "  ".join(f"{name} {size:,}" for name, size in sorted(result.bytes_by_class.items()))
    yield "stored", f"{classes}  (compressed bytes)"
    yield from _named("lost by class", shown.get("quantisation_loss"), "bits per byte, to quantisation")
    if curve := shown.get("bytes_curve"):
        points = "  ".join(f"{point['artifact_bytes']:,} {_number(point['val_bpb'])}" for point in curve)
        yield "bytes curve", f"{points}  (artifact bytes, bits per byte)"
    yield "parameters", f"{result.parameters:,}"
    tying_map = " ".join(map(str, spec.sharing.tying_map))
    yield "tying map", f"{tying_map}  LoRA rank {spec.sharing.lora.rank}"
    taken = f"{result.steps:,} steps, {result.tokens:,} tokens, {result.train_seconds:.1f} s"
    stopped = ", stopped early" if result.stopped else ""
    yield "trained", f"{taken} ({1000 * result.step_seconds:.0f} ms a step){stopped}"
    yield "then", f"evaluated in {result.evaluate_seconds:.1f} s, packed in {result.pack_seconds:.1f} s"
    yield from _by_layer(shown)
    yield "SHA-256", result.artifact_sha256


def _by_layer(shown: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for path, gammas in shown.get("gammas", {}).items():
        yield f"gates {path}", _numbers(gammas, 3)
    if influence := shown.get("block_influence"):
        yield "block influence", _numbers(influence, 3)
    yield from _named("scale spread", shown.get("scale_spread"))
    if contraction := shown.get("contraction"):
        changes, bpb = _numbers(contraction["changes"]), _numbers(contraction["bpb"])
        yield "contraction", f"relative changes {changes}, bits per byte {bpb}  (by extra cycle)"


def _named(name: str, values: dict[str, Any] | None, unit: str = "") -> Iterator[tuple[str, str]]:
    if values:
        text = "  ".join(f"{key} {_number(value)}" for key, value in values.items())
        yield name, f"{text}  ({unit})" if unit else text


def _numbers(values: Iterable[float | None], places: int = 4) -> str:
    return " ".join(_number(value, places) for value in values)


def _number(value: Any, places: int = 4) -> str:
    """A dash for none: what was not finite, or not scored."""
    if isinstance(value, dict):
        return " ".join(f"{key} {_number(part, places)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return _numbers(value, places)
    return "–" if value is None else f"{value:.{places}f}"
