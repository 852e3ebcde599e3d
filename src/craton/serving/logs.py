"""Structured logs: one JSON object a line on standard error. Prompts and answers only where asked for."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any


class JsonLines(logging.Formatter):
    """A log record as one line of JSON. A line break in a value cannot begin another line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def start_logging() -> None:
    """Send the server's and uvicorn's records to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("craton", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def event(name: str, **facts: Any) -> None:
    """Log something that happened, with its facts as fields."""
    logging.getLogger("craton.serving").info(name, extra={"facts": facts})


def fault(name: str, error: BaseException, **facts: Any) -> None:
    """Log a fault of ours with its traceback."""
    logging.getLogger("craton.serving").error(name, exc_info=error, extra={"facts": facts})
