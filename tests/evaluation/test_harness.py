"""The bridge to lm-evaluation-harness, against the harness's own Hugging Face backend on the same model and tasks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import craton
from craton.errors import UnknownName, UsageError
from craton.evaluation.harness import harness_model, run_harness
from craton.inference.model import Model

# The harness imports transformers, datasets and torch: some seconds.
pytestmark = [pytest.mark.slow, pytest.mark.peer]

CONTEXT = 96
WORDS = re.findall(r"\w+", "the cat sat on a mat and the dog ran to the river while birds sang in old trees by night")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def sentence(seed: int, length: int) -> str:
    picks = torch.randint(0, len(WORDS), (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in picks)


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        patch.setenv(name, "1")
    pytest.importorskip("lm_eval")
    yield
    patch.undo()


@pytest.fixture(scope="module", params=["with a BOS", "without"])
def folder(request, tmp_path_factory) -> Path:
    """A random Llama and its tokeniser, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("llama")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([sentence(i, 30) for i in range(50)], trainer)
    names = {"eos_token": "</s>", "pad_token": "</s>"}
    if request.param == "with a BOS":
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        names["bos_token"] = "<s>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names)
    fast.save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0 if request.param == "with a BOS" else None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).float()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder) -> Model:
    return craton.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of three tasks: choices, documents (some longer than the context) and written answers."""
    path = tmp_path_factory.mktemp("tasks")
    choices = [
        {
            "question": sentence(i, 3 + i % 60),
            "choices": [sentence(90 + 4 * i + k, 1 + k) for k in range(4)],
            "gold": i % 4,
        }
        for i in range(24)
    ]
    documents = [{"text": sentence(200 + i, 5 + 37 * i)} for i in range(6)]
    written = [{"question": sentence(300 + i, 4 + i), "answer": WORDS[i]} for i in range(8)]
    for name, records in (("choices", choices), ("documents", documents), ("written", written)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_task(
        path,
        "choices",
        "multiple_choice",
        doc_to_text="{{question}}:",
        doc_to_target="{{gold}}",
        doc_to_choice="{{choices}}",
        metric_list=metrics("acc", "acc_norm"),
    )
    write_task(
        path,
        "documents",
        "loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    write_task(
        path,
        "written",
        "generate_until",
        doc_to_text="{{question}} is",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n", " the"], "max_gen_toks": 12, "do_sample": False},
        metric_list=metrics("exact_match"),
    )
    return path


def metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def write_task(folder: Path, name: str, kind: str, **fields: Any) -> None:
    task = {
        "task": f"craton_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": kind,
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def reference(lm: Any, tasks: Path, names: list[str], **fields: Any) -> Any:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=100, **fields)


@pytest.mark.parametrize(
    "options", [{}, {"num_fewshot": 2}, {"apply_chat_template": True}], ids=["zero", "few", "chat"]
)
def test_the_scores_are_those_of_the_harness_s_own_backend(ours, theirs, tasks, options):
    names = ["craton_choices", "craton_documents", "craton_written"]
    if options:
        names.remove("craton_documents")
    found = run_harness(ours, names, include_path=tasks, **options)
    wanted = reference(theirs, tasks, names, **options)["results"]
    assert set(found) == set(names)
    compared = 0
    for task in names:
        for metric, result in found[task].items():
            assert result["value"] == pytest.approx(wanted[task][f"{metric},none"], rel=1e-3), (task, metric)
            compared += 1
    assert compared >= 3
    assert found["craton_choices"]["acc"]["stderr"] == pytest.approx(wanted["craton_choices"]["acc_stderr,none"])
    assert found["craton_choices"]["acc"]["n"] == 24
    assert found["craton_written"]["exact_match"]["n"] == 8


def test_every_request_is_answered_alike(ours, theirs, tasks):
    """Scores may agree by chance: here, each log-probability and each written text is compared."""
    fields = {"log_samples": True}
    names = ["craton_choices", "craton_documents", "craton_written"]
    mine = reference(harness_model(ours), tasks, names, **fields)["samples"]
    others = reference(theirs, tasks, names, **fields)["samples"]
    for name in names:
        for a, b in zip(mine[name], others[name], strict=True):
            assert a["doc_id"] == b["doc_id"]
            for left, right in zip(flat(a["resps"]), flat(b["resps"]), strict=True):
                assert left == (pytest.approx(right, abs=1e-3) if isinstance(right, float) else right)


def flat(value: Any) -> list[Any]:
    return [x for item in value for x in flat(item)] if isinstance(value, list | tuple) else [value]


def test_texts_and_conversations_become_the_same_tokens(ours, theirs):
    lm = harness_model(ours)
    talk = [{"role": "system", "content": "be old"}, {"role": "user", "content": "the cat"}]
    open_end = [*talk, {"role": "assistant", "content": "sat on"}]
    for messages, prompt in ((talk, True), (open_end, False)):
        text = lm.apply_chat_template(messages, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(messages, add_generation_prompt=prompt)
        assert lm.tok_encode(text) == theirs.tok_encode(text)
    for text in ("the cat", "<s>the cat", "", " on"):
        for special in (None, True, False):
            assert lm.tok_encode(text, add_special_tokens=special) == theirs.tok_encode(
                text, add_special_tokens=special
            )
    assert lm.chat_template(True) == theirs.chat_template(True)
    assert (lm.prefix_token_id, lm.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    assert lm.max_length == theirs.max_length


def instance(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, arguments, 0)


def test_written_answers(ours):
    lm = harness_model(ours)
    plain = {"until": [], "max_gen_toks": 10}
    (whole,) = lm.generate_until([instance("the cat", plain)], disable_tqdm=True)
    many = [f"never{i}" for i in range(20)]  # more than the engine stops at by itself
    (cut,) = lm.generate_until([instance("the cat", plain | {"until": [*many, whole[3:5]]})], disable_tqdm=True)
    assert cut == whole[: whole.index(whole[3:5])]
    drawn = plain | {"do_sample": True, "temperature": 2.0}
    first = lm.generate_until([instance("the cat", drawn)] * 3, disable_tqdm=True)
    assert len(set(first)) == 3
    assert lm.generate_until([instance("the cat", drawn)] * 3, disable_tqdm=True) == first
    with pytest.raises(UnknownName, match="num_beams"):
        lm.generate_until([instance("the cat", plain | {"num_beams": 4})], disable_tqdm=True)
    with pytest.raises(UsageError, match="context of 96"):
        lm.generate_until([instance("the cat", {"max_gen_toks": 96})], disable_tqdm=True)


def test_limits_and_refusals(ours, tasks, monkeypatch):
    found = run_harness(ours, ["craton_choices"], limit=4, include_path=tasks)
    assert set(found["craton_choices"]) == {"acc", "acc_norm"}
    assert found["craton_choices"]["acc"]["value"] in (0, 0.25, 0.5, 0.75, 1)
    assert found["craton_choices"]["acc"]["n"] == 4
    with pytest.raises(UnknownName, match="craton_choices"):
        run_harness(ours, ["craton_choice"], include_path=tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"craton\[eval\]"):
        run_harness(ours, ["craton_choices"], include_path=tasks)
