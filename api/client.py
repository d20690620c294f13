"""A typed client of the HTTP API: `with Caddie("http://127.0.0.1:8765") as caddie: caddie.leaderboard("sweep")`."""

import base64
import hashlib
import os
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack
from urllib.parse import quote, urlencode

from pydantic import TypeAdapter

from api.connection import ATTEMPTS, LIVE, ApiError, BadAnswer, ClientError, Connection, Unreachable, announced
from api.credentials import AuditOut, MadeTokenOut, MeOut, TokenOut
from api.desk import AskIn, AskOut, DirectiveOut, ReportIn, TellIn, ToldOut
from api.lanes import ClusterOut
from api.lines import LogLineOut
from api.previews import PreviewOut, StudyPreviewOut
from api.reports import ArmsOut, ImportanceOut, LedgerOut, ParetoOut, StoppingOut
from api.schemas import (
    ActivityOut,
    ArtifactOut,
    BatchedOut,
    BatchOut,
    EventOut,
    Health,
    MeasurementOut,
    NoteOut,
    Page,
    RecipeOut,
    RunOut,
    StudyOut,
    SubmittedOut,
    TagsOut,
    TrialOut,
    TrialSummary,
)
from api.standings import LeaderboardOut, VerdictOut
from orchestrator.lifecycle import StudyState, TrialState
from orchestrator.settings import Settings
from orchestrator.study import Origin, Verdict
from worker.spec import GangConfig

__all__ = ["ApiError", "BadAnswer", "Caddie", "ClientError", "Unreachable"]

WAIT_POLL_SECONDS = 0.5
OPEN = ("queued", "running")
LOG_LINES = TypeAdapter(list[LogLineOut])


class Wanted(TypedDict, total=False):
    """Which trials of a study, and in which order: a trial must have one of each list, and every tag."""

    state: Sequence[TrialState]
    origin: Sequence[Origin]
    verdict: Sequence[Verdict]
    arm: Sequence[str]
    tag: Sequence[str]
    sort: str
    """number, val_bpb, artifact_bytes, created_at or finished_at; -val_bpb is worst first."""
    page_size: int


class Caddie(Connection):
    """One server. Where no answer comes, reads and submissions are sent again; a key makes a submission count once.

    Every method raises ApiError where the API refuses, Unreachable where no answer comes, and BadAnswer where one comes
    that cannot be read: all of them ClientErrors.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        timeout_seconds: float = 60.0,
        page_size: int = 500,
    ) -> None:
        """Without a URL, CADDIE_URL's server; without a token, CADDIE_TOKEN's: an empty one sends none."""
        url = Settings.read(os.environ).url if base_url is None else base_url
        said = os.environ.get("CADDIE_TOKEN") if token is None else token
        super().__init__(url, token=said, timeout_seconds=timeout_seconds, page_size=page_size)

    def __enter__(self) -> "Caddie":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

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

    def studies(self, *, state: Sequence[StudyState] = (), archived: bool = False) -> list[StudyOut]:
        """Every study in these states, by default in any: those in use, or those that were archived."""
        query = {"state": state, "archived": str(archived).lower()}
        return list(self._pages("/v1/studies", Page[StudyOut], query))

    def study(self, study: str) -> StudyOut:
        return self._read("GET", f"/v1/studies/{_quoted(study)}", StudyOut)

    def move_study(self, study: str, move: str) -> StudyOut:
        """Pause, resume, stop, archive or unarchive."""
        return self._read("POST", f"/v1/studies/{_quoted(study)}/{_quoted(move)}", StudyOut)

    def change_study(self, study: str, body: Mapping[str, Any]) -> StudyOut:
        """Another state, budget or priority; the body is a StudyChange. Safe to repeat: it says what shall be."""
        return self._read("PATCH", f"/v1/studies/{_quoted(study)}", StudyOut, body=body, attempts=ATTEMPTS)

    def clone_study(self, study: str, body: Mapping[str, Any]) -> StudyOut:
        """Create a study like this one; the body is a CloneIn, with a name at least."""
        return self._read("POST", f"/v1/studies/{_quoted(study)}/clone", StudyOut, body=body)

    def leaderboard(self, study: str, limit: int = 100) -> LeaderboardOut:
        return self._read("GET", f"/v1/studies/{_quoted(study)}/leaderboard?limit={limit}", LeaderboardOut)

    def ledger(self, study: str, number: int | None = None) -> LedgerOut:
        """What the attempts of the study, or of its trial of this number, have cost so far."""
        trial = "" if number is None else f"/trials/{number}"
        return self._read("GET", f"/v1/studies/{_quoted(study)}{trial}/ledger", LedgerOut)

    def stopping(self, study: str) -> StoppingOut:
        """How often the study's runs were stopped early, and how often that would have been a mistake."""
        return self._read("GET", f"/v1/studies/{_quoted(study)}/stopping", StoppingOut)

    def pareto(self, study: str) -> ParetoOut:
        """The trials that no other beats in both BPB and bytes."""
        return self._read("GET", f"/v1/studies/{_quoted(study)}/pareto", ParetoOut)

    def importance(self, study: str) -> ImportanceOut:
        """Which parameters matter, and how the families of tying maps compare."""
        return self._read("GET", f"/v1/studies/{_quoted(study)}/importance", ImportanceOut)

    def cluster(self, hours: float = 1.0) -> ClusterOut:
        """What each gang does, and did within the last hours; how much of it was idle, and what waits."""
        return self._read("GET", f"/v1/cluster?hours={hours}", ClusterOut)

    def arms(self, study: str) -> ArmsOut:
        """What proposed the study's trials, and what came of it."""
        return self._read("GET", f"/v1/studies/{_quoted(study)}/arms", ArmsOut)

    def activity(self, study: str) -> list[ActivityOut]:
        """What the study's gangs do now."""
        return self._read("GET", f"/v1/studies/{_quoted(study)}/activity", Page[ActivityOut]).items

    def submit(self, study: str, body: Mapping[str, Any], *, idempotency_key: str | None = None) -> SubmittedOut:
        """Submit a trial; the body is a TrialIn. Without a key it gets one of its own, so that it is safe to repeat."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        path = f"/v1/studies/{_quoted(study)}/trials"
        return self._read("POST", path, SubmittedOut, body=body, headers=headers, attempts=ATTEMPTS)

    def submit_batch(
        self, study: str, bodies: Sequence[Mapping[str, Any]], *, idempotency_key: str | None = None
    ) -> list[BatchedOut]:
        """Submit up to a hundred trials, all or none; each body is a TrialIn. Safe to repeat, as submit is."""
        headers, body = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}, {"trials": list(bodies)}
        path = f"{_trials(study)}/batch"
        return self._read("POST", path, BatchOut, body=body, headers=headers, attempts=ATTEMPTS).trials

    def import_result(
        self, study: str, spec: Mapping[str, Any], result: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> TrialOut:
        """Add a trial that was trained elsewhere, with its result; safe to repeat, as submit is."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        path, body = f"/v1/studies/{_quoted(study)}/imports", {"spec": spec, "result": result}
        return self._read("POST", path, TrialOut, body=body, headers=headers, attempts=ATTEMPTS)

    def iter_trials(self, study: str, **wanted: Unpack[Wanted]) -> Iterator[TrialSummary]:
        """The study's trials that meet all that is wanted. Pages are fetched as they are asked for."""
        limit = wanted.pop("page_size", self._page_size)
        return self._pages(_trials(study), Page[TrialSummary], {**wanted, "limit": limit})

    def trials(self, study: str, **wanted: Unpack[Wanted]) -> list[TrialSummary]:
        """Every trial of the study that meets all that is wanted, by number where it does not say how to sort."""
        return list(self.iter_trials(study, **wanted))

    def tag(self, study: str, number: int, tags: Sequence[str]) -> list[str]:
        """Give the trial these tags, and take all others from it."""
        path, body = f"{_trials(study)}/{number}/tags", {"tags": list(tags)}
        return self._read("PUT", path, TagsOut, body=body, attempts=ATTEMPTS).tags

    def change_tags(self, study: str, number: int, *, add: Sequence[str] = (), remove: Sequence[str] = ()) -> list[str]:
        """Give the trial tags and take others from it; all that it then has."""
        path, body = f"{_trials(study)}/{number}/tags", {"add": list(add), "remove": list(remove)}
        return self._read("PATCH", path, TagsOut, body=body, attempts=ATTEMPTS).tags

    def notes(self, study: str, number: int) -> list[NoteOut]:
        return self._read("GET", f"{_trials(study)}/{number}/notes", Page[NoteOut]).items

    def add_note(self, study: str, number: int, text: str) -> NoteOut:
        """Write something about the trial. Not repeated: it would be there twice."""
        return self._read("POST", f"{_trials(study)}/{number}/notes", NoteOut, body={"text": text})

    def delete_note(self, study: str, number: int, note: int) -> None:
        self._send("DELETE", f"{_trials(study)}/{number}/notes/{note}", attempts=1)

    def trial_events(self, study: str, number: int) -> list[EventOut]:
        """What became of the trial, oldest first."""
        return list(self._pages(f"{_trials(study)}/{number}/events", Page[EventOut]))

    def trial(self, study: str, number: int) -> TrialOut:
        return self._read("GET", f"/v1/studies/{_quoted(study)}/trials/{number}", TrialOut)

    def cancel(self, study: str, number: int) -> TrialOut:
        return self._read("POST", f"/v1/studies/{_quoted(study)}/trials/{number}/cancel", TrialOut)

    def retry(self, study: str, number: int) -> TrialOut:
        """Queue a failed or cancelled trial once more. Not repeated: it might retry what failed meanwhile."""
        return self._read("POST", f"{_trials(study)}/{number}/retry", TrialOut)

    def add_seeds(self, study: str, number: int, seeds: Sequence[int] = (), *, count: int = 0) -> list[RunOut]:
        """Run a complete trial at these seeds, or at so many more of its study's list. Not repeated: where only a
        count is given, that would be so many more."""
        body = {"seeds": list(seeds)} if seeds else {"count": count}
        return self._read("POST", f"{_trials(study)}/{number}/seeds", Page[RunOut], body=body).items

    def cancel_run(self, study: str, number: int, run: int) -> RunOut:
        """End one queued or running seed of a complete trial."""
        return self._read("POST", f"{_trials(study)}/{number}/runs/{run}/cancel", RunOut)

    def measurements(self, study: str, number: int) -> list[MeasurementOut]:
        """Everything that the trial's attempts measured."""
        return list(self._pages(f"{_trials(study)}/{number}/measurements", Page[MeasurementOut]))

    def logs(
        self, study: str, number: int, *, attempt: int | None = None, after: int = 0, tail: int | None = None
    ) -> list[LogLineOut]:
        """What an attempt at the trial has logged, by default the latest one: the lines numbered above `after`, or of
        those the last, 1,000 at the most."""
        chosen = {"attempt": attempt, "after": after, "tail": tail}
        query = {name: value for name, value in chosen.items() if value is not None}
        path = f"{_trials(study)}/{number}/logs"
        if tail is None:
            return list(self._pages(path, Page[LogLineOut], query))
        return self._read("GET", f"{path}?{urlencode(query)}", Page[LogLineOut]).items

    def follow_logs(self, study: str, number: int, *, tail: int = 100) -> Generator[LogLineOut]:
        """The last lines that the trial's attempts have logged, then all that come, until the trial has ended."""
        for message in self._follow(f"{_trials(study)}/{number}/logs/stream?tail={tail}"):
            if message.kind == "end":
                return
            if not message.kind:
                yield from LOG_LINES.validate_json(message.data)

    def ask(
        self, study: str, executor: str, *, gang: GangConfig | None = None, lease_seconds: float = 60.0
    ) -> AskOut | None:
        """A run to execute, under a lease; None where there is nothing to do now. Not repeated: where no answer came,
        a run that was given out goes back to the queue once its lease has run out."""
        body = AskIn(executor=executor, gang=gang, lease_seconds=lease_seconds).model_dump(mode="json")
        answer = self._send("POST", f"/v1/studies/{_quoted(study)}/ask", body=body, attempts=1)
        return None if answer.status_code == 204 else AskOut.model_validate_json(answer.content)

    def report(self, asked: AskOut, body: ReportIn | None = None) -> DirectiveOut:
        """Say what the attempt has measured and logged, or only that it goes on; whether it should. Raises ApiError of
        kind lease-lost where it is not ours any more."""
        path = f"/v1/attempts/{asked.attempt_id}/report"
        said = (body or ReportIn()).model_dump(mode="json")
        return self._read("POST", path, DirectiveOut, body=said, headers=_lease(asked), attempts=ATTEMPTS)

    def put_artifact(self, asked: AskOut, data: bytes) -> ArtifactOut:
        """Store the model's bytes, before the attempt is told to have succeeded."""
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        headers = {**_lease(asked), "Repr-Digest": f"sha-256=:{digest}:"}
        path = f"/v1/attempts/{asked.attempt_id}/artifact"
        answer = self._send("PUT", path, content=data, headers=headers, attempts=ATTEMPTS)
        return ArtifactOut.model_validate_json(answer.content)

    def tell(self, asked: AskOut, body: TellIn) -> ToldOut:
        """End the attempt; safe to repeat."""
        path, said = f"/v1/attempts/{asked.attempt_id}/tell", body.model_dump(mode="json")
        return self._read("POST", path, ToldOut, body=said, headers=_lease(asked), attempts=ATTEMPTS)

    def wait(self, study: str, number: int, run_id: int | None = None) -> TrialOut:
        """The trial, once it and this run of it have ended; or as it waits, where its study has paused itself."""
        while True:
            trial = self.trial(study, number)
            if trial.state not in OPEN and not any(run.id == run_id and run.state in OPEN for run in trial.runs):
                return trial
            if all(run.state != "running" for run in trial.runs) and self.study(study).paused_itself:
                return trial
            time.sleep(WAIT_POLL_SECONDS)

    def verdict(
        self, study: str, number: int, *, against: int | None = None, losses: Sequence[float] = ()
    ) -> VerdictOut:
        """Whether the trial sets a record against another one, by default the best, or against losses in nats."""
        query = urlencode({"against": [] if against is None else against, "losses": list(losses)}, doseq=True)
        return self._read("GET", f"/v1/studies/{_quoted(study)}/trials/{number}/verdict?{query}", VerdictOut)

    def artifact(self, study: str, number: int) -> bytes:
        """The stored model. Raises ApiError where there is none, and BadAnswer where it arrived damaged."""
        path = f"/v1/studies/{_quoted(study)}/trials/{number}/artifact"
        answer = self._send("GET", path, attempts=ATTEMPTS)
        if announced(answer) != hashlib.sha256(answer.content).digest():
            raise BadAnswer("the artifact arrived damaged: its SHA-256 is not the one announced")
        return answer.content

    def save_artifact(self, study: str, number: int, file: Path) -> Path:
        """The stored model, in a file that is there once it is whole; an interrupted download is gone on with."""
        return self._download(f"/v1/studies/{_quoted(study)}/trials/{number}/artifact", file)

    def me(self) -> MeOut:
        """Who the server takes us for."""
        return self._read("GET", "/v1/me", MeOut)

    def create_token(self, body: Mapping[str, Any]) -> MadeTokenOut:
        """Make a token; the body is a TokenIn. Not repeated: a second one would find the name taken."""
        return self._read("POST", "/v1/tokens", MadeTokenOut, body=body)

    def tokens(self) -> list[TokenOut]:
        return list(self._pages("/v1/tokens", Page[TokenOut]))

    def revoke_token(self, token_id: int) -> TokenOut:
        return self._read("DELETE", f"/v1/tokens/{token_id}", TokenOut, attempts=ATTEMPTS)

    def audit(self, limit: int = 100) -> list[AuditOut]:
        """The latest writes, latest first."""
        return self._read("GET", f"/v1/audit?limit={limit}", Page[AuditOut]).items

    def events(self, study: str | None = None, after: int = 0, *, follow: bool = True) -> Generator[EventOut]:
        """State changes with ids above `after`, of one study or of all; and then, where `follow`, what comes, for ever.
        Goes on where a connection broke."""
        path = "/v1/events" if study is None else f"/v1/studies/{_quoted(study)}/events"
        for message in self._follow(path, str(after or "")):
            if not message.kind:
                yield EventOut.model_validate_json(message.data)
            elif (message.kind, message.data) == LIVE and not follow:
                return


def _trials(study: str) -> str:
    return f"/v1/studies/{_quoted(study)}/trials"


def _lease(asked: AskOut) -> dict[str, str]:
    return {"Caddie-Lease": asked.lease_token}


def _quoted(part: str) -> str:
    """A name as one segment of a path, whatever is in it."""
    return quote(part, safe="")
