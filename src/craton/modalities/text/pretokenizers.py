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

# The cased letters (Latin, Greek, Cyrillic, Georgian, Cherokee ...) as DeepSeek lists them. As numbers, because editors
# that normalise text would silently change some of the characters themselves.
_CASED_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 "
    "1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC "
    "1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 "
    "2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 "
    "2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 "
    "FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_DEEPSEEK_LETTERS = "".join("-".join(chr(int(end, 16)) for end in span.split("-")) for span in _CASED_LETTERS.split())
_DEEPSEEK_CJK = _isolate("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
_DEEPSEEK_LLM = (
    _isolate("[\r\n]"),
    _isolate(rf"\s?[{_DEEPSEEK_LETTERS}]+"),
    _isolate("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
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
    _isolate("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
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
