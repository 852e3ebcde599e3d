"""Servers as contenders: each is its own command, alone on the machine while it is measured."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import ContenderError

from contenders.weights import plain_folder
from contenders.worker import environment
from craton.checkpoints.checkpoint import Checkpoint

START_SECONDS = 180
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """A server that speaks OpenAI's protocol. command: without its port. model: what it calls its model. ready: a path
    that answers 200 once it serves. needs: the modules without which it is absent. setting: for the table."""

    command: Sequence[str]
    model: str
    ready: str
    needs: Sequence[str] = ()
    setting: str = ""

    @contextmanager
    def running(self, threads: int) -> Iterator[str]:
        """Start it, wait until it serves, and end it afterwards: its address. Raises ContenderError."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise ContenderError(f"not installed ({', '.join(missing)})")
        port = _free_port()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [*self.command, "--port", str(port)],
                stdout=output,
                stderr=output,
                env=environment() | {"OMP_NUM_THREADS": str(threads)},
            )
            try:
                url = f"http://127.0.0.1:{port}"
                if not _answers(url + self.ready, process):
                    output.seek(0)
                    lines = output.read().decode(errors="replace").strip().splitlines()
                    raise ContenderError(f"did not start: {lines[-1] if lines else 'it printed nothing'}")
                yield url
            finally:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def craton(name: str, threads: int) -> Server:
    """`craton serve` as a user starts it, with places for all clients."""
    code = "from craton.cli import main; main()"
    flags = ["--threads", str(threads), "--concurrency", "64"]
    return Server([sys.executable, "-c", code, "serve", name, *flags], name, "/ready", setting="4-bit")


def llama_cpp(published: Path, threads: int) -> Server:
    """llama-cpp-python's server on the same file. It answers one request at a time; without the flag, a new one would
    end the one before it."""
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(published), "--host", "127.0.0.1"]
    command += ["--n_ctx", "8192", "--n_threads", str(threads), "--n_threads_batch", str(threads)]
    needs = ("llama_cpp", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
    return Server([*command, "--interrupt_requests", "False"], "model", "/v1/models", needs, "4-bit")


def transformers(published: Path, folder: Path) -> Server:
    """`transformers serve` with continuous batching on the same weights in bfloat16; packed weights it has none."""
    target = plain_folder(published, folder)
    tokenizer = Checkpoint.open(published).tokenizer()
    (target / "chat_template.jinja").write_text(tokenizer.chat_template or "", encoding="utf-8")
    ends = {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.eos_ids[0]}
    (target / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    program = shutil.which("transformers", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    command = [program or "transformers", "serve", str(target), "--continuous-batching"]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "bfloat16"]
    return Server(command, str(target), "/health", ("transformers", "fastapi", "uvicorn", "openai"), "bf16")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False
