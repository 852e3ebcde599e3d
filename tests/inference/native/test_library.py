"""Finding the compiled library, and what is said when there is none."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from craton.errors import UnknownName, UsageError
from craton.inference import native
from craton.inference.native import library


def test_without_a_library_the_reason_is_one_line(tmp_path, monkeypatch):
    found, reason = library.load(tmp_path)
    assert found is None
    assert "not built" in reason
    assert "\n" not in reason

    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "_reason", reason)
    assert not native.available()
    assert native.reason() == reason
    with pytest.raises(UsageError, match="not available") as caught:
        native.isa()
    assert caught.value.remedy == reason


def test_a_file_that_is_no_library_is_named(tmp_path):
    (tmp_path / "_kernels.so").write_bytes(b"not a library")
    found, reason = library.load(tmp_path)
    assert found is None
    assert reason.startswith("_kernels.so cannot be loaded")


def test_a_library_of_another_version_is_refused(tmp_path):
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    (tmp_path / "old.c").write_text("int craton_abi_version(void) { return 0; }")
    subprocess.run([compiler, "-shared", "-fPIC", "old.c", "-o", "_kernels.so"], cwd=tmp_path, check=True)
    found, reason = library.load(tmp_path)
    assert found is None
    assert "version 0" in reason


@pytest.mark.usefixtures("kernels")
def test_the_instruction_set_has_a_name():
    assert native.isa() in library.ISAS
    assert native.reason() == ""
    with pytest.raises(UnknownName, match="avx1024"):
        library.select_isa("avx1024")
