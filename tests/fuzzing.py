"""What clients might send, and must not: cases that schemathesis draws from the OpenAPI document, over the application
itself. In a share of them the path names what exists, and the body is one that people would write, with a few values
that nobody foresaw; the rest is drawn from the document alone."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import schemathesis
from fastapi import FastAPI
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from schemathesis.hooks import HookContext

from worker.recipes import load_recipe

STUDY = "0"
"""The name of the study that is there: the shortest that the document allows, which systematic cases therefore use."""
TRIALS = 14
STREAM_SECONDS = 0.3  # how long a stream without news is listened to
STREAMS = "(events|stream)$"
MOST_LISTED = 20
SPECIFIED = "^/v1/(preview|studies|studies/preview|studies/{study}/(clone|imports|trials|trials/batch))$"
RELATED = "^/v1/(events|studies/{study}/(events|trials)|.*/(stream|verdict))$"

ODD = (0, -1, 2**31, 2**63, 10**30, 1e308, 1e-320, -0.0, "", "\0", "\ud800", "x" * 70, "../x", None, True, [], {}, [[]])
"""Values that something below might refuse: larger than a column, unwritable as text, of another type."""


def paths_of(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all values that are no mappings themselves."""
    for name, inner in value.items():
        yield from paths_of(inner, f"{prefix}{name}.") if isinstance(inner, dict) else (f"{prefix}{name}",)


PATHS = sorted(paths_of(load_recipe("laptop")))
VALUES: st.SearchStrategy[Any] = st.one_of(st.integers(0, 12), st.floats(0, 2), st.sampled_from(ODD))
OVERRIDES = st.one_of(
    st.dictionaries(st.sampled_from(("sharing.lora.rank", "sharing.unique_blocks", "seed")), st.integers(0, 6)),
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
    optional = {"allow_duplicate": st.booleans()} if operation.endswith("/trials") else {}
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


def configuration(examples: int, steps: int, *, seed: int) -> SchemathesisConfig:
    """Systematic cases of every operation, then `examples` drawn ones each, then runs of `steps` along links."""
    return SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "continue-on-failure": True,
            "request-timeout": 30,
            "max-stream-events": 2,
            "dictionaries": {"studies": {"values": [STUDY]}, "trials": {"values": [*range(TRIALS)]}},
            "parameters": {
                "path.study": {"dictionary": "studies", "probability": 0.9},
                "path.number": {"dictionary": "trials", "probability": 0.9},
            },
            "generation": {"max-examples": examples, "deterministic": True, "no-shrink": True},
            "phases": {
                "examples": {"enabled": False},
                "stateful": {"enabled": steps > 0, "max-steps": max(steps, 2)},
            },
            "operations": [
                {"include-path-regex": STREAMS, "request-timeout": STREAM_SECONDS},
                # What makes a spec, a space or a cursor valid is said in words: the schema allows more.
                {"include-path-regex": SPECIFIED, "checks": {"positive_data_acceptance": {"enabled": False}}},
                {"include-path-regex": RELATED, "checks": {"positive_data_acceptance": {"enabled": False}}},
                # `preview` is a name that a study can have, and as such it can be read.
                {
                    "include-path": "/v1/studies/preview",
                    "checks": {"allow_header_conformance": {"enabled": False}, "unsupported_method": {"enabled": False}},
                },
            ],
        }
    )  # fmt: skip


def fuzz(app: FastAPI, config: SchemathesisConfig, result: dict[str, Any]) -> tuple[list[str], dict[str, set[int]]]:
    """Send everything. Returns what was wrong, each with the request that shows it, and each operation's statuses."""
    schema = schemathesis.openapi.from_asgi("/v1/openapi.json", app, config=config)

    @schema.hook
    def flatmap_body(context: HookContext, body: Any) -> st.SearchStrategy[Any]:
        assert context.operation is not None
        if not isinstance(body, dict) or not re.match(SPECIFIED, context.operation.path):
            return st.just(body)
        return st.one_of(st.just(body), written(context.operation.path, body, result))

    schema.validate()
    wrong: dict[tuple[str, str, str], str] = {}
    statuses: dict[str, set[int]] = {}
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            for node_id, interaction in event.recorder.interactions.items():
                label = event.recorder.cases[node_id].value.operation.label
                statuses.setdefault(label, set()).add(interaction.response.status_code if interaction.response else 0)
                for check in event.recorder.checks.get(node_id, ()):
                    if (info := check.failure_info) is not None:
                        answer = interaction.response and interaction.response.content[:500]
                        said = f"{label}: {info.failure.title}: {info.failure.message}\n{info.code_sample}\n{answer!r}"
                        wrong.setdefault((label, check.name, info.failure.title), said)
        elif isinstance(event, events.NonFatalError):
            wrong.setdefault((event.label, "error", str(event.value)), f"{event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            raise event.exception
    return list(wrong.values()), statuses
