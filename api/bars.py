"""Bytes against a cap, scores by bytes, and trials by state, as the server draws them. Pure functions."""

from collections.abc import Mapping, Sequence
from html import escape

from orchestrator.compression import prior_of
from orchestrator.lifecycle import TrialState
from worker.report import TrialResult
from worker.spec import TrialSpec

STACK = (
    TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.QUEUED, TrialState.FAILED,
    TrialState.CANCELLED, TrialState.INFEASIBLE,
)  # fmt: skip
"""The order in which trials pass through states, and in which progress bars stack them."""


def stacked(counts: Mapping[TrialState, int]) -> list[tuple[str, int]]:
    """How many trials are in each state, as a progress bar stacks them."""
    return [(state.value, counts.get(state, 0)) for state in STACK]


def measured_bytes(result: TrialResult) -> dict[str, float]:
    """An artifact's bytes by tensor class, with its header and the code."""
    measured = {name: float(size) for name, size in result.bytes_by_class.items()}
    return measured | {"code": float(result.code_bytes)}


def predicted_bytes(spec: TrialSpec, artifact_bytes: int, code_bytes: int) -> dict[str, float]:
    """The same of an artifact that nobody has made yet: the prediction, shared out as its prior is by class."""
    prior = prior_of(spec)
    shares = {name.value: size for name, size in prior.by_class.items() if size} | {"header": prior.header_bytes}
    return {name: size / prior.model_bytes * (artifact_bytes - code_bytes) for name, size in shares.items()} | {
        "code": float(code_bytes)
    }


def bytes_bar(parts: Mapping[str, float], cap_bytes: int, interval: tuple[int, int] | None = None) -> str:
    """Bytes by name in one bar, against the cap, which is a line. Names become CSS classes.

    `interval` are the ends between which the total is expected, where it is a prediction: a whisker.
    """
    total = sum(parts.values())
    scale = 1000 / (max(total, cap_bytes, *(interval or ())) * 1.02)
    rects, x = [], 0.0
    for name, size in parts.items():
        title = f"<title>{escape(name)}: {size:,.0f} bytes</title>"
        place = f'x="{x:.2f}" y="6" width="{size * scale:.2f}" height="28"'
        rects.append(f'<rect class="bytes {escape(name)}" {place}>{title}</rect>')
        x += size * scale
    cap, words = cap_bytes * scale, f"{total:,.0f} of {cap_bytes:,} bytes"
    if interval:
        low, high = interval[0] * scale, interval[1] * scale
        words += f", {interval[0]:,} to {interval[1]:,} expected"
        ends = "".join(f'<line x1="{end:.2f}" x2="{end:.2f}" y1="12" y2="28"/>' for end in (low, high))
        rects.append(f'<g class="whisker"><line x1="{low:.2f}" x2="{high:.2f}" y1="20" y2="20"/>{ends}</g>')
    return (
        f'<svg class="bytes-bar" role="img" aria-label="{words}" viewBox="0 0 1000 40" '
        f'preserveAspectRatio="none"><title>{words}</title><rect class="room" x="0" y="6" width="{cap:.2f}" '
        f'height="28"/>{"".join(rects)}<line class="cap" x1="{cap:.2f}" x2="{cap:.2f}" y1="0" y2="40"/></svg>'
    )


def curve_picture(points: Sequence[tuple[int, float]]) -> str:
    """What one trained model scores (BPB) by the bytes of its artifact, smallest first; two points at least."""
    (least, *_, most), scores = [size for size, _ in points], [bpb for _, bpb in points]
    width, height = 560, 150
    across, up = (width - 120) / ((most - least) or 1), (height - 60) / ((max(scores) - min(scores)) or 1)
    places = [(60 + (size - least) * across, height - 40 - (bpb - min(scores)) * up) for size, bpb in points]
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{size:,} bytes: {bpb:.4f} BPB</title></circle>'
        f'<text x="{x:.1f}" y="{y - 9:.1f}">{bpb:.3f}</text>'
        f'<text x="{x:.1f}" y="{height - 12}">{size / 1000:,.0f}</text>'
        for (x, y), (size, bpb) in zip(places, points, strict=True)
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    words = "; ".join(f"{size:,} bytes: {bpb:.4f} BPB" for size, bpb in points)
    return (
        f'<svg class="curve" role="img" aria-label="{words}" width="{width}" viewBox="0 0 {width} {height}">'
        f'<polyline points="{line}"/>{dots}</svg>'
    )
