"""`craton runs` as a user meets it: pages for people, JSON for programs, and words for what cannot be done."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
from cyclopts import App

from craton import cli
from craton.cli.run_pages import falls_early, short_ids
from craton.store.artifacts import publish_model
from craton.store.manifest import Parent
from craton.store.run_record import Process
from craton.store.runs import Run, list_runs

CONFIG = {"steps": 200, "optimiser": {"kind": "adamw", "learning_rate": 0.001}, "data": "متن.txt"}
ORIGINS = {"steps": "--steps", "optimiser.kind": "default", "optimiser.learning_rate": "recipe.toml", "data": "default"}


@pytest.fixture(autouse=True)
def craton_home(tmp_path, monkeypatch):
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def craton(monkeypatch, capsys):
    """craton(*arguments) -> (exit status, standard output, standard error), in this process, 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")
    app = App(name="craton")
    app.command("craton.cli.runs:runs", name="runs")
    app.command("craton.cli.list_models:list_models", name="list")
    app.command("craton.cli.show:show", name="show")
    monkeypatch.setattr(cli, "app", app)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["craton", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def finished(name="first", kind="pretrain", scale=1.0, accuracy=0.75, **config) -> Run:
    run = Run.create(
        kind,
        config={**CONFIG, **config},
        provenance=ORIGINS,
        name=name,
        parents=(Parent(relation="trained_on", name="corpus"),),
    )
    with run.lock():
        run.set_total_steps(200)
        for step in range(1, 201):
            run.log_metrics(step, {"loss": scale * (2 + 8 / step), "tokens": 64})
        run.log_metrics(200, {"held_out/loss": scale * 2.5})
        run.finish("done", {"model": "mine@v1", "metrics": {"accuracy": accuracy}})
    return run


def lost(name="gone") -> Run:
    run = Run.create("finetune", config=CONFIG, provenance=ORIGINS, name=name)
    with run.lock():
        run.log_metrics(7, {"loss": 3.0})
        run.log("last words [bold]")
        run._update(process=Process(pid=1, start="long ago"))
        record = run.record
    run._update(**{key: getattr(record, key) for key in ("status", "ended", "result", "process")})
    return run


def words(text: str) -> str:
    return " ".join(text.split())


# --- list ---------------------------------------------------------------------------------------------------------


def test_no_runs_yet(craton):
    assert craton("runs")[:2] == (0, "")
    assert "There are no runs yet" in craton("runs")[2]
    assert json.loads(craton("runs", "--json")[1]) == {"runs": [], "damaged": []}


def test_the_list_has_the_newest_first(craton):
    first, second = finished(), lost("تحلیل")
    status, out, err = craton("runs")
    assert status == 0
    head, newer, older = out.splitlines()
    assert head.split() == ["run", "kind", "name", "status", "step", "loss", "when", "took"]
    short = short_ids([first.id, second.id])
    assert newer.split()[:6] == [short[second.id], "finetune", "تحلیل", "lost", "7", "3"]
    assert older.split()[:6] == [short[first.id], "pretrain", "first", "done", "200/200", "2.04"]
    assert f"craton runs resume {short[second.id]}" in err
    rows = json.loads(craton("runs", "--json")[1])["runs"]
    assert [row["id"] for row in rows] == [second.id, first.id]
    assert rows[1].items() >= {"status": "done", "step": 200, "loss": 2.04, "model": "mine@v1"}.items()


def test_a_damaged_run_is_told_beside_the_others(craton):
    good, bad = finished(), finished()
    (bad.folder / "run.json").write_text("{")
    status, out, err = craton("runs")
    assert status == 0
    assert good.id[:8] in out
    assert "the run is damaged" in err
    assert f"craton runs rm {bad.id}" in err
    assert len(json.loads(craton("runs", "--json")[1])["damaged"]) == 1


@pytest.mark.parametrize("columns", ["80", "100", "120"])
def test_lines_fit_the_terminal(craton, monkeypatch, columns):
    finished("a name that is much longer than any terminal would like it to be " * 2)
    finished()
    monkeypatch.setenv("COLUMNS", columns)
    for page in (["runs"], ["runs", "compare", "first", list_runs()[0].id]):
        out = craton(*page)[1]
        assert max(len(line.rstrip()) for line in out.splitlines()) <= int(columns)


def test_short_ids_are_unique_beginnings():
    ids = ["01AAAAAAAAAAAAAA", "01AAAAAAAAAABAAA", "01AAAAAAAAAABAAB", "02AAAAAAAAAAAAAA"]
    assert short_ids(ids) == {
        "01AAAAAAAAAAAAAA": "01AAAAAAAAAAA",
        "01AAAAAAAAAABAAA": "01AAAAAAAAAABAAA",
        "01AAAAAAAAAABAAB": "01AAAAAAAAAABAAB",
        "02AAAAAAAAAAAAAA": "02AAAAAA",
    }
    assert short_ids(ids[:1]) == {ids[0]: "01AAAAAA"}


# --- show ---------------------------------------------------------------------------------------------------------


def test_a_run_on_a_page(craton):
    run = finished()
    status, out, _ = craton("runs", "show", "first")
    assert status == 0
    text = words(out)
    for part in (
        f"{run.id} first",
        "status done",
        "steps 200/200",
        "trained on corpus",
        "made mine@v1",
        "training loss ▾ 2.04 at 200 last 2.04 at 200",
        "held-out loss ▾ 2.5 at 200",
        "┬ log",
        "accuracy 0.75",
        "optimiser.learning_rate 0.001 recipe.toml",
        "data متن.txt default",
    ):
        assert part in text
    assert "end of the log" not in out


def test_a_run_as_json(craton):
    run = finished()
    value = json.loads(craton("runs", "show", "last", "--json")[1])
    assert value["id"] == run.id
    assert value["settings"]["optimiser.learning_rate"] == {"value": 0.001, "from": "recipe.toml"}
    assert len(value["metrics"]) == 200
    assert value["result"]["metrics"] == {"accuracy": 0.75}
    assert value["parents"] == [{"relation": "trained_on", "name": "corpus"}]
    assert [event["event"] for event in value["events"]] == ["running", "done"]


def test_what_went_wrong_is_on_the_page(craton):
    run = Run.create("pretrain", config={}, provenance={})
    run.log("one\ntwo [red]three")
    with pytest.raises(ValueError, match="broken"), run.lock():
        raise ValueError("broken [thing]")
    text = words(craton("runs", "show", "last")[1])
    assert "status failed" in text
    assert "error ValueError: broken [thing]" in text
    assert "end of the log one two [red]three" in text
    lost()
    text = words(craton("runs", "show", "last")[1])
    assert "resume with craton runs resume" in text
    assert "last words [bold]" in text


def test_a_run_that_did_nothing_yet_has_no_curve(craton):
    Run.create("pretrain", config={}, provenance={})
    status, out, _ = craton("runs", "show", "last")
    assert status == 0
    assert "none yet" in out
    assert "┤" not in out


def test_the_axis_is_logarithmic_where_most_of_the_way_is_at_the_start():
    assert falls_early([(x, 2 + 8 / x) for x in range(1, 200)])
    assert not falls_early([(x, 10 - x / 30) for x in range(1, 200)])
    assert not falls_early([(x, 2 + 8 / x) for x in range(1, 10)])
    assert not falls_early([(x, 1.0 + x) for x in range(1, 200)])
    assert not falls_early([(0, 9.0), (1, 1.0), (100, 0.9)])
    assert not falls_early([(5, 1.0)])


# --- compare ------------------------------------------------------------------------------------------------------


def test_two_runs_side_by_side(craton):
    finished()
    finished("second", scale=0.5, accuracy=0.8, optimiser={"kind": "muon", "learning_rate": 0.001})
    status, out, _ = craton("runs", "compare", "first", "second")
    assert status == 0
    text = words(out)
    assert "settings that differ A B optimiser.kind adamw muon" in text
    assert "learning_rate" not in text
    assert "accuracy 0.75 0.8 +0.05" in text
    assert "loss 2.04 1.02 -1.02" in text
    assert "tokens 64 64 0" in text
    assert out.count("● A") == out.count("○ B") == 2
    value = json.loads(craton("runs", "compare", "first", "second", "--json")[1])
    assert value["settings"] == {"optimiser.kind": ["adamw", "muon"]}
    assert value["environment"] == {}
    assert value["metrics"]["loss"] == [2.04, 1.02, pytest.approx(-1.02)]
    assert [run["name"] for run in value["runs"]] == ["first", "second"]


def test_runs_of_different_kinds_compare_as_far_as_they_go(craton):
    finished()
    other = Run.create("finetune", config={"rank": 8}, provenance={"rank": "--rank"}, name="second")
    text = words(craton("runs", "compare", "first", "second")[1])
    assert "rank none 8" in text
    assert "kind pretrain finetune" in text
    assert "accuracy 0.75 - -" in text
    with other.lock():
        other.log_metrics(1, {"loss": math.nan})
    assert craton("runs", "compare", "second", "first")[0] == 0


# --- resume, rm ---------------------------------------------------------------------------------------------------


def test_resume_calls_the_verb_that_made_the_run(craton, monkeypatch):
    resumed = []
    for kind in ("pretrain", "finetune"):
        module = types.ModuleType(f"craton.cli.{kind}")
        module.resume_run = lambda run, kind=kind: resumed.append((kind, run.id))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    run = lost()
    assert craton("runs", "resume", run.id)[0] == 0
    assert resumed == [("finetune", run.id)]


def test_what_cannot_be_resumed(craton):
    finished()
    status, _, err = craton("runs", "resume", "first")
    assert (status, "is done" in err, "craton runs show" in err) == (2, True, True)
    Run.create("tokenizer", config={}, provenance={}, name="other")
    status, _, err = craton("runs", "resume", "other")
    assert (status, "'tokenizer' cannot be resumed" in err) == (2, True)


def test_what_has_nothing_to_publish(craton):
    finished()
    status, _, err = craton("runs", "apply", "first")
    assert (status, "nothing to publish" in err, "craton runs resume" in err) == (2, True, True)


def test_a_living_run_is_neither_resumed_nor_removed(craton):
    run = Run.create("pretrain", config={}, provenance={})
    code = "import sys\nfrom craton.store.runs import Run\nwith Run.open('last').lock():\n print(flush=True)\n input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    for verb in ("resume", "rm"):
        status, _, err = craton("runs", verb, run.id)
        assert (status, f"is at work in process {holder.pid}" in err) == (2, True)
    assert "running" in craton("runs")[1]
    holder.communicate(b"\n")
    assert json.loads(craton("runs", "rm", run.id, "--json")[1]) == {"removed": run.id}
    assert list_runs() == []


@pytest.mark.parametrize("verb", [["show"], ["resume"], ["rm"], ["compare", "first"]])
def test_an_unknown_run_is_2_with_the_nearest(craton, verb):
    finished()
    status, out, err = craton("runs", *verb, "frist")
    assert (status, out) == (2, "")
    assert "did you mean 'first'" in err
    status, out, _ = craton("runs", verb[0], *verb[1:], "frist", *([] if verb == ["resume"] else ["--json"]))
    assert status == 2
    if verb != ["resume"]:
        assert json.loads(out)["error"]["code"] == "unknown_name"


# --- TensorBoard --------------------------------------------------------------------------------------------------


def test_a_run_as_tensorboard_sees_it(craton, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finished()
    status, _, err = craton("runs", "show", "first", "--tensorboard", str(tmp_path / "board"))
    assert (status, "200 steps written" in err) == (0, True)
    events = EventAccumulator(str(tmp_path / "board" / run.id))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "tokens", "held_out/loss"}
    scalars = events.Scalars("loss")
    rows = run.metrics()
    assert [scalar.step for scalar in scalars] == [row["step"] for row in rows]
    assert [scalar.value for scalar in scalars] == pytest.approx([row["loss"] for row in rows])
    assert [scalar.wall_time for scalar in scalars] == pytest.approx([row["time"] for row in rows])


def test_without_tensorboard_the_remedy_is_named(craton, tmp_path, monkeypatch):
    finished()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = craton("runs", "show", "first", "--tensorboard", str(tmp_path))
    assert status == 2
    assert "pip install 'craton[tensorboard]'" in err


# --- what runs made, among the models -----------------------------------------------------------------------------


def test_an_adapter_in_the_list_and_on_its_page(craton):
    run = finished()

    def build(folder: Path) -> None:
        from safetensors.numpy import save_file

        numpy = pytest.importorskip("numpy")
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        save_file({name: numpy.zeros((8, 4), "float32")}, folder / "adapter_model.safetensors")

    parents = (Parent(relation="adapter_of", name="smollm2-135m-instruct@v1"),)
    publish_model("mine", build, source=f"run:{run.id}", parents=parents, licence="mit")
    status, out, _ = craton("list")
    assert status == 0
    assert f"adapter of smollm2-135m-instruct@v1, run:{run.id}" in words(out)
    assert json.loads(craton("list", "--json")[1])["models"][0]["adapter_of"] == "smollm2-135m-instruct@v1"
    status, out, _ = craton("show", "mine")
    assert status == 0
    for part in ("adapter of smollm2-135m-instruct@v1", "rank 8", "alpha 16", "targets q_proj, v_proj", "licence mit"):
        assert part in words(out)
    facts = json.loads(craton("show", "mine", "--json")[1])
    assert (facts["parameters"], facts["source"]) == (32, f"run:{run.id}")


def test_torch_is_not_imported_for_the_pages(craton_home):
    run = finished()
    for arguments in (["runs"], ["runs", "show", run.id], ["runs", "compare", run.id, run.id], ["runs", "--help"]):
        program = (
            "import sys\nfrom craton.cli.runs import runs\n"
            f"try:\n    runs({arguments[1:]!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
