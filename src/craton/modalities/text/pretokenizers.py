"""How byte-level BPE families cut text into words before merging, under the names that GGUF files use.

A vocabulary is only right with the cut that its merges were learnt on, and GGUF stores just a name for it
(`tokenizer.ggml.pre`). Each entry is the `normalizer` and `pre_tokenizer` of the family's published tokenizer.json;
where programs differ about a name, the checkpoint's own file decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from craton.errors import UnknownName

Json = dict[str, Any]


def _isolate(regex: str) -> Json:
    """Each match, and each stretch between matches, becomes a word."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


_TO_BYTES = _byte_level(use_regex=False)
_GPT2_WORDS = _byte_level(use_regex=True)
_EACH_DIGIT: Json = {"type": "Digits", "individual_digits": True}
_DIGIT_RUNS: Json = {"type": "Digits", "individual_digits": False}
_PUNCTUATION_RUNS: Json = {"type": "Punctuation", "behavior": "Contiguous"}
_NFC: Json = {"type": "NFC"}


@dataclass(frozen=True)
class PreTokenizer:
    """normalizer, pre_tokenizer: as in tokenizer.json. ignore_merges: a word in the vocabulary is taken whole.

    adds_bos: what a GGUF file means that does not say whether texts begin with BOS.
    """

    normalizer: Json | None
    pre_tokenizer: Json
    ignore_merges: bool = False
    adds_bos: bool = False


def _family(*steps: Json, nfc: bool = False, ignore_merges: bool = False, adds_bos: bool = False) -> PreTokenizer:
    cut = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return PreTokenizer(_NFC if nfc else None, cut, ignore_merges, adds_bos)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_LLAMA3 = _isolate(_CL100K % "{1,3}")
_QWEN2 = _isolate(_CL100K % "")
_QWEN35 = _isolate(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES)

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%(suffix)s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%(suffix)s"
    rf"|\p{{N}}%(digits)s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_TEKKEN = _isolate(_CASED % {"suffix": "", "digits": ""})
_O200K = _isolate(_CASED % {"suffix": _CONTRACTIONS + "?", "digits": "{1,3}"})

# The letters of Latin, Greek, Cyrillic, Armenian, Georgian, Cherokee ... as DeepSeek lists them.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_CJK = _isolate("[一-龥ࠀ-一가-퟿]+")
_DEEPSEEK_LLM = (
    _isolate("[\r\n]"),
    _isolate(rf"\s?[{_DEEPSEEK_LETTERS}]+"),
    _isolate(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
    _isolate(r"\s+$"),
    _DEEPSEEK_CJK,
    _EACH_DIGIT,
    _TO_BYTES,
)
_DEEPSEEK_CODER = (
    _isolate("[\r\n]"),
    _isolate(r"\s?\p{L}+"),
    _isolate(r"\s?\p{P}+"),
    _DEEPSEEK_CJK,
    _EACH_DIGIT,
    _TO_BYTES,
)
_DEEPSEEK_V3 = (
    _isolate(r"\p{N}{1,3}"),
    _isolate("[一-龥぀-ゟ゠-ヿ]+"),
    _isolate(
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
    ),
    _TO_BYTES,
)
_FALCON = (_PUNCTUATION_RUNS, _GPT2_WORDS, _DIGIT_RUNS, _isolate("[0-9][0-9][0-9]"))
_BLOOM = (_isolate(r" ?[^(\s|[.,!?…。，、।۔،])]+"), _TO_BYTES)

_GPT2 = _family(_GPT2_WORDS)
_GPT_NEOX = _family(_GPT2_WORDS, nfc=True)
_SMOLLM = _family(_EACH_DIGIT, _GPT2_WORDS)
_LLAMA_BPE = _family(_LLAMA3, _TO_BYTES, ignore_merges=True, adds_bos=True)
_DBRX = _family(_LLAMA3, _TO_BYTES)
_QWEN = _family(_QWEN2, _TO_BYTES, nfc=True)
_GPT4O = _family(_O200K, _TO_BYTES)

# Of names that mean the same, the first is the one written to GGUF files.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "phi-2", "roberta-bpe"), _GPT2),
    **dict.fromkeys(("olmo", "mpt"), _GPT_NEOX),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _SMOLLM),
    "command-r": _family(_EACH_DIGIT, _GPT2_WORDS, nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA_BPE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _DBRX),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN),
    "qwen35": _family(_QWEN35, _TO_BYTES, nfc=True),
    "tekken": _family(_TEKKEN, _TO_BYTES, ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "deepseek-llm": _family(*_DEEPSEEK_LLM),
    "deepseek-coder": _family(*_DEEPSEEK_CODER),
    "deepseek-v3": _family(*_DEEPSEEK_V3),
    "falcon": _family(*_FALCON),
    "bloom": _family(*_BLOOM),
    # What files without a name are read with.
    "default": _family(_isolate(r"[\p{P}\$\+<=>\^~\|]+"), _GPT2_WORDS, _DIGIT_RUNS, _isolate("[0-9][0-9][0-9]")),
}


def pre_tokenizer(name: str, *, where: str) -> PreTokenizer:
    """The family of that name; UnknownName for one that is not in the table, because a guess gives wrong ids."""
    if name not in PRE_TOKENIZERS:
        raise UnknownName("pre-tokeniser", name, PRE_TOKENIZERS, where=where)
    return PRE_TOKENIZERS[name]
