"""`caddie watch`: a study followed live until nothing of it is open and nothing more will be proposed."""

import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from api.client import Caddie, Unreachable
from api.options import show
from api.schemas import ActivityOut, StudyOut, TrialSummary
from api.standings import LeaderboardOut
from api.tables import plain
from api.terminal import bpb_text, seconds_text, tying_text
from api.terminal_results import leaderboard_table
from api.terminal_studies import activity_table, open_trials, spent_text
from orchestrator.lifecycle import OPEN_TRIALS, StudyState, TrialState

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 120.0
"""How long a server that goes away, to be updated say, is waited for."""
FIRST_ENDED = 10
"""How many of the trials that had ended before are named."""
KNOWN_IN_A_ROW = 2 * FIRST_ENDED
"""So many endings that were shown already, latest first, leave none unseen: an ending may be seen after a later one."""
LEADERS = 3
FAILURES = 100
"""Of so many of the trials that failed last, the commonest reason is said."""


@dataclass
class Shown:
    """Which endings were shown: by number and time, as a trial that is retried ends again."""

    endings: set[tuple[int, datetime]] = field(default_factory=set)
    since: datetime | None = None
    """Those not after it are history. None before the first look."""


@dataclass(frozen=True)
class Look:
    """What one look at a study found. `ended` are the trials that have ended since the last look, oldest first."""

    study: StudyOut
    ended: list[TrialSummary]
    activity: list[ActivityOut]
    board: LeaderboardOut

    @property
    def done(self) -> int:
        return sum(self.study.counts.values()) - open_trials(self.study)

    @property
    def is_last(self) -> bool:
        if self.study.paused_itself:
            return not self.study.counts.get(TrialState.RUNNING, 0)
        proposes = self.study.definition.space and self.study.state not in (StudyState.COMPLETE, StudyState.STOPPED)
        return not proposes and not open_trials(self.study)


def came_to_nothing(study: StudyOut) -> bool:
    """Whether no trial of it is complete because they failed, or something must be mended before it goes on."""
    failed, complete = (study.counts.get(state, 0) for state in (TrialState.FAILED, TrialState.COMPLETE))
    return study.paused_itself or (failed > 0 and complete == 0)


def watch_study(console: Console, caddie: Caddie, name: str) -> StudyOut:
    """Show a study live until nothing of it goes on by itself, and return it as it was then.

    That is when no trial of it is open and none will be proposed, or when it has paused itself and none is running.
    Where there is no terminal, each trial that ends is a line, and there is nothing else until the study ends.
    """
    shown = Shown()
    look = look_at(caddie, name, shown)
    picture = Picture(console, look)
    live = Live(picture, console=console, transient=True) if console.is_terminal else None
    with live or nullcontext():
        while True:
            for trial in look.ended:
                show(_ended_line(trial), console=console)
            picture.update(look)
            if look.is_last:
                break
            time.sleep(POLL_SECONDS)
            look = _patiently(caddie, name, shown, picture)
    show(*_conclusion(look), *_failures(caddie, look.study), console=console)
    return look.study


@dataclass
class Picture:
    """What stands below the trials that have ended, redrawn as wide as the terminal then is."""

    console: Console
    look: Look
    away: str = ""
    """Why the server did not answer, while it does not."""
    since: float = field(default_factory=time.monotonic)
    bar: Progress = field(init=False)
    task: TaskID = field(init=False)
    before: int = field(init=False)

    def __post_init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console,
        )  # fmt: skip
        self.task = self.bar.add_task(self.look.study.name, total=None)
        self.before = self.look.done

    def update(self, look: Look) -> None:
        self.look, self.away = look, ""
        study = look.study
        total = max(study.max_trials + study.submitted, sum(study.counts.values()))
        self.bar.update(self.task, completed=look.done, total=total)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self.bar, Text(self._line())]
        if self.away:
            parts.append(Text(f"{self.away}; trying again", style="red"))
        if self.look.activity:
            parts.append(activity_table(self.look.activity))
        if self.look.board.rows:
            parts.append(leaderboard_table(self.look.board.rows, "Leaders"))
        return Group(*parts)

    def _line(self) -> str:
        study, done = self.look.study, self.look.done - self.before
        said = [f"{count} {state}" for state, count in study.counts.items() if count and state in OPEN_TRIALS]
        if done > 0:
            each = (time.monotonic() - self.since) / done
            left = self.bar.tasks[0].remaining or 0
            said.append(f"{3600 / each:,.0f} trials an hour, about {seconds_text(each * left)} left")
        if study.spending:
            said.append(f"{spent_text(study)} GPU-hours")
        return plain("; ".join([study.state, *said]))


def _patiently(caddie: Caddie, name: str, shown: Shown, picture: Picture) -> Look:
    """The next look, once the server answers again. Raises Unreachable where it has not for PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return look_at(caddie, name, shown)
        except Unreachable as error:
            if time.monotonic() > deadline:
                raise
            picture.away = str(error).partition(": ")[0]


def look_at(caddie: Caddie, name: str, shown: Shown) -> Look:
    """What there is to show now. The first look takes only the latest of the endings before it."""
    study = caddie.study(name)  # first: what had ended then is among what is listed next
    first, known = shown.since is None, 0
    since = shown.since or datetime.min.replace(tzinfo=UTC)
    ended: list[TrialSummary] = []
    for trial in caddie.iter_trials(name, sort="-finished_at", page_size=KNOWN_IN_A_ROW):
        at = trial.finished_at
        if at is None:
            break
        if (trial.number, at) in shown.endings:
            known += 1
            if known == KNOWN_IN_A_ROW:  # here: the next would be another page
                break
            continue
        if first and len(ended) == FIRST_ENDED:
            since = at
        if at <= since:
            break
        ended.append(trial)
        known = 0
    found = Look(study, ended[::-1], caddie.activity(name), caddie.leaderboard(name, LEADERS))
    shown.since = since
    shown.endings |= {(trial.number, trial.finished_at) for trial in ended if trial.finished_at is not None}
    return found


def _ended_line(trial: TrialSummary) -> str:
    config = f"{tying_text(trial.tying_map)} LoRA {trial.lora_rank} ranks {trial.ranks}"
    if trial.val_bpb is not None and trial.artifact_bytes is not None:
        outcome = f"{trial.val_bpb:.4f} BPB, {trial.artifact_bytes:,} bytes"
    else:
        outcome = trial.reason or ""
    return f"trial {trial.number:>3}  {trial.state:<10} {config:<24} {outcome}".rstrip()


def _conclusion(look: Look) -> list[str]:
    study = look.study
    best = "" if study.best_bpb is None else f", the best trial {study.best_trial} with {bpb_text(study.best_bpb)} BPB"
    why = f" ({study.reason})" if study.reason else ""
    return [f"study {study.name} is {study.state}{why}: {look.done} trials{best}"]


def _failures(caddie: Caddie, study: StudyOut) -> list[str]:
    """How many of its trials failed, and why; nothing where none did."""
    failed, trials = study.counts.get(TrialState.FAILED, 0), sum(study.counts.values())
    if not failed:
        return []
    latest = caddie.iter_trials(study.name, state=[TrialState.FAILED], sort="-finished_at", page_size=FAILURES)
    reasons = Counter(" ".join((trial.reason or "").split()) for trial in islice(latest, FAILURES))
    often = ", most often" if len(reasons) > 1 else ""
    return [f"{failed} of {trials} trials failed{often}: {next(iter(reasons.most_common(1)), ('–', 0))[0]}"]
