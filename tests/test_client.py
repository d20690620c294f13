"""The Python client: typed answers, named refusals, and repeats that do nothing twice."""

import base64
import hashlib
import random
import re
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from claims import Results
from relay import Relay, canned

from api.client import ApiError, BadAnswer, Caddie, Unreachable
from orchestrator import leases
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome
from orchestrator.study import AttemptResult
from worker.spec import GangConfig

STUDY = {"name": "sweep", "recipe": "laptop", "space": {"sharing.lora.rank": {"choice": [0, 2]}}}


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
    with Relay(url, cuts=(0, 20)) as relay, Caddie(relay.url) as lossy:
        trial = lossy.submit("sweep", {"overrides": {"sharing.lora.rank": 1}})
    assert len(relay.asked) == 3
    assert [one.number for one in caddie.trials("sweep")] == [trial.number] == [0]


def test_a_request_that_is_not_safe_to_repeat_is_sent_once(caddie: Caddie, url: str) -> None:
    with Relay(url, cuts=(20,)) as relay, Caddie(relay.url) as lossy, pytest.raises(Unreachable):
        lossy.create_study(STUDY)
    assert len(relay.asked) == 1
    assert [study.name for study in caddie.studies()] == ["sweep"]


def test_a_busy_server_is_asked_again_when_it_says_where_that_is_safe(caddie: Caddie, url: str) -> None:
    busy, limited = (canned(status, Retry_After="0") for status in ("503 Busy", "429 Too Many"))
    with Relay(url, canned=(limited,)) as relay, Caddie(relay.url) as patient:
        assert patient.create_study(STUDY).name == "sweep"  # nothing was begun
    with Relay(url, canned=(busy, limited, busy)) as relay, Caddie(relay.url) as patient:
        assert patient.submit("sweep", {"params": {}}).number == 0
    with Relay(url, canned=(busy,)) as relay, Caddie(relay.url) as patient, pytest.raises(ApiError, match="503"):
        patient.cancel("sweep", 0)
    later = canned("429 Too Many", Retry_After="3600")
    with Relay(url, canned=(later,)) as relay, Caddie(relay.url) as patient, pytest.raises(ApiError, match="429"):
        patient.studies()
    assert caddie.trial("sweep", 0).state == "queued"


def test_what_is_no_answer_of_ours_is_said_in_one_line(url: str) -> None:
    page = canned("502 Bad Gateway", b"<html>\n<h1>Bad\nGateway</h1>")
    with Relay(url, canned=(page,)) as relay, Caddie(relay.url) as caddie, pytest.raises(ApiError) as proxied:
        caddie.studies()
    assert str(proxied.value) == f"HTTP 502 from {relay.url}/v1/studies: <html> <h1>Bad Gateway</h1>"
    other = canned("200 OK", b'{"name": "sweep"}')
    with Relay(url, canned=(other,)) as relay, Caddie(relay.url) as caddie, pytest.raises(BadAnswer) as newer:
        caddie.study("sweep")
    assert str(newer.value) == "GET /v1/studies/sweep answered what this version cannot read: id: Field required"


def test_the_token_of_the_environment_is_sent_unless_one_is_given(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADDIE_TOKEN", "from-env")
    with Relay(url) as relay:
        monkeypatch.setenv("CADDIE_URL", relay.url)
        for token in (None, "own", ""):
            with Caddie(token=token) as caddie:
                caddie.ready()
    first, second, third = relay.asked
    assert "authorization: bearer from-env" in first
    assert "authorization: bearer own" in second
    assert "authorization" not in third


def test_a_stream_that_breaks_is_taken_up_after_the_last_event(caddie: Caddie, url: str) -> None:
    caddie.create_study(STUDY)
    for rank in range(5):
        caddie.submit("sweep", {"overrides": {"sharing.lora.rank": rank}})
    with Relay(url, cuts=(900, 700)) as relay, Caddie(relay.url) as lossy:
        ids = [event.id for event in lossy.events("sweep", follow=False)]
    assert ids == [event.id for event in caddie.events(follow=False)]
    assert len(ids) == 6
    first, second, *_ = relay.asked
    assert "last-event-id" not in first
    assert "last-event-id: " in second
    assert [event.id for event in caddie.events("sweep", after=ids[3], follow=False)] == ids[4:]


@pytest.fixture
def model(caddie: Caddie, database: Database, tmp_path: Path, trial_result: Results) -> bytes:
    """What trial 0 of the study has stored."""
    caddie.create_study(STUDY)
    caddie.submit("sweep", {"params": {}})
    model, now = random.Random(0).randbytes(300_000), datetime.now(UTC)
    with database.write() as session:
        claimed = leases.claim(session, GangConfig(), "host", now, timedelta(minutes=5))
        assert claimed is not None
        result = trial_result(artifact_sha256=hashlib.sha256(model).hexdigest())
        stored = ArtifactStore(tmp_path / "artifacts").put(model)
        leases.finish(session, claimed.lease, AttemptResult(Outcome.SUCCEEDED, result=result, artifact=stored), now)
    return model


def test_a_download_that_breaks_off_is_gone_on_with(caddie: Caddie, url: str, model: bytes, tmp_path: Path) -> None:
    assert caddie.artifact("sweep", 0) == model
    with Relay(url, cuts=(100_000, 100_000)) as relay, Caddie(relay.url) as lossy:
        assert lossy.save_artifact("sweep", 0, tmp_path / "model").read_bytes() == model
    ranges = [line for head in relay.asked for line in head.splitlines() if line.startswith("range:")]
    assert len(relay.asked) == 3 and len(ranges) == 2
    assert all(line.startswith("range: bytes=") for line in ranges)
    (tmp_path / ".other.part").write_bytes(model[:1000])  # as an interrupted process leaves it
    with Relay(url) as relay, Caddie(relay.url) as later:
        assert later.save_artifact("sweep", 0, tmp_path / "other").read_bytes() == model
    assert "range: bytes=1000-" in relay.asked[0]
    (tmp_path / ".third.part").write_bytes(b"the start of something else")
    assert caddie.save_artifact("sweep", 0, tmp_path / "third").read_bytes() == model
    assert sorted(file.name for file in tmp_path.iterdir() if "part" in file.name) == []


def test_a_damaged_download_leaves_no_file(url: str, model: bytes, tmp_path: Path) -> None:
    digest = "sha-256=:" + base64.b64encode(hashlib.sha256(b"other").digest()).decode() + ":"
    damaged = canned("200 OK", b"not that", Repr_Digest=digest)
    with Relay(url, canned=(damaged, damaged)) as relay, Caddie(relay.url) as caddie:
        with pytest.raises(BadAnswer):
            caddie.artifact("sweep", 0)
        with pytest.raises(BadAnswer):
            caddie.save_artifact("sweep", 0, tmp_path / "model")
    assert not [file for file in tmp_path.iterdir() if "model" in file.name]


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Caddie(f"http://127.0.0.1:{port}") as nobody, pytest.raises(Unreachable, match=f"127.0.0.1:{port}"):
        nobody.ready()


def test_the_readmes_python_runs(
    caddie: Caddie, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    caddie.create_study({**STUDY, "name": "my-study"})
    monkeypatch.setenv("CADDIE_URL", url)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
    printed = capsys.readouterr().out
    assert not blocks or ("trial.queued" in printed and "not-found no artifact of trial 0" in printed)
