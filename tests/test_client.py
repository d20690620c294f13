"""The Python client: typed answers, named refusals, and repeats that do nothing twice."""

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from api.client import ApiError, Caddie, Unreachable
from orchestrator.database import Database

STUDY = {"name": "sweep", "recipe": "laptop", "space": {"sharing.lora.rank": {"choice": [0, 2]}}}


class LossyRelay:
    """Passes requests on to a server; cuts its first connections once the server has answered, before that arrives."""

    def __init__(self, url: str, losses: int) -> None:
        self.target = (urlsplit(url).hostname, urlsplit(url).port)
        self.losses = losses
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            with near, socket.create_connection(self.target) as far:
                while request := message(near):
                    far.sendall(request)
                    answer = message(far)
                    if self.losses:
                        self.losses -= 1
                        break
                    near.sendall(answer)


def message(source: socket.socket) -> bytes:
    """One HTTP message, headers and body; nothing where the connection has ended."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = source.recv(65_536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < (int(lengths[0]) if lengths else 0):
        body += source.recv(65_536)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def url(database: Database, serve: Callable[..., str], tmp_path: Path) -> str:
    return serve(database, artifacts=tmp_path / "artifacts", dashboard=False)


@pytest.fixture
def caddie(url: str) -> Iterator[Caddie]:
    with Caddie(url) as client:
        yield client


def test_a_study_tells_what_is_left_of_its_budget_and_what_its_stopping_costs(caddie: Caddie, url: str) -> None:
    study = caddie.create_study({**STUDY, "spending": {"dollars": 10.0}, "stopping": {}})
    assert study.spending is not None
    assert (study.spending.limit_gpu_hours, study.spending.left_gpu_hours) == (4.0, 4.0)
    told = caddie.stopping("sweep")
    assert (told.stopped, told.spared, told.error_rate_low, told.error_rate_high) == (0, 0, 0.0, 1.0)
    page = httpx.get(f"{url}/studies/sweep").text
    assert "GPU-hours, 0 reserved" in page
    assert "Stopped early" in page


def test_answers_are_typed(caddie: Caddie) -> None:
    assert caddie.ready().status == "ok"
    study = caddie.create_study(STUDY)
    assert isinstance(study.created_at, datetime)
    trials = [caddie.submit("sweep", {"overrides": {"sharing.lora.rank": rank}}) for rank in range(3)]
    assert [trial.number for trial in caddie.trials("sweep")] == [0, 1, 2]
    assert caddie.trial("sweep", 1).runs == trials[1].runs
    assert [run.id for run in trials[1].runs] == [trials[1].run_id]
    assert caddie.cancel("sweep", 1).state == "cancelled"
    assert caddie.wait("sweep", 1).state == "cancelled"
    assert caddie.move_study("sweep", "pause").state == "paused"
    assert caddie.study("sweep").counts == {"queued": 2, "cancelled": 1}
    assert caddie.leaderboard("sweep").rows == []
    assert caddie.measurements("sweep", 0) == []
    assert caddie.activity("sweep") == []
    assert caddie.ledger("sweep").attempts == caddie.ledger("sweep", 1).attempts == 0
    assert caddie.preview({"recipe": "ebls"}).tying_map == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert [recipe.name for recipe in caddie.recipes()] == sorted(recipe.name for recipe in caddie.recipes())
    stream = caddie.events("sweep")
    assert [next(stream).kind for _ in range(2)] == ["study.created", "trial.queued"]
    stream.close()


def test_every_page_of_a_list_is_read(caddie: Caddie, url: str) -> None:
    caddie.create_study(STUDY)
    for rank in range(5):
        caddie.submit("sweep", {"overrides": {"sharing.lora.rank": rank}})
    with Caddie(url, page_size=2) as short:
        assert [trial.number for trial in short.trials("sweep")] == [0, 1, 2, 3, 4]


def test_a_refusal_names_the_field(caddie: Caddie) -> None:
    caddie.create_study(STUDY)
    with pytest.raises(
        ApiError, match=r"overrides\.sharing\.unique_blocks: must be at most virtual_layers, 6"
    ) as caught:
        caddie.submit("sweep", {"overrides": {"sharing.unique_blocks": 9}})
    assert caught.value.status == 422
    assert [(one.field, one.value) for one in caught.value.problem.problems] == [("overrides.sharing.unique_blocks", 9)]
    for name in ("none", "../sweep", "a b", "ü"):
        with pytest.raises(ApiError) as missing:
            caddie.study(name)
        assert missing.value.status == 404


def test_a_submission_whose_answer_was_lost_is_repeated_and_counts_once(caddie: Caddie, url: str) -> None:
    caddie.create_study(STUDY)
    relay = LossyRelay(url, losses=2)
    with Caddie(relay.url) as lossy:
        trial = lossy.submit("sweep", {"overrides": {"sharing.lora.rank": 1}})
    relay.close()
    assert relay.losses == 0
    assert [one.number for one in caddie.trials("sweep")] == [trial.number] == [0]


def test_a_request_that_is_not_safe_to_repeat_is_sent_once(caddie: Caddie, url: str) -> None:
    relay = LossyRelay(url, losses=1)
    with Caddie(relay.url) as lossy, pytest.raises(Unreachable):
        lossy.create_study(STUDY)
    relay.close()
    assert [study.name for study in caddie.studies()] == ["sweep"]


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Caddie(f"http://127.0.0.1:{port}") as nobody, pytest.raises(Unreachable, match=f"127.0.0.1:{port}"):
        nobody.ready()
