"""Single submissions taken in together: those that are new to their study share its few statements and one commit.

The others, with a key or a configuration that the study knows, are submitted one by one as in a batch of one; and so
are all, where one of them cannot be added.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from sqlalchemy.exc import DataError, IntegrityError

from api.bodies import TrialIn
from api.context import Context, Writer
from api.schemas import SubmittedOut
from api.submission import judged, submit
from orchestrator import intake, store
from orchestrator.audit import add_audits
from orchestrator.calibration import Calibration
from orchestrator.detail import Detail, get_detail
from orchestrator.errors import CaddieError
from orchestrator.points import Domain
from orchestrator.study import NewTrial, Study
from worker.spec import TrialSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """A body that was sent to a study, by whom, and under which idempotency key."""

    study: str
    body: TrialIn
    key: str | None
    writer: Writer


@dataclass(frozen=True)
class Taken:
    """The answer to a submission, as JSON; and whether what it tells was there already under the same key."""

    number: int
    written: str
    replayed: bool


@dataclass
class _Case:
    """A submission on its way."""

    asked: Submission
    spec: TrialSpec | None = None
    spec_hash: str = ""
    new: NewTrial | None = None
    outcome: Taken | Exception | None = None


def take(context: Context, submissions: Sequence[Submission]) -> list[Taken | Exception]:
    """Each submission's answer, or why it was refused; what is answered is committed."""
    cases = [_Case(asked) for asked in submissions]
    for study, group in groupby(sorted(cases, key=lambda case: case.asked.study), lambda case: case.asked.study):
        own = list(group)
        _try(own, partial(_take, context, study, own))
    return [case.outcome for case in cases if case.outcome is not None]


def _take(context: Context, name: str, cases: Sequence[_Case]) -> None:
    with context.database.read() as session:
        study = store.get_study(session, name)
        calibration = context.calibrations.read(session, study.id)
    domain = Domain(study.definition.base, study.definition.space)
    for case in cases:
        _try([case], partial(_judge, study, domain, calibration, case))
    if sound := [case for case in cases if case.outcome is None]:
        with suppress(CaddieError, ValueError, IntegrityError, DataError):  # of one, perhaps: each shows alone
            _add(context, study, sound)
    for case in cases:
        if case.outcome is None:
            _try([case], partial(_alone, context, study, case))


def _try(cases: Sequence[_Case], step: Callable[[], None]) -> None:
    """Take a step with these submissions. Where it fails, that is the answer to all that have none: others go on."""
    try:
        step()
    except Exception as error:  # noqa: BLE001
        for case in cases:
            case.outcome = case.outcome or error


def _judge(study: Study, domain: Domain, calibration: Calibration, case: _Case) -> None:
    case.spec = case.asked.body.build(study.definition)
    case.spec_hash = case.spec.canonical_hash
    case.new = judged(study, domain, calibration, case.spec, case.asked.key, case.spec_hash)


def _add(context: Context, study: Study, cases: Sequence[_Case]) -> None:
    """Add what is new to the study, in one transaction."""
    now = max(case.asked.writer.now for case in cases)
    with context.database.write() as session:
        held = intake.hold(session, study.id)  # from here on no other submission can slip in between
        fresh = _fresh(cases, *intake.list_known(
            session, study.id, {case.spec_hash for case in cases}, {case.asked.key for case in cases if case.asked.key}
        ))  # fmt: skip
        news = [(case.new, case.spec_hash) for case in fresh if case.new is not None]
        added = intake.add_submitted(session, held, news, now) if news else []
        add_audits(session, [(case.asked.writer.actor, "trial.submit", f"studies/{study.name}") for case in fresh], now)
    for case, (trial, run) in zip(fresh, added, strict=True):
        number, state = trial.number, trial.state
        log.info("trial %d of study %s was submitted: %s", number, study.name, state, extra={"trial_id": trial.id})
        detail = Detail(trial, (run,) if run is not None else ())
        _try([case], partial(_answer, context, study, case, detail, run.id if run is not None else None))


def _answer(context: Context, study: Study, case: _Case, detail: Detail, run_id: int | None) -> None:
    case.outcome = _taken(context, study, detail, run_id)


def _fresh(cases: Sequence[_Case], hashes: set[str], keys: set[str]) -> list[_Case]:
    """Those of which neither study nor group knows the configuration or the key."""
    fresh: list[_Case] = []
    hashes, keys = set(hashes), set(keys)
    for case in cases:
        key = case.asked.key
        if case.spec_hash not in hashes and key not in keys:
            fresh.append(case)
        hashes.add(case.spec_hash)
        if key is not None:
            keys.add(key)
    return fresh


def _alone(context: Context, study: Study, case: _Case) -> None:
    assert case.spec is not None
    asked = case.asked
    submitted = submit(asked.writer, study, case.spec, key=asked.key, allow_duplicate=asked.body.allow_duplicate)
    with context.database.read() as session:
        detail = get_detail(session, study.name, submitted.trial.number)
    case.outcome = replace(_taken(context, study, detail, submitted.run_id), replayed=submitted.replayed)


def _taken(context: Context, study: Study, detail: Detail, run_id: int | None) -> Taken:
    out = SubmittedOut.detailed(study.name, detail, context.gpu_hour_dollars, run_id=run_id)
    return Taken(detail.trial.number, out.model_dump_json(), replayed=False)
