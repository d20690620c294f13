"""What the command line prints of a study's results: the leaderboard, a verdict, a ledger."""

from collections.abc import Mapping, Sequence

from api.reports import CostOut, LedgerOut
from api.standings import LeaderboardOut, LeaderboardRow, VerdictOut
from api.tables import Column, Grid
from api.terminal import tying_text


def leaderboard_table(rows: Sequence[LeaderboardRow], title: str) -> Grid:
    """The leaderboard: mean BPB, half its 95% interval, of how many seeds; and the BPB before quantisation, of one."""
    columns = (
        Column("rank"), Column("trial"), Column("BPB"), Column("±"), Column("n"), Column("before", 1), Column("bytes"),
        Column("params", 3), Column("tying map", left=True, cut=9), Column("LoRA", 2), Column("ranks", 5),
        Column("sec", 4),
    )  # fmt: skip
    cells = [
        (
            "over" if row.rank is None else str(row.rank), str(row.number),
            f"{row.val_bpb if row.mean_bpb is None else row.mean_bpb:.4f}", _half(row), str(row.seeds),
            f"{row.val_bpb_prequant:.4f}", f"{row.artifact_bytes:,}", f"{row.parameters:,}",
            tying_text(row.tying_map), str(row.lora_rank), str(row.ranks), f"{row.train_seconds:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    return Grid(columns, cells, title)


def leaderboard_notes(board: LeaderboardOut) -> list[str]:
    """What a reader has to know of the leaderboard's numbers."""
    notes = ["before is the BPB before quantisation, of the seed that completed the trial."] if board.rows else []
    if board.seed_sd is None:
        return notes
    notes += [f"± is half a 95% interval, with ~ where one seed has to borrow the SD of all, {board.seed_sd:.5f}."]
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


def ledger_tables(ledger: LedgerOut) -> list[Grid]:
    """What a study or a trial has cost: a phase a line, and what came to nothing; then by gang, and by trial."""
    of = ledger.study if ledger.trial is None else f"trial {ledger.trial} of {ledger.study}"
    ends = {"wasted": ledger.wasted, "of it void": ledger.void, "total": ledger.total}
    tables = [_cost_table(f"Ledger of {of}", "phase", {**ledger.phases, **ends})]
    if ledger.gangs:
        tables.append(_cost_table("Gangs", "gang", ledger.gangs, ledger.other_gangs))
    if ledger.trial is None and ledger.trials:
        by_trial = {str(number): cost for number, cost in ledger.trials.items()}
        tables.append(_cost_table("Trials", "trial", by_trial, ledger.other_trials))
    if ledger.savings is not None:
        saved = ledger.savings
        kinds = {
            _saved_text(saved.refused_trials, "refused", saved.refused_unknown): saved.refused,
            _saved_text(saved.pruned_trials, "pruned", saved.pruned_unknown): saved.pruned,
        }
        tables.append(_cost_table("Not spent", "trials", kinds, known=False))
    return tables


def _saved_text(trials: int, how: str, unknown: int) -> str:
    return f"{trials} {how}" + (f", {unknown} of unknown length" if unknown else "")


def _cost_table(
    title: str, what: str, costs: Mapping[str, CostOut], others: CostOut | None = None, known: bool = True
) -> Grid:
    """Costs, a line each; where they need not be `known`, nothing stands for no seconds."""
    columns = (Column(what, left=True, cut=12), Column("seconds"), Column("GPU-seconds"), Column("dollars"))
    shown = {**costs, "others": others} if others is not None and others.seconds else costs
    cells = [
        (name, f"{cost.seconds:,.1f}", f"{cost.gpu_seconds:,.1f}", f"{cost.dollars:,.2f}")
        if known or cost.seconds
        else (name, "–", "–", "–")
        for name, cost in shown.items()
    ]
    return Grid(columns, cells, title)
