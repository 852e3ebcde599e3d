"""`craton tokenizer`: train a tokeniser, measure how well it fits a language, extend a model's by a new one."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import App, Parameter
from rich.markup import escape
from rich.table import Table

from craton.cli.corpus import interruptible, reading
from craton.cli.options import DEFAULT_CHAT_MODEL, Json
from craton.cli.terminal import print_json, size, stdout
from craton.cli.token_view import harmless, isolated
from craton.errors import UsageError

if TYPE_CHECKING:
    from craton.modalities.text import Tokenizer
    from craton.modalities.text.fertility import Measured

Rows = list[tuple[str, str]]

SHOWN_PIECES: Final = 8
SHOWN_LETTERS: Final = 4  # at least, for a piece to say something
WIDEST_NAME: Final = 24  # columns of a terminal
FERTILITY_LEGEND: Final = """\
tokens/word: all tokens over the words, which are runs of letters, digits, marks and joiners
whole words: one token covers the word · round trip: documents that decode to other than they were"""

tokenizer = App(name="tokenizer", help="Train a tokeniser, measure it, extend a model's by a new language.")

Out = Annotated[Path, Parameter(name=["--out", "-o"], help="the new folder")]
Lines = Annotated[bool, Parameter(negative="", help="text files hold one document a line")]


@tokenizer.command
def train(
    *corpus: Annotated[str, Parameter(help="files, folders, patterns, or hf:org/name[:split]")],
    out: Out,
    vocab: Annotated[str, Parameter(name=["--vocab", "-v"], help="tokens in all: 32000, 32k, 1m")] = "32k",
    kind: Annotated[
        Literal["bpe", "unigram"],
        Parameter(help="byte-level byte-pair encoding, or the likeliest cut into pieces, with bytes for the rest"),
    ] = "bpe",
    reserve: Annotated[int, Parameter(help="spare special tokens for later, <|reserved_0|> and so on")] = 0,
    lines: Lines = False,
    json: Json = False,
) -> None:
    """Learn a tokeniser on a corpus, with tokens for documents, chats and tools and a chat template.

    The same corpus gives the same files. The folder appears when it is complete.
    """
    from craton.checkpoints.save import save_tokenizer
    from craton.config import parse
    from craton.data.shard_building import new_folder
    from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer

    flags = {"vocab": _count(vocab, "--vocab"), "kind": kind, "reserve": reserve}
    settings = parse(TokenizerSettings, flags, where="the flags")
    began = time.monotonic()
    with new_folder(out) as folder, reading(corpus, lines, f"learning {settings.vocab:,} tokens") as texts:
        trained = interruptible(lambda: train_tokenizer(texts, settings))
        save_tokenizer(trained, folder)
    special, learnt = len(settings.special), trained.vocab_size
    if json:
        print_json(
            {
                "folder": str(out),
                "kind": kind,
                "vocab": learnt,
                "asked": settings.vocab,
                "special": special,
                "documents": texts.documents,
                "bytes": texts.bytes,
                "seconds": round(time.monotonic() - began, 3),
            }
        )
        return
    name = {"bpe": "byte-level BPE", "unigram": "Unigram"}[kind]
    rows = [
        ("read", texts.summary()),
        ("learnt", f"{learnt:,} tokens, {name}: {special} special, 256 bytes, {learnt - special - 256:,} pieces"),
    ]
    if learnt < settings.vocab:
        rows.append(("", f"[yellow]{settings.vocab:,} were asked for; the corpus is too small for more[/]"))
    rows += [
        ("such as", _pieces(trained, range(special + 256, learnt))),
        ("written", _written(out)),
        ("next", f"craton tokenizer fertility FILE --with {DEFAULT_CHAT_MODEL} {escape(str(out))}"),
    ]
    _print(rows)


@tokenizer.command
def fertility(
    *files: Annotated[str, Parameter(help="one for each language: files, folders, patterns, or hf:org/name[:split]")],
    beside: Annotated[
        list[str] | None,
        Parameter(
            name=["--with", "-w"],
            consume_multiple=True,
            negative="",
            help=f"models, or folders with a tokenizer.json (default: {DEFAULT_CHAT_MODEL})",
        ),
    ] = None,
    lines: Lines = False,
    json: Json = False,
) -> None:
    """Show what texts cost in tokens: for each word, for each byte, and how many words stay in one piece.

    A word is a run of letters, digits, marks and joiners. Fewer tokens are more context and more speed.
    """
    from craton.modalities.text.fertility import measure_fertility

    if not files:
        raise UsageError("there is no text to measure", remedy="craton tokenizer fertility FILE")
    tokenizers = {name: _tokenizer(name) for name in beside or [DEFAULT_CHAT_MODEL]}
    found: dict[str, Measured] = {}
    for file in files:
        with reading([file], lines, "counting") as texts:
            found[file] = interruptible(lambda texts=texts: measure_fertility(texts, tokenizers))  # type: ignore[misc]
    if json:
        print_json({"files": [_fertility_json(file, measured, tokenizers) for file, measured in found.items()]})
    else:
        _print_fertility(found, tokenizers)


@tokenizer.command
def extend(
    model: Annotated[str, Parameter(help="a name or a path")],
    /,
    *corpus: Annotated[str, Parameter(help="files, folders, patterns, or hf:org/name[:split]")],
    out: Out,
    add: Annotated[str, Parameter(help="new tokens: 8000, 8k")] = "8k",
    lines: Lines = False,
    json: Json = False,
) -> None:
    """Add a new language to a model's byte-level BPE, and rows to its embedding and head.

    Old tokens keep their ids, and texts without new pieces their tokens. A new row is the mean of the rows of the
    tokens that it stands for. The folder, in Hugging Face's layout, appears when it is complete.
    """
    import torch

    from craton import store
    from craton.checkpoints.checkpoint import Checkpoint
    from craton.checkpoints.save import save_checkpoint
    from craton.data.shard_building import new_folder
    from craton.modalities.text.fertility import measure_fertility
    from craton.modalities.text.tokenizer_extension import extend_tokenizer
    from craton.models import CausalLM, Encoder
    from craton.models.resize import resize_embeddings

    count = _count(add, "--add")
    checkpoint = Checkpoint.open(store.find(model).path)
    old = checkpoint.tokenizer()
    with new_folder(out) as folder, reading(corpus, lines, f"learning {count:,} pieces") as texts:
        extension = interruptible(lambda: extend_tokenizer(old, texts, count))
        new = extension.tokenizer
        texts.say("measuring")
        measured = measure_fertility(texts.sample, {"old": old, "new": new})
        texts.say("extending the model")
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(checkpoint.stored_kind(), torch.float32)
        module = checkpoint.load(dtype)
        if not isinstance(module, CausalLM | Encoder):
            raise UsageError(f"{model} is no language model or encoder", remedy="extend the model that it was made of")
        before = sum(parameter.numel() for parameter in module.parameters())
        resize_embeddings(module, max(module.config.vocab, new.vocab_size), extension.sources)
        after = sum(parameter.numel() for parameter in module.parameters())
        save_checkpoint(module, checkpoint.family, folder, tokenizer=new, pooling=checkpoint.pooling)
    per_word = [measured.tokens_per_word(name) for name in ("old", "new")]
    if json:
        print_json(
            {
                "folder": str(out),
                "added": len(extension.sources),
                "asked": count,
                "vocab": new.vocab_size,
                "parameters": after,
                "documents": texts.documents,
                "bytes": texts.bytes,
                "tokens_per_word": {"old": per_word[0], "new": per_word[1], "bytes": measured.bytes},
            }
        )
        return
    rows = [
        ("read", texts.summary()),
        ("learnt", f"{len(extension.sources):,} pieces on top of {old.vocab_size:,} tokens"),
    ]
    if len(extension.sources) < count:
        rows.append(("", f"[yellow]{count:,} were asked for; the corpus is too small for more[/]"))
    rows.append(("such as", _pieces(new, extension.sources)))
    if per_word[0] is not None and per_word[1] is not None:
        part = "of it" if measured.bytes == texts.bytes else f"of its first {size(measured.bytes)}"
        rows.append(("tokens", f"{per_word[0]:.2f} → {per_word[1]:.2f} for each word {part}"))
    rows += [
        ("model", f"{before / 1e6:.1f} → {after / 1e6:.1f} million parameters, {str(dtype).removeprefix('torch.')}"),
        ("written", _written(out)),
        ("next", "train it on the new language: its new rows are but means of old ones"),
        ("", f"craton tokenizer fertility FILE --with {escape(model)} {escape(str(out))}"),
    ]
    _print(rows)


def _count(text: str, flag: str) -> int:
    """A number of tokens as people write it: 32000, 32,000, 32k, 1.5m."""
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([km]?)", text.strip().lower())
    number = float(re.sub("[_,]", "", match[1])) * {"": 1, "k": 1e3, "m": 1e6}[match[2]] if match else 0.0
    if number < 1 or number != int(number):
        raise UsageError(f"{text!r} is not a number of tokens", where=flag, remedy="write 32000, 32k or 1m")
    return int(number)


def _tokenizer(name: str) -> Tokenizer:
    """The tokeniser of a model or in a folder, without its weights and without torch."""
    from craton import store
    from craton.checkpoints.gguf.reader import GGUFFile
    from craton.modalities.text import Tokenizer, tokenizer_from_gguf

    path = Path(name).expanduser()
    if not (path / "tokenizer.json").is_file():
        path = store.find(name).path
    if path.suffix == ".gguf":
        with GGUFFile.open(path) as file:
            return tokenizer_from_gguf(dict(file.metadata))
    return Tokenizer.from_folder(path if path.is_dir() else path.parent)


def _written(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return f"[bold]{escape(str(folder))}[/]: {len(files)} files, {size(sum(path.stat().st_size for path in files))}"


def _pieces(trained: Tokenizer, ids: Iterable[int]) -> str:
    """The first pieces that are words, or large parts of words."""
    shown: list[str] = []
    for token in ids:
        text = trained.decode([token]).strip()
        if sum(character.isalpha() for character in text) >= SHOWN_LETTERS and text not in shown:
            shown.append(text)
        if len(shown) == SHOWN_PIECES:
            break
    return " · ".join(escape(isolated(harmless(text))) for text in shown) or "no piece of four letters"


def _print(rows: Rows) -> None:
    for key, value in rows:  # no table: a command that is cut into lines cannot be copied
        stdout.print(f"[dim]{key:7}[/]  {value}", soft_wrap=True)


def _print_fertility(found: dict[str, Measured], tokenizers: dict[str, Tokenizer]) -> None:
    width = min(max(len(name) for name in tokenizers), WIDEST_NAME)
    for file, measured in found.items():
        told = f"[dim]· {measured.words:,} words, {size(measured.bytes)}[/]"
        stdout.print(f"[bold]{escape(harmless(file))}[/] {told}", soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("", min_width=width, max_width=WIDEST_NAME, overflow="fold")
        for column in ("vocab", "tokens", "tokens/word", "bytes/token", "whole words", "round trip"):
            table.add_column(column, justify="right", min_width=len("100,000"), no_wrap=True)
        costs = {name: measured.tokens_per_word(name) for name in tokenizers}
        least = min((cost for cost in costs.values() if cost is not None), default=None)
        for name, own in tokenizers.items():
            row, whole = measured.by_tokenizer[name], measured.whole_share(name)
            table.add_row(
                escape(harmless(name)),
                f"{own.vocab_size:,}",
                f"{row.tokens:,}",
                _number(costs[name]),
                _number(measured.bytes_per_token(name)),
                "–" if whole is None else f"{whole:.1%}",
                f"[yellow]{row.altered:,} altered[/]" if row.altered else "exact",
                style="green" if len(tokenizers) > 1 and costs[name] == least else None,
            )
        stdout.print(table)
        stdout.print()
    stdout.print(FERTILITY_LEGEND, style="dim")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _fertility_json(file: str, measured: Measured, tokenizers: dict[str, Tokenizer]) -> dict[str, Any]:
    rows = []
    for name, own in tokenizers.items():
        row, bytes_per_token = measured.by_tokenizer[name], measured.bytes_per_token(name)
        rows.append(
            {
                "tokenizer": name,
                "vocab": own.vocab_size,
                "tokens": row.tokens,
                "tokens_per_word": measured.tokens_per_word(name),
                "tokens_per_byte": bytes_per_token and 1 / bytes_per_token,
                "bytes_per_token": bytes_per_token,
                "words_whole": measured.whole_share(name),
                "exact": not row.altered,
                "altered_documents": row.altered,
            }
        )
    counts = {"documents": measured.documents, "bytes": measured.bytes, "words": measured.words}
    return {"file": file, **counts, "tokenizers": rows}
