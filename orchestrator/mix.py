"""The `caddie` sampler: several arms, each drawn as often as its proposals have done well in this study."""

import random
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any

from orchestrator.gate import Gate
from orchestrator.guided import INCUMBENTS, guided
from orchestrator.lesson import key_of
from orchestrator.moves import complete, mutate, retie, spend
from orchestrator.outlook import Outlook
from orchestrator.points import Domain
from orchestrator.samplers import OptunaSampler
from orchestrator.shares import draw_arms
from orchestrator.study import NewStudy, Suggestion
from worker.recipes import load_recipe, recipe_names
from worker.spec import InvalidSpec, parse_spec

Candidate = tuple[dict[str, Any], Suggestion]

PRIORS: Mapping[str, tuple[float, float]] = {
    "surrogate": (6.0, 3.0), "exploit": (2.0, 4.0), "guided": (2.0, 4.0), "tpe": (1.0, 4.0), "random": (1.0, 8.0),
}  # fmt: skip
"""Successes and failures that each arm starts with: what it is taken for before the study has said anything."""
WINDOW = 200  # latest trials by which the arms are judged
RECIPES = 3  # sharings of recipes that are tried first
PARENTS = 8  # best trials that are mutated
TRIES = 12  # candidates of an arm before the next one is asked


class Mix:
    """The arms of one study. What it keeps follows from the space alone."""

    def __init__(self, domain: Domain, definition: NewStudy) -> None:
        self._domain, self._definition = domain, definition
        self._tpe = OptunaSampler("tpe", domain, definition)
        self._outlook = Outlook(domain, definition)

    def candidates(self, gate: Gate, seed: Callable[[int], int]) -> Iterator[Candidate]:
        """Points to propose, best first: recipes, then arm by arm in the order that is drawn."""
        memory = gate.memory
        if memory.count < RECIPES:
            yield from ((point, told) for point, told in self._recipes if not memory.is_known(point))
        arms: Mapping[str, Callable[[], Iterator[Candidate]]] = {
            "surrogate": lambda: self._expected(gate, random.Random(seed(1))),
            "exploit": lambda: self._exploited(gate, random.Random(seed(2))),
            "guided": lambda: islice(guided(gate, memory.best(INCUMBENTS), memory.followed), TRIES),
            "tpe": lambda: self._sampled(gate, seed),
            "random": lambda: self._drawn(random.Random(seed(3))),
        }
        tried = sorted(
            [*memory.latest("scored", WINDOW), *memory.latest("stopped", WINDOW)], key=lambda each: each.number
        )
        for arm in draw_arms(PRIORS, tried[-WINDOW:], random.Random(seed(0))):
            yield from arms[arm]()

    def _expected(self, gate: Gate, rng: random.Random) -> Iterator[Candidate]:
        for point in self._outlook.points(gate, rng):
            yield point, Suggestion(arm="surrogate")

    def _exploited(self, gate: Gate, rng: random.Random) -> Iterator[Candidate]:
        """Changes of good trials, better ones more often: of the tying map or of anything; half of them with the bytes
        that are left spent."""
        parents = gate.memory.best(PARENTS)
        if not parents:
            return
        for _ in range(TRIES):
            parent = parents[min(int(rng.expovariate(2 / PARENTS)), len(parents) - 1)]
            point = None
            if self._domain.tying is not None and rng.random() < 0.5:
                point = retie(self._domain, parent.trial.spec, rng)
            point = point or mutate(self._domain, parent.point, rng)
            if rng.random() < 0.5 and not gate.memory.is_known(point):
                point = spend(gate, point)
            yield point, Suggestion(arm="exploit", parent=parent.number)

    def _sampled(self, gate: Gate, seed: Callable[[int], int]) -> Iterator[Candidate]:
        with self._tpe.taught(gate.memory.selected()):
            for attempt in range(TRIES):
                yield self._tpe.ask(seed(10 + attempt)), Suggestion(arm="tpe")

    def _drawn(self, rng: random.Random) -> Iterator[Candidate]:
        for _ in range(TRIES):
            yield self._domain.random(rng), Suggestion(arm="random")

    @cached_property
    def _recipes(self) -> list[Candidate]:
        """Points that share as a recipe does; what the space says beside sharing is the base's, or drawn."""
        found: dict[str, Candidate] = {}
        for name in recipe_names():
            try:
                spec = parse_spec({**self._definition.base, "sharing": load_recipe(name)["sharing"]})
                point = complete(self._domain, self._domain.partial(spec), random.Random(name))
                made = self._domain.spec(point, spec.gang)
            except InvalidSpec:
                continue
            if made.sharing.canonical() == spec.sharing.canonical():
                found.setdefault(key_of(point), (point, Suggestion(arm="recipe", rule=name)))
        return list(found.values())[:RECIPES]
