"""Prompts with pictures: the engine reads them as the plain module does, and shares what may be shared."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tests.inference.native import test_step as native_tests
from tests.inference.test_engine import MODEL, TOKENIZER, VOCAB, make_engine

import craton
from craton.checkpoints.families import FAMILIES
from craton.checkpoints.save import save_checkpoint
from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear
from craton.errors import CheckpointError, CratonError, UsageError
from craton.inference import native
from craton.inference.engine import PREFILL_CHUNK, Engine, Request
from craton.inference.linears import prepare
from craton.inference.pictures import PromptPicture
from craton.inference.settings import SamplingSettings
from craton.inference.streaming import StreamWindow
from craton.modalities.image import ImagePreprocessing, encode_png
from craton.modalities.image.splitting import ImageSplitting
from craton.modalities.text import Tokenizer
from craton.models import ImageChat, ImageChatConfig, VisionConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig, replace_linears

IMAGE, SIDE = VOCAB - 2, 24


def make_seeing() -> ImageChat:
    torch.manual_seed(3)
    norm = NormConfig(kind="layer", bias=True)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=2, head_size=8, mask="full"),
        feedforward=FeedForwardConfig(hidden=24, activation="gelu", bias=True),
        norm=norm,
    )
    vision = VisionConfig(
        image=(SIDE, SIDE), patch=4, class_token=False, pooling="mean",
        trunk=TrunkConfig(width=16, layers=(layer,), final_norm=norm),
    )  # fmt: skip
    text = MODEL.config
    config = ImageChatConfig(
        **{name: getattr(text, name) for name in type(text).model_fields}, vision=vision, image_token=IMAGE
    )
    model = ImageChat(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    return model.requires_grad_(False).eval()


SEEING = make_seeing()
TOKENS = SEEING.config.picture_tokens  # 36


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, SIDE, SIDE)).astype(np.float32)


def words(seed: int, length: int) -> list[int]:
    return torch.randint(0, IMAGE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(*parts: int | list[int], **fields) -> Request:
    """A number is the seed of a picture, a list are tokens."""
    ids: list[int] = []
    pictures = []
    for part in parts:
        if isinstance(part, int):
            pictures.append(PromptPicture(len(ids), TOKENS, pixels(part)))
            ids += [IMAGE] * TOKENS
        else:
            ids += part
    return Request(
        ids, SamplingSettings(**{"max_tokens": 8, "logit_bias": {VOCAB - 1: -100.0}, **fields}), pictures=pictures
    )


def engine(slots: int = 8, **fields) -> Engine:
    return Engine(SEEING, TOKENIZER, dtype=torch.float32, slots=slots, **fields)


def naive(asked: Request) -> list[int]:
    """The answer by whole forward passes of the plain module."""
    out = list(asked.prompt)
    seen_ND = torch.cat([SEEING.see(torch.from_numpy(p.pixels_CHW)[None])[0] for p in asked.pictures])
    for _ in range(asked.settings.max_tokens or 1):
        at_T = torch.zeros(len(out), dtype=torch.bool)
        for picture in asked.pictures:
            at_T[picture.at : picture.end] = True
        hidden = SEEING.hidden(torch.tensor(out), torch.arange(len(out)), seen_T=at_T, seen_ND=seen_ND)
        logits = SEEING.logits(hidden[-1:])[0]
        logits[VOCAB - 1] = -100.0
        out.append(int(logits.argmax()))
    return out[len(asked.prompt) :]


def tokens(generation) -> list[int]:
    return [token.id for token in generation.wait().tokens]


LONG = request(words(1, 9), 1, words(2, PREFILL_CHUNK - 20), 2, 3, words(3, PREFILL_CHUNK), 4, words(4, 3))


@pytest.mark.parametrize(
    "asked",
    [
        request(words(1, 5), 1, words(2, 4)),
        request(1, words(2, 4)),
        request(words(2, 4), 1),
        request(words(5, PREFILL_CHUNK - 5), 1, 2, [7]),
        LONG,
    ],
)
def test_the_answer_is_that_of_whole_forward_passes(asked):
    assert tokens(engine().submit(asked)) == naive(asked)


def test_the_logits_are_the_plain_modules():
    generation = engine().submit(request(words(1, 9), 1, words(2, 300), 2, [5, 6], max_tokens=1, logprobs=20))
    [token] = generation.wait().tokens
    asked = generation.request
    at_T = torch.tensor(asked.prompt) == IMAGE
    seen_ND = torch.cat([SEEING.see(torch.from_numpy(p.pixels_CHW)[None])[0] for p in asked.pictures])
    hidden = SEEING.hidden(torch.tensor(asked.prompt), torch.arange(len(at_T)), seen_T=at_T, seen_ND=seen_ND)
    expected = SEEING.logits(hidden[-1:])[0].log_softmax(-1)
    for number, logprob in token.top_logprobs:
        assert logprob == pytest.approx(float(expected[number]), abs=1e-5)


def test_other_pixels_are_another_answer():
    first, second = (naive(request(words(1, 5), seed, words(2, 4), max_tokens=20)) for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_alone_or_beside_texts_and_other_pictures_the_same(slots):
    asked = [request(words(i, 4 + 30 * i), i, words(i + 50, 5), max_tokens=6 + i) for i in range(5)]
    texts = [Request(words(i, 10 + i), SamplingSettings(max_tokens=9)) for i in range(4)]
    mixed = [one for pair in zip(asked, [*texts, texts[0]], strict=True) for one in pair]
    alone = [tokens(engine().submit(one)) for one in mixed]
    together = engine(slots)
    running = [together.submit(one) for one in mixed]
    assert [tokens(one) for one in running] == alone
    together.check()


def test_the_same_picture_is_found_in_the_cache_and_another_never_is():
    one = engine(slots=1)
    first = one.submit(request(words(1, 40), 1, words(2, 9))).wait()
    again = one.submit(request(words(1, 40), 1, words(2, 9))).wait()
    assert again.cached_tokens == 40 + TOKENS + 8
    other = one.submit(request(words(1, 40), 2, words(2, 9))).wait()
    assert other.cached_tokens == 40
    assert tokens(other) == naive(other.request)
    back = one.submit(request(words(1, 40), 1, words(2, 9))).wait()  # from the store, in whole blocks
    assert back.cached_tokens >= 64
    assert tokens(back) == tokens(again) == tokens(first)


def test_ids_of_image_tokens_without_a_picture_share_nothing_with_one():
    one = engine(slots=1)
    one.submit(request(words(1, 40), 1, words(2, 9))).wait()
    plain = one.submit(Request([*words(1, 40), *[IMAGE] * TOKENS, 3], SamplingSettings(max_tokens=3))).wait()
    assert plain.cached_tokens == 40


def test_pictures_are_looked_at_only_where_they_are_read(monkeypatch):
    looked = []
    see = ImageChat.see
    monkeypatch.setattr(ImageChat, "see", lambda self, given: looked.append(1) or see(self, given))
    one = engine()
    first = one.submit(request(words(1, 40), 1, words(2, 9))).wait()
    assert len(looked) == 1
    longer = Request([*first.ids, *words(8, 5)], SamplingSettings(max_tokens=4), pictures=first.request.pictures)
    second = one.submit(longer).wait()
    assert second.cached_tokens == len(first.ids) - 1
    assert len(looked) == 1


def test_several_with_one_beginning_wait_for_the_first_to_read_it(monkeypatch):
    one = engine()
    running = [one.submit(request(words(1, 40), seed, words(2, 9))) for seed in (1, 1, 2)]
    assert [tokens(g) for g in running] == [naive(g.request) for g in running]
    assert running[1].cached_tokens == 40 + TOKENS + 8
    assert running[2].cached_tokens == 40


def test_what_gave_up_its_slot_reads_its_pictures_again():
    asked = request(words(1, 20), 1, words(2, 40), max_tokens=20)
    one = engine(slots=1)
    low = one.submit(asked)
    while len(low.tokens) < 5:
        one.step()
    high = Request(words(9, 30), SamplingSettings(max_tokens=4), priority=1)
    one.submit(high).wait()
    assert tokens(low) == naive(asked)
    one.check()


def test_wrong_places_and_blind_models_are_refused():
    asked = request(words(1, 5), 1, words(2, 4))
    with pytest.raises(UsageError, match="sees nothing"):
        make_engine().submit(asked)
    moved = [PromptPicture(4, TOKENS, pixels(1))]
    with pytest.raises(UsageError, match="image tokens"):
        engine().submit(Request(asked.prompt, pictures=moved))
    with pytest.raises(UsageError, match="image tokens"):
        engine().submit(Request(asked.prompt, pictures=[*asked.pictures, *asked.pictures]))
    with pytest.raises(UsageError, match="image tokens"):
        engine().submit(Request(asked.prompt, pictures=[PromptPicture(5, TOKENS - 1, pixels(1))]))
    with pytest.raises(UsageError, match="window"):
        engine(stream=StreamWindow(128, 4)).submit(asked)


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
def test_packed_weights_read_pictures_by_torch_and_write_by_the_native_step():
    text = native_tests.make(native_tests.layer(), native_tests.layer(), tied=False).config
    fields = {name: getattr(text, name) for name in type(text).model_fields}
    torch.manual_seed(1)
    plain = ImageChat(ImageChatConfig(**fields, vision=SEEING.config.vision, image_token=IMAGE)).requires_grad_(False)
    for parameter in plain.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)

    def packed(name: str, module: torch.nn.Module) -> torch.nn.Module:
        table = native_tests.quantized(module.weight, "Q8_0")
        return QuantizedEmbedding(table, torch.float32) if name == "embedding" else QuantizedLinear(table, None)

    replace_linears(plain, lambda name, _: name in ("embedding", "head") or (name.startswith("trunk.layers.") and
                    name.rpartition(".")[2] in ("q", "k", "v", "o", "up", "gate", "down")), packed)  # fmt: skip
    fast = copy.deepcopy(plain)
    prepare(fast, prepack=False, tiles=False, release=lambda: None)
    one = Engine(fast, TOKENIZER, dtype=torch.float32, native_threads=1)
    assert one._step is not None
    asked = request(words(1, 9), 1, words(2, 150), 2, [5, 6], max_tokens=5, logprobs=5)
    written = one.submit(asked).wait()
    ids = torch.tensor(written.ids)
    vectors = plain.see(torch.from_numpy(np.stack([p.pixels_CHW for p in asked.pictures]))).flatten(0, 1)
    hidden = plain.hidden(ids, torch.arange(len(ids)), seen_T=ids == IMAGE, seen_ND=vectors)
    expected = plain.logits(hidden).log_softmax(-1)
    blind = plain(ids, torch.arange(len(ids))).log_softmax(-1)
    errors = [
        [abs(logprob - float(logits[len(asked.prompt) - 1 + i, number])) for logits in (expected, blind)]
        for i, token in enumerate(written.tokens)
        for number, logprob in token.top_logprobs
    ]
    seen, unseen = np.mean(errors, 0)
    assert seen < 0.05 < 0.3 < unseen


# From messages to a prompt, with a whole checkpoint of a random model.

SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
SPECIAL = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", *ROWS]
LONGEST = 3 * SIDE


def byte_tokenizer(template: str) -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}
    return Tokenizer(backend, special_tokens=names, chat_templates={"default": template})


def write_seeing(folder: Path, kind: str = "smolvlm") -> Path:
    """A checkpoint of a small random model that sees, SmolVLM or LLaVA."""
    split, tokenizer = kind == "smolvlm", byte_tokenizer(SMOLVLM_TEMPLATE if kind == "smolvlm" else LLAVA_TEMPLATE)
    image = tokenizer.backend.token_to_id("<image>")
    vision = SEEING.config.vision
    layer = vision.trunk.layers[0]
    layer = layer.model_copy(update={"attention": layer.attention.model_copy(update={"bias": ("q", "k", "v", "o")})})
    norm = layer.norm
    trunk = TrunkConfig(
        width=16, layers=(layer,), final_norm=norm if split else None, input_norm=None if split else norm
    )  # fmt: skip
    changed = {"trunk": trunk} | ({} if split else {"class_token": True, "patch_bias": False, "pooling": "cls"})
    config = SEEING.config.model_copy(
        update={
            "vocab": tokenizer.backend.get_vocab_size(),
            "image_token": image,
            "vision": vision.model_copy(update=changed),
            "shuffle": 2 if split else 1,
            "projector": "linear" if split else "mlp",
        }
    )
    torch.manual_seed(5)
    model = ImageChat(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    family = {family.name: family for family in FAMILIES}[kind]
    whole = ImagePreprocessing(size=(SIDE, SIDE), filter="lanczos")
    save_checkpoint(model, family, folder, tokenizer=tokenizer, preprocessing=None if split else whole)
    if split:
        splitting = ImageSplitting(longest=LONGEST, tile=SIDE, whole=whole)
        (folder / "preprocessor_config.json").write_text(json.dumps(splitting.to_hf()))
    return folder


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    return craton.load(write_seeing(tmp_path_factory.mktemp("smolvlm")), threads=1)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return craton.load(write_seeing(tmp_path_factory.mktemp("llava"), "llava"), threads=1)


def test_a_model_of_texts_is_shown_no_picture(tiny_model):
    model = craton.load(str(tiny_model), threads=1)
    assert not model.sees
    with pytest.raises(UsageError, match="does not see"):
        model.chat(asking("What?", photo(1, 24, 24)))


def photo(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def asking(*parts) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def test_a_conversation_with_pictures_is_answered_from_them(smolvlm, llava, tmp_path):
    for model in (smolvlm, llava):
        assert model.sees
        one, two = photo(1, 50, 40), photo(2, 24, 70)
        (tmp_path / "one.png").write_bytes(encode_png(one))
        messages = asking("What is ", one, " and ", two, "?")
        prompt = model.prompt(messages)
        said = model.chat(messages, max_tokens=12)
        assert said.prompt_tokens == len(prompt.ids)
        logits = model.module.logits_of(
            torch.tensor(prompt.ids),
            torch.arange(len(prompt.ids)),
            torch.from_numpy(np.stack([p.pixels_CHW for p in prompt.pictures])),
        )
        assert said.choices[0].tokens[0].id == int(logits[-1].argmax())
        for same in (tmp_path / "one.png", encode_png(one)):
            assert model.chat(asking("What is ", same, " and ", two, "?"), max_tokens=12).text == said.text
        messages[0]["content"][1]["image"] = str(tmp_path / "one.png")
        assert model.chat(messages, max_tokens=12).text == said.text
        other = model.chat(asking("What is ", two, " and ", one, "?"), max_tokens=12)
        assert [t.id for t in other.choices[0].tokens] != [t.id for t in said.choices[0].tokens]


def test_a_text_alone_is_what_the_template_says_of_parts(smolvlm):
    expected = "<|im_start|>User: Hello<end_of_utterance>\nAssistant:"
    assert smolvlm.prompt([{"role": "user", "content": "Hello"}]).text == expected
    assert smolvlm.prompt(asking("Hello")).text == expected
    assert smolvlm.chat(asking("Hello"), max_tokens=3).prompt_tokens == len(smolvlm.render(asking("Hello")))


def test_several_turns_and_answers_share_what_was_seen(smolvlm):
    messages = asking("See ", photo(4, 30, 60), "?")
    first = smolvlm.chat(messages, max_tokens=4, logit_bias={smolvlm.tokenizer.eos_ids[0]: -100.0})
    longer = [*messages, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And now?"}]
    second = smolvlm.chat(longer, max_tokens=4, n=2, temperature=1.0, seed=1)
    assert second.cached_tokens >= first.prompt_tokens - 1
    assert len(second.choices) == 2


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (asking("What is <image>?"), "1 places for 0 pictures"),
        (asking("What is <image>?", photo(1, 24, 24)), "2 places for 1 pictures"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has no picture"),
        ([{"role": "user", "content": [{"type": "image", "image": 5}]}], "not int"),
        (asking("What?", photo(1, 24, 24).astype(np.float32)), "uint8"),
        (asking("What?", "a", b"no picture"), "not a picture"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "audio"),
        ([], "no messages"),
        ("hello", "list of messages"),
        ([5], "object"),
    ],
)
def test_bad_conversations_say_what_is_wrong(smolvlm, messages, said):
    with pytest.raises(CratonError, match=said):
        smolvlm.prompt(messages)


def test_a_template_that_drops_a_picture_is_noticed(tmp_path):
    folder = write_seeing(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for template, said in (
        ("{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}", "0 places"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no place for pictures"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        with pytest.raises(UsageError, match=said):
            craton.load(folder, threads=1).prompt(asking("What?", photo(1, 24, 24)))


def test_a_processor_of_another_model_is_noticed(tmp_path):
    folder = write_seeing(tmp_path)
    splitting = ImageSplitting(longest=80, tile=40, whole=ImagePreprocessing(size=(40, 40), filter="lanczos"))
    (folder / "preprocessor_config.json").write_text(json.dumps(splitting.to_hf()))
    with pytest.raises(CheckpointError, match="40 x 40"):
        craton.load(folder, threads=1).prompt(asking("What?", photo(1, 24, 24)))


@pytest.mark.peer
@pytest.mark.parametrize("shape", [(50, 40), (24, 24), (30, 90), (10, 7)])
def test_the_prompt_is_that_of_transformers(smolvlm, shape):
    transformers = pytest.importorskip("transformers")
    from PIL import Image
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    folder = smolvlm.checkpoint.folder
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    processor = transformers.Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(folder), tokenizer, image_seq_len=9, chat_template=SMOLVLM_TEMPLATE
    )
    pictures = [photo(7, *shape), photo(8, 30, 33)]
    messages = asking("What is ", pictures[0], " and ", pictures[1], "?")
    shown = [
        {**m, "content": [p if p["type"] == "text" else {"type": "image"} for p in m["content"]]} for m in messages
    ]
    text = processor.apply_chat_template(shown, add_generation_prompt=True)
    theirs = processor(text=text, images=[Image.fromarray(p) for p in pictures], return_tensors="np")
    ours = smolvlm.prompt(messages)
    assert ours.ids == theirs["input_ids"][0].tolist()
    pixels_NCHW = np.stack([p.pixels_CHW for p in ours.pictures])
    assert np.abs(pixels_NCHW - theirs["pixel_values"][0]).max() < 1e-5
    logits = (
        transformers.AutoModelForImageTextToText.from_pretrained(folder)
        .eval()(**{key: torch.from_numpy(value) for key, value in theirs.items()})
        .logits[0, -1]
    )
    assert smolvlm.chat(messages, max_tokens=1).choices[0].tokens[0].id == int(logits.argmax())
