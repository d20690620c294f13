"""Refused operations. Bad input is a ValueError (worker.shape.FieldError, worker.spec.InvalidSpec) instead.

CaddieError
├── NotFound            a study, trial or run that does not exist
├── Conflict            what exists forbids it: a taken name, a duplicate spec, a reused idempotency key
├── IllegalMove         the state does not allow it: cancelling a finished trial, resuming a stopped study
├── OverBudget          the study's budget does not allow the run to start
└── LeaseLost           the attempt is no longer ours to write
"""


class CaddieError(Exception):
    """An operation that was refused. Nothing was changed."""


class NotFound(CaddieError):
    """`kind` and `key` say what was looked for, and `within` where."""

    def __init__(self, kind: str, key: object, within: str = "") -> None:
        super().__init__(f"no {kind} {key!r}{within and f' in {within}'}")
        self.kind = kind
        self.key = key


class Conflict(CaddieError):
    """`field` and `value` say what clashes with something that exists; `existing` names that."""

    def __init__(self, field: str, value: object, message: str, existing: str | None = None) -> None:
        super().__init__(f"{field}: {message} (got {value!r})")
        self.field = field
        self.value = value
        self.message = message
        self.existing = existing


class IllegalMove(CaddieError):
    """The thing is in a state from which the move is not allowed; `allowed` are the states from which it is."""

    def __init__(self, thing: str, state: str, move: str, allowed: tuple[str, ...]) -> None:
        super().__init__(f"{thing} is {state} and cannot {move}; only one that is {' or '.join(allowed)} can")
        self.thing = thing
        self.state = state
        self.move = move
        self.allowed = allowed


class OverBudget(CaddieError):
    """What is left of the study's budget does not allow its next run. `final`: nothing of the study runs any more, so
    that no more can be left."""

    def __init__(self, study_id: int, message: str, final: bool) -> None:
        super().__init__(message)
        self.study_id = study_id
        self.final = final


class LeaseLost(CaddieError):
    """The attempt's lease expired, was taken, or was ended by a cancel. Stop the gang; do not retry."""

    def __init__(self, attempt_id: int) -> None:
        super().__init__(f"the lease on attempt {attempt_id} is lost")
        self.attempt_id = attempt_id
