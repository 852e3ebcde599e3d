"""Grammars that would never be compiled are refused in time, and nothing is lost by it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.inference.test_constraints import byte_tokenizer

from craton.errors import UsageError
from craton.inference import grammar_check
from craton.inference.constraints import make_constraint
from craton.inference.grammar_check import GrammarCheck
from craton.inference.settings import SamplingSettings

library = pytest.importorskip("llguidance")

# A few kilobytes that llguidance's own limits let through, and that take minutes.
BOMB = {"type": "object", "properties": {f"p{i}": {"type": "integer", "multipleOf": 99991 - i} for i in range(200)}}


def grammar(schema: dict) -> str:
    return str(library.LLMatcher.grammar_from_json_schema(schema))


@pytest.fixture
def check() -> Iterator[GrammarCheck]:
    check = GrammarCheck(seconds=1.0)
    yield check
    check.close()


def test_a_bomb_is_refused_and_its_process_replaced(check):
    check.check("JSON schema", grammar({"type": "string"}))
    first = check._process
    with pytest.raises(UsageError, match="the JSON schema takes longer than 1 s to compile"):
        check.check("JSON schema", grammar(BOMB))
    assert first.returncode == -signal.SIGALRM
    check.check("JSON schema", grammar({"type": "integer"}))
    assert check._process is not first


def test_a_verdict_is_remembered(check, monkeypatch):
    with pytest.raises(UsageError):
        check.check("JSON schema", grammar(BOMB))
    check.check("JSON schema", grammar({"type": "integer"}))
    monkeypatch.setattr(check, "_compile", None)
    with pytest.raises(UsageError):
        check.check("schema", grammar(BOMB))
    check.check("JSON schema", grammar({"type": "integer"}))


def test_one_process_serves_all(check):
    for i in range(5):
        check.check("regex", f"start: /a{{{i + 1}}}/")
        if not i:
            first = check._process
    assert check._process is first
    first.kill()
    first.wait()
    check.check("regex", "start: /b/")  # that somebody ended it is no verdict


def test_what_ends_the_compiler_twice_is_refused(check, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UsageError, match=r"the grammar ends the process that compiles it \(status 1\)"):
        check.check("grammar", 'start: "a"')


def test_a_malformed_grammar_is_left_to_who_compiles_it_next(check):
    check.check("grammar", "start: (((")


def test_a_request_with_a_bomb_is_refused(check, monkeypatch):
    monkeypatch.setattr(grammar_check, "CHECK", check)
    with pytest.raises(UsageError, match="takes longer than 1 s") as refusal:
        make_constraint(SamplingSettings(json_schema=BOMB), byte_tokenizer())
    assert "simplify" in refusal.value.remedy


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("busy", [False, True])
def test_the_process_does_not_outlive_who_started_it(busy, tmp_path):
    told = tmp_path / "bomb.json"
    told.write_text(json.dumps(grammar(BOMB if busy else {"type": "string"})))
    program = (
        "import json, pathlib, sys, threading, time\n"
        "from craton.inference.grammar_check import GrammarCheck\n"
        "check = GrammarCheck(seconds=2.0)\n"
        f"order = ('form', json.loads(pathlib.Path({str(told)!r}).read_text()))\n"
        "threading.Thread(target=check.check, args=order, daemon=True).start()\n"
        "while check._process is None: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "print(check._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 30
    while _lives(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _lives(worker)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
