"""Pictures drawn on the server as SVG: how layers share blocks, and how bytes stand against the cap. Pure functions."""

from collections.abc import Mapping, Sequence
from html import escape

from worker.sharing import SharingConfig
from worker.tying import TyingMap

# Told apart in the light, in the dark, and by most who see colours differently (after Okabe and Ito, 2008).
PALETTE = (
    "#3a86c8", "#e69f00", "#2a9d74", "#d1603d", "#b879b0", "#56b4e9",
    "#c9b20e", "#7d8a97", "#8c6bd8", "#d4738f", "#6fa84f", "#a8763e",
)  # fmt: skip
MARGIN = 78  # for the names of the rows
CELL = 46
SMALLEST = 0.55  # how far a narrow page may shrink the picture before it scrolls
SHORT = {"attention": "attn", "mlp": "mlp"}


def block_colour(block: int) -> str:
    """The colour of a block; beyond the palette, hues that are far from their neighbours'."""
    if block < len(PALETTE):
        return PALETTE[block]
    return f"hsl({block * 137.508 % 360:.0f} 45% 58%)"


def tying_strip(tying_map: TyingMap) -> str:
    """A tying map as a small strip, one cell a virtual layer, coloured by block."""
    width = max(3.0, min(11.0, 160 / len(tying_map)))
    cells = "".join(
        f'<rect x="{i * width:.1f}" width="{width - 1:.1f}" height="16" rx="2" fill="{block_colour(block)}"/>'
        for i, block in enumerate(tying_map)
    )
    total = width * len(tying_map)
    return (
        f'<svg class="strip" role="img" aria-label="{_words(tying_map)}" width="{total:.0f}" height="16" '
        f'viewBox="0 0 {total:.1f} 16"><title>{_words(tying_map)}</title>{cells}</svg>'
    )


def tying_picture(
    sharing: SharingConfig,
    *,
    unet_skips: bool,
    gammas: Mapping[str, Sequence[float]] | None = None,
    influence: Sequence[float] = (),
) -> str:
    """Virtual layers in order, coloured by block, with U-Net skips as arcs, and LoRA bypasses and influence below.

    `gammas` holds the gates of each path by virtual layer, once a trial has trained; bars are then as high as the gate
    is open, against the largest gate. Before that, and where a path has none, they are outlines. `influence` is each
    layer's Block Influence, drawn against the largest. Layers that run from a fraction of the budget on are pale.
    """
    tying_map, early = sharing.tying_map, sharing.layers_at(0.0)
    layers = len(tying_map)
    skips = skip_pairs(layers) if unet_skips else ()
    sky = 14 + (min(96, 16 + 10 * len(skips)) if skips else 0)
    parts = [_arc(start, end, sky, len(skips)) for start, end in skips]
    since = f", from {sharing.tying.from_fraction:.0%} of the budget on"
    parts += [_layer(i, block, sky, "" if i in early else since) for i, block in enumerate(tying_map)]
    height = sky + CELL + 26
    parts.append(_label("block", sky + 24) + _label("layer", sky + CELL + 14))
    if sharing.lora.rank:
        strongest = max((g for gates in (gammas or {}).values() for g in gates), default=0.0)
        for path in sorted(sharing.lora.paths):
            parts.append(_label(f"LoRA {SHORT[path]}", height + 21))
            parts += [_bar(i, "γ", gate, strongest, height) for i, gate in enumerate(_gates(path, layers, gammas))]
            height += 44
    if len(influence) == layers:
        parts.append(_label("influence", height + 21))
        parts += [_bar(i, "Block Influence", value, max(influence), height) for i, value in enumerate(influence)]
        height += 44
    width = MARGIN + layers * CELL + 4
    words = f"{_words(tying_map)}{since if len(early) < layers else ''}; LoRA rank {sharing.lora.rank}"
    narrow = f"min-width: {width * SMALLEST:.0f}px"
    return (
        f'<svg class="tying" role="img" aria-label="{words}" width="{width}" style="{narrow}" '
        f'viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
    )


def skip_pairs(layers: int) -> tuple[tuple[int, int], ...]:
    """Which virtual layer's output is added before which: the first half is pushed, the second half pops."""
    half = layers // 2
    return tuple((half - 1 - i, half + i) for i in range(half))


def bytes_bar(parts: Mapping[str, float], cap_bytes: int) -> str:
    """Bytes by name in one bar, against the cap, which is a line. Names become CSS classes."""
    total = sum(parts.values())
    scale = 1000 / (max(total, cap_bytes) * 1.02)
    rects, x = [], 0.0
    for name, size in parts.items():
        title = f"<title>{escape(name)}: {size:,.0f} bytes</title>"
        place = f'x="{x:.2f}" y="6" width="{size * scale:.2f}" height="28"'
        rects.append(f'<rect class="bytes {escape(name)}" {place}>{title}</rect>')
        x += size * scale
    cap = cap_bytes * scale
    return (
        f'<svg class="bytes-bar" role="img" aria-label="{total:,.0f} of {cap_bytes:,} bytes" viewBox="0 0 1000 40" '
        f'preserveAspectRatio="none"><rect class="room" x="0" y="6" width="{cap:.2f}" height="28"/>{"".join(rects)}'
        f'<line class="cap" x1="{cap:.2f}" x2="{cap:.2f}" y1="0" y2="40"/></svg>'
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


def _words(tying_map: TyingMap) -> str:
    return f"{len(tying_map)} layers over {max(tying_map) + 1} blocks: {' '.join(str(block) for block in tying_map)}"


def _middle(layer: int) -> float:
    return MARGIN + layer * CELL + CELL / 2


def _label(text: str, y: float) -> str:
    return f'<text class="row" x="0" y="{y}">{escape(text)}</text>'


def _layer(layer: int, block: int, top: float, since: str) -> str:
    x = MARGIN + layer * CELL
    late = ' class="late"' if since else ""
    return (
        f"<g{late}><title>layer {layer} applies block {block}{since}</title>"
        f'<rect x="{x + 2}" y="{top}" width="{CELL - 4}" height="{CELL - 6}" rx="7" fill="{block_colour(block)}"/>'
        f'<text class="block" x="{_middle(layer)}" y="{top + 26}">{block}</text></g>'
        f'<text class="layer" x="{_middle(layer)}" y="{top + CELL + 14}">{layer}</text>'
    )


def _arc(start: int, end: int, top: float, skips: int) -> str:
    left, right, low = _middle(start), _middle(end), top - 2
    high = low - (top - 8) * min(1.0, ((end - start + 1) / 2) / skips) * 1.3
    return (
        f'<path class="skip" d="M{left},{low} C{left},{high:.1f} {right},{high:.1f} {right},{low}">'
        f"<title>skip from layer {start} to layer {end}</title></path>"
    )


def _gates(path: str, layers: int, gammas: Mapping[str, Sequence[float]] | None) -> Sequence[float | None]:
    gates = (gammas or {}).get(path)
    return gates if gates is not None and len(gates) == layers else [None] * layers


def _bar(layer: int, name: str, value: float | None, largest: float, top: float) -> str:
    x, full = MARGIN + layer * CELL + 10, 34.0
    frame = f'<rect class="gate-frame" x="{x}" y="{top}" width="{CELL - 20}" height="{full}" rx="3"/>'
    if value is None:
        return frame
    high = full * value / largest if largest > 0 else 0.0
    return (
        f"<g><title>layer {layer}: {name} = {value:.4f}</title>{frame}"
        f'<rect class="gate" x="{x}" y="{top + full - high:.1f}" width="{CELL - 20}" height="{high:.1f}" rx="3"/></g>'
    )
