"""Reading the value that a parameter of a space has in a spec."""

from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter

from orchestrator.space import Parameter
from worker.spec import TrialSpec

FEW = 4096  # values that are kept for a quick look: exact steps are slow to reckon
ABSENT = object()  # the value of a parameter where the spec has one that is none of its own


class Reader:
    """Reads one choice or range at its path."""

    def __init__(self, path: str, parameter: Parameter) -> None:
        self._names = path.split(".")
        self._parameter = parameter
        self._whole = parameter.whole
        self._known = frozenset(parameter.values if parameter.choice is None and parameter.count <= FEW else ())
        self._parsed: tuple[Any, ...] = ()
        if parameter.choice is not None:  # a person may write a value short, such as a tying pattern's bare name
            adapter: TypeAdapter[Any] = TypeAdapter(type_at(self._names))
            self._parsed = tuple(adapter.validate_python(value) for value in parameter.choice)

    def read(self, spec: TrialSpec) -> Any:
        """The value as the parameter has it, or ABSENT."""
        value: Any = spec
        for name in self._names:
            value = getattr(value, name, None)
        if self._parameter.choice is not None:
            for choice, parsed in zip(self._parameter.choice, self._parsed, strict=True):
                if parsed == value:
                    return choice
            return ABSENT
        if value not in self._known and not self._parameter.contains(value):
            return ABSENT
        return int(value) if self._whole else value


def type_at(names: Sequence[str]) -> Any:
    """The type of a spec's field by its path. Raises LookupError."""
    kind: Any = TrialSpec
    for name in names:
        options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        models = [each for each in options if isinstance(each, type) and issubclass(each, BaseModel)]
        kind = models[0].model_fields[name].annotation
    return kind
