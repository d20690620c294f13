"""How an attempt ended, from what each of its ranks said and which of them died."""

import logging
from collections.abc import Mapping, Sequence

from orchestrator.launcher import Ending
from orchestrator.lifecycle import Cause, Outcome
from worker.mailbox import Mail

log = logging.getLogger(__name__)

REASONS = {"succeeded": "trained to the end of its budget", "stopped": "ended early, as asked"}


def ending_of(attempt_id: int, mails: Sequence[Mail], deaths: Mapping[int, str]) -> Ending | None:
    """The attempt's ending, or None while it goes on. `mails` is by rank; `deaths` says what became of ended processes.

    A rank that died without a closing is the cause, since its death makes its peers' collectives fail; next comes the
    lowest rank that failed; then one that declined to begin; else the attempt has ended once every rank has, with
    rank 0's result.
    """
    for rank in sorted(deaths):
        if mails[rank].closing is None:
            return Ending(Outcome.FAILED, f"rank {rank} {deaths[rank]}", cause=Cause.CRASH)
    closings = [mail.closing for mail in mails]
    for rank, closing in enumerate(closings):
        if closing is not None and closing.outcome == "failed":
            log.warning("attempt %d failed on rank %d:\n%s", attempt_id, rank, closing.traceback)
            cause = Cause(closing.cause or Cause.ERROR)
            alone = len(mails) == 1 or cause is Cause.BAD_INPUT  # which any rank would have found
            reason = closing.reason if alone else f"rank {rank}: {closing.reason}"
            return Ending(Outcome.FAILED, reason, cause=cause, traceback=closing.traceback)
    for closing in closings:
        if closing is not None and closing.outcome == "declined":
            return Ending(Outcome.PREEMPTED, f"its gang is replaced: {closing.reason}")
    lead = closings[0]
    if lead is None or any(closing is None for closing in closings):
        return None
    return Ending(Outcome(lead.outcome), REASONS[lead.outcome], lead.result)


def lost(attempt_id: int) -> Ending:
    """The ending of an attempt that a launcher does not know."""
    return Ending(Outcome.LOST, f"this launcher runs no attempt {attempt_id}")
