"""The cluster over HTTP: what each gang does and did, how much of it was idle, and what waits."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query

from api.context import DatabaseOf, Now
from api.lanes import ClusterOut
from api.problems import responses
from orchestrator.lanes import read_cluster

MAX_HOURS = 168.0

router = APIRouter(prefix="/cluster", tags=["cluster"], responses=responses(422))
Hours = Annotated[float, Query(gt=0, le=MAX_HOURS, description="The length of the window that ends now.")]


@router.get("")
def get_cluster(database: DatabaseOf, now: Now, hours: Hours = 1.0) -> ClusterOut:
    """What each gang does, and did within the last hours, of every orchestrator and executor on this database."""
    with database.read() as session:
        return ClusterOut.of(read_cluster(session, now, timedelta(hours=hours)))
