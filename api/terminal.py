"""What the command line prints: tables, tying maps and live progress."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from api.client import Caddie
from api.previews import PreviewOut, StudyPreviewOut
from api.reports import CostOut, LedgerOut
from api.schemas import (
    ActivityOut,
    PredictionOut,
    StudyOut,
    TrialOut,
    TrialSummary,
)
from api.standings import LeaderboardOut, LeaderboardRow, VerdictOut
from orchestrator.lifecycle import OPEN_TRIALS, StudyState, TrialState

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
POLL_SECONDS = 0.5


def tying_text(tying_map: Sequence[int]) -> str:
    """A tying map in as few characters as it takes: 012012, or with spaces from 37 blocks on."""
    if max(tying_map) < len(DIGITS):
        return "".join(DIGITS[block] for block in tying_map)
    return " ".join(str(block) for block in tying_map)


def leaderboard_table(rows: Sequence[LeaderboardRow], title: str) -> Table:
    """The leaderboard as a table that fits 80 columns: mean BPB, half its 95% interval, and of how many seeds."""
    table = _table(title, "rank", "trial", "BPB", "±", "n", "bytes", "params", "tying map", "LoRA", "ranks", "sec")
    for row in rows:
        rank = "over" if row.rank is None else str(row.rank)
        bpb = row.val_bpb if row.mean_bpb is None else row.mean_bpb
        table.add_row(
            rank, str(row.number), f"{bpb:.4f}", _half(row), str(row.seeds), f"{row.artifact_bytes:,}",
            f"{row.parameters:,}", tying_text(row.tying_map), str(row.lora_rank), str(row.ranks),
            f"{row.train_seconds:.1f}",
        )  # fmt: skip
    return table


def leaderboard_notes(board: LeaderboardOut) -> list[str]:
    """What a reader has to know of the leaderboard's numbers."""
    if board.seed_sd is None:
        return []
    notes = [f"± is half a 95% interval, with ~ where one seed has to borrow the SD of all, {board.seed_sd:.5f}."]
    fair = [f"trial {row.number} {row.unscreened_bpb:.4f}" for row in board.rows[:3] if row.unscreened_bpb is not None]
    if fair:
        notes.append(f"The first seed chose the trials, and flatters the best. Without it: {', '.join(fair)}.")
    return notes


def _half(row: LeaderboardRow) -> str:
    if row.low_bpb is None or row.high_bpb is None:
        return "–"
    return f"{'~' if row.pooled else ''}{(row.high_bpb - row.low_bpb) / 2:.4f}"


def verdict_lines(verdict: VerdictOut) -> list[str]:
    """A record verdict as a person reads it."""
    said = "sets a record" if verdict.record else "sets no record"
    lines = [f"trial {verdict.trial} of {verdict.study} {said} against {verdict.against}"]
    if verdict.mean_nats is not None and verdict.against_mean_nats is not None:
        ours, theirs = len(verdict.seeds), verdict.against_seeds
        lines.append(f"  {verdict.mean_nats:.5f} nats over {ours} seeds, {verdict.against_mean_nats:.5f} over {theirs}")
    if verdict.ahead_nats is not None and verdict.ahead_bpb is not None:
        lines.append(f"  ahead by {verdict.ahead_nats:.5f} nats ({verdict.ahead_bpb:.5f} BPB)")
        lines.append(f"  p = {verdict.p:.3g} that it is less than {verdict.margin_nats} ahead, by luck")
    lines.append(f"  alpha {verdict.alpha:.3g}: declared trial {verdict.declared} of the study, look {verdict.look}")
    lines += [f"  missing: {reason}" for reason in verdict.missing]
    if verdict.settle_seeds is not None:
        lines.append(f"  {verdict.settle_seeds} seeds beyond its own would settle it")
    return lines


def ledger_tables(ledger: LedgerOut) -> list[Table]:
    """What a study or a trial has cost: a phase a line, and what came to nothing; then by gang, and by trial."""
    of = ledger.study if ledger.trial is None else f"trial {ledger.trial} of {ledger.study}"
    ends = {"wasted": ledger.wasted, "of it void": ledger.void, "total": ledger.total}
    tables = [_cost_table(f"Ledger of {of}", "phase", {**ledger.phases, **ends})]
    if ledger.gangs:
        tables.append(_cost_table("Gangs", "gang", ledger.gangs, ledger.other_gangs))
    if ledger.trial is None and ledger.trials:
        by_trial = {str(number): cost for number, cost in ledger.trials.items()}
        tables.append(_cost_table("Trials", "trial", by_trial, ledger.other_trials))
    return tables


def _cost_table(title: str, what: str, costs: Mapping[str, CostOut], others: CostOut | None = None) -> Table:
    table = _table(title, what, "seconds", "GPU-seconds", "dollars")
    shown = {**costs, "others": others} if others is not None and others.seconds else costs
    for name, cost in shown.items():
        table.add_row(name, f"{cost.seconds:,.1f}", f"{cost.gpu_seconds:,.1f}", f"{cost.dollars:,.2f}")
    return table


def studies_table(studies: Sequence[StudyOut]) -> Table:
    """Studies, a line each."""
    table = _table("Studies", "name", "state", "trials", "complete", "refused", "best BPB")
    for study in studies:
        best = "–" if study.best_bpb is None else f"{study.best_bpb:.4f}"
        done = study.counts.get(TrialState.COMPLETE, 0)
        table.add_row(study.name, study.state, str(sum(study.counts.values())), str(done), str(study.refused), best)
    return table


def trial_lines(trial: TrialOut) -> list[str]:
    """One trial as a person reads it."""
    shape = f"tying map {tying_text(trial.tying_map)}, LoRA rank {trial.lora_rank}, {trial.parameters:,} parameters"
    if trial.result is not None:
        before = f"{trial.result.val_bpb_prequant:.4f} before quantisation"
        outcome = f"{trial.result.val_bpb:.4f} BPB ({before}), {trial.result.artifact_bytes:,} bytes"
    else:
        verdict = trial.verdict.replace("_", " ")
        outcome = f"{trial.prediction.artifact_bytes:,} artifact bytes predicted: {verdict}"
    why = f" ({trial.reason})" if trial.reason and trial.state != "complete" else ""
    return [f"trial {trial.number} of {trial.study}: {trial.state}{why}", f"  {shape}", f"  {outcome}"]


def preview_lines(name: str, preview: PreviewOut) -> list[str]:
    """A preview as a person reads it."""
    prediction = preview.prediction
    lines = [name, f"  parameters       {prediction.parameters:,}"]
    lines += [f"    {kind:<14} {count:,}" for kind, count in preview.parameters_by_class.items()]
    lines += [
        f"  tying map        {tying_text(preview.tying_map)}",
        f"  model bytes      {prediction.model_bytes:,} predicted",
        f"  code bytes       {prediction.code_bytes:,}",
        f"  artifact bytes   {prediction.artifact_bytes:,} predicted, "
        f"{prediction.artifact_bytes_low:,} to {prediction.artifact_bytes_high:,}",
        *_time_lines(prediction),
        f"  cap              {preview.cap_bytes:,}",
        f"  verdict          {preview.verdict.replace('_', ' ')}",
    ]
    return lines + ([f"    {preview.reason}"] if preview.reason else [])


def _time_lines(prediction: PredictionOut) -> Iterator[str]:
    """What is known of a prediction's steps and seconds."""
    if prediction.steps is not None:
        each = "" if prediction.step_seconds is None else f" predicted, {1000 * prediction.step_seconds:,.1f} ms each"
        yield f"  steps            {prediction.steps:,}{each}"
    for name, expected, low, high in (
        ("training", prediction.train_seconds, prediction.train_seconds_low, prediction.train_seconds_high),
        ("evaluation", prediction.evaluate_seconds, prediction.evaluate_seconds_low, prediction.evaluate_seconds_high),
    ):
        if expected is not None:
            yield f"  {name:<16} {expected:,.1f} s predicted, {low:,.1f} to {high:,.1f}"


def study_preview_lines(name: str, preview: StudyPreviewOut) -> list[str]:
    """Random points of a study as a person reads them, and how many of them would be refused."""
    lines = [name]
    for number, sample in enumerate(preview.samples, 1):
        verdict = "invalid" if sample.verdict is None else sample.verdict.replace("_", " ")
        tying_map = "–" if sample.tying_map is None else tying_text(sample.tying_map)
        lines.append(f"{number:>4}  {verdict:<10} {tying_map:<16} {_numbers(sample.prediction)}".rstrip())
        lines.append(f"      {_point_text({**sample.params, **sample.filled})}")
        lines += [f"      {sample.reason}"] if sample.reason else []
    drawn, refused = len(preview.samples), preview.invalid + preview.cannot_fit
    of = "" if preview.points is None else f" of at most {preview.points:,} points"
    share = f"{refused / drawn:.0%} would be refused"
    return [*lines, f"{drawn} drawn{of}; {share}: {preview.invalid} invalid, {preview.cannot_fit} certain not to fit"]


def _numbers(prediction: PredictionOut | None) -> str:
    """What a sample would be and cost, in one line."""
    if prediction is None:
        return ""
    between = f"{prediction.artifact_bytes_low / 1e6:.2f}–{prediction.artifact_bytes_high / 1e6:.2f} MB"
    steps = "–" if prediction.steps is None else f"{prediction.steps:,}"
    return f"{prediction.parameters:,} parameters, {between}, {steps} steps"


def _point_text(params: Mapping[str, Any]) -> str:
    """A point by the last parts of its names, where these differ, without the letters of a free map."""
    shown = {name: value for name, value in params.items() if not name.startswith("sharing.tying.free.")}
    lasts = Counter(name.rpartition(".")[2] for name in shown)
    texts = []
    for name, value in shown.items():
        last = name.rpartition(".")[2]
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        texts.append(f"{last if lasts[last] == 1 else name}={text}")
    return " ".join(texts)


def watch_study(console: Console, caddie: Caddie, name: str) -> StudyOut:
    """Show a study live until no trial of it is open and none will be proposed, and return it as it was then."""
    caddie.study(name)  # where there is none, nothing is drawn
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    task = bar.add_task(name, total=None)
    shown: set[tuple[int, str]] = set()
    with Live(bar, console=console, refresh_per_second=4) as live:
        while True:
            study = caddie.study(name)
            trials = caddie.trials(name)
            done = [trial for trial in trials if trial.state not in OPEN_TRIALS]
            for trial in done:
                if (trial.number, trial.state) not in shown:
                    shown.add((trial.number, trial.state))
                    live.console.print(_ended_line(trial), no_wrap=True, overflow="ellipsis", highlight=False)
            total = max(study.max_trials + study.submitted, len(trials))
            bar.update(task, completed=len(done), total=total, description=name + _spent(study))
            by_number = {trial.number: trial for trial in trials}
            active = [_running_line(by_number[a.trial], a) for a in caddie.activity(name) if a.trial in by_number]
            live.update(Group(bar, *active))
            ended = study.state in (StudyState.COMPLETE, StudyState.STOPPED) or not study.definition.space
            if ended and len(done) == len(trials):
                return study
            time.sleep(POLL_SECONDS)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
    )
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("tying map", "name", "phase", "gang", "state") else "right", no_wrap=True
        )
    return table


def _spent(study: StudyOut) -> str:
    spending = study.spending
    return f" {spending.spent_gpu_hours:.3g} of {spending.limit_gpu_hours:.3g} GPU-hours" if spending else ""


def _config(trial: TrialSummary) -> str:
    return f"{tying_text(trial.tying_map)} LoRA {trial.lora_rank} ranks {trial.ranks}"


def _ended_line(trial: TrialSummary) -> str:
    if trial.val_bpb is not None and trial.artifact_bytes is not None:
        outcome = f"{trial.val_bpb:.4f} BPB, {trial.artifact_bytes:,} bytes"
    else:
        outcome = trial.reason or ""
    return f"trial {trial.number:>3}  {trial.state:<10} {_config(trial):<24} {outcome}"


def _running_line(trial: TrialSummary, activity: ActivityOut) -> str:
    share = f"{activity.metrics['fraction']:>4.0%}" if "fraction" in activity.metrics else "    "
    loss = f"loss {activity.metrics['train_loss']:.3f}" if "train_loss" in activity.metrics else ""
    return f"  trial {trial.number:>3}  {share}  {_config(trial):<24} {activity.phase:<9} {loss}"
