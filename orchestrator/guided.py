"""Proposals from what trained models show of their own sharing: gates that close, layers that do little, loops that
settle or do not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from typing import Any

from orchestrator.gate import Gate
from orchestrator.lesson import Lesson
from orchestrator.moves import SIZES, changed, spend, tied_by
from orchestrator.points import Point
from orchestrator.study import Suggestion
from worker.spec import TrialSpec
from worker.tying import TyingMap

INCUMBENTS = 6  # best trials whose findings are followed
CLOSING = 0.8  # of its value at the start, the mean gate of a path: below, training has closed it
LARGEST = 1e9  # of what a diagnostic may say; infinities and what is no number are beyond
SETTLED, UNSETTLED = 0.25, 0.75  # change of the stream by one more pass, relative to it: below, passes contract


@dataclass(frozen=True)
class Finding:
    """What a trained trial suggests: the paths of its spec to change, and a sentence with the numbers."""

    rule: str
    changes: Mapping[str, Any]
    why: str


def guided(gate: Gate, incumbents: Sequence[Lesson], used: set[tuple[str, int]]) -> Iterator[tuple[Any, Suggestion]]:
    """Points of the space that the incumbents' findings suggest, each with its Suggestion, best incumbents first.

    `used` are the rules and parents that trials have come from: each is followed once.
    """
    for lesson in incumbents:
        for finding in findings(lesson):
            if (finding.rule, lesson.number) in used:
                continue
            point = changed(gate.memory.domain, lesson.trial.spec, finding.changes)
            if point is None:
                continue
            spent = _spent(gate, point, finding)
            grown = [name for name in SIZES if name in point and name in spent and spent[name] != point[name]]
            told = [f"{name} {spent[name]:g}" for name in grown]
            why = f"{finding.why}; the freed bytes go into {' and '.join(told)}" if told else finding.why
            yield spent, Suggestion(arm="guided", rule=finding.rule, parent=lesson.number, why=why)


def _spent(gate: Gate, point: Point, finding: Finding) -> Point:
    """The point grown; as it is where by growing it would lose, through a condition, what was found."""
    spent = spend(gate, point)
    spec = gate.spec(spent)
    return spent if spec is not None and changed(gate.memory.domain, spec, finding.changes) == spent else point


def findings(lesson: Lesson) -> Iterator[Finding]:
    """What the trial's diagnostics suggest; nothing where it has none."""
    result, spec = lesson.trial.result, lesson.trial.spec
    shown: Mapping[str, Any] = result.diagnostics if result is not None else {}
    gammas = {path: _numbers(each) for path, each in _mapping(shown.get("gammas")).items()}
    yield from _closed_gates(spec, gammas, lesson.number)
    yield from _idle_layers(spec, _numbers(shown.get("block_influence")), lesson.number)
    yield from _loops(spec, _changes(_mapping(shown.get("contraction")).get("changes")), lesson.number)


def _mapping(shown: Any) -> Mapping[Any, Any]:
    """What an imported trial shows may have any shape: of another than a mapping's, an empty one."""
    return shown if isinstance(shown, Mapping) else {}


def _numbers(shown: Any) -> list[float]:
    """A list of finite numbers; empty where it is anything else."""
    if not isinstance(shown, list | tuple):
        return []
    legal = all(isinstance(each, int | float) and abs(each) <= LARGEST for each in shown)
    return list(shown) if legal else []


def _changes(shown: Any) -> list[float]:
    """As _numbers, passes aside whose change is not known."""
    return _numbers([each for each in shown if each is not None]) if isinstance(shown, list | tuple) else []


def _closed_gates(spec: TrialSpec, gammas: Mapping[str, Sequence[float]], number: int) -> Iterator[Finding]:
    """LoRA paths whose gates training has closed go; with the last of them the rank."""
    lora = spec.sharing.lora
    layers = spec.sharing.virtual_layers
    shown = {path: gammas.get(path, ()) for path in lora.paths}
    means = {path: sum(each) / layers for path, each in shown.items() if len(each) == layers}
    start = 1 / (1 + exp(-lora.gate_init))
    closed = [path for path, mean in means.items() if mean < CLOSING * start]
    if not closed or not lora.rank:
        return
    told = " and ".join(f"{path} {means[path]:.3f}" for path in closed)
    why = f"trial {number} ended with mean gammas of {told}, from {start:.3f} at the start"
    left = [path for path in lora.paths if path not in closed]
    if left:
        yield Finding("drop_lora_path", {"sharing.lora.paths": left}, f"{why}: without LoRA there")
    else:
        yield Finding("drop_lora", {"sharing.lora.rank": 0}, f"{why}: without LoRA")


def _idle_layers(spec: TrialSpec, influence: Sequence[float], number: int) -> Iterator[Finding]:
    """The neighbouring layers of different blocks that together turn the stream least share a block."""
    tying_map = spec.sharing.tying_map
    if len(influence) != len(tying_map):
        return
    pairs = [(first + second, layer) for layer, (first, second) in enumerate(pairwise(influence))]
    apart = [pair for pair in pairs if tying_map[pair[1]] != tying_map[pair[1] + 1]]
    if not apart or len(set(tying_map)) == 1:
        return
    both, layer = min(apart)
    keep, gone = sorted((tying_map[layer], tying_map[layer + 1]))
    tied = tuple(keep if block == gone else block for block in tying_map)
    why = f"layers {layer} and {layer + 1} of trial {number} have the least Block Influence, {both:.3f} together"
    yield Finding("tie_least_influential", tied_by(tied), f"{why}: one block for both")


def _loops(spec: TrialSpec, changes: Sequence[float], number: int) -> Iterator[Finding]:
    """Where further passes change the stream little, one more pass of the loop; where much, one fewer."""
    loop = _longest_loop(spec.sharing.tying_map)
    if not changes or loop is None:
        return
    start, period, passes = loop
    tying_map, last = spec.sharing.tying_map, changes[-1]
    segment = f"layers {start} to {start + period - 1}"
    if last < SETTLED:
        longer = (*tying_map[: start + period], *tying_map[start:])
        why = f"one more pass changes the stream of trial {number} by {last:.2f} of itself: {passes + 1} passes of"
        yield Finding("loop_once_more", tied_by(longer), f"{why} {segment}")
    elif last > UNSETTLED:
        shorter = (*tying_map[:start], *tying_map[start + period :])
        why = f"one more pass changes the stream of trial {number} by {last:.2f} of itself: {passes - 1} passes of"
        yield Finding("loop_once_less", tied_by(shorter), f"{why} {segment}")


def _longest_loop(tying_map: TyingMap) -> tuple[int, int, int] | None:
    """First layer, period and passes of the segment that is passed again, and of those the one over most layers."""
    found: list[tuple[int, int, int]] = []
    layers = len(tying_map)
    for period in range(1, layers // 2 + 1):
        for start in range(layers - 2 * period + 1):
            passes = 1
            segment = tying_map[start : start + period]
            while tying_map[start + passes * period : start + (passes + 1) * period] == segment:
                passes += 1
            if passes > 1:
                found.append((start, period, passes))
    return max(found, key=lambda each: (each[1] * each[2], -each[1], -each[0]), default=None)
