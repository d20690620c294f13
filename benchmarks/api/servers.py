"""The servers that are compared, one to a process: Caddie's own, and two that do nothing but one insert or select.

`fastapi` is what a tutorial writes: FastAPI handlers with a SQLAlchemy session, which add or read one row. `drivers` is
a ceiling: Starlette's plainest handlers over sqlite3 or psycopg. All run under uvicorn as Caddie runs it, and on SQLite
with Caddie's settings (WAL, foreign keys, a busy timeout of 30 s).

Run by rates.py and the others: servers.py caddie|fastapi|drivers URL prints the port that it listens on.
"""

import asyncio
import json
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import JSON, String, create_engine, event, make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PRAGMAS = ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=30000")
PG_CONNECTIONS = 8


class Base(DeclarativeBase):
    pass


class ItemRow(Base):
    """A row of the compared servers: much smaller than a trial, which is their advantage."""

    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    params: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime]


class ItemIn(BaseModel):
    name: str
    params: dict[str, Any]


class ItemOut(ItemIn):
    id: int
    created_at: datetime


def fastapi_app(url: str) -> FastAPI:
    """One insert or one select, by FastAPI and SQLAlchemy."""
    sqlite = url.startswith("sqlite")
    engine = create_engine(url, connect_args={"timeout": 30} if sqlite else {})
    if sqlite:
        event.listen(engine, "connect", lambda connection, _record: _prepare(connection))
    Base.metadata.create_all(engine)
    app = FastAPI()

    @app.post("/items", status_code=201)
    def add_item(body: ItemIn) -> ItemOut:
        # A session as a dependency would be the tutorial's way; above 15 connections that one waits for itself.
        with Session(engine, expire_on_commit=False) as session:
            row = ItemRow(name=body.name, params=body.params, created_at=datetime.now(UTC).replace(tzinfo=None))
            session.add(row)
            session.commit()
            return ItemOut.model_validate(row, from_attributes=True)

    @app.get("/items/{number}")
    def get_item(number: int) -> ItemOut:
        with Session(engine) as session:
            row = session.get(ItemRow, number)
            if row is None:
                raise HTTPException(404)
            return ItemOut.model_validate(row, from_attributes=True)

    return app


INSERT = "INSERT INTO items (name, params, created_at) VALUES ({0}, {0}, {0}) RETURNING id"
SELECT = "SELECT id, name, params, created_at FROM items WHERE id = {0}"


def drivers_app(url: str) -> Starlette:
    """One insert or one select, by the database's own driver in the event loop."""
    Base.metadata.create_all(create_engine(url))
    return _sqlite_app(str(make_url(url).database)) if url.startswith("sqlite") else _postgresql_app(url)


def _sqlite_app(path: str) -> Starlette:
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    _prepare(connection)

    async def add_item(request: Request) -> Response:
        return _item(connection.execute(INSERT.format("?"), _values(await request.json())).fetchone(), 201)

    async def get_item(request: Request) -> Response:
        return _item(connection.execute(SELECT.format("?"), (request.path_params["number"],)).fetchone())

    return Starlette(routes=_routes(add_item, get_item))


def _postgresql_app(url: str) -> Starlette:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    idle: asyncio.Queue[psycopg.AsyncConnection[Any]] = asyncio.Queue()

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        for _ in range(PG_CONNECTIONS):
            idle.put_nowait(await psycopg.AsyncConnection.connect(plain, autocommit=True))
        yield

    async def run(statement: str, values: tuple[Any, ...]) -> Any:
        connection = await idle.get()
        try:
            return await (await connection.execute(statement, values, prepare=True)).fetchone()
        finally:
            idle.put_nowait(connection)

    async def add_item(request: Request) -> Response:
        return _item(await run(INSERT.format("%s"), _values(await request.json())), 201)

    async def get_item(request: Request) -> Response:
        return _item(await run(SELECT.format("%s"), (request.path_params["number"],)))

    return Starlette(routes=_routes(add_item, get_item), lifespan=lifespan)


def _routes(add_item: Any, get_item: Any) -> list[Route]:
    return [Route("/items", add_item, methods=["POST"]), Route("/items/{number:int}", get_item)]


def _values(body: dict[str, Any]) -> tuple[str, str, str]:
    return body["name"], json.dumps(body["params"]), datetime.now(UTC).replace(tzinfo=None).isoformat(" ")


def _item(row: Any, status: int = 200) -> Response:
    return Response(json.dumps(list(row), default=str), status, media_type="application/json")


def _prepare(connection: sqlite3.Connection) -> None:
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def main() -> None:
    kind, url = sys.argv[1:]
    # asyncio sends small answers at once only on a socket that says TCP, as those that uvicorn opens itself do.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    print(listener.getsockname()[1], flush=True)
    if kind == "caddie":
        from api.app import create_app
        from api.server import Server
        from orchestrator.database import Database

        server: uvicorn.Server = Server(create_app(Database(url)))
    else:
        app: Any = fastapi_app(url) if kind == "fastapi" else drivers_app(url)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
