"""What the command line prints of studies, and of the cluster that they share."""

from collections.abc import Sequence

from api.lanes import ClusterOut, LaneOut
from api.reports import ArmOut, ArmsOut, ImportanceOut, ParetoOut, StoppingOut
from api.schemas import ActivityOut, StudyOut
from api.tables import Column, Grid
from api.terminal import bpb_text, seconds_text, time_text
from orchestrator.lifecycle import OPEN_TRIALS, TrialState
from orchestrator.space import Parameter


def studies_table(studies: Sequence[StudyOut]) -> Grid:
    """Studies, a line each."""
    columns = (
        Column("name", left=True, cut=20), Column("state", left=True), Column("trials"), Column("open", 4),
        Column("complete", 3), Column("failed", 4), Column("refused", 5), Column("best BPB"), Column("GPU-hours", 6),
        Column("priority", 7), Column("created", 8),
    )  # fmt: skip
    cells = [
        (
            study.name, study.state, f"{sum(study.counts.values()):,}", str(open_trials(study)),
            f"{study.counts.get(TrialState.COMPLETE, 0):,}", f"{study.counts.get(TrialState.FAILED, 0):,}",
            f"{study.all_refused:,}", bpb_text(study.best_bpb), spent_text(study), str(study.priority),
            time_text(study.created_at),
        )
        for study in studies
    ]  # fmt: skip
    return Grid(columns, cells)


def open_trials(study: StudyOut) -> int:
    """How many of its trials are queued or running."""
    return sum(study.counts.get(state, 0) for state in OPEN_TRIALS)


def study_lines(study: StudyOut) -> list[str]:
    """One study as a person reads it."""
    new, counts = study.definition, ", ".join(f"{count:,} {state}" for state, count in study.counts.items() if count)
    search = f"{study.proposed:,} of {study.max_trials:,} proposed by {new.sampler}" if new.space else "none"
    best = "none yet" if study.best_bpb is None else f"{study.best_bpb:.4f} BPB, trial {study.best_trial}"
    left = f", {study.spending.left_gpu_hours:.3g} left; a CPU rank counts as a GPU" if study.spending else ""
    budget = [f"  budget     {spent_text(study)} GPU-hours{left}"] if study.spending else []
    return [
        f"study {study.name}: {study.state}{f' ({study.reason})' if study.reason else ''}",
        f"  trials     {counts or 'none'}",
        f"  search     {search}, {study.refused:,} points refused; {study.submitted:,} submitted",
        f"  best       {best}",
        *budget,
        f"  caps       {new.cap_bytes:,} bytes, {new.cap_train_seconds:,.0f} s to train",
        f"  priority   {study.priority}",
        f"  created    {time_text(study.created_at)}",
        *([f"  archived   {time_text(study.archived_at)}"] if study.archived_at else []),
        *[f"  space      {name}: {_range(parameter)}" for name, parameter in new.space.items()],
    ]


def spent_text(study: StudyOut) -> str:
    """What it has spent of its budget, in GPU-hours."""
    spending = study.spending
    return f"{spending.spent_gpu_hours:.3g} of {spending.limit_gpu_hours:.3g}" if spending else "–"


def _range(parameter: Parameter) -> str:
    """A parameter's values, in the words of a study file."""
    said = parameter.model_dump(mode="json", exclude_defaults=True)
    if "families" in said:
        said["families"] = list(said["families"])
    if list(said) == ["choice"]:
        return ", ".join(map(str, said["choice"]))
    return ", ".join(f"{name} {value}" for name, value in said.items())


def activity_table(activity: Sequence[ActivityOut]) -> Grid:
    """What gangs do now, a line each."""
    columns = (
        Column("trial"), Column("phase", left=True), Column("done"), Column("step"), Column("steps/s", 2),
        Column("loss", 1), Column("since", 3), Column("gang", 4, left=True, cut=12),
    )  # fmt: skip
    return Grid(columns, [_activity_row(one) for one in activity])


def _activity_row(one: ActivityOut) -> tuple[str, ...]:
    fraction, loss = one.metrics.get("fraction"), one.metrics.get("train_loss")
    rate = one.step / one.elapsed_seconds if one.step and one.elapsed_seconds else None
    return (
        str(one.trial), one.phase, "–" if fraction is None else f"{fraction:.0%}",
        "–" if one.step is None else f"{one.step:,}", "–" if rate is None else f"{rate:,.2f}",
        "–" if loss is None else f"{loss:.3f}", time_text(one.started_at)[11:], one.gang or "–",
    )  # fmt: skip


def pareto_table(found: ParetoOut) -> Grid:
    """The front of score and size, smallest first."""
    columns = (Column("trial"), Column("bytes"), Column("BPB"), Column("n"))
    cells = [
        (str(each.number), f"{each.artifact_bytes:,}", f"{each.val_bpb:.4f}", str(each.seeds)) for each in found.points
    ]
    return Grid(columns, cells, f"Pareto set of {found.study} (cap {found.cap_bytes:,} bytes)")


def importance_parts(found: ImportanceOut) -> list[Grid | str]:
    """Parameters by importance, then families of tying maps."""
    if not found.parameters:
        return [f"too few complete trials of {found.study} to tell: {found.trials}"]
    parameters = Grid(
        (Column("parameter", left=True, cut=20), Column("importance"), Column("trials")),
        [
            (each.name, "–" if each.importance is None else f"{each.importance:.0%}", str(each.trials))
            for each in found.parameters
        ],
        f"Importance in {found.study}, of {found.trials} complete trials",
    )
    families = Grid(
        (Column("family", left=True), Column("trials"), Column("best BPB"), Column("median BPB")),
        [
            (each.family, str(each.trials), bpb_text(each.best_bpb), bpb_text(each.median_bpb))
            for each in found.families
        ],
        "Families of tying maps",
    )
    return [parameters, families] if found.families else [parameters]


def arms_tables(found: ArmsOut) -> list[Grid]:
    """What proposed trials, then the rules of guided proposals."""
    tables = [_arms(found.arms, "arm")]
    return [*tables, _arms(found.rules, "rule")] if found.rules else tables


def _arms(arms: Sequence[ArmOut], what: str) -> Grid:
    columns = (
        Column(what, left=True, cut=16), Column("trials"), Column("scored", 2), Column("bests"), Column("best BPB"),
        Column("median BPB", 1), Column("better", 3), Column("mean gain", 4),
    )  # fmt: skip
    cells = [
        (
            arm.name, str(arm.trials), str(arm.scored), str(arm.bests), bpb_text(arm.best_bpb),
            bpb_text(arm.median_bpb), f"{arm.better} of {arm.compared}", bpb_text(arm.mean_gain),
        )
        for arm in arms
    ]  # fmt: skip
    return Grid(columns, cells)


def stopping_lines(found: StoppingOut) -> list[str]:
    """Early stops, and what those that were spared show of them."""
    rate = f"{found.error_rate_low:.0%} to {found.error_rate_high:.0%}"
    lines = [f"{found.stopped} runs stopped early, {found.spared} spared, of which {found.finished} have finished"]
    if found.finished:
        lines.append(f"  {found.wrong} of these would have passed by their final score: {rate} of all stops were wrong")
    if found.given_up_bpb is not None:
        lines.append(f"  without one of them, the best score would have been worse by {found.given_up_bpb:.5f} BPB")
    return lines


def cluster_parts(cluster: ClusterOut) -> list[Grid | str]:
    """Each gang's lane in a line, then what waits."""
    idle = "–" if cluster.idle_share is None else f"{cluster.idle_share:.1%}"
    used = ", ".join(f"{count} {kind}" for kind, count in cluster.ranks_in_use.items()) or "none"
    window = seconds_text((cluster.until - cluster.since).total_seconds())
    columns = (
        Column("gang", left=True, cut=16), Column("shape", left=True), Column("phase", left=True),
        Column("trial", left=True, cut=10), Column("idle"), Column("attempts", 2), Column("node", 3, left=True, cut=12),
        Column("device", 4, left=True, cut=12),
    )  # fmt: skip
    left_out = [f"and {cluster.lanes_left_out} more lanes"] if cluster.lanes_left_out else []
    return [
        f"the last {window}: idle {idle}, ranks in use: {used}",
        Grid(columns, [_lane_row(lane) for lane in cluster.lanes]),
        *left_out,
        *[
            f"{waiting.study}: {waiting.runs} {'run waits' if waiting.runs == 1 else 'runs wait'} for"
            f" {waiting.shape.ranks} {waiting.shape.device}"
            + ("" if waiting.waited_seconds is None else f", the longest for {seconds_text(waiting.waited_seconds)}")
            for waiting in cluster.queue
        ],
    ]


def _lane_row(lane: LaneOut) -> tuple[str, ...]:
    last = lane.segments[-1] if lane.segments else None
    trial = f"{last.study} {last.trial}" if lane.phase and last and last.trial is not None else "–"
    return (
        lane.gang, f"{lane.shape.ranks} {lane.shape.device}", lane.phase or "–", trial,
        "–" if lane.idle_share is None else f"{lane.idle_share:.0%}", str(lane.attempts), lane.node or "–",
        lane.device or "–",
    )  # fmt: skip
