"""Grammars from strangers: compiled first in a process that can be killed, under a deadline."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from hashlib import blake2b

from craton.errors import UsageError

# How long a grammar may take to compile. A schema of 5000 properties takes half of it; there are schemas of 3 kB that
# would take minutes (many numbers with a large `multipleOf`).
SECONDS = 5.0

# Grammars whose verdict is remembered, so that none is compiled there twice, and none that is too slow even twice.
KEPT_VERDICTS = 4096


class GrammarCheck:
    """Says of a grammar whether it compiles in time, by letting another process do it. That process is started for the
    first grammar, serves all others, and is replaced when it was killed. It is told grammars as JSON and answers so."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()  # why a grammar is refused, or ""

    def check(self, kind: str, grammar: str) -> None:
        """Raises UsageError for a grammar that takes too long to compile, or that ends whoever compiles it. kind: what
        the error calls it."""
        digest = blake2b(grammar.encode()).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            with self._lock:
                verdict = self._verdicts.get(digest)
                if verdict is None:
                    verdict = self._verdicts[digest] = self._compile(grammar)
                    if len(self._verdicts) > KEPT_VERDICTS:
                        self._verdicts.popitem(last=False)
        if verdict:
            raise UsageError(f"the {kind} {verdict}", remedy="simplify it: fewer or smaller repeats, bounds and parts")

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _compile(self, grammar: str) -> str:
        for _ in range(2):  # a process that something else has ended is no verdict
            process = self._start()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps({"grammar": grammar, "seconds": self._seconds}) + "\n")
                process.stdin.flush()
                if process.stdout.readline():
                    return ""
            except BrokenPipeError:
                pass
            except BaseException:
                self.close()  # its answer would be taken for that to the next order
                raise
            status = process.wait()
            if status == -signal.SIGALRM:
                return f"takes longer than {self._seconds:g} s to compile"
        return f"ends the process that compiles it (status {status})"

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            atexit.unregister(self.close)
            self.close()
            command = [sys.executable, "-P", "-m", "craton.inference.grammar_worker"]
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            try:
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True)
            except OSError as error:
                raise UsageError(f"the process that compiles grammars cannot be started: {error}") from None
            atexit.register(self.close)
        return self._process


CHECK = GrammarCheck()
