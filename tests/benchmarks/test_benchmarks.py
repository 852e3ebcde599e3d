"""The benchmarks' own machinery: ratios, rounds, documents, tables, the README's markers, and a short real run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from craton.errors import UsageError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # benchmarks are programs in a folder, not a package

import decode  # noqa: E402
import harness  # noqa: E402
import run_all  # noqa: E402
from contenders import worker  # noqa: E402

MACHINE = {"cpu": "Test CPU", "isa": ["avx2"], "cores": 2, "memory_gb": 8.0, "load_at_start": 0.1} | {
    "versions": {"craton": "0.1.0", "peer": None}
}


@pytest.fixture
def document() -> harness.Document:
    """Two thread counts of one case, and one case of seconds with an absent peer."""
    return {
        "machine": MACHINE,
        "cases": {
            "decode/q4_0/batch=1/threads=1": harness.case(
                30, {"slow": 10, "fast": 60}, "tokens/s", settings={"slow": "bf16"}
            ),
            "decode/q4_0/batch=1/threads=2": harness.case(50, {"slow": 20, "fast": 100}, "tokens/s", limit=200),
            "start": harness.case(0.5, {"slow": 2.0}, "s", less_is_better=True, absent={"fast": "not installed"}),
        },
    }


def test_a_ratio_above_one_means_that_we_are_better() -> None:
    assert harness.case(30, {"peer": 10}, "tokens/s")["ratio"] == {"peer": 3.0}
    assert harness.case(30, {"peer": 10}, "MB", less_is_better=True)["ratio"] == {"peer": 0.3333}


def test_a_case_stands_against_its_limit_and_has_none_where_none_is_known() -> None:
    assert harness.case(50, {}, "tokens/s", limit=200)["of_limit"] == 0.25
    assert "limit" not in harness.case(50, {}, "tokens/s")


def test_the_document_has_the_agreed_shape(document: harness.Document, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    harness.report(document, path)
    read = json.loads(path.read_text())
    assert set(read) == {"machine", "cases"}
    assert read["cases"]["decode/q4_0/batch=1/threads=2"] == {
        "ours": 50,
        "peers": {"slow": 20, "fast": 100},
        "ratio": {"slow": 2.5, "fast": 0.5},
        "unit": "tokens/s",
        "limit": 200,
        "of_limit": 0.25,
    }


def test_rounds_interleave_and_give_medians() -> None:
    order: list[str] = []

    def turn(name: str, figures: Iterator[float]) -> float:
        order.append(name)
        return next(figures)

    a, b = iter([1.0, 9.0, 2.0]), iter([5.0, 4.0, 100.0])
    medians, failed = harness.interleave({"A": lambda: turn("A", a), "B": lambda: turn("B", b)}, rounds=3)
    assert order == ["A", "B"] * 3
    assert medians == {"A": 2.0, "B": 5.0}
    assert not failed


def test_a_contender_that_fails_leaves_with_its_reason_and_the_others_go_on() -> None:
    turns = iter([1.0])

    def fails_in_the_second_round() -> float:
        for value in turns:
            return value
        raise harness.ContenderError("out of memory")

    medians, failed = harness.interleave({"A": fails_in_the_second_round, "B": lambda: 7.0}, rounds=4)
    assert medians == {"B": 7.0}
    assert failed == {"A": "out of memory"}


def test_the_machine_is_described_and_a_missing_package_has_no_version() -> None:
    facts = harness.machine(["torch", "no-such-package"])
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["versions"]["torch"]
    assert facts["versions"]["no-such-package"] is None


def test_bandwidth_is_bytes_per_second() -> None:
    assert 1e8 < harness.read_bandwidth(1 << 22, threads=2, passes=3) < 1e13


def test_the_table_for_people_names_the_absent(document: harness.Document) -> None:
    out = io.StringIO()
    harness.show(document, Console(file=out, width=200))
    text = out.getvalue()
    assert "10 bf16" in text
    assert "fast: not installed" in text
    assert "Test CPU, 2 cores, load 0.1 at the start" in text


def test_the_table_of_the_readme(document: harness.Document) -> None:
    lines = run_all.render_table(document).splitlines()
    assert lines[0] == "| case | unit | Craton | slow | fast | vs slow | vs fast |"
    assert lines[2] == (
        "| decode/q4_0/batch=1 | tokens/s | 30 / 50 | 10 bf16 / 20 | 60 / 100 | 3x / 2.5x | 0.5x / 0.5x |"
    )
    assert lines[3] == "| start | s | 0.5 | 2 | absent | 4x | - |"
    assert lines[4] == ""
    assert "Test CPU (avx2), 2 cores, 8.0 GB; craton 0.1.0." in lines[5]
    assert "with 1 / 2 threads" in lines[5]
    assert "fast is absent: not installed." in lines[5]
    assert len(lines) == 6


def test_the_table_replaces_what_stands_between_its_markers(document: harness.Document, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark:decode -->\nold\n<!-- /benchmark:decode -->\nafter\n")
    for _ in range(2):  # a second time changes nothing
        run_all.update(readme, "decode", document)
        assert readme.read_text() == (
            f"before\n<!-- benchmark:decode -->\n{run_all.render_table(document)}\n<!-- /benchmark:decode -->\nafter\n"
        )


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- benchmark:decode -->",
        "<!-- /benchmark:decode --> <!-- benchmark:decode -->",
        "<!-- benchmark:decode --> <!-- /benchmark:decode --> <!-- benchmark:decode --> <!-- /benchmark:decode -->",
    ],
)
def test_a_readme_without_clear_markers_is_refused_and_left_alone(
    text: str, document: harness.Document, tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(UsageError, match="no place for the table of decode"):
        run_all.update(readme, "decode", document)
    assert readme.read_text() == text


def test_markers_are_checked_before_the_benchmarks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(*_: Any, **__: Any) -> None:
        raise AssertionError("a benchmark ran")

    monkeypatch.setattr(run_all, "TABLES", tmp_path / "benchmarks.md")
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    monkeypatch.setattr(subprocess, "run", runs)
    assert run_all.main() == 2
    assert "benchmarks.md" in capsys.readouterr().err


def test_every_benchmark_has_its_place_and_the_readme_says_what_the_tables_say() -> None:
    tables = run_all.read(run_all.TABLES)
    for path in run_all.HERE.glob("*.py"):
        if path.stem not in run_all.NOT_BENCHMARKS:
            run_all.between(tables, path.stem)
    assert run_all.render_summary(tables) in run_all.read(run_all.README)


def test_the_summary_takes_rows_from_the_tables(monkeypatch: pytest.MonkeyPatch, document: harness.Document) -> None:
    tables = f"<!-- benchmark:decode -->\n{run_all.render_table(document)}\n<!-- /benchmark:decode -->"
    monkeypatch.setattr(run_all, "SUMMARY", (("starting", "decode", "start", "slow"),))
    assert run_all.render_summary(tables).splitlines()[-1] == "| starting | s | 0.5 | slow | 2 | 4x |"
    monkeypatch.setattr(run_all, "SUMMARY", (("starting", "decode", "start", "nobody"),))
    with pytest.raises(UsageError, match="nobody"):
        run_all.render_summary(tables)


FAKE = """
import os, sys
from contenders.worker import serve

class Fake:
    def __init__(self, fails=None):
        if fails == "import":
            import no_such_package
        if fails == "kill":
            print("Illegal instruction", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        self.facts = {"setting": "fake"}

    def use_threads(self, threads):
        print("noise on standard output")

    def read(self, prompts):
        self.prompts = prompts

    def rewind(self):
        pass

    def step(self):
        if len(self.prompts) > 2:
            raise ValueError("too\\nmany")

serve(Fake)
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that costs nothing, to be started as `contenders.fake`."""
    package = tmp_path / "contenders"
    package.mkdir()
    for path in [*(BENCHMARKS / "contenders").glob("*.py"), BENCHMARKS / "harness.py"]:
        (package if path.parent.name == "contenders" else tmp_path).joinpath(path.name).symlink_to(path)
    (package / "fake.py").write_text(FAKE)
    monkeypatch.setattr(worker, "BENCHMARKS", tmp_path)


@pytest.mark.usefixtures("fakes")
def test_a_worker_times_its_contender_in_another_process() -> None:
    with worker.Worker("fake") as fake:
        assert fake.facts() == {"setting": "fake"}
        assert fake.ask("read", threads=1, batch=2, length=8) > 0
        assert fake.ask("decode", steps=3) > 0
        assert fake.ask("memory", threads=1) > 1
        fake.ask("read", threads=1, batch=3, length=8)
        with pytest.raises(harness.ContenderError, match="ValueError: too many"):
            fake.ask("decode", steps=3)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("fails", "reason"),
    [("import", "not installed .*no_such_package"), ("kill", "ended with status -9: Illegal instruction")],
)
def test_a_contender_that_cannot_start_says_why(fails: str, reason: str) -> None:
    with worker.Worker("fake", fails=fails) as fake, pytest.raises(harness.ContenderError, match=reason):
        fake.facts()


class StubWorker:
    """Answers every question with one figure, or fails when it is asked (or, with "load", at once)."""

    def __init__(self, figure: float | str) -> None:
        self.figure = figure

    def facts(self) -> dict[str, Any]:
        if self.figure == "load":
            raise harness.ContenderError("does not load")
        return {"setting": f"set {self.figure}"}

    def ask(self, what: str, **_: int) -> float:
        if isinstance(self.figure, str):
            raise harness.ContenderError(f"cannot {what}")
        return self.figure


def race(**figures: float | str) -> decode.Race:
    keys = {
        "ours": ("Craton", "q4_0"),
        "bf16": ("transformers", "bfloat16"),
        "fp32": ("transformers", "float32"),
        "llama": ("llama.cpp", "q4_0"),
        "other": ("llama.cpp", "q8_0"),
    }
    return decode.Race({keys[name]: StubWorker(figure) for name, figure in figures.items()})  # type: ignore[misc]


def test_transformers_stands_with_its_better_dtype() -> None:
    entrants = race(ours=30.0, bf16=10.0, fp32=12.0, llama=40.0, other=99.0)
    figures = entrants.run("decode", 1, steps=1)
    fast = entrants.case(figures, "q4_0", "tokens/s")
    assert fast["peers"] == {"transformers": 12.0, "llama.cpp": 40.0}
    assert fast["settings"]["transformers"] == "set 12.0"
    small = entrants.case(figures, "q4_0", "MB", less_is_better=True)
    assert small["peers"]["transformers"] == 10.0
    assert "absent" not in fast


def test_a_peer_that_fails_is_named_with_its_reason_and_stays_out() -> None:
    entrants = race(ours=30.0, bf16="load", fp32=12.0, llama="breaks", other="load")
    one = entrants.case(entrants.run("decode", 2, steps=1), "q4_0", "tokens/s")
    assert one["peers"] == {"transformers": 12.0}
    assert one["absent"] == {"llama.cpp": "cannot decode"}
    assert ("llama.cpp", "q4_0") not in entrants.run("read", 1)


@pytest.mark.parametrize("figure", ["load", "breaks"])
def test_without_craton_there_is_no_race(figure: str) -> None:
    with pytest.raises(harness.ContenderError, match="Craton q4_0"):
        race(ours=figure, bf16=10.0).run("decode", 1)


def test_the_time_to_the_first_output_is_not_that_to_the_last() -> None:
    program = "print('first', flush=True); import time; time.sleep(30)"
    assert 0 < decode.seconds_to_first_output([sys.executable, "-c", program]) < 20
    with pytest.raises(harness.ContenderError, match="no such thing"):
        decode.seconds_to_first_output([sys.executable, "-c", "raise SystemExit('no such thing')"])


@pytest.mark.slow
@pytest.mark.peer
def test_a_quick_run_measures_every_contender(smollm2_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "decode.py"), "--quick", "--json", str(path)]
    subprocess.run([*command, "--model", str(smollm2_gguf)], check=True)
    cases = json.loads(path.read_text())["cases"]
    assert "decode/bf16/batch=8/threads=2/prompt=32" in cases
    for name, one in cases.items():
        assert one["ours"] > 0, name
        assert one["peers"]["transformers"] > 0, name
        assert one["ratio"]["transformers"] == pytest.approx(one["ours"] / one["peers"]["transformers"], rel=1e-2), name
        assert "llama.cpp" in one["peers"] | one.get("absent", {}), name
