"""What is kept: reckoned by one for many, given for a while, and never waited for where it need not be."""

import threading
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, thread_time

from api.kept import MOST, QUICK_SECONDS, Kept


def long_reckoning() -> float:
    """Takes longer than what is quick, of a processor."""
    began = thread_time()
    while thread_time() - began < 3 * QUICK_SECONDS:
        pass
    return monotonic()


def test_of_many_who_ask_at_once_one_reckons() -> None:
    kept, asked = Kept(), 0

    def reckon() -> float:
        nonlocal asked
        asked += 1
        return long_reckoning()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kept.get("key", reckon), range(8)))
    assert asked == 1
    assert len({answer.value for answer in found}) == 1
    assert sorted(answer.seconds_left > 0 for answer in found) == [False, *[True] * 7]


def test_what_is_quick_is_reckoned_whenever_it_is_asked_for() -> None:
    kept, values = Kept(), iter(range(3))
    assert [kept.get("key", lambda: next(values)).value for _ in range(3)] == [0, 1, 2]


def test_nobody_waits_for_what_a_thread_reckons() -> None:
    kept, go = Kept(), threading.Event()

    def reckon() -> str:
        assert go.wait(30)
        return "reckoned"

    answer = kept.get_soon("key", reckon)
    assert (answer.value, answer.seconds_left > 0) == (None, True)
    assert kept.get_soon("key", reckon).value is None
    go.set()
    assert kept.get("key", reckon).value == "reckoned"  # which waits
    assert kept.get_soon("key", reckon).value == "reckoned"


def test_a_reckoning_that_fails_is_tried_again() -> None:
    kept = Kept()
    for _ in range(2):
        try:
            kept.get("key", lambda: 1 // 0)
        except ZeroDivisionError:
            continue
    assert kept.get("key", lambda: 1).value == 1


def test_so_many_are_kept_and_no_more() -> None:
    kept = Kept()
    first = kept.get("first", long_reckoning).value
    for key in range(MOST - 1):
        kept.get(key, lambda: 0)
        assert kept.get("first", lambda: 0.0).value == first  # asked for latest
    for key in range(MOST):
        kept.get(-key, lambda: 0)
    assert kept.get("first", lambda: 0.0).value == 0.0
