"""Whether an attempt has been silent, or has run, for longer than its limits allow."""

from dataclasses import dataclass, field
from datetime import datetime

from orchestrator.launcher import Ending, Update
from orchestrator.lifecycle import Cause, Outcome
from worker.spec import LimitsConfig

LOOK_SECONDS = 30.0
"""The most that one look adds to a silence: while this machine slept, or the database was away, nobody looked."""


@dataclass
class Watch:
    """One attempt under its limits, since it began. Its silence counts from the first look on."""

    limits: LimitsConfig
    began_at: datetime
    silent_seconds: float = 0.0
    _looked_at: datetime = field(init=False)
    _said: tuple[str, int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._looked_at = self.began_at

    def look(self, update: Update, now: datetime) -> Ending | None:
        """The ending of an attempt that has outlived its limits by `now`, given the latest that its gang says.

        While it waits for another on its gang, it has not begun.
        """
        if update.phase == "queue":
            self._looked_at = now
            return None
        passed = (now - self._looked_at).total_seconds()
        self._looked_at = now
        said = (update.phase, update.beats)
        self.silent_seconds = 0.0 if said != self._said else self.silent_seconds + min(max(passed, 0.0), LOOK_SECONDS)
        self._said = said
        patience = self.limits.patience_seconds if update.phase == "train" else self.limits.silence_seconds
        if self.silent_seconds >= patience:
            reason = f"no progress for {patience:g} s in phase {update.phase}"
            return Ending(Outcome.FAILED, reason, cause=Cause.HANG)
        limit = self.limits.attempt_seconds
        ran = (now - self.began_at).total_seconds() - update.seconds.get("queue", 0.0)
        if limit is not None and ran >= limit:
            return Ending(Outcome.FAILED, f"not finished after {limit:g} s", cause=Cause.LIMIT)
        return None
