"""Runs on disk: readable after a kill at any moment, written by one process at a time, found by what a user types."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from craton import __version__
from craton.config import Settings
from craton.errors import StoreError, UnknownName, UsageError
from craton.store import environment as surroundings
from craton.store.environment import environment, process_start
from craton.store.manifest import Parent
from craton.store.run_files import TAIL_BYTES, append_row, read_last_rows, read_rows
from craton.store.runs import Run, damaged_runs, list_runs, remove_run


class Training(Settings):
    steps: int = Field(10, description="how many")
    data: str = Field("متن", description="what")


def create(name: str | None = None, kind: str = "pretrain") -> Run:
    return Run.create(kind, config=Training(), provenance={"steps": "default", "data": "--data"}, name=name)


@pytest.fixture
def run() -> Run:
    return create()


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A process with `run` opened from its first argument."""
    program = f"import os, signal, sys, time\nfrom craton.store.runs import Run\nrun = Run.open(sys.argv[1])\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLD = "with run.lock():\n    run.log_metrics(1, {'loss': 2.0})\n    print('running', flush=True)\n    sys.stdin.read()"


# --- what is kept -------------------------------------------------------------------------------------------------


def test_a_run_from_beginning_to_end(craton_home: Path) -> None:
    base = Parent(relation="base", name="other@v1")
    run = Run.create("finetune", config=Training(steps=3), provenance={"steps": "--steps"}, parents=(base,), name="مدل")
    assert (run.status, run.seconds, run.is_alive()) == ("queued", 0.0, False)
    assert run.folder == craton_home / "runs" / run.id
    assert run.checkpoints_folder.is_dir()
    with run.lock():
        assert run.status == "running"
        assert run.is_alive()
        run.set_total_steps(3)
        for step in range(1, 4):
            run.log_metrics(step, {"loss": 1 / step, "tokens": 7 * step})
        run.event("checkpoint", step=3)
        run.log("step 3\nسلام")
        run.finish("done", {"model": "mine@v1", "metrics": {"accuracy": 0.5}})
    again = Run.open(run.id)
    assert again.record == run.record
    assert (again.status, again.kind, again.name, again.record.parents) == ("done", "finetune", "مدل", (base,))
    assert again.record.result == {"model": "mine@v1", "metrics": {"accuracy": 0.5}}
    assert again.record.total_steps == 3
    assert 0 < again.seconds < 10
    assert again.config() == {"steps": 3, "data": "متن"}
    assert again.settings() == {"steps": (3, "--steps"), "data": ("متن", "default")}
    assert [(row["step"], row["loss"], row["tokens"]) for row in again.metrics()] == [
        (1, 1, 7),
        (2, 0.5, 14),
        (3, 1 / 3, 21),
    ]
    assert [event["event"] for event in again.events()] == ["running", "checkpoint", "done"]
    assert again.log_lines(9) == ["step 3", "سلام"]
    assert not list((craton_home / "tmp").iterdir())


def test_the_surroundings_name_nobody(run: Run) -> None:
    facts = run.environment()
    assert facts == environment()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["torch"]
    assert facts["craton"] == __version__
    assert facts["threads"] >= 1
    import getpass
    import socket

    text = json.dumps(facts)
    for name in (getpass.getuser(), socket.gethostname(), str(Path.home())):
        assert name not in text


def test_the_command_is_kept_without_the_programs_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, command in (
        (["/usr/local/bin/craton", "pretrain", "--size", "30m"], ("craton", "pretrain", "--size", "30m")),
        (["/x/craton/cli/__main__.py", "runs"], ("craton", "runs")),
        (["/home/me/train.py", "1"], ("python", "train.py", "1")),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        assert create().record.command == command


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (KeyboardInterrupt(), "interrupted", "fault"),
        (SystemExit(143), "interrupted", "fault"),
        (ValueError("no"), "failed", "fault"),
        (StoreError("full", remedy="free some"), "failed", "store"),
    ],
)
def test_a_block_that_raises_says_how_it_ended(run: Run, error: BaseException, status: str, code: str) -> None:
    with pytest.raises(type(error)), run.lock():
        raise error
    again = Run.open(run.id)
    assert again.status == status
    assert again.record.result is not None
    assert again.record.result["error"]["code"] == code
    assert not again.is_alive()


def test_a_block_that_says_nothing_is_done(run: Run) -> None:
    with run.lock():
        pass
    assert Run.open(run.id).status == "done"


def test_an_error_after_the_end_does_not_change_it(run: Run) -> None:
    def work() -> None:
        with run.lock():
            run.finish("done", {"metrics": {}})
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        work()
    assert Run.open(run.id).status == "done"


def test_settings_by_dotted_key() -> None:
    config = {"optimiser": {"betas": [0.9, 0.95]}, "mixture": {"a": 1}, "adapter": None}
    origins = {"optimiser.betas": "default", "mixture": "--mixture", "adapter": "recipe.toml"}
    assert Run.create("finetune", config=config, provenance=origins).settings() == {
        "optimiser.betas": ([0.9, 0.95], "default"),
        "mixture": ({"a": 1}, "--mixture"),
        "adapter": (None, "recipe.toml"),
    }


# --- metrics ------------------------------------------------------------------------------------------------------


def rows(run: Run) -> list[tuple[int, Any]]:
    return [(row["step"], row.get("loss")) for row in run.metrics()]


def test_steps_of_a_resumed_part_supersede_older_ones(run: Run) -> None:
    for step in range(1, 6):
        run.log_metrics(step, {"loss": step})
    for step in range(4, 7):
        run.log_metrics(step, {"loss": 10 * step})
    assert rows(run) == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_after_a_rewind_later_steps_do_not_count(run: Run) -> None:
    for step in range(1, 6):
        run.log_metrics(step, {"loss": step})
    run.rewind(3)
    assert rows(run) == [(1, 1), (2, 2), (3, 3)]
    run.log_metrics(4, {"loss": 40})
    assert rows(run)[-1] == (4, 40)
    assert run.last_metrics()["step"] == 4


def test_numbers_of_one_step_come_together(run: Run) -> None:
    run.log_metrics(5, {"loss": 2.0})
    run.log_metrics(5, {"validation_loss": 2.5})
    run.log_metrics(6, {"loss": 1.5})
    assert [{key: value for key, value in row.items() if key != "time"} for row in run.metrics()] == [
        {"step": 5, "loss": 2.0, "validation_loss": 2.5},
        {"step": 6, "loss": 1.5},
    ]
    last = run.last_metrics()
    assert (last["step"], last["loss"], last["validation_loss"]) == (6, 1.5, 2.5)


def test_numbers_that_are_not_finite_are_strict_json(run: Run) -> None:
    run.log_metrics(1, {"loss": float("nan"), "gradient_norm": float("inf"), "tokens": 3})
    line = (run.folder / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert run.metrics()[0]["tokens"] == 3


def test_a_torn_line_is_skipped_and_never_glued_to_the_next(run: Run) -> None:
    run.log_metrics(1, {"loss": 1.0})
    path = run.folder / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert rows(run) == [(1, 1.0)]
        run.log_metrics(2, {"loss": 2.0})
        assert rows(run)[-1] == (2, 2.0)
        assert len(rows(run)) == 2
    path.write_bytes(whole + bytes(100))  # as some file systems leave it after a power cut
    assert rows(run) == [(1, 1.0)]


def test_a_line_is_one_write(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: writes.append(len(data)) or write(descriptor, data))
    run.log_metrics(1, {f"a{i}": 1.0 for i in range(1000)})
    assert len(writes) == 1


def test_a_full_disk_is_an_error_in_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log_metrics(1, {"loss": 1.0})
    write, room = os.write, [9, 0]

    def fill(descriptor: int, data: Any) -> int:
        if (left := room.pop(0)) == 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:left])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        with pytest.raises(StoreError, match=r"metrics\.jsonl: No space") as caught:
            run.log_metrics(2, {"loss": 2.0})
    assert "space" in str(caught.value.remedy)
    run.log_metrics(2, {"loss": 2.0})
    assert rows(run) == [(1, 1.0), (2, 2.0)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    written=st.lists(st.dictionaries(st.text(max_size=5), st.one_of(st.text(max_size=9), st.integers()), max_size=4)),
    cut=st.integers(0, 400),
    junk=st.binary(max_size=20),
)
def test_whatever_is_cut_off_or_added_whole_lines_survive(
    tmp_path: Path, written: list[dict[str, Any]], cut: int, junk: bytes
) -> None:
    path = tmp_path / "x.jsonl"
    path.unlink(missing_ok=True)
    for row in written:
        append_row(path, row)
    content = path.read_bytes() if written else b""
    kept = content[: max(0, len(content) - cut)]
    path.write_bytes(kept + junk.replace(b"\n", b""))
    whole = kept.count(b"\n")
    assert read_rows(path)[:whole] == written[:whole]
    append_row(path, {"last": 1})
    assert read_rows(path)[-1] == {"last": 1}
    assert read_rows(path)[:whole] == written[:whole]


def test_the_end_of_a_long_file_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_last_rows(path) == []
    for i in range(3000):
        append_row(path, {"step": i, "text": "متن" * 10})
    last = read_last_rows(path)
    assert path.stat().st_size > 2 * TAIL_BYTES
    assert [row["step"] for row in last] == list(range(3000 - len(last), 3000))
    assert 100 < len(last) < 2000


# --- finding ------------------------------------------------------------------------------------------------------


def test_by_id_beginning_name_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    runs = []
    for i, name in enumerate(("first", "same", "same", None)):
        monkeypatch.setattr(time, "time_ns", lambda i=i: now + i * 3600 * 10**9)
        runs.append(create(name))
    ids = [run.id for run in runs]
    assert [run.id for run in list_runs()] == ids
    assert Run.open("last").id == ids[3]
    assert Run.open("first").id == ids[0]
    assert Run.open("same").id == ids[2]
    for wanted in ids:
        assert Run.open(wanted).id == Run.open(wanted[:14]).id == Run.open(wanted.lower()[:16]).id == wanted
    with pytest.raises(UsageError, match="4 runs begin with '01'") as caught:
        Run.open("01")
    assert ids[3] in str(caught.value.remedy)


@pytest.mark.parametrize("text", ["", "frist", "../runs", "/", "01" + "Z" * 24, "*", "01\0", "x" * 300])
def test_unknown_runs_are_compared_with_known_ones(text: str) -> None:
    with pytest.raises(UnknownName, match="unknown run"):
        Run.open(text)
    create("first")
    with pytest.raises(UnknownName) as caught:
        Run.open(text)
    assert "first" in str(caught.value.remedy)


def test_a_typing_error_in_an_id_is_near_it(run: Run) -> None:
    for length in (8, 12, 26):
        wrong = run.id[: length - 3] + ("00" if run.id[length - 3] != "0" else "11") + run.id[length - 1]
        with pytest.raises(UnknownName) as caught:
            Run.open(wrong)
        assert run.id[:length] in str(caught.value.remedy)


def test_of_many_runs_the_newest_are_named() -> None:
    ids = sorted(create(f"n{i}").id for i in range(20))
    with pytest.raises(UnknownName) as caught:
        Run.open("zzzz")
    assert ids[-1][:8] in str(caught.value.remedy)
    assert len(str(caught.value.remedy)) < 120


def test_last_without_runs() -> None:
    assert list_runs() == damaged_runs() == []
    with pytest.raises(UnknownName):
        Run.open("last")


def test_a_damaged_run_hides_no_other(craton_home: Path) -> None:
    good, bad, moved, newer = create(), create(), create(), create()
    (bad.folder / "run.json").write_text("{")
    other = moved.folder.rename(moved.folder.with_name(moved.id[:-1] + ("0" if moved.id[-1] != "0" else "1")))
    record = json.loads((newer.folder / "run.json").read_text())
    (newer.folder / "run.json").write_text(json.dumps(record | {"schema": 2, "surplus": 1}))
    (craton_home / "runs" / "notes").mkdir()
    assert [run.id for run in list_runs()] == [good.id]
    assert sorted(str(error.where) for error in damaged_runs()) == sorted(
        [str(bad.folder / "run.json"), str(other), str(newer.folder / "run.json")]
    )
    with pytest.raises(StoreError, match="the run is damaged") as caught:
        Run.open(bad.id)
    assert caught.value.remedy == f"remove it: craton runs rm {bad.id}"
    with pytest.raises(StoreError, match="newer Craton"):
        Run.open(newer.id)
    assert remove_run(bad.id) == bad.id
    assert len(damaged_runs()) == 2


def test_damaged_settings_are_an_error_in_words(run: Run) -> None:
    (run.folder / "config.json").write_text("[1")
    with pytest.raises(StoreError, match=r"config\.json is damaged"):
        run.config()
    (run.folder / "provenance.json").unlink()
    with pytest.raises(StoreError, match=r"provenance\.json: No such file"):
        run.settings()


# --- processes ----------------------------------------------------------------------------------------------------


def test_one_process_at_a_time(run: Run) -> None:
    holder = child(HOLD, run.id)
    assert first_line(holder) == "running"
    with pytest.raises(UsageError, match="is at work"), run.lock():
        pass
    seen = Run.open(run.id)
    assert (seen.status, seen.is_alive()) == ("running", True)
    with pytest.raises(UsageError, match=f"process {holder.pid}"):
        remove_run(run.id)
    holder.communicate()
    assert Run.open(run.id).status == "done"
    with run.lock():
        pass


def test_a_killed_run_is_lost_and_can_be_taken_up_again(run: Run) -> None:
    holder = child(HOLD, run.id)
    assert first_line(holder) == "running"
    holder.kill()  # and not waited for: a zombie is no life
    deadline = time.monotonic() + 10
    while Run.open(run.id).is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    lost = Run.open(run.id)
    assert (lost.record.status, lost.status, lost.is_alive()) == ("running", "lost", False)
    assert lost.seconds < 10
    worked = lost.seconds
    with lost.lock():
        assert lost.status == "running"
        lost.rewind(0)
        lost.log_metrics(1, {"loss": 1.0})
    done = Run.open(run.id)
    assert done.status == "done"
    assert done.seconds >= worked
    assert rows(done) == [(1, 1.0)]
    assert [event["event"] for event in done.events()] == ["running", "running", "done"]
    holder.communicate()


def test_where_there_are_no_locks_a_living_process_is_respected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from craton.store import locks

    def no_locks(descriptor: int, wait: bool) -> None:
        raise OSError(38, "Function not implemented")

    holder = child(HOLD, run.id)
    assert first_line(holder) == "running"
    monkeypatch.setattr(locks, "_acquire", no_locks)
    with pytest.raises(UsageError, match=f"process {holder.pid}"), run.lock():
        pass
    holder.communicate()
    with run.lock():
        pass


def test_a_reused_process_number_is_not_life(run: Run) -> None:
    with run.lock():
        process = run.record.process
        assert process is not None
        assert process.start is not None
        assert process_start(process.pid) == process.start
        run.record = run.record.model_copy(update={"process": process.model_copy(update={"start": "before"})})
        assert not run.is_alive()


def test_processes_are_told_apart_without_proc() -> None:
    if shutil.which("ps") is None:
        pytest.skip("there is no ps here")
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    starts = [surroundings._start_from_ps(sleeper.pid) for _ in range(2)]
    assert starts[0] == starts[1] is not None
    sleeper.communicate(b"\n")
    assert surroundings._start_from_ps(sleeper.pid) is None
    assert process_start(sleeper.pid) is None


KILL_WHILE_LOGGING = """
with run.lock():
    print("running", flush=True)
    for step in range(1, 10**9):
        run.log_metrics(step, {"loss": 1 / step, "text": 0.123456789})
        if step % 50 == 0:
            run.event("checkpoint", step=step)
            run.set_total_steps(step)
"""


def test_kills_at_random_moments_while_logging(run: Run) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    logged = 0
    for _ in range(6):
        process = child(KILL_WHILE_LOGGING, run.id)
        assert first_line(process) == "running"
        time.sleep(chance.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        lost = Run.open(run.id)
        assert lost.status == "lost"
        steps = [row["step"] for row in lost.metrics()]
        assert steps == list(range(1, len(steps) + 1))
        logged += len(steps)
        assert damaged_runs() == []
        assert all(event["event"] in ("running", "checkpoint") for event in lost.events())
    assert logged > 6


WRITE_MANY = "for i in range(300):\n    run.log_metrics(int(sys.argv[2]) * 1000 + i, {'loss': 1.0, 'more': 'x' and 2})"


def test_lines_of_several_writers_do_not_mix(run: Run) -> None:
    for writer in [child(WRITE_MANY, run.id, str(number)) for number in range(3)]:
        writer.communicate()
        assert writer.returncode == 0
    # A writer that meets another's line half written begins with a line break of its own: an empty line, and no harm.
    lines = [line for line in (run.folder / "metrics.jsonl").read_bytes().splitlines() if line]
    assert len(lines) == 900
    assert len(run.metrics()) == 900


DIE_AT = """
import os, signal, sys
steps, die_at = 0, int(sys.argv[1])

def hook(event, arguments):
    global steps
    if event.partition(".")[0] in ("open", "os", "shutil", "fcntl"):
        steps += 1
        if steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

from craton.store.runs import Run
sys.addaudithook(hook)
before = steps
run = Run.create("pretrain", config={"a": 1}, provenance={})
with run.lock():
    run.log_metrics(1, {"loss": 1.0})
    run.finish("done", {"metrics": {}})
print(before, steps)
"""


def test_a_kill_at_any_call_leaves_a_readable_run_or_none() -> None:
    def go(die_at: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", DIE_AT, str(die_at)], capture_output=True, text=True)

    begin, end = map(int, go(0).stdout.split())
    assert end - begin > 30
    for die_at in range(begin + 2, end - 4, (end - begin) // 8):  # a second run makes fewer folders
        before = {run.id for run in list_runs()}
        assert go(die_at).returncode == -signal.SIGKILL
        assert damaged_runs() == []
        for run in list_runs():
            if run.id not in before:
                assert run.status in ("queued", "lost", "done")
                assert run.config() == {"a": 1}
                assert run.environment()["python"]
                with contextlib.suppress(UsageError), run.lock():
                    run.log_metrics(2, {"loss": 2.0})


# --- removing, and cost -------------------------------------------------------------------------------------------


def test_remove_deletes_the_run_alone(craton_home: Path) -> None:
    first, second = create("first"), create("second")
    (first.checkpoints_folder / "step-1").mkdir()
    assert remove_run("first") == first.id
    assert [run.id for run in list_runs()] == [second.id]
    assert list((craton_home / "tmp").iterdir()) == []
    with pytest.raises(UnknownName):
        remove_run("first")


def test_runs_need_no_torch(run: Run) -> None:
    code = """
with run.lock():
    run.log_metrics(1, {"loss": 1.0})
print([name for name in ("torch", "numpy") if name in sys.modules])
"""
    assert first_line(child(code, run.id)) == "[]"
