"""Answers that take long to reckon, kept for a while: however many readers ask, they cost a tenth of a processor."""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from time import monotonic, thread_time
from typing import Any, Generic, TypeVar

SHARE = 0.1
"""Of a processor, that one answer may take at the most."""
QUICK_SECONDS = 0.005
"""What takes less is reckoned whenever it is asked for."""
MOST = 64
SOON_SECONDS = 1.0
"""When to ask again for what is being reckoned."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """A value, and in how many seconds there may be a newer one: 0 where it is as of now."""

    value: Value
    seconds_left: float


@dataclass
class _Place:
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by the one who reckons."""
    value: Any = None
    until: float = 0.0


class Kept:
    """Values by key, MOST at a time. One that took t seconds is given for t / SHARE seconds."""

    def __init__(self) -> None:
        self._lock, self._places = threading.Lock(), dict[Hashable, _Place]()

    def get(self, key: Hashable, reckon: Callable[[], Value]) -> Answer[Value]:
        """The value. Of many who ask at the same time one reckons it, and the others wait for that."""
        place = self._place(key)
        with place.lock:
            if (left := place.until - monotonic()) > 0:
                return Answer(place.value, left)
            _reckon(place, reckon, 0.0)
            return Answer(place.value, 0.0)

    def get_soon(self, key: Hashable, reckon: Callable[[], Value]) -> Answer[Value | None]:
        """The value, or at once the one before it, if any, while a thread of its own reckons it."""
        place = self._place(key)
        if (left := place.until - monotonic()) > 0:
            return Answer(place.value, left)
        if place.lock.acquire(blocking=False):
            threading.Thread(target=_reckon_beside, args=(place, reckon), name="reckon", daemon=True).start()
        return Answer(place.value, SOON_SECONDS)

    def _place(self, key: Hashable) -> _Place:
        with self._lock:
            place = self._places.pop(key, None) or _Place()
            self._places[key] = place  # what was asked for latest comes last
            while len(self._places) > MOST:
                self._places.pop(next(iter(self._places)))
            return place


def _reckon(place: _Place, reckon: Callable[[], Any], least_seconds: float) -> None:
    began = thread_time()
    place.value = reckon()
    took = thread_time() - began
    place.until = monotonic() + (took / SHARE if took > QUICK_SECONDS else least_seconds)


def _reckon_beside(place: _Place, reckon: Callable[[], Any]) -> None:
    try:
        _reckon(place, reckon, SOON_SECONDS)
    finally:
        place.lock.release()
