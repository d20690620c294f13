"""Which of many points may be expected to improve on what a study has: a surrogate over what its trials showed."""

import random
from collections.abc import Iterator, Sequence
from math import erf, inf, sqrt
from typing import Any

import numpy as np

from orchestrator.descriptors import Descriptors, Features
from orchestrator.gate import Gate, Passed
from orchestrator.lesson import Lesson, key_of
from orchestrator.memory import Memory
from orchestrator.moves import mutate
from orchestrator.points import Domain, Point
from orchestrator.study import NewStudy
from orchestrator.surrogate import SIZE_EFFECT, Matrix, Surrogate
from worker.spec import GangConfig

WHOLE = 1024  # points of a space up to which all are looked at
DRAWN, MUTATED, REFINED = 24, 16, 16  # points of a larger space that are: at random, near the best, near the likeliest
PARENTS = 8  # best trials, and likeliest points, that others are made from
CHECKED = 32  # points that are checked, the likeliest to improve first
COMPARED = 3  # points that may become trials, of which the likelihood to keep the cap chooses
BEST, LATEST, STOPPED = 100, 60, 30  # trials that it learns from
KEPT = 20_000  # points whose features are kept
WILD = 3.0  # above the median by so many times what the best is below it, a value is no more than that


class Outlook:
    """The surrogate of one study. What it keeps are features of points, by the gang: not every gang can train each."""

    def __init__(self, domain: Domain, study: NewStudy) -> None:
        self._domain, self._study = domain, study
        self._descriptors = Descriptors(domain)
        self._rows: dict[tuple[GangConfig, str], Features | None] = {}
        self._all: dict[GangConfig, tuple[Matrix, list[dict[str, Any]], list[str]]] = {}
        self._is_small = domain.count <= WHOLE

    def points(self, gate: Gate, rng: random.Random) -> Iterator[dict[str, Any]]:
        """Points to propose, best first; before them those that were found to be likely but may not become trials."""
        memory = gate.memory
        lessons = _learned(memory)
        rows, points = self._known_space(gate) if self._is_small else self._described(gate, self._pool(memory, rng))
        if not points:
            return
        judged = _Judged(lessons, memory.open(), self._study, rng)
        surrogate, light = judged.surrogate(self, gate, rows), _Light(memory, self._study)
        gains = surrogate.improvement(rows, judged.best)
        order = np.argsort(-gains * light.chance(rows), kind="stable")
        if not self._is_small:
            near = [mutate(self._domain, points[i], rng) for i in order[:PARENTS] for _ in range(REFINED // PARENTS)]
            more, added = self._described(gate, [point for point in near if not memory.is_known(point)])
            if added:
                rows, points = np.vstack([rows, more]), [*points, *added]
                gains = surrogate.improvement(rows, judged.best)
                order = np.argsort(-gains * light.chance(rows), kind="stable")
        passed: list[tuple[float, dict[str, Any]]] = []
        for place in order[: len(order) if self._is_small else CHECKED]:
            checked = gate.check(points[place])
            if not isinstance(checked, Passed):
                yield points[place]
                continue
            passed.append((gains[place] * _chance(checked, self._study), points[place]))
            if len(passed) == COMPARED:
                break
        yield from (point for _, point in sorted(passed, key=lambda each: -each[0]))

    def _known_space(self, gate: Gate) -> tuple[Matrix, list[dict[str, Any]]]:
        """Every point of a small space that is no trial yet."""
        rows, points, keys = self._everything(gate)
        new = [place for place, key in enumerate(keys) if not gate.memory.is_known_key(key)]
        return rows[new], [points[place] for place in new]

    def _everything(self, gate: Gate) -> tuple[Matrix, list[dict[str, Any]], list[str]]:
        if gate.gang not in self._all:
            rows, points = self._described(gate, list(self._domain.points()))
            self._all[gate.gang] = rows, points, [key_of(point) for point in points]
        return self._all[gate.gang]

    def _pool(self, memory: Memory, rng: random.Random) -> list[dict[str, Any]]:
        pool = [self._domain.random(rng) for _ in range(DRAWN)]
        if parents := memory.best(PARENTS):
            pool += [mutate(self._domain, rng.choice(parents).point, rng) for _ in range(MUTATED)]
        distinct = {key_of(point): point for point in pool}
        return [point for point in distinct.values() if not memory.is_known(point)]

    def _described(self, gate: Gate, points: Sequence[Point]) -> tuple[Matrix, list[dict[str, Any]]]:
        """Rows of features of those that are valid specs."""
        found = [(row, dict(point)) for point in points if (row := self.row(gate, point)) is not None]
        return np.array([row for row, _ in found]), [point for _, point in found]

    def row(self, gate: Gate, point: Point) -> Features | None:
        key = gate.gang, key_of(point)
        if key not in self._rows:
            if len(self._rows) >= KEPT:
                self._rows.clear()
            spec = gate.spec(point)
            self._rows[key] = None if spec is None else self._descriptors.row(spec, point)
        return self._rows[key]

    @property
    def groups(self) -> Sequence[str]:
        return self._descriptors.groups


class _Judged:
    """Lessons with one value each: the objective, or of several objectives one weighing of them, drawn anew."""

    def __init__(self, lessons: list[Lesson], waiting: list[Lesson], study: NewStudy, rng: random.Random) -> None:
        self.lessons, self.waiting = lessons, waiting
        values = np.array([lesson.values for lesson in lessons]).reshape(len(lessons), len(study.objectives))
        scored = np.array([lesson.kind == "scored" for lesson in lessons], dtype=bool)
        if scored.any():  # a stopped one is no better than it was, and no worse than the worst that trained on
            values = np.minimum(values, values[scored].max(axis=0))
        self.size_effect = SIZE_EFFECT
        if values.shape[1] == 1:
            self.values = _tamed(values[:, 0])
        else:
            weight = rng.random()
            self.values, self.size_effect = _chebyshev(values, np.array([weight, 1 - weight])), 0.0
        feasible = [value for value, lesson in zip(self.values, lessons, strict=True) if lesson.feasible]
        self.best = float(min(feasible, default=inf))

    def surrogate(self, outlook: Outlook, gate: Gate, around: Matrix) -> Surrogate:
        """Fitted to the lessons; open trials are taken to become what they are expected to."""
        pairs = [(row, value) for lesson, value in zip(self.lessons, self.values, strict=True)
                 if (row := outlook.row(gate, lesson.point)) is not None]  # fmt: skip
        rows = np.array([row for row, _ in pairs]).reshape(len(pairs), around.shape[1])
        surrogate = Surrogate(rows, np.array([value for _, value in pairs]), outlook.groups, around, self.size_effect)
        opened = [row for lesson in self.waiting if (row := outlook.row(gate, lesson.point)) is not None]
        surrogate.believe(np.array(opened).reshape(len(opened), around.shape[1]))
        if self.best == inf:
            expected = surrogate.predict(np.vstack([*opened, around[:1]]))[0]
            self.best = float(expected.min())
        return surrogate


class _Light:
    """A guess of bytes by size alone, from what was predicted for the trials so far: which points to check first."""

    def __init__(self, memory: Memory, study: NewStudy) -> None:
        told = [lesson.trial.prediction for lesson in [*_learned(memory), *memory.open()]]
        self._room = np.log2(study.cap_bytes)
        self._size = np.log2([each.parameters for each in told])
        self._bytes = np.log2([each.artifact_bytes for each in told])

    def chance(self, rows: Matrix) -> Matrix:
        """That each row's artifact keeps the cap, its bytes in proportion to those of the trial nearest in size."""
        if not len(self._size):
            return np.ones(len(rows))
        nearest = np.abs(rows[:, :1] - self._size[None]).argmin(axis=1)
        guess = self._bytes[nearest] + rows[:, 0] - self._size[nearest]
        apart = 0.03 + 0.2 * np.abs(rows[:, 0] - self._size[nearest])
        return 0.5 * (1 + np.array([erf(each / sqrt(2)) for each in (self._room - guess) / apart]))


def _learned(memory: Memory) -> list[Lesson]:
    chosen = [*memory.best(BEST), *memory.latest("scored", LATEST), *memory.latest("stopped", STOPPED)]
    return [lesson for _, lesson in sorted({lesson.number: lesson for lesson in chosen}.items())]


def _tamed(values: Matrix) -> Matrix:
    """Without values so bad that the others would look alike beside them."""
    if len(values) < 4:
        return values
    middle = float(np.median(values))
    tamed: Matrix = np.minimum(values, middle + WILD * (middle - values.min()))
    return tamed


def _chebyshev(values: Matrix, weights: Matrix) -> Matrix:
    """The augmented Chebyshev scalarisation of ParEGO (Knowles, 2006), each objective from 0 at best to 1 at worst."""
    if not len(values):
        return np.zeros(0)
    low, high = values.min(axis=0), values.max(axis=0)
    weighted = weights * (values - low) / np.where(high > low, high - low, 1.0)
    return weighted.max(axis=1) + 0.05 * weighted.sum(axis=1)  # type: ignore[no-any-return]


def _chance(passed: Passed, study: NewStudy) -> float:
    """That the artifact keeps the cap, its bytes normal with nine of ten in the prediction's interval."""
    prediction = passed.prediction
    deviation = max((prediction.artifact_bytes_high - prediction.artifact_bytes_low) / 2 / 1.645, 1.0)
    return 0.5 * (1 + erf((study.cap_bytes - prediction.artifact_bytes) / deviation / sqrt(2)))
