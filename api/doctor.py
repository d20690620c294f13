"""`caddie doctor`: what does not belong, straight from the database, the folder of artifacts and the Ray cluster,
without a server."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.doctor import Finding, clear, examine
from orchestrator.settings import Settings

UNASKED = (
    "Ray was not asked for its gangs: CADDIE_RAY_ADDRESS names no cluster, and the Ray of `caddie up` ends with it"
)


def run_doctor(settings: Settings, *, clearing: bool, as_json: bool) -> int:
    """Print what does not belong, after clearing it where asked to. 0 where nothing of it remains, else 1, or 2 where
    the database is of another version. 1 also where the Ray cluster that is named does not answer."""
    database = Database(settings.database_url)
    try:
        if database.is_new or database.needs_migration():
            print("caddie: the database is not at this version's schema: run `caddie migrate` first", file=sys.stderr)
            return 2
        artifacts, now = ArtifactStore(settings.artifacts), datetime.now(UTC)
        remaining = examine(database, artifacts, now)
        cleared: list[Finding] = []
        if clearing:
            cleared, remaining = clear(database, artifacts, remaining, now)
        gangs = _on_ray(settings, database, clearing=clearing)
    finally:
        database.close()
    cleared, remaining = [*cleared, *gangs.cleared], [*remaining, *gangs.remaining]
    if as_json:
        answer = {
            "cleared": [_json(finding) for finding in cleared],
            "remaining": [_json(found) for found in remaining],
            "ray": gangs.note,
        }
        print(json.dumps(answer, indent=2))
    else:
        asked = "" if gangs.note is None else " in the database and the artifacts"
        print("\n".join([*([gangs.note] if gangs.note else []), *doctor_lines(cleared, remaining, asked)]))
    return 1 if remaining or gangs.unanswered else 0


@dataclass(frozen=True)
class _OnRay:
    """What the cluster has that does not belong. `note` says why it was not asked, None where it was."""

    note: str | None
    unanswered: bool = False
    cleared: Sequence[Finding] = ()
    remaining: Sequence[Finding] = ()


def _on_ray(settings: Settings, database: Database, *, clearing: bool) -> _OnRay:
    if settings.ray_address is None:
        return _OnRay(UNASKED)
    from orchestrator import ray_census  # loads Ray, which takes a second

    try:
        with ray_census.joined(settings.ray_address):
            present, now = ray_census.present(), datetime.now(UTC)
            census = ray_census.examine(database, present, settings.owner, now)
            if clearing:
                return _OnRay(None, False, *ray_census.clear(database, census, now))
            return _OnRay(None, remaining=census.findings())
    except ray_census.NoCluster as error:
        return _OnRay(f"Ray was not asked for its gangs: {error}", unanswered=True)


def doctor_lines(cleared: Sequence[Finding], remaining: Sequence[Finding], where: str) -> list[str]:
    """A line for each finding, and a sum. `where` limits what can be said where nothing is wrong."""
    lines = [f"cleared: {_sentence(finding)}" for finding in cleared]
    lines += [f"{_sentence(finding)}; --clear {finding.remedy or 'leaves it as it is'}" for finding in remaining]
    if not remaining:
        return [*lines, f"nothing is wrong{where}{f' any more: {len(cleared)} cleared' if cleared else ''}"]
    kinds = ", ".join(f"{count} × {kind}" for kind, count in Counter(finding.kind for finding in remaining).items())
    return [*lines, f"{len(remaining)} found{f' after {len(cleared)} were cleared' if cleared else ''}: {kinds}"]


def _sentence(finding: Finding) -> str:
    return f"{finding.kind}: {finding.where}: {finding.what}"


def _json(finding: Finding) -> dict[str, Any]:
    return {"kind": finding.kind, "what": finding.what, "where": finding.where, "remedy": finding.remedy}
