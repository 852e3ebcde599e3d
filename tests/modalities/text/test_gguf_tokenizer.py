"""Tokenizers out of GGUF metadata: against transformers, against llama.cpp's rules and against slow references."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from craton.errors import CratonError, FileFormatError, UnknownName
from craton.modalities.text import Tokenizer, tokenizer_from_gguf
from craton.modalities.text.gguf_tokenizer import merges_from_scores
from craton.modalities.text.pretokenizers import PRE_TOKENIZERS
from craton.modalities.text.token_pieces import byte_level_alphabet

FAST = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

HOSTILE = [
    "  double  spaces\t\ttabs \n\n\nnewlines \r\n mixed \u00a0 \u2003 \u3000 wide",
    "don't can't I'LL we'Ve 's'S ''' \"quoted\" (a) [b] {c} <d> $1+2=3^4~5|6`",
    "123 4567 ۱۲۳۴ ١٢٣ ½ ²³ Ⅷ ③ 1,234.56",
    "می‌خواهم کتاب‌های خوبی بخوانم؛ آیا می‌شود؟ «بله»",
    "👩‍👩‍👧‍👦🏳️‍🌈👋🏽 ☃️ \u200d\u200f\ufeff\x00\x1b[0m",
    "東京は日本の首都です。안녕하세요 สวัสดี हिन्दी",
    "e\u0301 é Ångström ﬁ İı ſ K",
    "def f(x):\n\treturn {k: v for k, v in x.items() if v != None}  # 3.14e-10\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <s> </s> <0x41> ▁under",
    "a" * 200 + " " * 50 + "!" * 50 + "\n" * 20,
]


def smollm2_reference(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """SmolLM2 put together by hand as its published tokenizer.json has it."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(tokens[:17])
    return backend


def test_real_file(smollm2: Tokenizer, smollm2_metadata: dict[str, Any]) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.unk_id, smollm2.pad_id) == (1, 0, 2)
    assert smollm2.eos_ids == (2, 0)
    assert smollm2.special_ids == set(range(17))
    assert not smollm2.adds_bos
    assert smollm2.chat_template == smollm2_metadata["tokenizer.chat_template"]


@pytest.mark.parametrize("text", HOSTILE)
def test_real_file_as_published(smollm2: Tokenizer, smollm2_metadata: dict[str, Any], text: str) -> None:
    reference = smollm2_reference(smollm2_metadata)
    ids = reference.encode(text).ids
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids) == reference.decode(ids)


@pytest.mark.peer
def test_real_file_as_in_transformers(smollm2: Tokenizer, smollm2_metadata: dict[str, Any], shared_data: Path) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"].items()
    entries = {
        name: smollm2_metadata[f"tokenizer.{key}"] for key, name in names if f"tokenizer.{key}" in smollm2_metadata
    }
    theirs, _ = mapping.convert_gguf_tokenizer("llama", entries)
    # transformers does not know the name "smollm" and forgets to cut digits apart.
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    wiki = (shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:100_000]
    persian = (shared_data / "parsinlu" / "text_fa.txt").read_text(encoding="utf-8")[:50_000]
    for text in [wiki, persian, Path(__file__).read_text(encoding="utf-8"), *HOSTILE]:
        ids = theirs.encode(text).ids
        assert smollm2.encode(text) == ids
        assert smollm2.decode(ids) == theirs.decode(ids)


# How words are cut


def words(name: str, text: str) -> list[bytes]:
    """The words, as bytes, that our pre-tokeniser of that name makes."""
    family = PRE_TOKENIZERS[name]
    description = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    description["pre_tokenizer"] = family.pre_tokenizer
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    alphabet = byte_level_alphabet()
    return [bytes(alphabet[c] for c in word) for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
ENGLISH = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
CL100K = (
    rf"(?:{ENGLISH})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's expressions, applied one after another to what the last one left.
LLAMA_CPP = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [CL100K % "{1,3}"],
    "dbrx": [CL100K % "{1,3}"],
    "qwen2": [CL100K % ""],
    "qwen35": [
        rf"(?:{ENGLISH})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}


def cut(text: str, expressions: list[str]) -> list[bytes]:
    """Cuts with another regular-expression engine."""
    regex = pytest.importorskip("regex")
    pieces = [text]
    for expression in expressions:
        pattern = regex.compile(expression)
        cut_pieces = []
        for piece in pieces:
            end = 0
            for match in pattern.finditer(piece):
                cut_pieces += [piece[end : match.start()], match.group()]
                end = match.end()
            cut_pieces.append(piece[end:])
        pieces = [piece for piece in cut_pieces if piece]
    return [piece.encode() for piece in pieces]


@pytest.mark.parametrize("name", LLAMA_CPP)
@pytest.mark.parametrize("text", [text for text in HOSTILE if "ſ" not in text])
def test_words_are_cut_as_in_llama_cpp(name: str, text: str) -> None:
    if name == "default":
        text = "".join(
            c for c in text if c.isascii()
        )  # its later steps see bytes in one program, characters in another
    assert words(name, text) == cut(text, LLAMA_CPP[name])


@pytest.mark.peer
@pytest.mark.parametrize("text", HOSTILE)
def test_words_are_cut_as_in_transformers(text: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    checked = 0
    for name, expression in mapping.GGUF_PRE_TOKENIZER_SPLITS.items():
        if name in PRE_TOKENIZERS:
            split = pre_tokenizers.Split(tokenizers.Regex(expression), behavior="isolated")
            assert words(name, text) == [word.encode() for word, _ in split.pre_tokenize_str(text)], name
            checked += 1
    assert checked >= 10


def test_words_of_families_without_another_implementation() -> None:
    assert words("deepseek-llm", "Hi there, 12é 漢字かな\n") == [
        w.encode() for w in ("Hi", " there", ",", " ", "1", "2", "é", " ", "漢字かな", "\n")
    ]
    # Falcon cuts digits by threes, from the left; and it does so among bytes.
    assert words("falcon", "In 12345, $9") == [w.encode() for w in ("In", " ", "123", "45", ",", " ", "$", "9")]
    assert words("bloom", "Hello, world! سلام، دنیا") == [
        w.encode() for w in ("Hello", ",", " world", "!", " سلام", "،", " دنیا")
    ]
    assert words("command-r", "a12") == [b"a", b"1", b"2"]


def test_composed_and_decomposed_letters(byte_level_metadata: dict[str, Any]) -> None:
    """Families that normalise read é the same however it is stored."""
    for pre, same in (("qwen2", True), ("command-r", True), ("smollm", False)):
        tokenizer = tokenizer_from_gguf(byte_level_metadata | {"tokenizer.ggml.pre": pre})
        assert (tokenizer.encode("e\u0301") == tokenizer.encode("é")) is same


# Byte-level BPE


def test_byte_level_bpe_is_the_tokenizer_it_was_written_from(
    byte_level: Tokenizer, byte_level_metadata: dict[str, Any]
) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata)
    for text in HOSTILE:
        assert tokenizer.encode(text) == byte_level.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|im_start|>", "").replace(
            "<|im_end|>", ""
        ).replace("<|endoftext|>", "")


def test_ignored_merges(byte_level_metadata: dict[str, Any]) -> None:
    """Llama 3 takes a word whole that the vocabulary has, though no merges lead to it."""
    tokens = [*byte_level_metadata["tokenizer.ggml.tokens"], "Ġzqx"]
    types = [*byte_level_metadata["tokenizer.ggml.token_type"], 1]
    metadata = byte_level_metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    whole = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False})
    assert whole.encode(" zqx") == [len(tokens) - 1]
    assert len(tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "dbrx"}).encode(" zqx")) > 1


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, [], []),
        ({"tokenizer.ggml.add_bos_token": True}, [1], []),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [1], [2]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [1], []),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, [], []),
    ],
)
def test_tokens_around_a_text(
    byte_level_metadata: dict[str, Any], changes: dict[str, Any], before: list[int], after: list[int]
) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata | changes)
    plain = tokenizer.encode("the fox", add_special_tokens=False)
    assert tokenizer.encode("the fox") == [*before, *plain, *after]
    assert tokenizer.adds_bos is bool(before)


def test_tokens_that_end_a_generation(byte_level_metadata: dict[str, Any]) -> None:
    tokens = [*byte_level_metadata["tokenizer.ggml.tokens"], "<|eot_id|>", "<end_of_turn>", "custom"]
    types = [*byte_level_metadata["tokenizer.ggml.token_type"], 3, 1, 3]
    size = len(tokens)
    metadata = byte_level_metadata | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": size - 1,
    }
    # <end_of_turn> is here an ordinary token, so it ends nothing.
    assert tokenizer_from_gguf(metadata).eos_ids == (0, size - 1, size - 3, 2)


def test_user_defined_tokens_are_matched_whole_and_shown(byte_level_metadata: dict[str, Any]) -> None:
    tokens = [*byte_level_metadata["tokenizer.ggml.tokens"], "<think>", "   "]
    types = [*byte_level_metadata["tokenizer.ggml.token_type"], 4, 4]
    tokenizer = tokenizer_from_gguf(
        byte_level_metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    )
    ids = tokenizer.encode("a<think>b   c")
    assert {len(tokens) - 2, len(tokens) - 1} <= set(ids)
    assert tokenizer.decode(ids) == "a<think>b   c"


def test_named_chat_templates(byte_level_metadata: dict[str, Any]) -> None:
    metadata = byte_level_metadata | {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_templates": ["tool_use", "missing"],
        "tokenizer.chat_template.tool_use": "tools",
    }
    assert tokenizer_from_gguf(metadata).chat_templates == {"default": "plain", "tool_use": "tools"}


# SentencePiece BPE


def sentencepiece_reference(metadata: dict[str, Any], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.mark.peer
def test_merges_are_those_that_transformers_derives(sentencepiece_metadata: dict[str, Any]) -> None:
    base = pytest.importorskip("transformers.tokenization_utils_base")
    tokens, scores = sentencepiece_metadata["tokenizer.ggml.tokens"], sentencepiece_metadata["tokenizer.ggml.scores"]
    types = sentencepiece_metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    not_text = {token for token, kind in zip(tokens, types, strict=True) if kind != 1}
    theirs = base.generate_merges(vocab, dict(zip(tokens, scores, strict=True)), skip_tokens=not_text)
    assert merges_from_scores(tokens, scores, types) == theirs
    # Equal scores are ordered by the lengths of the halves.
    flat = [-float(i // 7) for i in range(len(tokens))]
    theirs = base.generate_merges(vocab, dict(zip(tokens, flat, strict=True)), skip_tokens=not_text)
    assert merges_from_scores(tokens, flat, types) == theirs


@FAST
@given(text=st.one_of(st.sampled_from(HOSTILE), st.text()))
def test_sentencepiece_as_in_tokenizers(
    sentencepiece: Tokenizer, sentencepiece_metadata: dict[str, Any], text: str
) -> None:
    by_quality: dict[tuple[str, str], tuple[float, int, int]] = {}
    tokens = sentencepiece_metadata["tokenizer.ggml.tokens"]
    normal = set(tokens[259:])
    for token, score in zip(tokens, sentencepiece_metadata["tokenizer.ggml.scores"], strict=True):
        if token in normal:
            for at in range(1, len(token)):
                if {token[:at], token[at:]} <= normal:
                    by_quality[token[:at], token[at:]] = (score, at, len(token) - at)
    merges = sorted(by_quality, key=by_quality.__getitem__, reverse=True)
    reference = sentencepiece_reference(sentencepiece_metadata, merges)
    ids = reference.encode(text).ids
    assert sentencepiece.encode(text, add_special_tokens=False) == ids
    assert sentencepiece.decode(ids) == reference.decode(ids)


def greedy(text: str, metadata: dict[str, Any]) -> list[str]:
    """SentencePiece's own procedure, slowly: always join the two neighbours that make the best token."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    quality = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    text_tokens = {token for token, kind in zip(tokens, types, strict=True) if kind == 1}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        neighbours = enumerate(left + right for left, right in itertools.pairwise(pieces))
        pairs = [(quality[joined], -i) for i, joined in neighbours if joined in text_tokens]
        if not pairs:
            break
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [
        part
        for piece in pieces
        for part in ([piece] if piece in text_tokens else [f"<0x{byte:02X}>" for byte in piece.encode()])
    ]


def test_sentencepiece_as_sentencepiece_does_it(
    sentencepiece: Tokenizer, sentencepiece_metadata: dict[str, Any], lines: list[str]
) -> None:
    for text in [*lines[:5], "a quick 漢 word 🦊", "the the the", "unseen: ЖЩ ½"]:
        ids = sentencepiece.encode(text, add_special_tokens=False)
        assert [sentencepiece.backend.id_to_token(i) for i in ids] == greedy(text, sentencepiece_metadata)


def test_space_before_a_sentencepiece_text(sentencepiece_metadata: dict[str, Any]) -> None:
    with_space = tokenizer_from_gguf(sentencepiece_metadata)
    without = tokenizer_from_gguf(sentencepiece_metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert with_space.encode("the") == without.encode(" the")
    assert without.encode("the") != without.encode(" the")
    assert without.decode(without.encode(" the")) == " the"
    # After a special token a text begins anew.
    end = with_space.eos_ids[0]
    assert with_space.encode("</s>the", add_special_tokens=False) == [end, *with_space.encode("the")[1:]]


def test_words_that_look_like_byte_tokens_are_text(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("<0x41>", add_special_tokens=False)
    assert sentencepiece.backend.token_to_id("<0x41>") not in ids
    assert sentencepiece.decode(ids) == "<0x41>"


# WordPiece and unigram


@pytest.mark.parametrize("typed", [True, False])
def test_wordpiece_as_the_folder_it_came_from(minilm_folder: Path, typed: bool) -> None:
    folder = Tokenizer.from_folder(minilm_folder)
    tokens = [folder.backend.id_to_token(i) for i in range(folder.vocab_size)]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [
            t if i in folder.special_ids else t[2:] if t.startswith("##") else "▁" + t for i, t in enumerate(tokens)
        ],
        "tokenizer.ggml.bos_token_id": 101,
        "tokenizer.ggml.eos_token_id": 102,
        "tokenizer.ggml.seperator_token_id": 102,
        "tokenizer.ggml.unknown_token_id": 100,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 103,
    }
    if typed:
        kinds = [3 if i in folder.special_ids else 1 for i in range(len(tokens))]
        metadata |= {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.normalizer.lowercase": True}
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.special_tokens == folder.special_tokens
    assert tokenizer.eos_ids == ()
    for text in [*HOSTILE, "Réunion ÉCOLE [MASK] unaffable"]:
        ids = folder.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == folder.decode(ids)


def test_a_cased_wordpiece_vocabulary_keeps_case() -> None:
    tokens = ["[UNK]", "[CLS]", "[SEP]", "▁Paris", "▁paris", "s"]
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": tokens}
    assert tokenizer_from_gguf(metadata).encode("Paris pariss") == [1, 3, 4, 5, 2]
    metadata["tokenizer.ggml.normalizer.lowercase"] = True
    assert tokenizer_from_gguf(metadata).encode("Paris") == [1, 4, 2]


def test_unigram(lines: list[str]) -> None:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    tokenizer = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.tokens": [token for token, _ in vocab],
            "tokenizer.ggml.scores": [score for _, score in vocab],
            "tokenizer.ggml.token_type": [3, 3, 2, *([1] * (len(vocab) - 3))],
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 2,
            "tokenizer.ggml.padding_token_id": 0,
        }
    )
    for text in lines[:5]:
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == [*ids, 1]
        assert tokenizer.decode(ids) == backend.decode(ids)
    assert tokenizer.eos_ids == (1,)


# Wrong metadata


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer.ggml.model": None}, "describes no tokenizer"),
        ({"tokenizer.ggml.tokens": None}, "no whole tokenizer"),
        ({"tokenizer.ggml.tokens": "abc"}, "array was expected"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "not all text"),
        ({"tokenizer.ggml.merges": None}, "no whole tokenizer"),
        ({"tokenizer.ggml.merges": ["unheard of"]}, "cannot be built"),
        ({"tokenizer.ggml.merges": ["alone"]}, "cannot be built"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries"),
        ({"tokenizer.ggml.token_type": 1}, "array was expected"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "no id"),
        ({"tokenizer.ggml.eos_token_id": -1}, "no id"),
        ({"tokenizer.ggml.eot_token_id": "2"}, "no id"),
        ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "names none"),
    ],
)
def test_contradictory_metadata(byte_level_metadata: dict[str, Any], changes: dict[str, Any], complaint: str) -> None:
    metadata = {key: value for key, value in (byte_level_metadata | changes).items() if value is not None}
    with pytest.raises(FileFormatError, match=complaint) as refusal:
        tokenizer_from_gguf(metadata)
    assert "tokenizer.ggml" in str(refusal.value.where)


def test_a_token_listed_twice(byte_level_metadata: dict[str, Any]) -> None:
    tokens = list(byte_level_metadata["tokenizer.ggml.tokens"])
    tokens[9] = tokens[8]
    with pytest.raises(FileFormatError, match="listed twice"):
        tokenizer_from_gguf(byte_level_metadata | {"tokenizer.ggml.tokens": tokens})


def test_unknown_kinds_are_named(byte_level_metadata: dict[str, Any]) -> None:
    with pytest.raises(UnknownName, match="smolm") as refusal:
        tokenizer_from_gguf(byte_level_metadata | {"tokenizer.ggml.pre": "smolm"})
    assert "smollm" in str(refusal.value.remedy)
    with pytest.raises(UnknownName, match="rwkv"):
        tokenizer_from_gguf(byte_level_metadata | {"tokenizer.ggml.model": "rwkv"})


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
    st.lists(st.one_of(st.text(max_size=3), st.integers(), st.none()), max_size=4),
    st.dictionaries(st.text(), st.none()),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_metadata_escapes_the_error_tree(
    data: st.DataObject, byte_level_metadata: dict[str, Any], sentencepiece_metadata: dict[str, Any]
) -> None:
    whole = data.draw(st.sampled_from([byte_level_metadata, sentencepiece_metadata]))
    small = {key: value[:40] if isinstance(value, list) else value for key, value in whole.items()}
    small.pop("tokenizer.ggml.merges", None)
    small["tokenizer.ggml.merges"] = []
    keys = data.draw(st.lists(st.sampled_from(sorted({*small, "tokenizer.chat_templates"})), max_size=3))
    changed = small | {key: data.draw(JUNK) for key in keys}
    changed["tokenizer.ggml.model"] = data.draw(st.sampled_from(["gpt2", "llama", "bert", "t5"]))
    try:
        tokenizer = tokenizer_from_gguf(changed)
    except CratonError:
        return
    tokenizer.decode(tokenizer.encode("any text"))
