"""Training from the command line, end to end on tiny models: what it makes opens, what is wrong is said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.llama import LLAMA
from craton.checkpoints.save import save_checkpoint
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.models import build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import causal_config
from craton.pretraining.sizing import SizeOverrides, size

TEXT = "the cat sat on the mat and the dog sat on the log while the sun rose over the quiet hill\n"
SMALL = ["--vocab", "340", "--context", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"story {i}\n" + TEXT * (2 + i % 5), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny language model with a chat template, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([TEXT * 20 + "user assistant system yes no good bad"], TokenizerSettings(vocab=360))
    shape = SizeOverrides(width=64, layers=2, heads=2, kv_heads=1, hidden=128)
    config = causal_config(
        size("0.1m", vocab=tokenizer.vocab_size, context=128, overrides=shape), tokenizer.vocab_size, 128
    )
    model = build(config)
    initialise(model, 0)
    save_checkpoint(model, LLAMA, folder, tokenizer=tokenizer)
    return folder


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "CRATON_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def craton(home: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "craton.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(home), timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return done


def lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# --- pretraining --------------------------------------------------------------------------------------------------


def test_pretrain_makes_a_model_that_writes(home, corpus):
    words = ["--size", "0.2m", "--tokens", "4000", "--name", "tiny", "--json"]
    told = json.loads(craton(home, "pretrain", corpus, *SMALL, *words).stdout)
    assert told["model"] == "tiny@v1"
    assert told["steps"] > 0
    assert told["evaluation"]["bits_per_byte"] > 0
    assert craton(home, "generate", "the", "-m", "tiny", "--max-tokens", "3").stdout
    assert "pretrain" in craton(home, "runs").stdout
    page = craton(home, "runs", "show", told["run"]).stdout
    assert "--size" in page
    assert "loss" in page
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(told["path"]).eval()
    ours = Checkpoint.open(told["path"]).load(torch.float32)
    ids = torch.arange(5, 25)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids, torch.arange(20)), theirs(ids[None]).logits[0], rtol=1e-3, atol=1e-3)


def test_a_dry_run_says_what_it_would_take_and_keeps_nothing(home, corpus):
    before = craton(home, "runs", "--json").stdout
    done = craton(home, "pretrain", corpus, *SMALL, "--size", "0.2m", "--tokens", "4000", "--dry-run")
    for word in ("parameters", "memory", "time", "disk", "steps"):
        assert word in done.stderr
    assert craton(home, "runs", "--json").stdout == before


@pytest.mark.slow
def test_a_recipe_is_overruled_by_flags_and_its_typos_are_named(home, corpus, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('size = "0.2m"\nvocab = "340"\ncontext = 32\n[training]\nlearning_rat = 1e-3\n', encoding="utf-8")
    done = craton(home, "pretrain", corpus, "--recipe", recipe, status=2)
    assert "learning_rate" in done.stderr
    assert "recipe.toml" in done.stderr
    recipe.write_text(recipe.read_text().replace("learning_rat ", "learning_rate "), encoding="utf-8")
    flags = ["--tokens", "2000", "--learning-rate", "2e-3", "--threads", "1", "--name", "by-recipe", "--json"]
    told = json.loads(craton(home, "pretrain", corpus, "--recipe", recipe, *flags).stdout)
    folder = home / "runs" / told["run"]
    assert json.loads((folder / "config.json").read_text())["settings"]["training"]["learning_rate"] == 2e-3
    origins = json.loads((folder / "provenance.json").read_text())
    assert origins["settings.training.learning_rate"] == "--learning-rate"
    assert origins["settings.size"].endswith("recipe.toml")


@pytest.mark.parametrize(
    "words",
    [
        ["--experts", "4", "--size", "0.4m"],
        pytest.param(["--objective", "masked-token", "--size", "0.3m"], marks=pytest.mark.slow),
    ],
    ids=["experts", "masked"],
)
def test_other_models_are_pretrained_and_open(home, corpus, words):
    told = json.loads(
        craton(home, "pretrain", corpus, *SMALL, *words, "--tokens", "3000", "--name", "other", "--json").stdout
    )
    assert Checkpoint.open(told["path"]).load(torch.float32) is not None


@pytest.mark.slow
def test_a_model_goes_on_from_prepared_shards(home, corpus, base, tmp_path):
    craton(home, "data", "prepare", corpus, "--tokenizer", base, "--out", tmp_path / "shards")
    words = ["--model", base, "--tokenizer", base, "--context", "32", "--steps", "3", "--threads", "1", "--json"]
    told = json.loads(craton(home, "pretrain", tmp_path / "shards", *words, "--name", "further").stdout)
    assert told["steps"] == 3


# --- fine-tuning --------------------------------------------------------------------------------------------------

CHATS = [
    {"messages": [{"role": "user", "content": f"the cat {i}"}, {"role": "assistant", "content": "sat on the mat"}]}
    for i in range(12)
]
PROMPTS = [{"prompt": f"the dog {i} ", "completion": "sat on the log"} for i in range(12)]
LABELLED = [{"text": f"the cat {i} sat", "label": "cat"} for i in range(8)] + [
    {"text": f"the dog {i} sat", "label": "dog"} for i in range(8)
]
PAIRS = [{"anchor": f"the cat {i}", "positive": f"the mat {i}"} for i in range(12)]
PREFERENCES = [{"prompt": f"the sun {i} ", "chosen": "rose over the hill", "rejected": "sat"} for i in range(12)]
BINARY = [{"prompt": f"the sun {i} ", "completion": "rose", "label": i % 2 == 0} for i in range(12)]
TASKS = [
    ("sft", "lora", CHATS),
    ("sft", "dora", PROMPTS),
    ("sft", "full", [{"text": TEXT}] * 12),
    ("classify", "lora", LABELLED),
    ("classify", "full", LABELLED),
    ("embed", "lora", PAIRS),
    ("dpo", "lora", PREFERENCES),
    ("dpo", "full", PREFERENCES),
    ("orpo", "qlora", PREFERENCES),
    ("kto", "lora", BINARY),
]
# Each starts the program anew, which takes seconds; the objectives themselves have tests of their own.
FAST_TASKS = [("sft", "lora"), ("classify", "lora"), ("embed", "lora"), ("dpo", "full")]


@pytest.mark.parametrize(
    ("task", "method", "rows"),
    [
        pytest.param(*one, id=f"{one[0]}-{one[1]}", marks=() if one[:2] in FAST_TASKS else pytest.mark.slow)
        for one in TASKS
    ],
)
def test_finetune_publishes_what_was_learnt(home, base, tmp_path, task, method, rows):
    data = lines(tmp_path / "data.jsonl", *rows)
    words = ["--task", task, "--method", method, "--steps", "2", "--batch", "4", "--threads", "1", "--name", "made"]
    told = json.loads(craton(home, "finetune", base, data, *words, "--json").stdout)
    files = {path.name for path in Path(told["path"]).iterdir()}
    assert "README.md" in files
    if method == "full":
        Checkpoint.open(told["path"]).load(torch.float32)
    else:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert str(base) in craton(home, "show", told["model"]).stdout
    assert told["steps"] == 2
    assert told["evaluation"]["loss"] >= 0  # 0 where one example is held out and has nothing to be confused with


def ask(home: Path, model: str) -> str:
    asked = {"messages": [{"role": "user", "content": "the cat 3"}], "max_tokens": 12}
    command = [sys.executable, "-m", "craton.cli", "generate", "--jsonl", "-m", model]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment(home))
    return str(json.loads(done.stdout)["choices"][0]["text"])


@pytest.mark.slow
def test_what_was_learnt_is_said(home, base, tmp_path):
    data = lines(tmp_path / "chats.jsonl", *CHATS * 4)
    words = ["--method", "full", "--steps", "60", "--batch", "8", "--learning-rate", "1e-2", "--threads", "1", "--json"]
    told = json.loads(craton(home, "finetune", base, data, *words, "--name", "talker").stdout)
    assert told["evaluation"]["loss"] < 0.5
    assert ask(home, "talker") == "sat on the mat"


@pytest.mark.slow
def test_an_adapter_talks_as_the_model_that_it_is_merged_into(home, base, tmp_path):
    data = lines(tmp_path / "chats.jsonl", *CHATS * 4)
    words = ["--steps", "20", "--batch", "8", "--learning-rate", "1e-2", "--threads", "1", "--dtype", "float32"]
    craton(home, "finetune", base, data, *words, "--name", "adapter")
    craton(home, "merge", "adapter", "--name", "merged")
    assert ask(home, "adapter") == ask(home, "merged") != ask(home, base)


# --- interruption and resume --------------------------------------------------------------------------------------


def start(home: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "craton.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(home))


def wait_for_metrics(home: Path, name: str, rows: int) -> Path:
    for _ in range(1200):
        for record in (home / "runs").glob("*/run.json"):
            if json.loads(record.read_text()).get("name") == name:
                metrics = record.parent / "metrics.jsonl"
                if metrics.exists() and metrics.read_bytes().count(b"\n") >= rows:
                    return record.parent
        time.sleep(0.05)
    raise AssertionError("no metrics appeared")


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL], ids=["ctrl-c", "kill"]
)
def test_a_stopped_run_goes_on_to_the_same_weights(home, base, tmp_path, number):
    data = lines(tmp_path / "data.jsonl", *[{"text": f"{i} {TEXT}"} for i in range(40)])
    words = ["finetune", base, data, "--method", "full", "--steps", "60", "--batch", "8", "--threads", "1"]
    words += ["--save-every", "3", "--dtype", "float32"]
    straight = json.loads(craton(home, *words, "--name", "straight", "--json").stdout)
    name = f"stopped-{number.name.lower()}"
    process = start(home, *words, "--name", name)
    folder = wait_for_metrics(home, name, 7)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"craton runs resume {folder.name}" in said
    listed = {run["id"]: run["status"] for run in json.loads(craton(home, "runs", "--json").stdout)["runs"]}
    assert listed[folder.name] == {"SIGINT": "interrupted", "SIGKILL": "lost"}[number.name]
    craton(home, "runs", "resume", folder.name)
    made = json.loads((folder / "run.json").read_text())["result"]["model"]
    resumed = home / "models" / made.partition("@")[0] / made.partition("@")[2]
    one = (Path(straight["path"]) / "model.safetensors").read_bytes()
    assert one == (resumed / "model.safetensors").read_bytes()
    again = craton(home, "runs", "resume", folder.name, status=2)
    assert "done" in again.stderr or "finished" in again.stderr


@pytest.mark.slow
def test_a_run_is_not_resumed_on_other_data(home, base, tmp_path):
    data = lines(tmp_path / "data.jsonl", *[{"text": f"{i} {TEXT}"} for i in range(20)])
    process = start(home, "finetune", base, data, "--steps", "400", "--batch", "4", "--threads", "1", "--name", "moved")
    folder = wait_for_metrics(home, "moved", 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    lines(data, *[{"text": f"{i} other {TEXT}"} for i in range(20)])
    assert "the data changed" in craton(home, "runs", "resume", folder.name, status=2).stderr


# --- bad data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "wizard", "content": "b"}]}\n', ":1", "wizard"),
        (b'{"text": "fine"}\n{"prompt": "a", "completion": "b"}\n', ":2", "mixed"),
        pytest.param(b'{"txt": "a"}\n', ":1", "text", marks=pytest.mark.slow),
        pytest.param(b'{"text": "a"}\n{"text": "\xff"}\n', ":2", "UTF-8", marks=pytest.mark.slow),
        pytest.param(b"", "data.jsonl", "empty|no records", marks=pytest.mark.slow),
        pytest.param(b'{"text": "a"}\n{"text": \n', ":2", "JSON", marks=pytest.mark.slow),
        (b'{"messages": [{"role": "user", "content": "only a question"}]}\n', ":1", "nothing|no trained|train"),
    ],
    ids=["role", "mixed", "key", "utf-8", "empty", "json", "untrained"],
)
def test_bad_data_is_refused_with_its_line_and_leaves_no_run(home, base, tmp_path, content, where, what):
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    before = craton(home, "runs", "--json").stdout
    done = craton(home, "finetune", base, data, status=2)
    assert f"{where}" in done.stderr
    assert re.search(what, done.stderr)
    assert craton(home, "runs", "--json").stdout == before


MORE_POLICIES = [
    pytest.param(policy, said, marks=pytest.mark.slow)
    for policy, said in (("truncate", "truncated"), ("split", "split"))
]


@pytest.mark.parametrize(("policy", "said"), [("drop", "dropped"), *MORE_POLICIES])
def test_samples_longer_than_the_context_are_counted_by_policy(home, base, tmp_path, policy, said):
    data = lines(tmp_path / "data.jsonl", {"text": TEXT}, {"text": TEXT * 30}, {"text": TEXT}, {"text": TEXT})
    words = ["--overlong", policy, "--steps", "1", "--batch", "2", "--threads", "1", "--name", "long", "--dry-run"]
    done = craton(home, "finetune", base, data, *words)
    assert re.search(rf"1 {said}", " ".join(done.stderr.split()))


@pytest.mark.slow
def test_when_nothing_is_left_to_train_on_the_remedy_is_said(home, base, tmp_path):
    data = lines(tmp_path / "data.jsonl", {"text": TEXT * 30})
    done = craton(home, "finetune", base, data, "--holdout", "0", status=2)
    assert "--overlong" in done.stderr


@pytest.mark.slow
def test_a_label_that_training_did_not_see_is_named(home, base, tmp_path):
    data = lines(tmp_path / "train.jsonl", *LABELLED)
    test = lines(tmp_path / "test.jsonl", {"text": "a bird", "label": "bird"})
    done = craton(home, "finetune", base, data, "--task", "classify", "--evaluation", test, status=2)
    assert "bird" in done.stderr
    assert "test.jsonl:1" in done.stderr


@pytest.mark.slow
def test_one_line_of_ten_million_characters(home, base, tmp_path):
    data = lines(tmp_path / "data.jsonl", {"text": "word " * 2_000_000}, *[{"text": TEXT}] * 4)
    craton(home, "finetune", base, data, "--steps", "1", "--batch", "2", "--threads", "1", "--name", "wide")


@pytest.mark.slow
def test_two_processes_print_once_publish_once_and_say_what_one_says(home, corpus):
    words = ["pretrain", str(corpus), *SMALL, "--size", "0.2m", "--tokens", "3000", "--dtype", "float32", "--json"]
    alone = json.loads(craton(home, *words, "--name", "alone").stdout)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "craton.cli", *words, "--name", "beside"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(home), timeout=240)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one document, so one process has printed
    assert told["model"] == "beside@v1"
    assert told["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    assert told["evaluation"]["loss"] == pytest.approx(alone["evaluation"]["loss"], rel=1e-3)
