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

Value = TypeVar("Value")


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """A value, and in how many seconds asking again would reckon it anew: 0 where it is as of now."""

    value: Value
    seconds_left: float


@dataclass
class _Place:
    lock: threading.Lock = field(default_factory=threading.Lock)
    value: Any = None
    until: float = 0.0


class Kept:
    """Values by key. Of many who ask for one at the same time, one reckons it, and the others wait for that."""

    def __init__(self) -> None:
        self._lock, self._places = threading.Lock(), dict[Hashable, _Place]()

    def get(self, key: Hashable, reckon: Callable[[], Value]) -> Answer[Value]:
        """The value of this key. One that took t seconds is given for t / SHARE seconds; MOST at a time."""
        with self._lock:
            place = self._places.pop(key, None) or _Place()
            self._places[key] = place
            while len(self._places) > MOST:
                self._places.pop(next(iter(self._places)))
        with place.lock:
            if (left := place.until - monotonic()) > 0:
                return Answer(place.value, left)
            began = thread_time()
            place.value = reckon()
            took = thread_time() - began
            place.until = monotonic() + took / SHARE if took > QUICK_SECONDS else 0.0
            return Answer(place.value, 0.0)
