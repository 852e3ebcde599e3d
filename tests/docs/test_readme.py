"""Every command that the README shows runs, and prints what the README says it prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from craton.inference import native

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def transcript() -> list[tuple[str, list[str], list[str]]]:
    """(command, lines typed into it, lines shown) of the README's console block."""
    block = re.search(r"<!-- transcript -->\n```console\n(.*?)```", README, re.DOTALL)
    assert block, "the README has no transcript"
    steps: list[tuple[str, list[str], list[str]]] = []
    for line in block[1].splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], [], []))
        elif line.startswith("› "):
            steps[-1][1].append(line[2:])
        else:
            steps[-1][2].append(line)
    return steps


@pytest.mark.parametrize(("command", "typed", "shown"), transcript(), ids=lambda value: str(value)[:40])
def test_a_command_of_the_readme(command, typed, shown, smollm2_gguf, minilm_folder, tmp_path):
    program = f"{shlex.quote(sys.executable)} -m craton.cli"
    line = re.sub(r"\bcraton\b(?= [a-z])", lambda _: program, command.replace("/tmp/", f"{tmp_path}/"))
    done = subprocess.run(
        ["bash", "-c", line], input="\n".join(typed), capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    if shown and native.available():  # without the kernels bfloat16 answers, perhaps in other words
        assert done.stdout.splitlines() == shown
    else:
        assert done.stdout + done.stderr


def test_the_python_of_the_readme(smollm2_gguf, minilm_folder):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "torch.Size([2, 384])" in done.stdout


def test_the_readme_s_two_commands_are_targets_and_the_gate_runs_the_second():
    root = Path(__file__).parents[2]
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)
    assert "make test" in (root / ".ci" / "run").read_text()
