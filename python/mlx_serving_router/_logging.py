"""What a process of the command line logs, on standard error: lines for people, or JSON objects for programs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final

# What every record has; whatever else is there was given as `extra`.
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(settings: dict[str, Any], *, name: str, debug: bool = False) -> None:
    """Sets up the logging of this process.

    Args:
        settings: `logging` of the configuration.
        name: What the process is, for lines of several processes in one terminal.
        debug: Logs everything of this package, whatever the settings say.
    """
    handler = logging.StreamHandler(sys.stderr)
    if settings["format"] == "json":
        handler.setFormatter(_JsonFormatter(name))
    else:
        handler.setFormatter(_TextFormatter(name))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = "debug" if debug else settings["level"]
    logging.getLogger("mlx_serving_router").setLevel(level.upper())


class _TextFormatter(logging.Formatter):
    """One line, with what was given as `extra` behind the message."""

    def __init__(self, name: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {name}: %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 logging's name
        return " ".join(
            [super().formatMessage(record), *(f"{key}={value}" for key, value in _extra(record).items())]
        )


class _JsonFormatter(logging.Formatter):
    """One object a line, with what was given as `extra` beside the message."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        content = _extra(record) | {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
