"""`/metrics` for Prometheus: requests and streams of this server, and what the database holds, read at most every few
seconds."""

import platform
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.database import Database
from orchestrator.gauges import Figures, Gauges

CACHED_SECONDS = 5.0
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

router = APIRouter(tags=["health"])


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self, database: Database, gpu_hour_dollars: float) -> None:
        own = self.registry = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter(
            "caddie_http_requests",
            "Requests, by the status they were answered with, or none.",
            ("method", "route", "status"),
            registry=own,
        )
        self.seconds = Histogram(
            "caddie_http_request_seconds", "Until the answer began.", ("method", "route"), buckets=BUCKETS, registry=own
        )
        self.streams = Gauge("caddie_event_streams", "Open streams of events.", registry=own)
        self.errors = Counter("caddie_database_errors", "Statements that failed.", ("kind",), registry=own)
        about = {"version": version("caddie"), "python": platform.python_version()}
        Info("caddie_build", "What runs here.", registry=own).info(about)
        own.register(_Stored(database, gpu_hour_dollars))
        event.listen(database.engine, "handle_error", self._count_error)

    def _count_error(self, context: ExceptionContext) -> None:
        self.errors.labels(type(context.sqlalchemy_exception or context.original_exception).__name__).inc()


class Measured:
    """ASGI middleware that counts requests by the template of their route, and times them until the answer begins."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, streams = time.perf_counter(), "none", False
        answered: float | None = None

        async def note(message: Message) -> None:
            nonlocal status, streams, answered
            if message["type"] == "http.response.start":
                status, answered = str(message["status"]), time.perf_counter()
                streams = (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]
                if streams:
                    self._metrics.streams.inc()
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:  # which is answered further out
            if answered is None:
                status, answered = "500", time.perf_counter()
            raise
        finally:
            if streams:
                self._metrics.streams.dec()
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = route_of(scope)
            self._metrics.requests.labels(method, route, status).inc()
            if answered is not None:  # else whoever asked had left
                self._metrics.seconds.labels(method, route).observe(max(answered - began, 0.0))


def route_of(scope: Scope) -> str:
    """The template of the request's route, of which there are few whatever paths are asked for."""
    template = getattr(scope.get("route"), "path", None)
    path: str = scope["path"]
    if template is None:
        return next((prefix for prefix in ("/assets", "/dashboard") if path.startswith(prefix)), "other")
    # A router that is included does not tell its routes of its prefix.
    return f"/v1{template}" if path.startswith("/v1/") and not template.startswith("/v1") else str(template)


class _Stored(Collector):
    """What the database holds. Where it does not answer, these metrics are missing and the others are there."""

    def __init__(self, database: Database, gpu_hour_dollars: float) -> None:
        self._database, self._gpu_hour_dollars = database, gpu_hour_dollars
        self._gauges, self._lock = Gauges(), threading.Lock()
        self._known: tuple[float, Figures | None] = (float("-inf"), None)

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        up = GaugeMetricFamily("caddie_database_up", "Whether the database answered.")
        up.add_metric((), 0.0 if figures is None else 1.0)
        yield up
        if figures is not None:
            yield from _families(figures, self._gpu_hour_dollars)

    def describe(self) -> list[Metric]:
        return []  # to register is not to ask the database

    def _figures(self) -> Figures | None:
        with self._lock:
            if time.monotonic() - self._known[0] > CACHED_SECONDS:
                self._known = (time.monotonic(), self._read())
            return self._known[1]

    def _read(self) -> Figures | None:
        try:
            with self._database.read() as session:
                return self._gauges.read(session, datetime.now(UTC))
        except SQLAlchemyError:
            return None


def _families(figures: Figures, gpu_hour_dollars: float) -> Iterator[Metric]:
    for name, help_text, label, values in (
        ("caddie_studies", "Studies by state.", "state", figures.studies),
        ("caddie_trials", "Trials by state.", "state", figures.trials),
        ("caddie_gangs", "Open attempts by the phase of their gang.", "phase", figures.gangs),
    ):
        gauge = GaugeMetricFamily(name, help_text, labels=(label,))
        for key, count in values.items():
            gauge.add_metric((key,), count)
        yield gauge
    dollars = {phase: spent * gpu_hour_dollars / 3600 for phase, spent in figures.gpu_seconds.items()}
    for name, help_text, label, sums in (
        ("caddie_attempts", "Ended attempts by outcome.", "outcome", figures.attempts),
        ("caddie_attempt_seconds", "Seconds of ended attempts by phase.", "phase", figures.seconds),
        ("caddie_gpu_seconds", "GPU-seconds of ended attempts by phase.", "phase", figures.gpu_seconds),
        ("caddie_dollars", "What those cost at today's price.", "phase", dollars),
    ):
        counter = CounterMetricFamily(name, help_text, labels=(label,))
        for key, value in sums.items():
            counter.add_metric((key,), value)
        yield counter
    shape = ("ranks", "device")
    queued = GaugeMetricFamily("caddie_queued_runs", "Runs that wait for a gang, by its shape.", labels=shape)
    waited = GaugeMetricFamily("caddie_queue_seconds", "For how long the first of them has waited.", labels=shape)
    for gang, runs in figures.queued.items():
        queued.add_metric((str(gang.ranks), gang.device), runs)
        waited.add_metric((str(gang.ranks), gang.device), figures.waited_seconds.get(gang, 0.0))
    yield from (queued, waited)
    idle = GaugeMetricFamily(
        "caddie_idle_share",
        "What ranks waited before attempts that ended in the last ten minutes, of the time they were held.",
    )
    if figures.idle_share is not None:
        idle.add_metric((), figures.idle_share)
    yield idle


@router.get("/metrics", response_class=PlainTextResponse)
def get_metrics(request: Request) -> Response:
    """This server's requests and streams, and the state of the database, in Prometheus' text format."""
    metrics: Metrics = request.app.state.metrics
    return Response(generate_latest(metrics.registry), media_type=MEDIA_TYPE)
