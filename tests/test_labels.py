"""Tags and notes over HTTP, and lists of trials by them and by everything else."""

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import product
from typing import Any

import httpx
import pytest
from claims import NewStudies, NewTrials, Results
from crowds import crowd_of

from api.client import ApiError, Caddie
from orchestrator.audit import list_audits
from orchestrator.database import Database
from orchestrator.labels import MOST_NOTES, MOST_TAGS, add_note
from orchestrator.lifecycle import TrialState
from orchestrator.listing import Order, Sort, read_place
from orchestrator.store import get_study, get_trial

TRIALS = "/v1/studies/sweep/trials"


@pytest.fixture
def url(
    database: Database,
    serve: Callable[..., str],
    new_study: NewStudies,
    new_trial: NewTrials,
    trial_result: Results,
    now: datetime,
) -> str:
    """A study of twelve trials: scores fall and rise again, and every third trial has failed without one."""
    rows: list[dict[str, Any]] = []
    for n in range(1, 12):
        row: dict[str, Any] = {"val_bpb": abs(n - 6) / 10 + 1, "artifact_bytes": 1000 + n // 2}
        row |= {"created_at": now + timedelta(hours=n), "finished_at": now - timedelta(hours=n)}
        row["suggestion"] = {"arm": "guided", "rule": "lora_off"} if n % 2 else {"arm": "surrogate"}
        if n % 3 == 0:
            row |= {"state": "failed", "origin": "submitted", "suggestion": None}
            row |= {"result": None, "val_bpb": None, "artifact_bytes": None, "feasible": None}
        rows.append(row)
    crowd_of(database, new_study("sweep"), new_trial(), trial_result(), now, rows)
    return serve(database, dashboard=False)


@pytest.fixture
def caddie(url: str) -> Iterator[Caddie]:
    with Caddie(url, page_size=2) as caddie:  # so that every list is of several pages
        yield caddie


def numbers(caddie: Caddie, **query: Any) -> list[int]:
    return [trial.number for trial in caddie.trials("sweep", **query)]


# Lists


ORDERS = {
    "number": [*range(12)],
    "-number": [*range(11, -1, -1)],
    "val_bpb": [5, 7, 4, 8, 2, 10, 1, 11, 0, 3, 6, 9],
    "-val_bpb": [0, 11, 1, 10, 2, 8, 4, 7, 5, 9, 6, 3],
    "artifact_bytes": [1, 2, 4, 5, 7, 8, 10, 11, 0, 3, 6, 9],
    "-artifact_bytes": [0, 11, 10, 8, 7, 5, 4, 2, 1, 9, 6, 3],
    "-created_at": [*range(11, -1, -1)],
    "finished_at": [*range(11, -1, -1)],
}


def test_trials_come_in_the_order_asked_for_and_those_without_a_value_last(caddie: Caddie) -> None:
    assert {sort: numbers(caddie, sort=sort) for sort in ORDERS} == ORDERS


def test_lists_are_filtered_by_everything_that_is_asked_together(caddie: Caddie) -> None:
    assert numbers(caddie, state=[TrialState.FAILED]) == numbers(caddie, origin=["submitted"]) == [3, 6, 9]
    assert numbers(caddie, arm=["submitted by hand"]) == [3, 6, 9]
    assert numbers(caddie, arm=["sampler"]) == [0]
    assert numbers(caddie, arm=["guided", "sampler"], sort="val_bpb") == [5, 7, 1, 11, 0]
    assert numbers(caddie, arm=["guided"], state=[TrialState.FAILED]) == numbers(caddie, verdict=["grey"]) == []
    caddie.tag("sweep", 4, ["old", "odd"])
    caddie.tag("sweep", 5, ["odd"])
    assert numbers(caddie, tag=["odd"], sort="-number") == [5, 4]
    assert numbers(caddie, tag=["odd", "old"]) == [4]
    assert [trial.tags for trial in caddie.trials("sweep", tag=["odd"])] == [["odd", "old"], ["odd"]]


def test_a_page_goes_on_where_the_last_ended_whatever_came_between(caddie: Caddie, url: str) -> None:
    first = httpx.get(f"{url}{TRIALS}", params={"sort": "-number", "limit": 3}).json()
    caddie.submit("sweep", {"overrides": {"sharing.lora.rank": 1}})
    then = httpx.get(f"{url}{TRIALS}", params={"sort": "-number", "limit": 3, "cursor": first["next"]}).json()
    assert [trial["number"] for trial in first["items"] + then["items"]] == [11, 10, 9, 8, 7, 6]


def test_a_cursor_that_is_none_of_this_order_is_refused(url: str) -> None:
    by_score = httpx.get(f"{url}{TRIALS}", params={"sort": "val_bpb", "limit": 1}).json()["next"]
    forged = ["", "x", "=", "bnVtYmVyOltudWxsLDFd" * 9, by_score, "dmFsX2JwYjpbImEiLDFd"]
    for cursor in forged:
        answer = httpx.get(f"{url}{TRIALS}", params={"sort": "number", "cursor": cursor})
        assert answer.status_code == 422, (cursor, answer.text)
        assert answer.json()["problems"][0]["field"] == "query.cursor"
    for query in ({"sort": "spec"}, {"arm": "\0"}, {"tag": "A b"}, {"verdict": "no"}, {"limit": 0}):
        assert httpx.get(f"{url}{TRIALS}", params=query).status_code == 422


FORGED = ["1e999", "NaN", "9999999999999999999999", '"2026-01-01"', "true", "[1]", "{}"]


def test_a_forged_cursor_never_reaches_the_database() -> None:
    orders: tuple[Order, ...] = ("number", "val_bpb", "artifact_bytes", "created_at")
    for order, written in product(orders, FORGED):
        for text in (f"[{written},1]", f"[1,{written}]", written):
            with pytest.raises((TypeError, ValueError)):
                read_place(text, Sort(order))


# Tags and notes


def test_tags_are_replaced_as_a_whole_and_shown_with_the_trial(caddie: Caddie, database: Database) -> None:
    assert caddie.tag("sweep", 0, ["b", "a", "b"]) == ["a", "b"]
    assert caddie.tag("sweep", 0, ["b", "paper/tab-1:x"]) == caddie.trial("sweep", 0).tags == ["b", "paper/tab-1:x"]
    assert caddie.tag("sweep", 0, []) == caddie.trial("sweep", 0).tags == []
    with database.read() as session:
        assert {(audit.action, audit.subject) for audit in list_audits(session)} == {
            ("trial.tag", "studies/sweep/trials/0")
        }


def test_tags_are_added_and_taken_whatever_others_there_are(caddie: Caddie, url: str) -> None:
    caddie.tag("sweep", 0, ["hers", "old"])
    assert caddie.change_tags("sweep", 0, add=["mine", "old"], remove=["old", "none"]) == ["hers", "mine"]
    assert caddie.change_tags("sweep", 0) == ["hers", "mine"]
    many = [f"t{number}" for number in range(MOST_TAGS - 1)]
    with pytest.raises(ApiError, match="remove some first") as refused:
        caddie.change_tags("sweep", 0, add=many)
    assert refused.value.status == 409 and caddie.trial("sweep", 0).tags == ["hers", "mine"]
    answer = httpx.patch(f"{url}{TRIALS}/0/tags", json={"add": ["A"]})
    assert (answer.status_code, answer.json()["problems"][0]["field"]) == (422, "add.0")


WRONG_TAGS = ["", "A", " a", "a b", "-a", "a\0", "é", "\ud800", "<b>", "a" * 65]


def test_a_tag_that_is_none_is_refused_and_leaves_the_others(caddie: Caddie, url: str) -> None:
    caddie.tag("sweep", 0, ["kept"])
    for tag in WRONG_TAGS:
        body = json.dumps({"tags": ["fine", tag]})
        answer = httpx.put(f"{url}{TRIALS}/0/tags", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["problems"][0]["field"]) == (422, "tags.1"), tag
    assert caddie.trial("sweep", 0).tags == ["kept"]


def test_notes_are_kept_with_who_wrote_them_and_can_be_removed(caddie: Caddie) -> None:
    texts = ["It diverged at <b>step 7</b>.\n\n— see the log", "é" * 10_000]
    first, second = (caddie.add_note("sweep", 1, text) for text in texts)
    assert [note.text for note in caddie.notes("sweep", 1)] == texts and first.author == "local"
    assert caddie.trial("sweep", 1).notes == caddie.notes("sweep", 1) == [first, second]
    caddie.delete_note("sweep", 1, first.id)
    assert caddie.trial("sweep", 1).notes == [second]
    for number, note in ((1, first.id), (0, second.id), (99, second.id)):
        with pytest.raises(ApiError) as refused:
            caddie.delete_note("sweep", number, note)
        assert refused.value.status == 404


def test_a_note_that_is_none_is_refused(url: str) -> None:
    for text in ("", "a" * 10_001, None, 7):
        answer = httpx.post(f"{url}{TRIALS}/1/notes", json={"text": text})
        assert (answer.status_code, answer.json()["problems"][0]["field"]) == (422, "text")


def test_a_trial_has_only_so_many_notes(caddie: Caddie, database: Database, now: datetime) -> None:
    with database.write() as session:
        trial = get_trial(session, get_study(session, "sweep").id, 1)
        for number in range(MOST_NOTES):
            add_note(session, trial.id, "ada", str(number), now)
    with pytest.raises(ApiError, match="delete one first") as refused:
        caddie.add_note("sweep", 1, "one more")
    assert refused.value.status == 409 and len(caddie.notes("sweep", 1)) == MOST_NOTES


def test_a_trials_events_are_its_own_in_their_order(caddie: Caddie) -> None:
    submitted = caddie.submit("sweep", {"overrides": {"sharing.lora.rank": 1}})
    caddie.submit("sweep", {"overrides": {"sharing.lora.rank": 3}})
    caddie.cancel("sweep", submitted.number)
    kinds = [event.kind for event in caddie.trial_events("sweep", submitted.number)]
    assert kinds == ["trial.queued", "trial.cancelled"]
    with pytest.raises(ApiError):
        caddie.trial_events("sweep", 99)
