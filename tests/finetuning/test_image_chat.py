"""Fine-tuning of models that chat about pictures: what is trained, and that the result is used as it was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pictures need Pillow")

from safetensors.torch import load_file
from tests.inference.test_pictures import write_seeing

import craton as package
from craton.checkpoints.checkpoint import Checkpoint
from craton.data.batch import collate
from craton.data.chat_pictures import ChatPictures
from craton.data.records import read_records
from craton.data.rendering import render_records
from craton.data.schema import check_schema
from craton.errors import TrainingError
from craton.finetuning.finetune import resume
from craton.finetuning.loading import load
from craton.modalities.image import encode_png
from craton.models import ImageChat
from craton.store import find
from craton.store.runs import Run
from craton.training.image_chat import SeeingNextToken

SHADES = {"dark": 40, "light": 215}
# As many chat models of today write their turns; LLaVA 1.5's own template never ends an answer.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<end_of_utterance>{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_seeing(tmp_path / "llava", "llava")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rng, lines = np.random.default_rng(0), []
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for number in range(24):
        name, mean = list(SHADES.items())[number % 2]
        pixels = np.clip(rng.normal(mean, 20, (30, 30, 3)), 0, 255).astype(np.uint8)
        (tmp_path / "data" / "pictures" / f"{number}.png").write_bytes(encode_png(pixels))
        shown = {"type": "image", "image": f"pictures/{number}.png"}
        asked = {"role": "user", "content": [shown, {"type": "text", "text": "Shade?"}]}
        lines.append(json.dumps({"messages": [asked, {"role": "assistant", "content": name}]}))
    table = tmp_path / "data" / "chats.jsonl"
    table.write_text("\n".join(lines))
    return table


def flags(**changes: Any) -> list[str]:
    chosen = {
        "steps": 40, "batch": 8, "holdout": 0.25, "learning_rate": 2e-2, "threads": 1, "dtype": "float32", "rank": 8,
        "name": "shades", "weight_decay": 0,
    } | changes  # fmt: skip
    return [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def ask(name: str, value: int) -> str:
    shown = {"type": "image", "image": np.full((30, 30, 3), value, np.uint8)}
    asked = {"role": "user", "content": [shown, {"type": "text", "text": "Shade?"}]}
    return load(name, threads=1).chat([asked], max_tokens=8, temperature=0).text


def test_an_adapter_end_to_end(craton, base, chats, tmp_path):
    status, _, err = craton("finetune", base, chats, *flags())
    assert status == 0, err
    assert "24 pictures in 24 conversations" in " ".join(err.split())
    assert {name: ask("shades", value) for name, value in SHADES.items()} == {"dark": "dark", "light": "light"}
    light = tmp_path / "light.png"
    light.write_bytes(encode_png(np.full((30, 30, 3), 220, np.uint8)))
    status, out, err = craton(
        "chat", "shades", "--image", light, "--temperature", "0", "--threads", "1", "--max-tokens", "8", "Shade?"
    )
    assert (status, out) == (0, "light\n"), err


@pytest.mark.peer
def test_peft_reads_it_and_merged_it_is_the_same(craton, base, chats):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    assert craton("finetune", base, chats, *flags(steps=5))[0] == 0
    status, _, err = craton("merge", "shades", "--name", "merged")
    assert status == 0, err
    adapted, merged = load("shades", threads=1, dtype="float32"), load("merged", threads=1, dtype="float32")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, find("shades").path).eval()
    picture = {"type": "image", "image": np.full((30, 30, 3), 99, np.uint8)}
    prompt = merged.prompt([{"role": "user", "content": [picture]}])
    ids, pixels = torch.tensor(prompt.ids), torch.from_numpy(prompt.pictures[0].pixels_CHW)[None]
    with torch.inference_mode():
        expected = theirs(input_ids=ids[None], pixel_values=pixels).logits[0]
        for ours in (adapted, merged):
            found = ours.module.logits_of(ids, torch.arange(len(ids)), pixels)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_what_an_adapter_changes(craton, base, chats):
    assert craton("finetune", base, chats, *flags(steps=2))[0] == 0
    names = set(load_file(find("shades").path / "adapter_model.safetensors"))
    assert any("multi_modal_projector.linear_1.lora_B" in name for name in names)
    assert any("language_model" in name for name in names)
    assert not any("vision_tower" in name for name in names)
    assert craton("finetune", base, chats, *flags(steps=2, targets="q,v", name="few"))[0] == 0
    few = set(load_file(find("few").path / "adapter_model.safetensors"))
    assert few
    assert all("language_model" in name and ("q_proj" in name or "v_proj" in name) for name in few)


def test_all_weights_but_the_vision_tower(craton, base, chats):
    status, _, err = craton("finetune", base, chats, *flags(method="full", learning_rate=3e-3))
    assert status == 0, err
    assert {name: ask("shades", value) for name, value in SHADES.items()} == {"dark": "dark", "light": "light"}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, find("shades").path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("vision_tower") for name in changed)
    assert {"multi_modal_projector.linear_1.weight", "language_model.lm_head.weight"} <= changed


def test_logits_of_training_are_those_of_inference(base, chats):
    checkpoint = Checkpoint.open(base)
    module, tokenizer = checkpoint.load(torch.float32), checkpoint.tokenizer()
    assert isinstance(module, ImageChat)
    pictures = ChatPictures(module.config, tokenizer, base)
    checked = check_schema(read_records(chats))
    examples = list(render_records(checked, tokenizer, checked.schema, pictures=pictures))[:3]
    batch = collate(examples)
    with torch.inference_mode():
        parts = SeeingNextToken()(module, batch)
        model, expected = package.load(base, threads=1, dtype="float32"), 0.0
        for record in list(check_schema(read_records(chats)))[:3]:
            *asked, answer = record.value["messages"]
            asked[0]["content"][0]["image"] = str(chats.parent / asked[0]["content"][0]["image"])
            prompt = model.prompt(asked)
            ids = [*prompt.ids, *tokenizer.encode(f"{answer['content']}<end_of_utterance>")]
            pixels = torch.from_numpy(np.stack([p.pixels_CHW for p in prompt.pictures]))
            logits = module.logits_of(torch.tensor(ids), torch.arange(len(ids)), pixels).log_softmax(-1)
            expected -= sum(float(logits[i - 1, ids[i]]) for i in range(len(prompt.ids), len(ids)))
    assert parts.count == sum(example.trained for example in examples)
    assert float(parts.loss_sum) == pytest.approx(expected, rel=1e-5)


def test_a_run_that_was_stopped_is_the_run_that_was_not(craton, base, chats):
    more = {"steps": 6, "save_every": 3, "keep_last": 9}
    for name in ("whole", "cut"):
        status, _, err = craton("finetune", base, chats, *flags(**more, name=name))
        assert status == 0, err
    run = Run.open("cut")
    shutil.rmtree(run.checkpoints_folder / "step-00000006")
    again = resume(run)
    whole, cut = (load_file(path / "adapter_model.safetensors") for path in (find("whole").path, again.model.path))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_other_pictures_are_not_gone_on_with(craton, base, chats):
    assert craton("finetune", base, chats, *flags(steps=4, save_every=2, keep_last=9))[0] == 0
    run = Run.open("shades")
    shutil.rmtree(run.checkpoints_folder / "step-00000004")
    (chats.parent / "pictures" / "3.png").write_bytes(encode_png(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(TrainingError, match="the data changed"):
        resume(run)


def test_inspection_shows_pictures_as_marks(craton, base, chats):
    status, out, err = craton("data", "inspect", chats, "--model", base, "--json")
    assert status == 0, err
    marks = [token for token in json.loads(out)["samples"][0]["sequences"]["messages"] if "<image>" in token["text"]]
    assert marks == [{"text": "<image> x 36", "trained": False, "special": True}]
    assert "<image>" in craton("data", "inspect", chats, "--model", base)[1]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda chats: (chats.parent / "pictures" / "5.png").unlink(), "5.png"),
        (lambda chats: chats.write_text(chats.read_text().replace("Shade?", "<image>", 1)), "2 places for 1"),
    ],
)
def test_wrong_data_is_named(craton, base, chats, spoil, match):
    spoil(chats)
    status, out, _ = craton("finetune", base, chats, *flags(), "--json")
    assert status == 2
    assert match in out
    assert f"{chats}:" in out


def test_a_model_that_sees_nothing(craton, tiny_model, chats):
    status, out, _ = craton("finetune", tiny_model, chats, *flags(), "--json")
    assert status == 2
    assert "sees none" in out
    assert f"{chats}:1" in out


def test_a_model_that_cuts_its_pictures_is_taught_too(craton, chats, tmp_path):
    folder = write_seeing(tmp_path / "smolvlm")
    status, _, err = craton("finetune", folder, chats, *flags(steps=2, batch=2, micro_tokens=300))
    assert status == 0, err
    names = set(load_file(find("shades").path / "adapter_model.safetensors"))
    assert any("connector.modality_projection.proj" in name for name in names)
    assert not any("vision_model" in name for name in names)
    assert isinstance(ask("shades", 40), str)
