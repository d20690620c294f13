"""What clients might send, and must not: cases that schemathesis draws from the OpenAPI document, over the application
itself. In a share of them the path names what exists, and the body is one that people would write, with a few values
that nobody foresaw; the rest is drawn from the document alone."""

import logging
import random
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import schemathesis
from fastapi import FastAPI
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from schemathesis.generation.case import Case
from schemathesis.generation.modes import GenerationMode
from schemathesis.hooks import HookContext, unregister
from starlette.types import Receive, Scope, Send

from orchestrator.study import Lease
from worker.recipes import load_recipe

log = logging.getLogger(__name__)

STUDY, DOOMED = "0", "1"
"""The study that is there, by the name that systematic cases use; and one to pause, stop and archive."""
TRIALS = 14
TOKEN = "caddie_for_tests"
STREAM_SECONDS = 0.3  # how long a stream without news is listened to
STREAMS = "(events|stream)$"
MOST_LISTED = 20
SPECIFIED = "^/v1/(preview|studies|studies/preview|studies/{study}/(clone|imports|trials|trials/batch))$"
MOVES = "^/v1/studies/{study}(/(pause|resume|stop|archive|unarchive))?$"
RELATED = (
    "^/v1/(events|tokens|attempts/.*/artifact|studies/{study}/(events|trials)"
    "|.*/(measurements|notes|seeds|stream|tell|verdict))$"
)

ODD: tuple[Any, ...] = (
    0,
    -1,
    2**31,
    2**63,
    10**30,
    1e308,
    1e-320,
    -0.0,
    "",
    "\0",
    "\ud800",
    "x" * 70,
    "../x",
    None,
    True,
    [],
    {},
    [[]],
)
"""Values that something below might refuse: larger than a column, unwritable as text, of another type."""


def paths_of(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all values that are no mappings themselves."""
    for name, inner in value.items():
        yield from paths_of(inner, f"{prefix}{name}.") if isinstance(inner, dict) else (f"{prefix}{name}",)


PATHS = sorted(paths_of(load_recipe("laptop")))
VALUES: st.SearchStrategy[Any] = st.one_of(st.integers(0, 12), st.floats(0, 2), st.sampled_from(ODD))
OVERRIDES = st.one_of(
    st.fixed_dictionaries({"optimizer.matrix_lr": st.floats(0.01, 0.03)}),
    st.fixed_dictionaries({"sharing.lora.rank": st.integers(0, 8), "seed": st.integers(1, 10**9)}),
    st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=2),
)
SPACES: st.SearchStrategy[Any] = st.dictionaries(
    st.sampled_from(("sharing.lora.rank", "sharing.unique_blocks", "sharing.tying", "model.width")),
    st.one_of(
        st.sampled_from(({"low": 1, "high": 6}, {"choice": [0, 2]}, {"choice": ["cycle", "sequence"]}, {"fill": True})),
        st.fixed_dictionaries({"low": VALUES, "high": VALUES}),
        st.builds(lambda values: {"choice": values}, st.lists(VALUES, max_size=3)),
    ),
    max_size=2,
)


def written(operation: str, body: dict[str, Any], result: dict[str, Any]) -> st.SearchStrategy[Any]:
    """A body as people write them, for an operation that takes a spec; `result` is one that was trained."""
    optional: dict[str, st.SearchStrategy[Any]] = (
        {"allow_duplicate": st.booleans()} if operation.endswith("/trials") else {}
    )
    if operation.endswith("/batch"):
        return st.builds(
            lambda trials: {"trials": trials}, st.lists(written("/trials", {}, result), min_size=1, max_size=3)
        )
    if operation.endswith("/clone"):
        return st.just({"name": body.get("name", "clone")})
    if operation.endswith("/imports"):
        said = body.get("result")
        changed = st.dictionaries(st.sampled_from(sorted(result)), VALUES, max_size=1)
        some = st.just({}) if not isinstance(said, dict) else st.sampled_from([{}, {k: said[k] for k in [*said][:1]}])
        results = st.builds(lambda a, b: {**result, **a, **b}, changed, some)
        return st.fixed_dictionaries({"overrides": OVERRIDES, "result": results})
    if operation.endswith(("/studies", "/studies/preview")):
        fixed = {"name": st.just(body.get("name", "new")), "recipe": st.just("laptop"), "overrides": OVERRIDES}
        kept = {key: value for key, value in body.items() if key not in ("base", "size", "space", *fixed)}
        return st.builds(lambda new: {**kept, **new}, st.fixed_dictionaries(fixed, optional={"space": SPACES}))
    if operation.endswith("/preview"):
        optional = {"study": st.sampled_from([None, STUDY, "none"]), "cap_bytes": st.integers(1, 2**53)}
        return st.fixed_dictionaries({"recipe": st.just("laptop"), "overrides": OVERRIDES}, optional=optional)
    params = st.dictionaries(st.sampled_from(("sharing.lora.rank", "sharing.unique_blocks")), VALUES)
    return st.fixed_dictionaries({"overrides": OVERRIDES}, optional={"params": params, **optional})


def configuration(examples: int, *, drawn: Collection[str], linked: bool, dice: bool) -> SchemathesisConfig:
    """`examples` drawn cases of every operation, as many walks along links, and systematic cases but for the paths in
    `drawn`. Without `dice` they are the same each time: a change is not judged by chance."""
    return SchemathesisConfig.from_dict(
        {
            "seed": random.randrange(2**32) if dice else 1,
            "continue-on-failure": True,
            "request-timeout": 30,
            "max-stream-events": 2,
            "headers": {"Authorization": f"Bearer {TOKEN}"},
            "dictionaries": {"studies": {"values": [STUDY]}, "trials": {"values": [*range(TRIALS)]}},
            "parameters": {
                "path.study": {"dictionary": "studies", "probability": 0.9},
                "path.number": {"dictionary": "trials", "probability": 0.9},
            },
            "generation": {"max-examples": examples, "deterministic": not dice, "no-shrink": True},
            "phases": {
                "examples": {"enabled": False},
                "coverage": {"enabled": True},
                "stateful": {"enabled": linked},
            },
            "operations": [
                {
                    "include-path-regex": f"^({'|'.join(map(re.escape, drawn))})$",
                    "phases": {"coverage": {"enabled": False}},
                },
                {"include-path-regex": STREAMS, "request-timeout": STREAM_SECONDS},
                # What makes a spec, a space or a cursor valid is said in words: the schema allows more.
                {"include-path-regex": SPECIFIED, "checks": {"positive_data_acceptance": {"enabled": False}}},
                {"include-path-regex": RELATED, "checks": {"positive_data_acceptance": {"enabled": False}}},
                # `preview` is a name that a study can have; `batch` is no trial's number, which is said first.
                {
                    "include-path-regex": "/(preview|batch)$",
                    "checks": {name: {"enabled": False} for name in ("allow_header_conformance", "unsupported_method")},
                },
            ],
        }
    )  # fmt: skip


@dataclass
class Answered:
    """The application as a server runs it: what nobody expected was answered, and is logged, not raised."""

    app: FastAPI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception:
            log.exception("unexpected: %s %s", scope.get("method"), scope.get("path"))


def is_right(case: Case[Any]) -> bool:
    """Whether the case was drawn as one that the document allows."""
    return case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE


def fuzz(
    app: FastAPI, config: SchemathesisConfig, result: dict[str, Any], held: Lease, ended: Lease
) -> tuple[list[str], dict[str, set[int]]]:
    """Send everything. Returns what was wrong, each with a request that shows it, and the statuses of each operation.

    `result` is one that was trained, as JSON. Executors report under the lease `held`, and tell how the attempt under
    the lease `ended` did.
    """
    schema = schemathesis.openapi.from_dict(app.openapi(), config=config)
    schema.app = Answered(app)
    schema.validate()

    @schema.hook
    def flatmap_case(context: HookContext, case: Case[Any]) -> st.SearchStrategy[Case[Any]]:
        if not (is_right(case) and isinstance(case.body, dict) and re.match(SPECIFIED, case.path)):
            return st.just(case)

        def say(body: dict[str, Any]) -> Case[Any]:
            case.body = body
            return case

        return st.one_of(written(case.path, case.body, result).map(say), st.just(case))

    @schemathesis.hook
    def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
        if is_right(case) and case.path.startswith("/v1/attempts/"):
            lease = ended if case.path.endswith("/tell") else held
            case.path_parameters["attempt_id"] = lease.attempt_id
            case.headers["Caddie-Lease"] = lease.token
        elif is_right(case) and case.method.upper() in ("POST", "PATCH") and re.match(MOVES, case.path):
            case.path_parameters["study"] = DOOMED

    wrong: dict[tuple[str, str, str], str] = {}
    statuses: dict[str, set[int]] = {}
    try:
        found = list(from_schema(schema).execute())
    finally:
        unregister(before_call)
    for event in found:
        if isinstance(event, events.ScenarioFinished):
            for case_id, interaction in event.recorder.interactions.items():
                label, answer = event.recorder.cases[case_id].value.operation.label, interaction.response
                statuses.setdefault(label, set()).add(answer.status_code if answer else 0)
                for check in event.recorder.checks.get(case_id, ()):
                    if check.failure_info is not None:
                        failure, request = check.failure_info.failure, check.failure_info.code_sample
                        said = f"{label}: {failure.title}: {failure.message}\n{request}\n{answer and answer.content!r}"
                        wrong.setdefault((label, check.name, failure.title), said[:3000])
        elif isinstance(event, events.NonFatalError):
            wrong.setdefault((event.label, "error", str(event.value)), f"{event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            raise event.exception
    return list(wrong.values()), statuses
