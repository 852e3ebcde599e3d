"""The kernels under the address, undefined-behaviour and thread sanitisers, compiled from the same sources."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from craton.inference import native

CPP = Path(native.__file__).parent / "cpp"
DRIVER = Path(__file__).parent / "driver.cpp"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_no_sanitizer_complains(tmp_path, sanitizers):
    compiler = os.environ.get("CXX") or shutil.which("c++") or pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command += [
        "-Wno-error=maybe-uninitialized",
        "-Wno-error=uninitialized",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        f"-I{CPP}",
    ]
    program = tmp_path / "driver"
    sources = [str(path) for path in (*sorted(CPP.glob("*.cpp")), DRIVER)]
    built = subprocess.run([*command, *sources, "-o", str(program)], capture_output=True, text=True, check=False)
    if built.returncode != 0 and "cannot find" in built.stderr:
        pytest.skip(f"this compiler lacks the {sanitizers} run-time library")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
