"""Hostile JSON: it is refused by name, on both databases, and leaves nothing behind."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from api.plain import InvalidBody, read_plain
from orchestrator.database import Database

STUDY: dict[str, Any] = {"name": "sweep", "recipe": "laptop", "space": {"sharing.lora.rank": {"choice": [0, 2]}}}
TRIALS = "/v1/studies/sweep/trials"


@pytest.fixture
def http(database: Database, serve: Callable[..., str]) -> Iterator[httpx.Client]:
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=serve(database, dashboard=False), headers=headers) as http:
        assert http.post("/v1/studies", json=STUDY).status_code == 201
        assert http.post(TRIALS, json={"recipe": "laptop"}).status_code == 201
        yield http


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_no_database_keeps_is_refused_wherever_it_stands(text: str, http: httpx.Client) -> None:
    bodies: list[tuple[str, str, dict[str, Any], str]] = [
        ("POST", TRIALS, {"overrides": {"data.dataset": text}}, "overrides.data.dataset"),
        ("POST", TRIALS, {"recipe": text}, "recipe"),
        ("POST", TRIALS, {"overrides": {text: 1}}, "overrides."),
        ("POST", f"{TRIALS}/batch", {"trials": [{"recipe": "laptop"}, {"params": {text: 1}}]}, "trials.1.params."),
        ("POST", f"{TRIALS}/0/notes", {"text": f"x{text}"}, "text"),
        ("PUT", f"{TRIALS}/0/tags", {"tags": ["a", text]}, "tags.1"),
        ("POST", "/v1/studies", {**STUDY, "name": "new", "overrides": {"data.dataset": text}}, "overrides.data."),
        ("POST", "/v1/studies/sweep/clone", {"name": "new", "space": {text: {"choice": [1, 2]}}}, "space."),
        ("POST", "/v1/preview", {"recipe": "laptop", "overrides": {"data.dataset": text}}, "overrides.data.dataset"),
        ("POST", "/v1/studies/sweep/imports", {"recipe": "laptop", "result": {"diagnostics": {"a": [text]}}},
         "result.diagnostics.a.0"),
    ]  # fmt: skip
    for method, path, body, field in bodies:
        answer = http.request(method, path, content=json.dumps(body))
        assert answer.status_code == 422, (path, answer.text)
        assert answer.json()["problems"][0]["field"].startswith(field), answer.text
    assert [study["name"] for study in http.get("/v1/studies").json()["items"]] == ["sweep"]
    assert http.get(TRIALS).json()["items"][0]["tags"] == http.get(f"{TRIALS}/0/notes").json()["items"] == []
    assert len(http.get(TRIALS).json()["items"]) == 1


def test_what_would_say_two_things_or_too_much_is_refused(http: httpx.Client) -> None:
    bodies = {
        '{"overrides": {"seed": 1}, "overrides": {"seed": 2}}': (422, "overrides"),
        '{"overrides": {"seed": 1, "seed": 2}}': (422, "seed"),
        '{"overrides": {"seed": 9223372036854775808}}': (422, "overrides.seed"),
        '{"overrides": {"seed": 1e400}}': (422, "overrides.seed"),
        '{"overrides": {"optimizer.matrix_lr": NaN}}': (422, "overrides.optimizer.matrix_lr"),
        '{"overrides": {"model.width": 1%s}}' % ("0" * 400): (422, "overrides.model.width"),
        '{"overrides": {"model.width": 1%s}}' % ("0" * 5000): (400, None),
        '{"overrides": {"a": "\\u12"}}': (400, None),
    }
    for body, (status, field) in bodies.items():
        answer = http.post(TRIALS, content=body)
        assert answer.status_code == status, (body[:60], answer.text)
        problems = answer.json()["problems"]
        assert (problems[0]["field"] if problems else None) == field, answer.text
    assert len(http.get(TRIALS).json()["items"]) == 1


def test_a_surrogate_pair_is_a_character() -> None:
    assert read_plain(b'{"text": "\\ud83d\\ude00"}') == {"text": "\U0001f600"}
    with pytest.raises(InvalidBody) as refused:
        read_plain(b'[{"a": 1, "b": {"c": 1, "c": 2, "c": 3}}]')
    assert [problem.message for problem in refused.value.invalid.problems] == [
        "is given 3 times in one object: give it once"
    ]
