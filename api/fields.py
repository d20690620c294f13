"""A spec as a form's fields: read off its JSON schema, shown as text, and read back as what a person changed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from worker.spec import Problem, TrialSpec

Kind = Literal["whole", "number", "text", "choice", "switch", "list", "part"]
"""part: whether an optional group of fields is there at all."""
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
REST = "rest"  # the section of what belongs to no part of a spec


@dataclass(frozen=True)
class Field:
    """One value of a spec: its dotted path, what it may be, and what it means."""

    path: str
    kind: Kind
    default: Any
    help: str
    limits: str
    """What it may be, in words; empty where anything of its kind will do."""
    options: tuple[Any, ...] = ()
    optional: bool = False
    """Whether it may be left empty, which means none."""

    @property
    def name(self) -> str:
        """The last part of the path, in words."""
        return self.path.rpartition(".")[2].replace("_", " ")

    @property
    def choices(self) -> list[tuple[str, str]]:
        """Of a field with few values: each as text, and as the form says it."""
        if self.kind == "switch":
            return [("true", "yes"), ("false", "no")]
        if self.kind == "part":
            return [("true", "on"), ("false", "off")]
        none = [("", "none")] if self.optional else []
        return none + [(str(option), str(option)) for option in self.options]

    def text(self, value: Any) -> str:
        """The value as the form shows it."""
        if self.kind == "part":
            return "true" if value is not None else "false"
        if value is None:
            return ""
        if self.kind == "list":
            return ", ".join(str(item) for item in value)
        return str(value).lower() if self.kind == "switch" else str(value)

    def value(self, text: str) -> Any:
        """What the text says. Text that is no such value stays text, which no spec takes: it will be told why."""
        text = text.strip()
        if self.kind in ("switch", "part"):
            return text == "true"
        if not text and self.optional:
            return None
        if self.kind == "choice":
            return next((option for option in self.options if str(option) == text), text)
        if self.kind == "list":
            return [_number(item, int) for item in text.strip("[]").replace(",", " ").split()]
        return text if self.kind == "text" else _number(text, int if self.kind == "whole" else float)


@dataclass(frozen=True)
class Section:
    """The fields of one part of a spec."""

    name: str
    help: str
    fields: tuple[Field, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Every field of a TrialSpec by the part that it is in, in the spec's order; what is in none comes last."""
    schema = TrialSpec.model_json_schema()
    found: list[Section] = []
    rest: list[Field] = []
    for name, part in schema["properties"].items():
        if "$ref" in part:
            whole = _resolve(part, schema)
            found.append(Section(name, _prose(whole), tuple(_fields(name, whole, part["default"], schema))))
        else:
            rest += _field(name, part, part.get("default"), schema)
    return (*found, Section(REST, "", tuple(rest)))


def all_fields() -> Iterator[Field]:
    """The fields of all sections."""
    for section in sections():
        yield from section.fields


def texts_of(spec: TrialSpec) -> dict[str, str]:
    """What the form shows for a spec: by path, of every field."""
    plain = spec.model_dump(mode="json")
    return {field.path: field.text(_at(plain, field)) for field in all_fields()}


def overrides_of(spec: TrialSpec, texts: Mapping[str, str]) -> dict[str, Any]:
    """What a form's texts change in the spec that it started from. Fields that the texts leave out stay as they are."""
    plain, changed, absent = spec.model_dump(mode="json"), dict[str, Any](), set[str]()
    for field in all_fields():
        text, before = texts.get(field.path), _at(plain, field)
        if text is None or field.path.rpartition(".")[0] in absent:
            continue
        value = field.value(text)
        if field.kind == "part":
            if not value:
                absent.add(field.path)
            if value != (before is not None):
                changed[field.path] = {} if value else None
        elif value != before:
            changed[field.path] = value
    return changed


def placed(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """Problems by the path of the field that each is about; of what is about none, by the empty path."""
    paths = [field.path for field in all_fields()]
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        path = problem.field.removeprefix("overrides.").removeprefix("spec.")
        own = max((one for one in paths if path == one or path.startswith(f"{one}.")), key=len, default="")
        found.setdefault(own, []).append(problem)
    return found


def _fields(prefix: str, part: Mapping[str, Any], defaults: Mapping[str, Any] | None, schema: Any) -> Iterator[Field]:
    for name, described in part["properties"].items():
        default = (defaults or {}).get(name, described.get("default"))
        yield from _field(f"{prefix}.{name}", described, default, schema)


def _field(path: str, described: Mapping[str, Any], default: Any, schema: Any) -> Iterator[Field]:
    either = [one for one in described.get("anyOf", ()) if one.get("type") != "null"]
    optional, whole = bool(either), _resolve(either[0] if either else described, schema)
    if "const" in whole:
        return
    if whole.get("type") == "object":
        if optional:
            yield Field(path, "part", default, _prose(whole), "", optional=True)
        first, *others = _fields(path, whole, default, schema)
        # What the part is about stands at its first field, such as a tying's pattern.
        yield first if first.help or optional else replace(first, help=_prose(whole))
        yield from others
        return
    items = _resolve(whole.get("items", {}), schema)
    options = tuple(whole.get("enum", ()))
    limits = [f"{words} {whole[key]:,}" for key, words in LIMITS.items() if key in whole]
    if "enum" in items:
        limits.append("any of " + ", ".join(items["enum"]))
    elif items:
        limits.append("whole numbers with commas")
    yield Field(path, _kind(whole), default, _prose(described), ", ".join(limits), options, optional)


def _prose(described: Mapping[str, Any]) -> str:
    """What is said about a part or a field, a line a paragraph."""
    paragraphs = described.get("description", "").replace("`", "").split("\n\n")
    return "\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


def _kind(whole: Mapping[str, Any]) -> Kind:
    if "enum" in whole:
        return "choice"
    kinds: dict[str, Kind] = {"integer": "whole", "number": "number", "boolean": "switch", "array": "list"}
    return kinds.get(whole.get("type", ""), "text")


def _resolve(described: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (
        schema["$defs"][described["$ref"].rpartition("/")[2]] if "$ref" in described else described
    )
    return found


def _at(plain: Mapping[str, Any], field: Field) -> Any:
    """The value at a field's path; the default where the part that it is in is absent."""
    place: Any = plain
    for name in field.path.split("."):
        if place is None:
            return field.default
        place = place[name]
    return place


def _number(text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text
