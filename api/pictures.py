"""How layers share blocks, drawn on the server as SVG. Pure functions."""

from collections.abc import Iterator, Mapping, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from html import escape

from worker.sharing import SharingConfig
from worker.tying import TyingMap

# Each found as far as can be from those before it (CIE Lab) as seen by all, and without red or green cones (Machado et
# al., 2009), neither too pale for the light nor too deep for the dark. Neighbours are at least 19 apart.
PALETTE = (
    "#2f7fc4", "#e69f00", "#83533f", "#642ce8", "#49cabd", "#b9c07c",
    "#226677", "#ae5113", "#75bff0", "#5170ec", "#c0837c", "#139fae",
)  # fmt: skip
PALE = 0.3  # luminance above which dark digits are read more easily
MARGIN = 78  # for the names of the rows
CELL = 46
SMALLEST = 0.55  # how far a narrow page may shrink the picture before it scrolls
SHORT = {"attention": "attn", "mlp": "mlp"}


def block_colour(block: int) -> str:
    """The colour of a block; beyond the palette, hues that are far from their neighbours', in three depths."""
    if block < len(PALETTE):
        return PALETTE[block]
    red, green, blue = hls_to_rgb(block * 0.381966 % 1, (0.45, 0.6, 0.72)[block % 3], 0.5)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


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
    """Virtual layers in order, coloured by block: skips as arcs above, what is applied again as arcs in the block's
    colour below, loops in brackets, then LoRA bypasses and influence.

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
    parts.append(_label("block", sky + 24) + _label("layer", sky + CELL + 14))
    height: float = sky + CELL + 26
    tied, depth = _ties(tying_map, height - 4)
    parts += tied
    height += depth
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


@dataclass(frozen=True)
class Loop:
    """Virtual layers from `start` on that apply the same `period` blocks `passes` times in a row."""

    start: int
    period: int
    passes: int


def loops(tying_map: TyingMap) -> Iterator[Loop]:
    """The loops of a map, first to last: at each layer the one that covers most, the shortest of those."""
    at = 0
    while at < len(tying_map):
        found = Loop(at, 1, 1)
        for period in range(1, (len(tying_map) - at) // 2 + 1):
            passes, segment = 1, tying_map[at : at + period]
            while tying_map[at + passes * period : at + (passes + 1) * period] == segment:
                passes += 1
            if passes > 1 and passes * period > found.passes * found.period:
                found = Loop(at, period, passes)
        if found.passes > 1:
            yield found
        at += found.period * found.passes


def skip_pairs(layers: int) -> tuple[tuple[int, int], ...]:
    """Which virtual layer's output is added before which: the first half is pushed, the second half pops."""
    half = layers // 2
    return tuple((half - 1 - i, half + i) for i in range(half))


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
        f'<text class="block{_ink(block)}" x="{_middle(layer)}" y="{top + 26}">{block}</text></g>'
        f'<text class="layer" x="{_middle(layer)}" y="{top + CELL + 14}">{layer}</text>'
    )


def _arc(start: int, end: int, top: float, skips: int) -> str:
    left, right, low = _middle(start), _middle(end), top - 2
    high = low - (top - 8) * min(1.0, ((end - start + 1) / 2) / skips) * 1.3
    return (
        f'<path class="skip" d="M{left},{low} C{left},{high:.1f} {right},{high:.1f} {right},{low}">'
        f"<title>skip from layer {start} to layer {end}</title></path>"
    )


def _ties(tying_map: TyingMap, top: float) -> tuple[list[str], float]:
    """Arcs from each layer to the next that applies its block, and brackets around loops; and how deep they hang."""
    again = [(i, tying_map.index(block, i + 1)) for i, block in enumerate(tying_map) if block in tying_map[i + 1 :]]
    if not again:
        return [], 0.0
    deepest = min(46.0, 10 + 4.0 * max(end - start for start, end in again))
    widest = max(end - start for start, end in again)
    parts = []
    for start, end in again:
        low = top + 8 + (deepest - 8) * (end - start) / widest
        block = tying_map[start]
        parts.append(
            f'<path class="tie" stroke="{block_colour(block)}" d="M{_middle(start)},{top} C{_middle(start)},{low:.1f} '
            f'{_middle(end)},{low:.1f} {_middle(end)},{top}">'
            f"<title>layer {end} applies block {block} again</title></path>"
        )
    parts.append(_label("again", top + 12))
    floor, brackets = top + deepest, [_bracket(loop, top + deepest) for loop in loops(tying_map)]
    return parts + brackets, floor - top + (28 if brackets else 8)


def _bracket(loop: Loop, top: float) -> str:
    left = MARGIN + loop.start * CELL + 5
    right = MARGIN + (loop.start + loop.period * loop.passes) * CELL - 5
    said = f"×{loop.passes}" if loop.period == 1 else f"{loop.period} layers ×{loop.passes}"
    return (
        f'<path class="loop" d="M{left},{top} v6 H{right} v-6"/>'
        f'<text class="layer" x="{(left + right) / 2}" y="{top + 19}">{said}</text>'
    )


def _ink(block: int) -> str:
    """The class of digits on a block's colour: none where white is read more easily."""
    colour = block_colour(block)
    red, green, blue = ((int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5))
    return " on-pale" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > PALE else ""


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
