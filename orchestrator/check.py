"""What is wrong with a space, by path, before its study exists."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise, product
from math import floor
from random import Random
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from orchestrator.condition import Clause, Condition
from orchestrator.families import BLOCKS, DEEPEST, FAMILIES, FAMILY, LAYERS, TYING, Spelling, TyingFamilies, spell
from orchestrator.points import Domain, value_at
from orchestrator.reader import type_at
from orchestrator.space import FamilyName, Parameter, Space, apply
from worker.spec import GangConfig, InvalidSpec, Problem, TrialSpec, parse_spec

Model = TypeVar("Model", bound=BaseModel)
Key = TypeVar("Key")
_FIXED = {
    "gang": "the study's gangs say which shapes to propose for",
    "seed": "it is not part of the configuration",
    "limits": "they are not part of the configuration",
    "schema_version": "there is one",
}
DRAWN = 32  # of a space's points, to see whether a rule that a value breaks reads anything that varies
MOST_TRIED, MOST_PARSED = 20_000, 256  # combinations of a family's parameters, until one is found that is legal


def check_study(base: Mapping[str, Any], gangs: Sequence[GangConfig], space: Space) -> None:
    """Raises InvalidSpec naming all that is wrong with a study's base, its gangs on that base, and its space.

    That is paths that cannot vary, values that no spec could take, families of tying maps that are never legal, and
    conditions that cannot be read, met or put in an order.
    """
    problems = tuple(_study_problems(base, dict(enumerate(gangs)), space))
    if problems:
        raise InvalidSpec(problems)


def rest_problems(data: Any) -> Iterator[Problem]:
    """What else is wrong with a study's plain data of which some part could not be read: all is said at once."""
    base, gangs, space = (data.get(name) if isinstance(data, Mapping) else None for name in ("base", "gangs", "space"))
    if isinstance(base, Mapping):
        shapes = _readable(GangConfig, dict(enumerate(gangs)) if isinstance(gangs, list | tuple) else {})
        yield from _study_problems(base, shapes, _readable(Parameter, space if isinstance(space, Mapping) else {}))


def _readable(model: type[Model], parts: Mapping[Key, Any]) -> dict[Key, Model]:
    found: dict[Key, Model] = {}
    for key, part in parts.items():
        with suppress(ValidationError):
            found[key] = model.model_validate(part)
    return found


def _study_problems(base: Mapping[str, Any], gangs: Mapping[int, GangConfig], space: Space) -> Iterator[Problem]:
    try:
        parse_spec(base)
    except InvalidSpec as error:
        yield from (problem.within("base") for problem in error.problems)
        return
    for index, gang in gangs.items():
        try:
            parse_spec({**base, "gang": gang})
        except InvalidSpec as error:
            for problem in error.problems:
                yield replace(problem, field=problem.field.removeprefix("gang.")).within(f"gangs.{index}")
    yield from space_problems(base, space)


def space_problems(base: Mapping[str, Any], space: Space) -> Iterator[Problem]:
    """All that is wrong, in the space's order. The base is a valid spec's."""
    spec, wrong = parse_spec(base), set[str]()
    for path, parameter in space.items():
        found = list(_path_problems(path, space)) or list(_parameter_problems(base, path, parameter, space))
        if found:
            wrong.add(path)
        yield from found
    sound = {path: parameter for path, parameter in space.items() if path not in wrong}
    conditions = [Problem(f"space.{path}.when", each.when, message, kind) for path, each in space.items()
                  for message, kind in _reading_problems(each.condition, space)]  # fmt: skip
    yield from conditions
    try:
        domain = Domain(base, sound)
    except InvalidSpec as error:
        yield from error.problems
        return
    if not conditions:
        for path, parameter in space.items():
            if parameter.condition is not None:
                yield from _never_met(path, parameter.condition, spec, sound, domain)
    for path in (LAYERS, BLOCKS):
        if path in sound and _is_always_set(path, domain, sound):
            yield Problem(f"space.{path}", path, f"means nothing: every family of {TYING} sets it")
    tying = domain.tying
    if isinstance(tying, TyingFamilies):
        for family in tying.parameters:
            yield from _never_legal(family, tying, base, sound)


def never_legal_values(base: Mapping[str, Any], space: Space) -> Iterator[Problem]:
    """Choices, and ends of ranges, that break a rule between fields whatever the rest of a sound space is.

    Asked when a study is created, and not when one is read: it may be from before there was such a rule.
    """
    parsed = 0
    for path, parameter in space.items():
        if not parameter.is_sampled or (path in (LAYERS, BLOCKS) and TYING in space):  # families may set them instead
            continue
        for value in _ends_and_between(parameter):
            broken = _rules_broken(base, {path: value})
            for others in _elsewhere(path, base, space) if broken else ():
                parsed += 1
                broken = [problem for problem in _rules_broken(base, {**others, path: value}) if problem in broken]
                if not broken or parsed > MOST_TRIED:
                    break
            if parsed > MOST_TRIED:
                return
            for problem in broken[:1]:
                said = problem.message if problem.field == path else f"can never be here: {problem}"
                yield Problem(f"space.{path}", value, said)


def _rules_broken(base: Mapping[str, Any], changes: Mapping[str, Any]) -> list[Problem]:
    """The rules that break then, in their words: one that reads more than the changed path has others elsewhere."""
    try:
        apply(base, changes)
    except InvalidSpec as error:
        return [problem for problem in error.problems if problem.kind == "rule"]
    return []


def _elsewhere(path: str, base: Mapping[str, Any], space: Space) -> Iterator[Mapping[str, Any]]:
    """What the space has for its other paths: each by itself, then some of all together."""
    options = [_options(other, base, space) for other in space if other != path]
    for each in options:
        yield from each
    rng = Random(0)
    for _ in range(DRAWN if len(options) > 1 else 0):
        yield {name: value for each in options for name, value in rng.choice(each).items()}


def _options(path: str, base: Mapping[str, Any], space: Space) -> list[Mapping[str, Any]]:
    parameter = space[path]
    if parameter.families is not None:
        tying = Domain(base, space).tying
        assert isinstance(tying, TyingFamilies)
        spelled = (
            each for family in tying.parameters for each in islice(_spellings(family, tying, base, space), DRAWN)
        )
        found = [{LAYERS: each.layers, BLOCKS: each.blocks, TYING: each.tying.model_dump(mode="json")}
                 for each in spelled if isinstance(each, Spelling) and each.map]  # fmt: skip
        return [{}, *found]
    values = _ends_and_between(parameter.fill.range if parameter.fill is not None else parameter)
    return [{}, *({path: value} for value in values)]


def _path_problems(path: str, space: Space) -> Iterator[Problem]:
    field, first = f"space.{path}", path.split(".")[0]
    if first in _FIXED:
        yield Problem(field, path, f"cannot vary: {_FIXED[first]}")
    for other in space:
        if path.startswith(f"{other}."):
            yield Problem(field, path, f"lies inside {other}, which varies too: give one of the two")


def _parameter_problems(base: Mapping[str, Any], path: str, parameter: Parameter, space: Space) -> Iterator[Problem]:
    if parameter.families is not None:
        yield from _family_problems(path, parameter.families, space)
    elif parameter.fill is not None:
        first = next(other for other, each in space.items() if each.fill is not None)
        if path != first:
            yield Problem(f"space.{path}.fill", path, f"{first} is filled already: one path can be")
        elif problems := list(_value_problems(base, path, parameter.fill.range)):
            yield from problems
        elif type_at(path.split(".")) not in (int, float):
            yield Problem(f"space.{path}.fill", path, "is no number")
    else:
        yield from _value_problems(base, path, parameter)


def _value_problems(base: Mapping[str, Any], path: str, parameter: Parameter) -> Iterator[Problem]:
    """What is wrong with values at their own path; what is wrong between paths depends on the other parameters."""
    for value in _ends_and_between(parameter):
        try:
            apply(base, {path: value})
        except InvalidSpec as error:
            own = [problem for problem in error.problems if problem.kind != "rule"]
            if own and own[0].kind == "unknown":
                message = f"is not a path of a trial's spec: {own[0].field} {own[0].message}"
                yield Problem(f"space.{path}", path, message, "unknown")
                return
            yield from (Problem(f"space.{path}", value, problem.message, "value") for problem in own)


def _ends_and_between(parameter: Parameter) -> tuple[Any, ...]:
    """Values that stand for all: every choice, or both ends and, of numbers that are not whole, one between them."""
    if parameter.choice is not None:
        return parameter.choice
    low, high = parameter.low, parameter.high
    assert low is not None
    assert high is not None
    between = low + (parameter.step or (high - low) * 0.381966)
    return (low, high) if parameter.whole or between > high else (low, high, between)


def _family_problems(
    path: str, families: Mapping[FamilyName, Mapping[str, Parameter]], space: Space
) -> Iterator[Problem]:
    if path != TYING:
        yield Problem(f"space.{path}.families", list(families), f"are of tying maps: only {TYING} has them")
        return
    layers = space.get(LAYERS)
    if "free" in families and layers is not None and layers.fill is not None:
        message = f"has a dimension for each layer, so {LAYERS} cannot be filled"
        yield Problem(f"space.{path}.families.free", "free", message)
    for family, parameters in families.items():
        known = FAMILIES[family].parameters
        for part, parameter in parameters.items():
            field = f"space.{path}.families.{family}.{part}"
            if part not in known:
                has = ", ".join(known) or "no parameters"
                yield Problem(field, part, f"is not a parameter of {family}, which has {has}", "unknown")
                continue
            low, high = known[part]
            for value in _ends_and_between(parameter):
                whole = part == "from_fraction" or isinstance(value, int)
                if (
                    isinstance(value, bool)
                    or not isinstance(value, int | float)
                    or not whole
                    or not low <= value <= high
                ):
                    kind = "a number" if part == "from_fraction" else "a whole number"
                    yield Problem(field, value, f"must be {kind} from {low:g} to {high:g}", "value")


def _reading_problems(condition: Condition | None, space: Space) -> Iterator[tuple[str, Any]]:
    """What is wrong with the paths that a condition reads."""
    families = space[TYING].families if TYING in space else None
    for path in condition.paths if condition is not None else ():
        own = families is not None and path.startswith(f"{TYING}.")
        inside = next((other for other in space if path.startswith(f"{other}.")), None)
        if path.split(".")[0] in _FIXED:
            yield f"cannot read {path}: it is not part of the configuration that varies", "rule"
        elif own and not _is_family_path(path, families or {}):
            yield f"cannot read {path}: of tying families there is {FAMILY}, and the parameters of each", "unknown"
        elif not own and inside is not None:
            yield f"cannot read {path}: it lies inside {inside}, which varies; compare that", "rule"
        elif path == TYING and families is not None:
            yield f"cannot read {path}, which has families: compare {FAMILY}", "rule"
        elif not own and not _is_spec_path(path):
            yield f"cannot read {path}: it is not a path of a trial's spec", "unknown"
        elif part := next((other for other in space if other.startswith(f"{path}.")), None):
            yield f"cannot read {path}: a part of it varies, {part}; compare that", "rule"


def _is_family_path(path: str, families: Mapping[FamilyName, Any]) -> bool:
    family, _, part = path.removeprefix(f"{TYING}.").partition(".")
    if family == "free":
        return "free" in families and part.isdecimal()
    return path == FAMILY or any(family == name and part in FAMILIES[name].parameters for name in families)


def _is_spec_path(path: str) -> bool:
    try:
        type_at(path.split("."))
    except LookupError:
        return False
    return True


def _never_met(path: str, condition: Condition, spec: TrialSpec, space: Space, domain: Domain) -> Iterator[Problem]:
    """A condition that reads what is filled, or that no value of one path meets."""
    data = spec.model_dump(mode="json")
    for read in condition.paths:
        if domain.fill_path in domain.sources(read):
            message = f"cannot read {read}: it follows from {domain.fill_path}, which is filled last"
            yield Problem(f"space.{path}.when", condition.text, message)
            continue
        clauses = condition.of(read)
        if not any(
            all(clause.holds(value) for clause in clauses) for value in _seen(read, clauses, data, space, domain)
        ):
            text = " and ".join(f"{clause.path} {clause.operator} {clause.literal}" for clause in clauses)
            yield Problem(f"space.{path}.when", condition.text, f"can never hold: nothing in this study has {text}")


def _seen(path: str, clauses: Sequence[Clause], data: Mapping[str, Any], space: Space, domain: Domain) -> Iterator[Any]:
    """Values that a condition may read at a path: of numbers, some on either side of each that it compares with."""
    numbers = [number for clause in clauses for number in clause.numbers]
    dimensions = {each.name: each.parameter for each in domain.dimensions}
    parameter = None if _is_always_set(path, domain, space) else dimensions.get(path)
    if parameter is not None:
        yield from _around(parameter, numbers)
    if path.startswith(f"{TYING}.") and TYING in space:
        yield None
    elif not _is_always_set(path, domain, space) and (parameter is None or space[path].when is not None):
        yield value_at(data, path)
    if isinstance(domain.tying, TyingFamilies):
        for reached in domain.tying.reach(path):
            yield from _around(reached, numbers)


def _is_always_set(path: str, domain: Domain, space: Space) -> bool:
    """Whether every family of tying maps sets this path, so that nothing else does."""
    setting = domain.setting(path)
    return bool(setting) and space[TYING].when is None and setting == set(space[TYING].families or ())


def _around(parameter: Parameter, numbers: Sequence[float]) -> Iterator[Any]:
    """Values of a parameter such that of every run between and at these numbers there is one."""
    if parameter.choice is not None:
        yield from parameter.choice
        return
    low, high = parameter.low, parameter.high
    assert low is not None
    assert high is not None
    inside = sorted({low, high, *(number for number in numbers if low < number < high)})
    if parameter.whole or parameter.step is not None:
        last = int(parameter.count) - 1
        places = {floor(parameter.steps_to(number)) + step for number in inside for step in (-1, 0, 1, 2)}
        yield from (parameter.value_at(place) for place in sorted(places) if 0 <= place <= last)
    else:
        yield from inside
        yield from (float((Fraction(one) + Fraction(other)) / 2) for one, other in pairwise(inside))


def _never_legal(family: FamilyName, tying: TyingFamilies, base: Mapping[str, Any], space: Space) -> Iterator[Problem]:
    """A family none of whose maps any spec could have, whatever else the space varies."""
    tried, parsed, message = 0, 0, ""
    for spelled in islice(_spellings(family, tying, base, space), MOST_TRIED):
        tried += 1
        if isinstance(spelled, Spelling):
            parsed += 1
            found = None if parsed > MOST_PARSED else _problem_elsewhere(spelled, base, space)
            if found is None:
                return
            message = found
        else:
            message = spelled
    if tried < MOST_TRIED:
        yield Problem(f"space.{TYING}.families.{family}", family, f"can never be legal here: {message}")


def _spellings(
    family: FamilyName, tying: TyingFamilies, base: Mapping[str, Any], space: Space
) -> Iterator[Spelling | str]:
    """What each combination of a family's parameters says, or what is wrong with it."""
    sharing = parse_spec(base).sharing
    depths = _numbers(space.get(LAYERS), sharing.virtual_layers, LAYERS in FAMILIES[family].sets)
    blocks = _numbers(space.get(BLOCKS), sharing.unique_blocks, BLOCKS in FAMILIES[family].sets)
    for layers, unique in product(depths, blocks):
        for parts in tying.examples(family):
            try:
                spelled = spell(family, parts, layers, unique)
                if spelled.layers > DEEPEST:
                    yield f"it has {spelled.layers} virtual layers, and a spec at most {DEEPEST}"
                elif spelled.map:
                    yield spelled
            except ValueError as error:
                yield str(error)


def _numbers(parameter: Parameter | None, at_base: int, is_set: bool) -> tuple[int, ...]:
    """What virtual layers or blocks may be where the family does not set them."""
    if parameter is None or is_set:
        return (at_base,)
    values = parameter.fill.range.values if parameter.fill is not None else parameter.values
    return (*values, at_base) if parameter.when is not None else values


def _problem_elsewhere(spelled: Spelling, base: Mapping[str, Any], space: Space) -> str | None:
    """What the base has against a tying at a path that does not vary."""
    try:
        apply(base, {LAYERS: spelled.layers, BLOCKS: spelled.blocks, TYING: spelled.tying.model_dump(mode="json")})
    except InvalidSpec as error:
        varies = (TYING, *space)
        fixed = [each for each in error.problems if not any(f"{each.field}.".startswith(f"{p}.") for p in varies)]
        return str(fixed[0]) if fixed else None
    return None
