"""What a search knows of its study: a cache of the history, of which samplers see a bounded part."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from orchestrator.feasibility import Predictor
from orchestrator.lesson import Lesson, key_of, lesson_of, point_of
from orchestrator.lifecycle import OPEN_TRIALS
from orchestrator.points import Domain, Point
from orchestrator.study import Study, Trial
from worker.spec import GangConfig, TrialSpec

BEST, LATEST, LATEST_LESS = 150, 100, 50  # of scored trials by value, and by number; of refused and of stopped ones
FEW = 50  # finished trials that the predictor learns one by one; of more it reads the latest alone
KEPT = 20_000  # specs whose canonical hash is kept


class Memory:
    """The trials of one study, by number. Another memory of the same history is equal in all that it says."""

    def __init__(self, study: Study, domain: Domain) -> None:
        self.study, self.domain = study, domain
        self.revision = 0
        """Grows with all that is learned. While it stays the same, so does what can be proposed."""
        self._hashed: dict[str, str] = {}  # the canonical hash of specs, which takes ten times what writing one does
        self._forget()

    def _forget(self) -> None:
        self._trials: dict[int, Trial] = {}  # by number, in order
        self._points: dict[int, Point] = {}  # of those that are points of the space
        self._lessons: dict[int, Lesson] = {}
        self._ranked: list[tuple[float, int]] = []  # scored and feasible, by the first objective
        self._numbers: dict[str, list[int]] = {}  # of lessons, in order, by kind
        self.predictor = Predictor()
        self._predicted: set[int] = set()  # numbers of the finished trials that the predictor has learned
        self._hashes: set[str] = set()  # of every trial
        self._gangs: set[GangConfig] = set()
        self._keys: set[str] = set()  # of every trial that is a point
        self.followed: set[tuple[str, int]] = set()  # rules with the trials that showed them, which were followed
        self.position = -1  # the farthest that proposals which walk have come

    def learn(self, history: Sequence[Trial]) -> None:
        """Take over what is new or has changed. A history that does not continue the last one starts afresh."""
        numbers = [trial.number for trial in history]
        assert numbers == sorted(numbers), "a history is ordered by number"
        if numbers[: len(self._trials)] != list(self._trials):
            self._forget()
        news = [trial for trial in history if self._trials.get(trial.number) is not trial]
        self.revision += any(map(self._is_telling, news))
        for trial in news:
            self._take(trial)
        self._predict_from(news)

    def _is_telling(self, trial: Trial) -> bool:
        """Whether more is new than how far an open trial has come."""
        before = self._trials.get(trial.number)
        return before is None or trial.state not in OPEN_TRIALS or before.state not in OPEN_TRIALS

    def _take(self, trial: Trial) -> None:
        assert trial.study_id == self.study.id, "a memory is of one study"
        number, fresh = trial.number, trial.number not in self._trials
        self._trials[number] = trial
        if fresh:
            self._hashes.add(trial.spec_hash)
            self._gangs.add(trial.spec.gang)
            if (point := point_of(trial, self.domain)) is not None:
                self._points[number] = point
                self._keys.add(key_of(point))
            self._note(trial)
        if number in self._points:
            self._drop(number)
            self._add(lesson_of(trial, self._points[number], self.study.definition))

    def _predict_from(self, news: Sequence[Trial]) -> None:
        """The predictor learns a trial once, so one that ended again, at another rung, means learning all anew."""
        ended = [trial for trial in news if trial.state not in OPEN_TRIALS]
        if len(ended) > FEW or any(trial.number in self._predicted for trial in news):
            self.predictor = Predictor.of([each for each in self._trials.values() if each.state not in OPEN_TRIALS])
        else:
            for trial in ended:
                self.predictor.learn(trial)
        self._predicted -= {trial.number for trial in news}
        self._predicted |= {trial.number for trial in ended}

    def _note(self, trial: Trial) -> None:
        suggestion = trial.suggestion
        if suggestion is not None and suggestion.rule is not None and suggestion.parent is not None:
            self.followed.add((suggestion.rule, suggestion.parent))
        if suggestion is not None and suggestion.position is not None:
            self.position = max(self.position, suggestion.position)

    def _drop(self, number: int) -> None:
        lesson = self._lessons.pop(number, None)
        if lesson is not None:
            numbers = self._numbers[lesson.kind]
            del numbers[bisect_left(numbers, number)]
            if lesson.feasible:
                del self._ranked[bisect_left(self._ranked, (lesson.values[0], number))]

    def _add(self, lesson: Lesson | None) -> None:
        if lesson is not None:
            self._lessons[lesson.number] = lesson
            insort(self._numbers.setdefault(lesson.kind, []), lesson.number)
            if lesson.feasible:
                insort(self._ranked, (lesson.values[0], lesson.number))

    @property
    def count(self) -> int:
        """Trials so far."""
        return len(self._trials)

    def best(self, count: int) -> list[Lesson]:
        """Scored within every cap, the best by the first objective first."""
        return [self._lessons[number] for _, number in self._ranked[:count]]

    def latest(self, kind: str, count: int) -> list[Lesson]:
        """The last of a kind, by number."""
        return [self._lessons[number] for number in self._numbers.get(kind, [])[-count:]]

    def open(self) -> list[Lesson]:
        return [self._lessons[number] for number in self._numbers.get("open", [])]

    def selected(self) -> list[Lesson]:
        """What a sampler sees, by number: the best and the latest scored ones, the latest others, and all open ones."""
        chosen = [*self.best(BEST), *self.latest("scored", LATEST), *self.open()]
        chosen += [lesson for kind in ("stopped", "refused") for lesson in self.latest(kind, LATEST_LESS)]
        return [by_number for _, by_number in sorted({lesson.number: lesson for lesson in chosen}.items())]

    def is_known(self, point: Point) -> bool:
        """Whether some trial is at this very point. One at an equal point may hide behind another spelling of it."""
        return self.is_known_key(key_of(point))

    def is_known_key(self, key: str) -> bool:
        return key in self._keys

    def is_known_spec(self, spec: TrialSpec) -> bool:
        """Whether some trial has this spec, seed and gang aside."""
        gangs = self._gangs | {spec.gang}
        return any(self._hash(spec.model_copy(update={"gang": gang})) in self._hashes for gang in gangs)

    def _hash(self, spec: TrialSpec) -> str:
        written = spec.model_dump_json()
        if written not in self._hashed:
            if len(self._hashed) >= KEPT:
                self._hashed.clear()
            self._hashed[written] = spec.canonical_hash
        return self._hashed[written]
