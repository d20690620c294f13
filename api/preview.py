"""What a spec would be and cost, without running it; and the recipes to start from."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query

from api.bodies import PreviewIn, StudyIn
from api.context import ContextOf
from api.plain import PlainRoute
from api.previews import PreviewOut, StudyPreviewOut
from api.problems import responses
from api.schemas import Page, RecipeOut
from orchestrator import feasibility, store
from orchestrator.caps import Caps
from orchestrator.sample import draw_samples
from orchestrator.study import CAP_BYTES, NewStudy, Prediction
from worker.inventory import TensorClass
from worker.recipes import load_recipe, recipe_names
from worker.spec import TrialSpec, parse_spec

Predicts = Callable[[TrialSpec], Prediction]
Shares = Callable[[TrialSpec], dict[TensorClass, float]]

router = APIRouter(route_class=PlainRoute, tags=["preview"])

SAMPLES, MOST_SAMPLES = 20, 1000


@router.post("/preview", openapi_extra={"x-role": "viewer"}, responses=responses(400, 404, 415, 422))
def preview_spec(body: PreviewIn, context: ContextOf) -> PreviewOut:
    """Predict a configuration's parameters and bytes. Nothing is stored."""
    if body.study is None:
        return preview(body.build(None), Caps(body.cap_bytes or CAP_BYTES))
    with context.database.read() as session:
        study = store.get_study(session, body.study)
        calibration = context.calibrations.read(session, study.id)
    definition = study.definition
    caps = definition.model_copy(update={"cap_bytes": body.cap_bytes or definition.cap_bytes})
    return preview(body.build(definition), caps, calibration.predict, calibration.shares)


@router.post("/studies/preview", openapi_extra={"x-role": "viewer"}, responses=responses(400, 415, 422))
def preview_study(
    body: StudyIn,
    samples: Annotated[
        int, Query(ge=1, le=MOST_SAMPLES, description="How many points to draw, by the study's seed.")
    ] = SAMPLES,
) -> StudyPreviewOut:
    """What a study would propose at random, and how much of it would be refused. Nothing is stored."""
    return StudyPreviewOut.of(draw_samples(body.definition(), samples))


@router.get("/recipes")
def list_recipes() -> Page[RecipeOut]:
    """Named specs from the literature."""
    return Page(items=[RecipeOut(name=name, spec=parse_spec(load_recipe(name))) for name in recipe_names()])


def preview(
    spec: TrialSpec, caps: NewStudy | Caps, predict: Predicts = feasibility.predict, shares: Shares = feasibility.shares
) -> PreviewOut:
    """The spec's prediction, as a study's trials calibrate it, and its verdict against the caps."""
    prediction = predict(spec)
    verdict, reason = feasibility.judge(prediction, caps, spec)
    return PreviewOut.of(spec, prediction, caps.cap_bytes, verdict, reason, shares(spec))
