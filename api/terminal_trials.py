"""What the command line prints of trials, and of what they say."""

from collections.abc import Sequence

from api.comparison import results
from api.differences import side_by_side
from api.lines import LogLineOut
from api.schemas import EventOut, MeasurementOut, NoteOut, TrialOut, TrialSummary
from api.tables import Column, Grid
from api.terminal import bpb_text, time_text, tying_text
from orchestrator.lifecycle import OPEN_TRIALS


def trials_table(trials: Sequence[TrialSummary]) -> Grid:
    """Trials, a line each."""
    columns = (
        Column("trial"), Column("state", left=True), Column("BPB"), Column("bytes"), Column("params", 3),
        Column("tying map", left=True, cut=9), Column("LoRA", 2), Column("ranks", 6), Column("seed", 7),
        Column("origin", 5, left=True), Column("arm", 8, left=True), Column("ended", 9, left=True),
        Column("tags", 6, left=True, cut=8),
        Column("reason", 4, left=True, cut=12),
    )  # fmt: skip
    cells = [
        (
            str(trial.number), trial.state, bpb_text(trial.val_bpb),
            f"{trial.artifact_bytes or trial.predicted_artifact_bytes:,}{'' if trial.artifact_bytes else '?'}",
            f"{trial.parameters:,}", tying_text(trial.tying_map), str(trial.lora_rank), str(trial.ranks),
            str(trial.seed), trial.origin, trial.suggestion.arm if trial.suggestion else "–",
            time_text(trial.finished_at), " ".join(trial.tags), _why(trial) or trial.phase,
        )
        for trial in trials
    ]  # fmt: skip
    return Grid(columns, cells)


def trial_lines(trial: TrialOut) -> list[str]:
    """One trial as a person reads it."""
    shape = f"tying map {tying_text(trial.tying_map)}, LoRA rank {trial.lora_rank}, {trial.parameters:,} parameters"
    if trial.result is not None:
        before = f"{trial.result.val_bpb_prequant:.4f} before quantisation"
        outcome = f"{trial.result.val_bpb:.4f} BPB ({before}), {trial.result.artifact_bytes:,} bytes"
    else:
        verdict = trial.verdict.replace("_", " ")
        outcome = f"{trial.prediction.artifact_bytes:,} artifact bytes predicted: {verdict}"
    why = f" ({_why(trial)})" if _why(trial) else ""
    return [f"trial {trial.number} of {trial.study}: {trial.state}{why}", f"  {shape}", f"  {outcome}"]


def _why(trial: TrialSummary) -> str | None:
    """Why a trial has ended without success. One that is open may have a reason too, about its prediction."""
    return None if trial.state in (*OPEN_TRIALS, "complete") else trial.reason


def trial_parts(trial: TrialOut) -> list[Grid | str]:
    """All of one trial: its lines, how it was labelled, and its attempts."""
    where = (
        [f"  proposed by {trial.suggestion.arm}" + (f": {trial.suggestion.why}" if trial.suggestion.why else "")]
        if trial.suggestion
        else []
    )
    tags = [f"  tags {' '.join(trial.tags)}"] if trial.tags else []
    notes = [line for note in trial.notes for line in note_lines(note)]
    attempts: list[Grid | str] = [attempts_table(trial)] if trial.runs else []
    attempts += [
        f"attempt {attempt.number} (id {attempt.id}) {attempt.outcome}: {attempt.reason}"
        for run in trial.runs
        for attempt in run.attempts
        if attempt.reason
    ]
    return [*trial_lines(trial), *where, *tags, *attempts, *notes]


def note_lines(note: NoteOut) -> list[str]:
    """A note: who wrote it when, under which id, and then its lines."""
    return [f"note {note.id} by {note.author}, {time_text(note.at)}", *(f"  {line}" for line in note.text.splitlines())]


def attempts_table(trial: TrialOut) -> Grid:
    """Every run of the trial with each attempt at it, in their order."""
    columns = (
        Column("run", 6), Column("seed"), Column("rung", 5), Column("attempt"), Column("id"),
        Column("state", left=True), Column("BPB", 1), Column("seconds"), Column("dollars", 3),
        Column("gang", 4, left=True, cut=10),
    )  # fmt: skip
    rows = []
    for run in trial.runs:
        named = (str(run.id), str(run.seed), str(run.rung))
        if not run.attempts:
            rows.append((*named, "–", "–", run.state.value, "–", "–", "–", "–"))
        for attempt in run.attempts:
            scored = run.scores if attempt.outcome == "succeeded" else None
            rows.append((
                *named, str(attempt.number), str(attempt.id), attempt.outcome or attempt.phase or "running",
                bpb_text(scored.val_bpb if scored else None), f"{attempt.cost.seconds:,.1f}",
                f"{attempt.cost.dollars:,.2f}",
                attempt.gang or "–",
            ))  # fmt: skip
    return Grid(columns, rows)


def comparison_table(trials: Sequence[TrialOut]) -> Grid:
    """Trials side by side: what came of each, then the fields of their specs that are not the same in all."""
    rows: list[tuple[str, ...]] = [
        ("state", *(trial.state for trial in trials)),
        *((line.name, *line.texts) for line in results(trials, None)),
        ("tying map", *(tying_text(trial.tying_map) for trial in trials)),
    ]
    rows += [
        (line.path, *("–" if value is None else str(value) for value in line.values))
        for line in side_by_side([trial.spec for trial in trials])
        if line.differs
    ]
    columns = (Column("", left=True, cut=16), *(Column(f"trial {trial.number}", cut=9) for trial in trials))
    return Grid(columns, rows)


def measurements_table(measurements: Sequence[MeasurementOut]) -> Grid:
    """What was measured, a step a line; a column a metric."""
    names = list(dict.fromkeys(name for one in measurements for name in one.metrics))
    columns = (
        Column("attempt id", 2), Column("seed", 3), Column("step"), Column("seconds"),
        *(Column(name, drop) for drop, name in enumerate(names, 4)),
    )  # fmt: skip
    cells = [
        (
            str(one.attempt_id), str(one.seed), f"{one.step:,}", f"{one.elapsed_seconds:,.1f}",
            *(f"{one.metrics[name]:.6g}" if name in one.metrics else "–" for name in names),
        )
        for one in measurements
    ]  # fmt: skip
    return Grid(columns, cells)


def event_line(event: EventOut) -> str:
    """One state change."""
    about = event.study if event.trial is None else f"{event.study} {event.trial}"
    return f"{event.id:>6}  {time_text(event.at)}  {about}  {event.kind}  {event.message}".rstrip()


def log_line(said: LogLineOut) -> str:
    """A line of a log, after how long its attempt had run."""
    return f"{said.elapsed_seconds:>8,.1f}s  {said.line}"
