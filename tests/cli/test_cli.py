"""The command line as a user meets it: output, notes, exit codes, and nothing heavy before it is needed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from craton import __version__
from craton.cli import main


@pytest.fixture
def craton(monkeypatch, capsys):
    """craton(*arguments, stdin="") -> (exit status, standard output, standard error), in this process."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["craton", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["chat", "--help"], ["list"]])
def test_torch_is_not_imported_before_it_is_needed(arguments, tmp_path):
    program = (
        "import sys\nfrom craton.cli import main\n"
        f"sys.argv = ['craton', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {"CRATON_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_help_names_every_verb(craton):
    status, out, _ = craton("--help")
    assert status == 0
    for verb in ("pull", "list", "show", "verify", "rm", "chat", "generate", "embed"):
        assert f" {verb} " in out


def test_version(craton):
    assert craton("--version")[1].strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["chatt"], "chat"),
        (["generate", "x", "--temprature", "1"], "--temperature"),
        (["generate", "x", "--model", "smolm2-135m-instruct"], "smollm2-135m-instruct"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--dtype", "int3"], "float32"),
        (["generate", "x", "--logit-bias.abc", "1"], "logit_bias"),
        (["embed", "--modl", "x"], "--model"),
        (["show", "../../etc/passwd"], "passwd"),
        (["rm", "nothing"], "nothing"),
    ],
)
def test_wrong_use_is_2_with_a_hint(craton, arguments, hint, monkeypatch, tmp_path):
    monkeypatch.setenv("CRATON_HOME", str(tmp_path))
    status, out, err = craton(*arguments)
    assert status == 2
    assert hint in out + err
    assert "Traceback" not in err


def test_errors_are_json_where_json_was_asked_for(craton, tmp_path, monkeypatch):
    monkeypatch.setenv("CRATON_HOME", str(tmp_path))
    status, out, _ = craton("show", "smolm2-135m-instruct", "--json")
    assert status == 2
    error = json.loads(out)["error"]
    assert error["code"] == "unknown_name"
    assert "smollm2" in error["remedy"]


def test_a_fault_of_ours_is_3_and_says_so(craton, monkeypatch):
    from craton import store

    def broken() -> list[None]:
        raise ZeroDivisionError

    monkeypatch.setattr(store, "list_models", broken)
    status, _, err = craton("list")
    assert status == 3
    assert "fault of Craton" in err


def test_an_empty_store_says_where_to_start(craton, tmp_path, monkeypatch):
    monkeypatch.setenv("CRATON_HOME", str(tmp_path))
    status, out, err = craton("list")
    assert (status, out) == (0, "")
    assert "craton pull" in err
    assert json.loads(craton("list", "--json")[1]) == {"models": [], "damaged": []}


def test_a_file_goes_in_and_out_of_the_store(craton, smollm2_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    status, _, err = craton("pull", str(smollm2_gguf), "--name", "mine")
    assert status == 0
    assert "read in place" in err
    assert "mine@v1" in craton("list")[1]
    assert craton("verify", "mine")[0] == 0
    assert craton("rm", "mine")[0] == 0
    assert smollm2_gguf.exists()
    assert "mine" not in craton("list")[1]


def test_verify_finds_a_changed_file_and_ends_with_1(craton, minilm_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((minilm_folder / name).read_bytes())
    assert craton("pull", str(folder), "--name", "copy")[0] == 0
    (folder / "config.json").write_text("{}")
    status, out, _ = craton("verify", "copy", "--json")
    assert status == 1
    assert json.loads(out)["problems"] == [{"what": "changed", "path": "config.json"}]


def test_show_tells_what_a_model_is(craton, smollm2_gguf):
    status, out, _ = craton("show", str(smollm2_gguf))
    assert status == 0
    for fact in ("LlamaForCausalLM", "134.5 million", "8192", "Q4_1"):
        assert fact in out
    facts = json.loads(craton("show", str(smollm2_gguf), "--json")[1])
    assert facts["parameters"] == 134515008
    assert "im_start" in facts["template"]


def test_generate_streams_text_to_standard_output_and_notes_to_standard_error(craton, smollm2_gguf):
    status, out, err = craton("generate", "The capital of France is", "-m", str(smollm2_gguf), "--max-tokens", "4")
    assert status == 0
    assert "Paris" in out
    assert "tokens/s" in err
    assert "threads" in err


def test_generate_json(craton, smollm2_gguf):
    arguments = ["-m", str(smollm2_gguf), "--max-tokens", "3", "--logprobs", "2", "--n", "2", "--json"]
    value = json.loads(craton("generate", *arguments, stdin="One, two, three,")[1])
    assert [len(choice["logprobs"]) for choice in value["choices"]] == [3, 3]
    assert value["usage"]["completion_tokens"] == 6
    assert value["choices"][0]["text"] == value["choices"][1]["text"]  # greedy: the seed does not matter


def test_generate_json_lines_keep_their_order(craton, smollm2_gguf):
    rows = [
        {"prompt": "One, two, three,", "max_tokens": 2},
        {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 3},
        {"prompt": "The capital of France is", "max_tokens": 1},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    status, out, _ = craton("generate", "--jsonl", "-m", str(smollm2_gguf), stdin=lines)
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [a["usage"]["completion_tokens"] for a in answers] == [2, 3, 1]
    assert "Paris" in answers[2]["choices"][0]["text"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "line 2"),
        ("[1]", "line 2"),
        ('{"text": "x"}', "line 2"),
        ('{"prompt": "x", "temprature": 1}', "temperature"),
        ('{"prompt": "x", "top_p": 7}', "top_p"),
    ],
)
def test_a_bad_json_line_is_named_before_anything_runs(craton, line, words):
    status, out, err = craton("generate", "--jsonl", "-m", "anything", stdin='{"prompt": "fine"}\n' + line)
    assert (status, out) == (2, "")
    assert words in err


def test_embed_prints_vectors(craton, minilm_folder):
    status, out, _ = craton("embed", "a cat", "a dog", "-m", str(minilm_folder))
    vectors = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [len(v) for v in vectors] == [384, 384]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-4)
    value = json.loads(craton("embed", "-m", str(minilm_folder), "--json", stdin="a cat\na dog\n")[1])
    assert value["vectors"] == vectors


def test_the_wrong_kind_of_model_says_so(craton, minilm_folder):
    status, _, err = craton("generate", "x", "-m", str(minilm_folder))
    assert status == 2
    assert "encoder" in err


def test_too_long_a_text_says_by_how_much(craton, minilm_folder):
    status, _, err = craton("embed", "word " * 400, "-m", str(minilm_folder))
    assert status == 2
    assert "402 tokens, 146 more than the 256" in err


def test_a_chat_with_commands(craton, smollm2_gguf, tmp_path: Path):
    saved = tmp_path / "talk.json"
    script = (
        f"Say hello.\n/system Be brief.\nWhat is \\\ntwo and two?\n/save {saved}\n/save {saved}\n/nonsense\n/exit\n"
    )
    status, out, err = craton("chat", str(smollm2_gguf), "--max-tokens", "8", stdin=script)
    assert status == 0
    assert out.strip()
    talk = json.loads(saved.read_text())["messages"]
    # /system starts the conversation again.
    assert [m["role"] for m in talk] == ["system", "user", "assistant"]
    assert talk[1]["content"] == "What is \ntwo and two?"
    assert "exists already" in err
    assert "unknown command /nonsense" in err


def test_a_long_message_in_chat_is_refused_and_the_chat_goes_on(craton, smollm2_gguf):
    script = "word " * 9000 + "\n/reset\nHi\n"
    status, out, err = craton("chat", str(smollm2_gguf), "--max-tokens", "3", stdin=script)
    assert status == 0
    assert "more than the context of 8192" in err
    assert out.strip()


@pytest.mark.slow
def test_export_writes_what_loads_again_with_the_same_answer(craton, smollm2_gguf, tmp_path: Path):
    asked = ["generate", "The capital of France is", "--max-tokens", "5", "--dtype", "float32", "-m"]
    answer = craton(*asked, str(smollm2_gguf))[1]
    for target in (tmp_path / "copy.gguf", tmp_path / "folder"):
        assert craton("export", str(smollm2_gguf), str(target))[0] == 0
        assert craton(*asked, str(target))[1] == answer
        status, _, err = craton("export", str(smollm2_gguf), str(target))
        assert status == 2
        assert "exists already" in err
    assert "im_start" in craton("show", str(tmp_path / "folder"), "--json")[1]


def test_export_keeps_a_sentence_encoder_s_pooling(craton, minilm_folder, tmp_path: Path):
    target = tmp_path / "encoder"
    assert craton("export", str(minilm_folder), str(target))[0] == 0
    vectors = [craton("embed", "a cat", "-m", str(path))[1] for path in (minilm_folder, target)]
    assert vectors[0] == vectors[1]
