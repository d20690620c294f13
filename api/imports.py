"""Results that were made elsewhere, brought into a study over HTTP."""

import logging

from fastapi import APIRouter, Response
from sqlalchemy.exc import IntegrityError

from api.bodies import ImportIn
from api.context import ContextOf, StudyName, WriterOf
from api.plain import PlainRoute
from api.problems import responses
from api.schemas import TrialOut
from api.trials import Key, describe
from orchestrator import feasibility, store
from orchestrator.errors import Conflict
from orchestrator.points import Domain
from orchestrator.records import import_trial
from orchestrator.study import NewTrial

log = logging.getLogger(__name__)
router = APIRouter(
    route_class=PlainRoute, prefix="/studies/{study}/imports", tags=["trials"], responses=responses(404, 422)
)


@router.post(
    "", status_code=201, responses={**responses(400, 409, 415), 200: {"model": TrialOut, "description": "Replayed"}}
)
def import_result(
    study: StudyName, body: ImportIn, context: ContextOf, writer: WriterOf, response: Response, key: Key = None
) -> TrialOut:
    """Add a trial that was trained elsewhere, with its result. It teaches the sampler and costs the study nothing."""
    database = context.database
    with database.read() as session:
        found = store.get_study(session, study)
        calibration = context.calibrations.read(session, found.id)
    spec = body.build(found.definition)
    prediction = calibration.predict(spec)
    verdict, reason = feasibility.judge(prediction, found.definition, spec)
    params = Domain(found.definition.base, found.definition.space).partial(spec)
    new = NewTrial(spec, params, "imported", prediction, verdict, reason, key)
    try:
        with writer.write("trial.import", f"studies/{study}") as session:
            trial = import_trial(session, found, new, body.result, writer.now)
    except (Conflict, IntegrityError):
        with database.read() as session:
            replay = None if key is None else store.find_trial(session, found.id, idempotency_key=key)
        if replay is None:
            raise
        if (replay.spec, replay.result) != (spec, body.result):
            message = f"was used for trial {replay.number}, which has another spec or result"
            existing = f"/v1/studies/{study}/trials/{replay.number}"
            raise Conflict("Idempotency-Key", key, message, existing) from None
        trial = replay
        response.status_code = 200
        response.headers["Idempotent-Replay"] = "true"
    else:
        log.info("trial %d of study %s was imported", trial.number, study, extra={"trial_id": trial.id})
    response.headers["Location"] = f"/v1/studies/{study}/trials/{trial.number}"
    with database.read() as session:
        return describe(session, study, trial, context)
