"""What attempts measured, in SQL: message by message, or one metric by step."""

from collections.abc import Collection, Mapping

from sqlalchemy import exists, literal, or_, select, tuple_
from sqlalchemy.orm import Session, aliased

from orchestrator.rows import progress_of
from orchestrator.study import Progress
from orchestrator.tables import AttemptRow, MeasurementRow, RunRow, TrialRow


def list_measurements(
    session: Session, trial_id: int, after: Mapping[int, int] | None = None, limit: int | None = None
) -> tuple[Progress, ...]:
    """What a trial's attempts measured, attempt by attempt, in the order in which their gangs said it.

    `after` leaves out what the caller has: of each attempt that it names, the messages up to that number. `limit`:
    only the first so many messages.
    """
    place = MeasurementRow.attempt_id, MeasurementRow.number
    found = [RunRow.trial_id == trial_id]
    for attempt_id, number in (after or {}).items():
        found.append(or_(MeasurementRow.attempt_id != attempt_id, MeasurementRow.number > number))
    query = (
        select(MeasurementRow, RunRow.id, RunRow.seed).join(AttemptRow, AttemptRow.id == MeasurementRow.attempt_id)
        .join(RunRow, RunRow.id == AttemptRow.run_id).where(*found).order_by(*place)
    )  # fmt: skip
    if limit is not None:
        beyond = session.execute(query.with_only_columns(*place).distinct().offset(limit).limit(1)).one_or_none()
        if beyond is not None:
            query = query.where(tuple_(*place) < tuple_(*map(literal, beyond)))
    grouped: dict[tuple[int, int], tuple[list[MeasurementRow], int, int]] = {}
    for row, run_id, seed in session.execute(query):
        grouped.setdefault((row.attempt_id, row.number), ([], run_id, seed))[0].append(row)
    return tuple(progress_of(rows, run_id, seed) for rows, run_id, seed in grouped.values())


def list_curves(session: Session, study_id: int, name: str, numbers: Collection[int]) -> dict[int, dict[int, float]]:
    """One metric by step, for each trial of these numbers that measured it: of its latest attempt that did, further
    seeds aside."""
    first = aliased(RunRow)
    further = exists().where(first.trial_id == RunRow.trial_id, first.rung == RunRow.rung, first.id < RunRow.id)
    query = (
        select(TrialRow.number, MeasurementRow.attempt_id, MeasurementRow.step, MeasurementRow.value)
        .join(AttemptRow, AttemptRow.id == MeasurementRow.attempt_id).join(RunRow, RunRow.id == AttemptRow.run_id)
        .join(TrialRow, TrialRow.id == RunRow.trial_id)
        .where(TrialRow.study_id == study_id, TrialRow.number.in_(numbers), MeasurementRow.name == name, ~further)
        .order_by(MeasurementRow.attempt_id, MeasurementRow.number)
    )  # fmt: skip
    curves: dict[int, tuple[int, dict[int, float]]] = {}
    for number, attempt_id, step, value in session.execute(query):
        if number not in curves or curves[number][0] != attempt_id:
            curves[number] = (attempt_id, {})
        curves[number][1][step] = value
    return {number: curve for number, (_, curve) in curves.items()}
