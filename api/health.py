"""Whether the process is up, and whether it can work."""

from fastapi import APIRouter
from sqlalchemy.exc import SQLAlchemyError

from api.context import DatabaseOf
from api.problems import NotReady, responses
from api.schemas import Health

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def get_health() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", responses=responses(503))
def get_readiness(database: DatabaseOf) -> Health:
    """The database answers, and its schema is this version's."""
    try:
        behind = database.needs_migration()
    except SQLAlchemyError as error:
        raise NotReady(f"the database does not answer: {type(error).__name__}") from None
    if behind:
        raise NotReady("the database is not migrated to this version: run caddie migrate")
    return Health()
