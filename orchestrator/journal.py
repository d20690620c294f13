"""What a program of Caddie logs: one line an entry, whatever text of somebody else's is in it."""

import logging
import re
from types import TracebackType

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class Journal(logging.Formatter):
    """Escapes control characters, so that no text can pass for an entry of its own, or reach a terminal as a command.
    The lines of a traceback are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.message.rstrip())
        return super().formatMessage(record)

    def formatException(self, ei: _ExcInfo) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {escaped(line)}" for line in lines)


def escaped(text: str) -> str:
    """The text without a control character: `\\n` for a line's end."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def write_journal(level: int) -> None:
    """Log to standard error from now on, entries of this level and above."""
    handler = logging.StreamHandler()
    handler.setFormatter(Journal())
    logging.basicConfig(level=level, handlers=[handler])
