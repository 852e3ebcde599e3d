"""How much does a model lose in fewer bits and with zeros, and which method loses least?

Cases (perplexity of WikiText-2, less is better; limit: the model as it is)
    int8                 8 bits, symmetric; peers: none but the limit
    4-bit, 3-bit, 2-bit  GPTQ; peers in the same run: rounding to nearest (RTN), AWQ, HQQ
    4-bit/tuned          AWQ and 200 steps of SignRound a block, on 64 windows of other articles of the same file;
                         peers: AWQ and rounding to nearest alone, on the same text
    4-bit/other text     GPTQ calibrated on Shakespeare's plays; peer: on Python's docstrings, as by default
    50% zeros, 2:4 zeros SparseGPT; peers: Wanda, magnitude; on other articles of the same file

How the figures are made
    SmolLM2-135M-Instruct comes as a GGUF file of 4 bits, on whose grid rounding would cost nothing. It is moved off the
    grid first: norms and the columns behind them, and the rows before and the columns behind each feed-forward's
    product, get scales drawn around 1 that cancel, so that the function stays what it was (the limit is measured after
    it). What is compared is what the methods make of the same weights, with the same groups of 32 and the same text:
    32 windows of 512 tokens of Python's own docstrings. The perplexity is that of the first 16 windows of the
    validation text, each window on its own. Weights do not pass through a file here; that what is read again equals
    what was made is checked by every `craton quantize` and by its tests.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Case, Document, case, machine, parser, report
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.save import save_checkpoint
from craton.compression import prune, quantize
from craton.compression.blocks import Source, Stream, linear_names, open_source
from craton.compression.calibration import read_calibration
from craton.compression.grids import Form
from craton.compression.layers import choose_layers
from craton.compression.sparsity import parse_pattern
from craton.compression.walk import Refine, Work, walk
from craton.models import CausalLM
from craton.store import find

SHARED = Path(__file__).parents[2] / "shared" / "data"
MODEL = "smollm2-135m-instruct"
PACKAGES = ("craton", "torch")
GROUP, WINDOW = 32, 512
TUNING, TUNING_WINDOWS = 200, 64  # steps a block, and the windows that they draw from
SPREAD = 0.05  # of the logarithms of the scales: off the grid, and no channel much larger than its neighbours
METHODS = {"GPTQ": "gptq", "RTN": "rtn", "AWQ": "awq", "HQQ": "hqq"}


@dataclass(frozen=True)
class Bench:
    """A model off its grid, the text it is judged by, and the text to calibrate with, by its name."""

    source: Source
    judged_NT: Tensor
    calibration: dict[str, Tensor]
    limit: float

    def run(
        self, work: Work, text: str | None, *, gram: bool = True, refine: Refine | None = None
    ) -> tuple[float, float]:
        """Perplexity, and seconds: work on every block, calibrated with this text (none: without)."""
        started = time.perf_counter()
        followers = Stream(self.source.backbone, self.judged_NT)
        calibration = Stream(self.source.backbone, self.calibration[text]) if text is not None else None
        with tempfile.TemporaryDirectory() as folder:
            walk(
                self.source,
                Path(folder),
                work,
                calibration,
                [followers],
                names_of=linear_names,
                gram=gram,
                int8_inputs=False,
                refine=refine,
                on_progress=lambda doing: print(f"\r{doing:<70}", end="", file=sys.stderr, flush=True),
            )
        print(file=sys.stderr)
        return perplexity(self.source, followers, self.judged_NT), time.perf_counter() - started


def main() -> int:
    """Run the cases whose data is here, and report."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--only", metavar="TEXT", default="", help="only cases whose name holds this text")
    arguments = flags.parse_args()
    document: Document = {"machine": machine(PACKAGES), "cases": {}}
    text = SHARED / "wikitext2" / "valid.txt"
    if not text.is_file():
        print(f"no cases: {text} is not there", file=sys.stderr)
        report(document, arguments.json)
        return 0
    with tempfile.TemporaryDirectory() as home:
        bench = set_up(Path(home), text, quick=arguments.quick)
        for name, make in cases(bench, quick=arguments.quick):
            if arguments.only in name:
                print(name, file=sys.stderr, flush=True)
                document["cases"][name] = make()
                print(document["cases"][name], file=sys.stderr, flush=True)
    report(document, arguments.json)
    return 0


def cases(bench: Bench, *, quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name, what measures it)."""
    if quick:
        yield "4-bit", lambda: quantized(bench, 4, ("GPTQ", "RTN"))
        return
    yield "int8", lambda: quantized(bench, 8, ("RTN",))
    for bits in (4, 3, 2):
        yield f"{bits}-bit", lambda bits=bits: quantized(bench, bits, tuple(METHODS))
    yield "4-bit/tuned", lambda: tuned(bench)
    if "Shakespeare" in bench.calibration:
        yield "4-bit/other text", lambda: other_text(bench)
    yield "50% zeros", lambda: pruned(bench, "0.5")
    yield "2:4 zeros", lambda: pruned(bench, "2:4")


def quantized(bench: Bench, bits: int, contenders: tuple[str, ...]) -> Case:
    """Perplexities of the methods at so many bits; the first contender is ours."""
    figures, settings = {}, {}
    for name in contenders:
        work = work_of(bench.source, METHODS[name], bits)
        figures[name], seconds = bench.run(work, "docstrings" if name in ("GPTQ", "AWQ") else None)
        settings[name] = f"({seconds:.0f} s)"
    first, *_ = contenders
    return perplexities(bench, figures.pop(first), figures, {"Craton": f"{first} {settings.pop(first)}", **settings})


def tuned(bench: Bench) -> Case:
    """Rounding trained by what blocks give, beside what it begins with."""
    figures, settings = {}, {}
    for name, method, steps in (("RTN", "rtn", 0), ("AWQ", "awq", 0), ("tuned", "awq", TUNING)):
        work, refine = work_of(bench.source, method, 4), quantize.block_tuning(steps, names(bench.source))
        figures[name], seconds = bench.run(work, "more WikiText" if method == "awq" else None, refine=refine)
        settings[name] = f"({seconds:.0f} s)"
    return perplexities(bench, figures.pop("tuned"), figures, {"Craton": f"tuned {settings.pop('tuned')}", **settings})


def other_text(bench: Bench) -> Case:
    """What the choice of the text to calibrate with does."""
    work = work_of(bench.source, "gptq", 4)
    ours, peer = (bench.run(work, text)[0] for text in ("Shakespeare", "docstrings"))
    return perplexities(bench, ours, {"docstrings": peer}, {"Craton": "calibrated on Shakespeare"})


def pruned(bench: Bench, sparsity: str) -> Case:
    """Perplexities of the pruning methods."""
    pattern, published = parse_pattern(sparsity), names(bench.source)
    figures = {}
    for name, method in {"SparseGPT": "sparsegpt", "Wanda": "wanda", "magnitude": "magnitude"}.items():
        work = prune.block_work(bench.source, method, pattern, published)  # type: ignore[arg-type]
        text = None if method == "magnitude" else "WikiText"  # what makes up for a loss fits the text that it saw
        figures[name], _ = bench.run(work, text, gram=method == "sparsegpt")
    return perplexities(bench, figures.pop("SparseGPT"), figures, {"Craton": "SparseGPT"})


def work_of(source: Source, method: str, bits: int) -> Work:
    """Quantising all matrices alike, with zeros where `craton quantize` has them by default."""
    settings = quantize.QuantizeSettings(method=method, bits=bits, group=GROUP)  # type: ignore[arg-type]
    published = names(source)
    forms = dict.fromkeys(published, Form(bits, GROUP, settings.symmetric(bits)))
    return quantize.block_work(source, settings.method, forms, published)


def names(source: Source) -> dict[str, str]:
    """The matrices of the blocks, by their names here and in the files."""
    return {one.name: one.published for one in choose_layers(source, ["lm_head"]).matrices}


def perplexities(bench: Bench, ours: float, peers: dict[str, float], settings: dict[str, str]) -> Case:
    """A case whose limit is the model as it is."""
    return case(ours, peers, "perplexity", less_is_better=True, limit=bench.limit, settings=settings)


# --- the model and the text ---------------------------------------------------------------------------------------


def set_up(home: Path, text: Path, *, quick: bool) -> Bench:
    """The model off its grid in a folder, opened as `craton quantize` opens one, and the texts."""
    checkpoint = Checkpoint.open(find(MODEL).path)
    model = checkpoint.load(torch.float32)
    assert isinstance(model, CausalLM)
    move_off_the_grid(model)
    tokenizer = checkpoint.tokenizer()
    save_checkpoint(model, checkpoint.family, home / "base", tokenizer=tokenizer)
    source = open_source(Checkpoint.open(home / "base"))
    window, judged, samples = (256, 4, 8) if quick else (WINDOW, 16, 32)
    ids = tokenizer.encode(text.read_text(encoding="utf-8")[: judged * window * 8], add_special_tokens=False)
    judged_NT = torch.tensor(ids[: judged * window]).view(judged, window)
    calibration = {"docstrings": read_calibration(tokenizer, [], window=window, samples=samples, seed=0).ids_NT}
    for name, count in (("WikiText", samples), ("more WikiText", samples if quick else TUNING_WINDOWS)):
        # From the end of the text, far from what is judged.
        ids = tokenizer.encode(text.read_text(encoding="utf-8")[-count * window * 8 :], add_special_tokens=False)
        calibration[name] = torch.tensor(ids[-count * window :]).view(count, window)
    plays = SHARED / "tinyshakespeare" / "input.txt"
    if plays.is_file() and not quick:
        found = read_calibration(tokenizer, [str(plays)], window=window, samples=samples, seed=0)
        calibration["Shakespeare"] = found.ids_NT
    stream = Stream(source.backbone, judged_NT)
    for number, block in enumerate(source.backbone.trunk.layers):
        stream.advance(block, number)  # type: ignore[arg-type]
    limit = perplexity(source, stream, judged_NT)
    print(f"perplexity as it is: {limit:.3f}", file=sys.stderr, flush=True)
    return Bench(source, judged_NT, calibration, limit)


@torch.no_grad()
def move_off_the_grid(model: CausalLM) -> None:
    """Scales that cancel, into every block of a Llama-like model in fp32."""
    generator = torch.Generator().manual_seed(0)

    def drawn(size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * SPREAD).exp()

    for block in model.trunk.layers:
        attention, feedforward = block.attention, block.feedforward
        readers = {
            block.attention_norm["input"]: (attention.q, attention.k, attention.v),
            block.feedforward_norm["input"]: (feedforward.gate, feedforward.up),
        }
        for norm, linears in readers.items():
            scales_I = drawn(len(norm.weight))
            norm.weight /= scales_I
            for linear in linears:
                linear.weight *= scales_I
        scales_F = drawn(feedforward.up.out_features)
        feedforward.up.weight /= scales_F[:, None]
        feedforward.down.weight *= scales_F


@torch.no_grad()
def perplexity(source: Source, stream: Stream, ids_NT: Tensor) -> float:
    """From hidden states after the last block."""
    model = source.model
    assert isinstance(model, CausalLM)
    norm = model.trunk.final_norm
    hidden_TD = stream.hidden_TD if norm is None else norm(stream.hidden_TD)
    total = 0.0
    for hidden_SD, ids_T in zip(hidden_TD.view(*ids_NT.shape, -1), ids_NT, strict=True):
        total += float(F.cross_entropy(model.logits(hidden_SD[:-1]), ids_T[1:], reduction="sum"))
    return math.exp(total / (ids_NT.numel() - len(ids_NT)))


if __name__ == "__main__":
    sys.exit(main())
