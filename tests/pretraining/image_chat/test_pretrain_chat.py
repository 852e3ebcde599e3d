"""Runs of `craton pretrain-chat`: the projector alone learns, a run goes on as it was, and what is published is opened
by transformers and by `craton chat`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="pictures need Pillow")

from safetensors.torch import load_file

import craton as package
from craton.checkpoints.checkpoint import Checkpoint
from craton.data.records import Record
from craton.errors import UsageError
from craton.modalities.image import encode_png
from craton.modalities.text import ChatTemplate, Tokenizer
from craton.models import CausalLM, DualEncoder, ImageChat
from craton.pretraining.image_chat.data import as_chats
from craton.pretraining.image_chat.joining import IMAGE, join, seeing_tokenizer
from craton.pretraining.image_chat.pretrain import resume
from craton.store import find
from craton.store.runs import Run

SHADES = {"red": (220, 30, 30), "blue": (30, 30, 220)}
ASKED = "what is the answer"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    rng, lines = np.random.default_rng(0), []
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for number in range(24):
        name, colour = list(SHADES.items())[number % 2]
        pixels = np.clip(rng.normal(colour, 12, (20, 30, 3)), 0, 255).astype(np.uint8)
        (tmp_path / "data" / "pictures" / f"{number}.png").write_bytes(encode_png(pixels))
        lines.append(json.dumps({"image": f"pictures/{number}.png", "caption": name}))
    table = tmp_path / "data" / "captions.jsonl"
    table.write_text("\n".join(lines))
    return table


@pytest.fixture
def flags(seeing_folders, tiny_model):
    def made(**changes: Any) -> list[str]:
        chosen = {
            "vision": seeing_folders["clip"], "language": tiny_model, "question": ASKED, "steps": 6, "batch": 8,
            "holdout": 0.25, "threads": 1, "dtype": "float32", "name": "sees",
        } | changes  # fmt: skip
        return [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    return made


def shown(colour: tuple[int, int, int]) -> list[dict[str, Any]]:
    picture = {"type": "image", "image": np.full((24, 24, 3), colour, np.uint8)}
    return [{"role": "user", "content": [picture, {"type": "text", "text": ASKED}]}]


def test_only_the_projector_is_trained_and_the_answers_come_from_pictures(
    craton, captions, flags, seeing_folders, tiny_model
):
    status, _, err = craton("pretrain-chat", captions, *flags(steps=30, learning_rate=3e-2))
    assert status == 0, err
    assert "the projector alone is trained" in " ".join(err.split())
    folder = find("sees").path
    after, clip, text = (load_file(f / "model.safetensors") for f in (folder, seeing_folders["clip"], tiny_model))
    for name, tensor in after.items():
        if name.startswith("vision_tower."):
            assert torch.equal(tensor, clip[name.removeprefix("vision_tower.")]), name
        elif name.startswith("language_model."):
            old = text[name.removeprefix("language_model.")]
            assert torch.equal(tensor[: len(old)], old), name
    assert not any("layers.1." in name for name in after if name.startswith("vision_tower."))  # the last one of two
    model = package.load("sees", threads=1, dtype="float32")
    scores = {
        name: {
            answer: model.module.logits_of(
                torch.tensor([*prompt.ids, *model.tokenizer.encode(answer)]),
                torch.arange(len(prompt.ids) + len(model.tokenizer.encode(answer))),
                torch.from_numpy(np.stack([p.pixels_CHW for p in prompt.pictures])),
            )[len(prompt.ids) - 1].log_softmax(-1)[model.tokenizer.encode(answer)[0]].item()
            for answer in SHADES
        }
        for name, colour in SHADES.items()
        if (prompt := model.prompt(shown(colour)))
    }  # fmt: skip
    for name, found in scores.items():
        assert max(found, key=found.__getitem__) == name, scores
    light = captions.parent / "pictures" / "0.png"
    status, _, err = craton("chat", "sees", "--image", light, "--max-tokens", "3", "--threads", "1", ASKED)
    assert status == 0, err


def test_gradients_reach_the_projector_alone(seeing_folders, tiny_model):
    vision, language = (Checkpoint.open(folder).load(torch.float32) for folder in (seeing_folders["clip"], tiny_model))
    assert isinstance(vision, DualEncoder)
    assert isinstance(language, CausalLM)
    tokenizer, token = seeing_tokenizer(Checkpoint.open(tiny_model).tokenizer())
    model = join(vision, language, token, seed=0)
    ids = torch.tensor([5, *[token] * model.config.picture_tokens, 7, 8])
    model.logits_of(ids, torch.arange(len(ids)), torch.randn(1, 3, 24, 24)).logsumexp(-1).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"projector.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")}
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in with_gradient)
    assert tokenizer.vocab_size == model.config.vocab
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_joined_model_without_pictures_is_the_language_model(seeing_folders, tiny_model):
    plain = Checkpoint.open(tiny_model).load(torch.float32)
    vision, language = (Checkpoint.open(folder).load(torch.float32) for folder in (seeing_folders["clip"], tiny_model))
    token = seeing_tokenizer(Checkpoint.open(tiny_model).tokenizer())[1]
    model = join(vision, language, token, seed=0)
    ids = torch.randint(0, plain.config.vocab, (40,))
    with torch.inference_mode():
        ours, theirs = model(ids, torch.arange(40)), plain(ids, torch.arange(40))
    assert torch.equal(ours[:, : plain.config.vocab], theirs)


CHATML = (
    "\n{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] | trim + '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
BY_PARTS = "{%- for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %};{% endfor -%}"  # noqa: E501


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=4),
    source=st.sampled_from([CHATML, BY_PARTS]),
)
def test_a_conversation_of_texts_is_written_as_before(texts: list[str], source: str) -> None:
    before = letters(source)
    after, _ = seeing_tokenizer(before)
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    old, new = ChatTemplate.of(before), ChatTemplate.of(after)
    for ready in (False, True):
        expected = old.render_text(messages, add_generation_prompt=ready)
        assert new.render_text(messages, add_generation_prompt=ready) == expected
        assert new.render_text(parts, add_generation_prompt=ready) == expected


def letters(template: str | None) -> Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "_": 1}, unk_token="_"))
    return Tokenizer(backend, chat_templates={} if template is None else {"default": template})


def test_smollm2s_template_goes_on_as_it_was(smollm2_gguf):
    before = Checkpoint.open(smollm2_gguf).tokenizer()
    after, token = seeing_tokenizer(before)
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert ChatTemplate.of(after).render(asked, after) == ChatTemplate.of(before).render(asked, before)
    assert token == before.vocab_size
    assert after.encode(f"a{IMAGE}b") == [*before.encode("a"), token, *before.encode("b")]
    assert seeing_tokenizer(letters(CHATML))[0].special_ids == {2}
    with pytest.raises(UsageError, match="no chat template"):
        seeing_tokenizer(letters(None))


def test_captions_become_conversations():
    value = {"image": "a.png", "caption": " A cat. "}
    (chat,) = as_chats([Record(value, "x.jsonl:1")], "What?")
    image, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}
    answer = {"role": "assistant", "content": "A cat."}
    assert chat.value == {"messages": [{"role": "user", "content": [image, text]}, answer]}
    (bare,) = as_chats([Record(value, "x.jsonl:1")], "")
    assert bare.value["messages"][0]["content"] == [image]


@pytest.mark.peer
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_what_is_published_opens_in_transformers(craton, captions, flags, seeing_folders, tower):
    transformers = pytest.importorskip("transformers")
    assert craton("pretrain-chat", captions, *flags(vision=seeing_folders[tower]))[0] == 0
    ours = package.load("sees", threads=1, dtype="float32")
    assert isinstance(ours.module, ImageChat)
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        ours.checkpoint.folder, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert all("post_layernorm" in name for name in info["missing_keys"])  # which nothing reads
    processor = transformers.AutoProcessor.from_pretrained(ours.checkpoint.folder)
    assert isinstance(processor, transformers.LlavaProcessor)
    pixels = np.random.default_rng(0).integers(0, 256, (31, 40, 3), dtype=np.uint8)
    asked = shown((0, 0, 0))
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(text=text, images=pixels, return_tensors="pt", add_special_tokens=False)
    asked[0]["content"][0]["image"] = pixels
    prompt = ours.prompt(asked)
    assert inputs["input_ids"][0].tolist() == prompt.ids
    seen = torch.from_numpy(prompt.pictures[0].pixels_CHW)[None]
    torch.testing.assert_close(inputs["pixel_values"], seen, atol=1e-5, rtol=1e-5)
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        expected = theirs(**inputs).logits[0]
        found = ours.module.logits_of(torch.tensor(prompt.ids), torch.arange(len(prompt.ids)), seen)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_a_run_that_was_stopped_is_the_run_that_was_not(craton, captions, flags):
    for name in ("whole", "cut"):
        status, _, err = craton("pretrain-chat", captions, *flags(save_every=3, keep_last=9, name=name))
        assert status == 0, err
    run = Run.open("cut")
    shutil.rmtree(run.checkpoints_folder / "step-00000006")
    again = resume(run)
    whole, cut = (load_file(path / "model.safetensors") for path in (find("whole").path, again.model.path))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    (captions.parent / "pictures" / "3.png").write_bytes(encode_png(np.zeros((9, 9, 3), np.uint8)))
    shutil.rmtree(run.checkpoints_folder / "step-00000006")
    with pytest.raises(Exception, match="changed"):
        resume(run)


def test_what_it_makes_is_taught_to_chat(craton, captions, flags):
    assert craton("pretrain-chat", captions, *flags())[0] == 0
    shows = {"type": "image", "image": "pictures/0.png"}
    chat = [{"role": "user", "content": [shows]}, {"role": "assistant", "content": "red"}]
    table = captions.with_name("chats.jsonl")
    table.write_text("\n".join([json.dumps({"messages": chat})] * 4))
    status, _, err = craton(
        "finetune", "sees", table, "--steps", "2", "--batch", "2", "--threads", "1", "--name", "taught"
    )
    assert status == 0, err
    status, _, err = craton(
        "chat",
        "taught",
        "--image",
        captions.parent / "pictures" / "0.png",
        "--max-tokens",
        "2",
        "--threads",
        "1",
        "red",
    )
    assert status == 0, err


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vision": "vit"}, "cannot be the vision tower"),
        ({"language": "clip"}, "cannot be the language model"),
        ({"language": "none"}, "--language"),
        ({"data": "missing"}, "7.png"),
        ({"data": "uncaptioned"}, "no caption"),
        ({"data": "texts"}, "shows a picture"),
        ({"max_tokens": 8}, "shows a picture"),
        ({"name": "No Name"}, "name"),
    ],
)
def test_wrong_use(craton, captions, flags, seeing_folders, changes, match):
    changes = dict(changes)
    wrong = changes.pop("data", None)
    if wrong == "missing":
        (captions.parent / "pictures" / "7.png").unlink()
    elif wrong == "uncaptioned":
        captions.write_text(captions.read_text().replace('"caption": "blue"', '"caption": ""', 1))
    elif wrong == "texts":
        captions.write_text('{"prompt": "what", "completion": "red"}\n' * 4)
    chosen = {key: seeing_folders.get(value, value) for key, value in changes.items()}
    words = flags(**chosen)
    if changes.get("language") == "none":
        at = words.index("--language")
        del words[at : at + 2]
    status, out, _ = craton("pretrain-chat", captions, *words, "--json")
    assert status == 2, out
    assert match in out
    if wrong in ("missing", "uncaptioned"):
        assert f"{captions}:" in out
