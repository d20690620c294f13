"""What the command line prints of previews and recipes; and how it writes tying maps, scores and times anywhere."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from api.previews import PreviewOut, StudyPreviewOut
from api.schemas import PredictionOut, RecipeOut
from api.tables import Column, Grid

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def tying_text(tying_map: Sequence[int]) -> str:
    """A tying map in as few characters as it takes: 012012, or with spaces from 37 blocks on."""
    if max(tying_map) < len(DIGITS):
        return "".join(DIGITS[block] for block in tying_map)
    return " ".join(str(block) for block in tying_map)


def bpb_text(bpb: float | None) -> str:
    """A score, or what stands for none."""
    return "–" if bpb is None else f"{bpb:.4f}"


def time_text(moment: datetime | None) -> str:
    """A moment in the reader's own time zone, to the second."""
    return "–" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def seconds_text(seconds: float) -> str:
    """A duration in the two units that matter: 41s, 12m07s, 3h05m, 2d04h."""
    whole = int(seconds)
    for size, unit, part, name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02}{name}"
    return f"{whole}s"


def recipes_table(recipes: Sequence[RecipeOut]) -> Grid:
    """Recipes, a line each."""
    columns = (
        Column("name", left=True), Column("tying map", left=True, cut=12), Column("LoRA"), Column("width"),
        Column("vocabulary", 3), Column("gang", 2, left=True),
    )  # fmt: skip
    cells = []
    for recipe in recipes:
        model, sharing, gang = recipe.spec.model, recipe.spec.sharing, recipe.spec.gang
        cells.append((
            recipe.name, tying_text(sharing.tying_map), str(sharing.lora.rank), f"{model.width:,}",
            f"{model.vocab_size:,}", f"{gang.ranks} {gang.device}",
        ))  # fmt: skip
    return Grid(columns, cells)


def preview_lines(name: str, preview: PreviewOut) -> list[str]:
    """A preview as a person reads it."""
    prediction = preview.prediction
    lines = [name, f"  parameters       {prediction.parameters:,}"]
    lines += [f"    {kind:<14} {count:,}" for kind, count in preview.parameters_by_class.items()]
    lines += [
        f"  tying map        {tying_text(preview.tying_map)}",
        f"  model bytes      {prediction.model_bytes:,} predicted",
        *(f"    {kind:<14} {size.expected:,}" for kind, size in preview.bytes_by_class.items()),
        f"  code bytes       {prediction.code_bytes:,}",
        f"  artifact bytes   {prediction.artifact_bytes:,} predicted, "
        f"{prediction.artifact_bytes_low:,} to {prediction.artifact_bytes_high:,}",
        *_time_lines(prediction),
        f"  cap              {preview.cap_bytes:,}",
        f"  verdict          {preview.verdict.replace('_', ' ')}",
    ]
    return lines + ([f"    {preview.reason}"] if preview.reason else [])


def _time_lines(prediction: PredictionOut) -> Iterator[str]:
    """What is known of a prediction's steps and seconds."""
    if prediction.steps is not None:
        each = "" if prediction.step_seconds is None else f" predicted, {1000 * prediction.step_seconds:,.1f} ms each"
        yield f"  steps            {prediction.steps:,}{each}"
    for name, expected, low, high in (
        ("training", prediction.train_seconds, prediction.train_seconds_low, prediction.train_seconds_high),
        ("evaluation", prediction.evaluate_seconds, prediction.evaluate_seconds_low, prediction.evaluate_seconds_high),
    ):
        if expected is not None:
            yield f"  {name:<16} {expected:,.1f} s predicted, {low:,.1f} to {high:,.1f}"


def study_preview_lines(name: str, preview: StudyPreviewOut) -> list[str]:
    """Random points of a study as a person reads them, and how many of them would be refused."""
    lines = [name]
    for number, sample in enumerate(preview.samples, 1):
        verdict = "invalid" if sample.verdict is None else sample.verdict.replace("_", " ")
        tying_map = "–" if sample.tying_map is None else tying_text(sample.tying_map)
        lines.append(f"{number:>4}  {verdict:<10} {tying_map:<16} {_numbers(sample.prediction)}".rstrip())
        lines.append(f"      {_point_text({**sample.params, **sample.filled})}")
        lines += [f"      {sample.reason}"] if sample.reason else []
    drawn, refused = len(preview.samples), preview.invalid + preview.cannot_fit
    of = "" if preview.points is None else f" of at most {preview.points:,} points"
    share = f"{refused / drawn:.0%} would be refused"
    return [*lines, f"{drawn} drawn{of}; {share}: {preview.invalid} invalid, {preview.cannot_fit} certain not to fit"]


def _numbers(prediction: PredictionOut | None) -> str:
    """What a sample would be and cost, in one line."""
    if prediction is None:
        return ""
    between = f"{prediction.artifact_bytes_low / 1e6:.2f}–{prediction.artifact_bytes_high / 1e6:.2f} MB"
    steps = "–" if prediction.steps is None else f"{prediction.steps:,}"
    return f"{prediction.parameters:,} parameters, {between}, {steps} steps"


def _point_text(params: Mapping[str, Any]) -> str:
    """A point by the last parts of its names, where these differ, without the letters of a free map."""
    shown = {name: value for name, value in params.items() if not name.startswith("sharing.tying.free.")}
    lasts = Counter(name.rpartition(".")[2] for name in shown)
    texts = []
    for name, value in shown.items():
        last = name.rpartition(".")[2]
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        texts.append(f"{last if lasts[last] == 1 else name}={text}")
    return " ".join(texts)
