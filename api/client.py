"""A typed client of the HTTP API: `with Caddie("http://127.0.0.1:8765") as caddie: caddie.leaderboard("sweep")`."""

import hashlib
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import httpx
from pydantic import BaseModel

from api.cluster import ClusterOut
from api.lines import LogLineOut
from api.refusals import ProblemDetails
from api.reports import LedgerOut, StoppingOut
from api.schemas import (
    ActivityOut,
    EventOut,
    Health,
    MeasurementOut,
    Page,
    PreviewOut,
    RecipeOut,
    StudyOut,
    StudyPreviewOut,
    SubmittedOut,
    TrialOut,
    TrialSummary,
)
from api.standings import LeaderboardOut, VerdictOut

ATTEMPTS = 4
FIRST_WAIT_SECONDS = 0.2
WAIT_POLL_SECONDS = 0.5
OPEN = ("queued", "running")
Answer = TypeVar("Answer", bound=BaseModel)


class ApiError(Exception):
    """The API refused: `status` is HTTP's, `problem` says which fields are wrong where it can."""

    def __init__(self, status: int, problem: ProblemDetails) -> None:
        super().__init__(problem.detail)
        self.status = status
        self.problem = problem


class Unreachable(Exception):
    """No answer came: the server is down, or went away. A request that is safe to repeat was repeated first."""


class Caddie:
    """One server. Where no answer comes, reads and submissions are sent again; a key makes a submission count once."""

    def __init__(self, base_url: str, *, timeout_seconds: float = 60.0, page_size: int = 500) -> None:
        self._page_size = page_size
        self._http = httpx.Client(base_url=base_url, timeout=timeout_seconds)

    def __enter__(self) -> "Caddie":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def ready(self) -> Health:
        """Raises ApiError where the database is not ready. Asks once, for callers that wait by themselves."""
        return self._read("GET", "/readyz", Health, attempts=1)

    def recipes(self) -> list[RecipeOut]:
        return self._read("GET", "/v1/recipes", Page[RecipeOut]).items

    def preview(self, body: Mapping[str, Any]) -> PreviewOut:
        """What a spec would cost; the body is a PreviewIn."""
        return self._read("POST", "/v1/preview", PreviewOut, body=body, attempts=ATTEMPTS)

    def preview_study(self, body: Mapping[str, Any], samples: int = 20) -> StudyPreviewOut:
        """Random points of a study that does not exist; the body is a StudyIn."""
        path = f"/v1/studies/preview?samples={samples}"
        return self._read("POST", path, StudyPreviewOut, body=body, attempts=ATTEMPTS)

    def create_study(self, body: Mapping[str, Any]) -> StudyOut:
        """Create a study; the body is a StudyIn. Not repeated: a second one would find the name taken."""
        return self._read("POST", "/v1/studies", StudyOut, body=body)

    def studies(self) -> list[StudyOut]:
        return list(self._pages("/v1/studies", Page[StudyOut]))

    def study(self, study: str) -> StudyOut:
        return self._read("GET", f"/v1/studies/{_quoted(study)}", StudyOut)

    def move_study(self, study: str, move: str) -> StudyOut:
        """Pause, resume or stop."""
        return self._read("POST", f"/v1/studies/{_quoted(study)}/{_quoted(move)}", StudyOut)

    def leaderboard(self, study: str, limit: int = 100) -> LeaderboardOut:
        return self._read("GET", f"/v1/studies/{_quoted(study)}/leaderboard?limit={limit}", LeaderboardOut)

    def ledger(self, study: str, number: int | None = None) -> LedgerOut:
        """What the attempts of the study, or of its trial of this number, have cost so far."""
        trial = "" if number is None else f"/trials/{number}"
        return self._read("GET", f"/v1/studies/{_quoted(study)}{trial}/ledger", LedgerOut)

    def stopping(self, study: str) -> StoppingOut:
        """How often the study's runs were stopped early, and how often that would have been a mistake."""
        return self._read("GET", f"/v1/studies/{_quoted(study)}/stopping", StoppingOut)

    def cluster(self, hours: float = 1.0) -> ClusterOut:
        """What each gang does, and did within the last hours; how much of it was idle, and what waits."""
        return self._read("GET", f"/v1/cluster?hours={hours}", ClusterOut)

    def activity(self, study: str) -> list[ActivityOut]:
        """What the study's gangs do now."""
        return self._read("GET", f"/v1/studies/{_quoted(study)}/activity", Page[ActivityOut]).items

    def submit(self, study: str, body: Mapping[str, Any], *, idempotency_key: str | None = None) -> SubmittedOut:
        """Submit a trial; the body is a TrialIn. Without a key it gets one of its own, so that it is safe to repeat."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        path = f"/v1/studies/{_quoted(study)}/trials"
        return self._read("POST", path, SubmittedOut, body=body, headers=headers, attempts=ATTEMPTS)

    def import_result(
        self, study: str, spec: Mapping[str, Any], result: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> TrialOut:
        """Add a trial that was trained elsewhere, with its result; safe to repeat, as submit is."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        path, body = f"/v1/studies/{_quoted(study)}/imports", {"spec": spec, "result": result}
        return self._read("POST", path, TrialOut, body=body, headers=headers, attempts=ATTEMPTS)

    def trials(self, study: str) -> list[TrialSummary]:
        """Every trial of the study, by number."""
        return list(self._pages(f"/v1/studies/{_quoted(study)}/trials", Page[TrialSummary]))

    def trial(self, study: str, number: int) -> TrialOut:
        return self._read("GET", f"/v1/studies/{_quoted(study)}/trials/{number}", TrialOut)

    def cancel(self, study: str, number: int) -> TrialOut:
        return self._read("POST", f"/v1/studies/{_quoted(study)}/trials/{number}/cancel", TrialOut)

    def measurements(self, study: str, number: int) -> list[MeasurementOut]:
        path = f"/v1/studies/{_quoted(study)}/trials/{number}/measurements"
        return self._read("GET", path, Page[MeasurementOut]).items

    def logs(
        self, study: str, number: int, *, attempt: int | None = None, after: int = 0, tail: int | None = None
    ) -> list[LogLineOut]:
        """What an attempt at the trial has logged, by default the latest one: the lines numbered above `after`, 1,000
        at the most, or of those the last."""
        chosen = {"attempt": attempt, "after": after, "tail": tail}
        query = urlencode({name: value for name, value in chosen.items() if value is not None})
        path = f"/v1/studies/{_quoted(study)}/trials/{number}/logs?{query}"
        return self._read("GET", path, Page[LogLineOut]).items

    def follow_logs(self, study: str, number: int, *, tail: int = 100) -> Generator[LogLineOut]:
        """The last lines of the trial's latest attempt, then all that come, until the trial has ended."""
        attempt, lines = 0, self.logs(study, number, tail=tail)
        while True:
            over = self.trial(study, number).state not in OPEN
            for said in lines:
                yield said
                attempt, after = said.attempt_id, said.number
            latest = self.logs(study, number, tail=1)
            again = bool(latest) and latest[0].attempt_id == attempt
            lines = self.logs(study, number, after=after if again else 0) if latest else []
            if over and not lines:
                return
            time.sleep(0 if lines else WAIT_POLL_SECONDS)

    def wait(self, study: str, number: int, run_id: int | None = None) -> TrialOut:
        """The trial, once it and this run of it have ended."""
        while True:
            trial = self.trial(study, number)
            if trial.state not in OPEN and not any(run.id == run_id and run.state in OPEN for run in trial.runs):
                return trial
            time.sleep(WAIT_POLL_SECONDS)

    def verdict(
        self, study: str, number: int, *, against: int | None = None, losses: Sequence[float] = ()
    ) -> VerdictOut:
        """Whether the trial sets a record against another one, by default the best, or against losses in nats."""
        query = urlencode({"against": [] if against is None else against, "losses": list(losses)}, doseq=True)
        return self._read("GET", f"/v1/studies/{_quoted(study)}/trials/{number}/verdict?{query}", VerdictOut)

    def artifact(self, study: str, number: int) -> bytes:
        """The stored model. Raises ApiError where there is none, and Unreachable where it arrived damaged."""
        answer = self._send("GET", f"/v1/studies/{_quoted(study)}/trials/{number}/artifact", attempts=ATTEMPTS)
        if answer.headers["etag"].strip('"') != hashlib.sha256(answer.content).hexdigest():
            raise Unreachable("the artifact arrived damaged: its SHA-256 is not the one announced")
        return answer.content

    def events(self, study: str | None = None, after: int = 0) -> Generator[EventOut]:
        """State changes with ids above `after`, for ever: of one study, or of all. Goes on where a connection broke."""
        path = "/v1/events" if study is None else f"/v1/studies/{_quoted(study)}/events"
        failures = 0
        while failures < ATTEMPTS:
            try:
                with self._http.stream("GET", path, params={"after": after}, timeout=httpx.Timeout(60.0)) as stream:
                    if stream.is_error:
                        stream.read()
                        raise _refusal(stream)
                    failures = 0
                    for data in _messages(stream.iter_lines()):
                        event = EventOut.model_validate_json(data)
                        after = event.id
                        yield event
            except httpx.TransportError:
                failures += 1
                time.sleep(FIRST_WAIT_SECONDS * 2**failures)
        raise Unreachable(f"{self._http.base_url} does not answer")

    def _pages(self, path: str, kind: type[Page[Answer]]) -> Iterator[Answer]:
        after = -1
        while True:
            page = self._read("GET", f"{path}?limit={self._page_size}&after={after}", kind)
            yield from page.items
            if page.next is None:
                return
            after = page.next

    def _read(
        self,
        method: str,
        path: str,
        kind: type[Answer],
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        attempts: int | None = None,
    ) -> Answer:
        repeats = attempts or (ATTEMPTS if method == "GET" else 1)
        return kind.model_validate_json(self._send(method, path, body=body, headers=headers, attempts=repeats).content)

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        attempts: int,
    ) -> httpx.Response:
        for attempt in range(attempts):
            try:
                answer = self._http.request(method, path, json=body, headers=headers)
            except httpx.TransportError as error:
                if attempt == attempts - 1:
                    raise Unreachable(
                        f"{self._http.base_url} does not answer: {type(error).__name__} {error}"
                    ) from None
                time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
                continue
            if answer.is_error:
                raise _refusal(answer)
            return answer
        raise AssertionError("a request is sent at least once")


def _refusal(answer: httpx.Response) -> ApiError:
    try:
        problem = ProblemDetails.model_validate_json(answer.content)
    except ValueError:  # a proxy's own page, say
        text = " ".join(answer.text.split())[:200]
        problem = ProblemDetails(
            type="about:blank", title="", status=answer.status_code, detail=f"HTTP {answer.status_code}: {text}"
        )
    return ApiError(answer.status_code, problem)


def _messages(lines: Iterator[str]) -> Iterator[str]:
    """The data of a stream's unnamed events."""
    data: list[str] = []
    named = False
    for line in lines:
        if not line:
            if data and not named:
                yield "\n".join(data)
            data, named = [], False
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif line.startswith("event:"):
            named = True


def _quoted(part: str) -> str:
    """A name as one segment of a path, whatever is in it."""
    return quote(part, safe="")
