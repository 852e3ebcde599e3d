"""`craton ask`: a question answered from indexed documents, with the quotes that prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape

from craton.cli.index import DEFAULT_INDEX, IndexName, Where
from craton.cli.options import DEFAULT_CHAT_MODEL, DType, Json, Threads
from craton.cli.terminal import load_model, print_json, stderr, stdout

if TYPE_CHECKING:
    from craton.retrieval.ask import CitedAnswer


def ask(
    question: Annotated[str, Parameter(help="what to ask")],
    /,
    *,
    index: IndexName = DEFAULT_INDEX,
    model: Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")] = DEFAULT_CHAT_MODEL,
    passages: Annotated[int, Parameter(help="passages to show the model")] = 4,
    where: Where = (),
    mmr: Annotated[
        float | None, Parameter(help="weight of relevance against variety in choosing passages, 0 to 1 (none: 1)")
    ] = None,
    rerank: Annotated[
        str | None, Parameter(help="a cross-encoder (an encoder with one output) that puts the best 50 in order anew")
    ] = None,
    max_tokens: Annotated[int, Parameter(help="longest answer")] = 96,
    prompt: Annotated[bool, Parameter(negative="", help="also print the exact text that the model was sent")] = False,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Answer a question from the documents of an index. Every sentence of the answer has a quote that stands in its
    source, character for character; what has none is left out and shown as unproven."""
    from craton.retrieval.ask import ask as answer
    from craton.retrieval.filters import parse_filters
    from craton.retrieval.index import open_index
    from craton.retrieval.rerank import CrossEncoder

    with open_index(index, threads) as opened:
        chosen = parse_filters(where) if where else None
        reranker = CrossEncoder(rerank) if rerank is not None else None
        loaded = load_model(model, dtype=dtype, threads=threads, quiet=json)
        found = answer(
            opened,
            loaded,
            question,
            k=passages,
            where=chosen,
            mmr=mmr,
            rerank=reranker,
            max_tokens=max_tokens,
        )
    if json:
        print_json(found.as_dict())
        return
    _show(found, prompt)


def _show(found: CitedAnswer, prompt: bool) -> None:
    stdout.print(escape(found.text), soft_wrap=True)
    quotes = [one.quote for one in found.sentences if one.quote is not None]
    for number, quote in enumerate(quotes, 1):
        page = f", page {quote.page}" if quote.page is not None else ""
        place = f"{quote.document}{page}, characters {quote.start} to {quote.end}"
        stdout.print(f"  [dim]\\[{number}][/] “{escape(quote.text)}”", soft_wrap=True)
        stdout.print(
            f"      [dim]{escape(place)} · covers {quote.support:.0%} · score {quote.score:.2f}[/]", soft_wrap=True
        )
    for one in found.sentences:
        if one.quote is None:
            stderr.print(f"  [yellow]unproven, left out:[/] [dim]{escape(one.text)}[/]")
    for name in found.suspicious:
        stderr.print(f"  [yellow]note:[/] {escape(name)} speaks to a model; it was read as data, and nothing was done")
    if not found.found and found.sources:
        names = ", ".join(dict.fromkeys(source.document for source in found.sources))
        stderr.print(f"  [dim]nearest: {escape(names)}[/]")
    if prompt and found.prompt:
        stderr.print(f"\n[dim]{escape(found.prompt)}[/]")
    stderr.print(f"[dim]{found.prompt_tokens} tokens read, {found.completion_tokens} written, {found.seconds:.2f} s[/]")
