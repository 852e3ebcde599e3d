"""`craton scaling`: a ladder of small models, the law that their loss follows, and what it says of the next size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.terminal import print_json, stderr, stdout
from craton.pretraining.ladder import LadderReport, LadderSettings, Train, climb, plan_ladder
from craton.pretraining.scaling import LEVEL, Forecast
from craton.pretraining.sizing import SizePlan, short

# Below so many tokens a parameter, a loss still falls faster than any law of it (measured: 2 are too few).
FEW_TOKENS: Final = 5


def scaling(
    *sources: Annotated[str, Parameter(help="text: files, folders, patterns, hf:org/name[:split], or one of shards")],
    flags: Flags[LadderSettings] | None = None,
    json: Json = False,
) -> None:
    """Train models of several small sizes and foretell a larger one's loss before it is trained."""
    from craton.config.resolve import FLAGS, resolve
    from craton.errors import UsageError
    from craton.store.runs import Run

    if not sources:
        raise UsageError("there is no data to train on", remedy="craton scaling FILE")
    settings, origins = resolve(LadderSettings, [(FLAGS, given(flags))])
    vocab, speed, train = connect(sources, settings)
    ladder = plan_ladder(
        [size for size in settings.sizes.split(",") if size],
        settings.predict,
        vocab=vocab,
        context=settings.context,
        flops=None if settings.minutes is None else 60 * settings.minutes * speed(),
    )
    per_parameter = ladder.target.tokens / ladder.target.dial
    if per_parameter < FEW_TOKENS:
        stderr.print(f"[yellow]{per_parameter:.2g} tokens a parameter are few: the forecast will be rough[/]")
    run = Run.create("scaling", config=settings, provenance=origins)

    def record(kind: str, /, **data: Any) -> None:
        run.event(kind, **data)
        if kind == "forecast":
            stderr.print(_foretold(Forecast(**data["forecast"])))

    def train_aloud(plan: SizePlan) -> float:
        stderr.print(f"[dim]{short(plan.dial)}: {short(plan.parameters)} parameters on {short(plan.tokens)} tokens[/]")
        loss = train(plan)
        stderr.print(f"[dim]{short(plan.dial)}: held-out loss {loss:.4f}[/]")
        return loss

    with run.lock():
        report = climb(train_aloud, ladder, record)
        metrics = {"forecast": report.forecast.loss} | (
            {} if report.measured is None else {"measured": report.measured}
        )
        run.finish("done", {"metrics": metrics})
    if json:
        print_json({"run": run.id, **report.as_dict()})
    else:
        _print(report)


def connect(sources: Sequence[str], settings: LadderSettings) -> tuple[int, Callable[[], float], Train]:
    """The one place where the ladder meets pretraining: the vocabulary, how many FLOPs a second this machine makes on
    small models, and what trains one of them."""
    import torch

    from craton.config.sizes import parse_size
    from craton.errors import UsageError
    from craton.pretraining.pretrain import pretrain
    from craton.pretraining.settings import PretrainSettings
    from craton.training.estimate import USUAL_SHARE
    from craton.training.hardware import compute_dtype, gemm_peak

    data, tokenizer = list(sources), settings.tokenizer

    def train(plan: SizePlan) -> float:
        nonlocal data, tokenizer
        chosen = PretrainSettings(
            size=str(plan.dial),
            tokens=plan.tokens,
            tokenizer=tokenizer,
            vocab=settings.vocab,
            context=settings.context,
            name=f"scaling-{short(plan.dial).lower()}",
        )
        result = pretrain(data, chosen, {})
        assert result is not None
        if "loss" not in result.outcome.evaluation:
            raise UsageError("no text is left to measure the loss on", remedy="take more data")
        # The first run has made the tokeniser and the shards for all of them.
        folder = result.run.folder
        data = [str(folder / "data")] if (folder / "data").is_dir() else data
        tokenizer = str(folder / "tokenizer")
        return result.outcome.evaluation["loss"]

    def speed() -> float:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return USUAL_SHARE[0] * gemm_peak(compute_dtype("auto", device)[0], device)

    return _vocabulary(tokenizer) if tokenizer is not None else parse_size(settings.vocab), speed, train


def _vocabulary(tokenizer: str) -> int:
    from pathlib import Path

    from craton import store
    from craton.checkpoints.checkpoint import Checkpoint
    from craton.modalities.text import Tokenizer

    if (Path(tokenizer) / "tokenizer.json").is_file():
        return Tokenizer.from_folder(tokenizer).vocab_size
    return Checkpoint.open(store.find(tokenizer).path).tokenizer().vocab_size


def _print(report: LadderReport) -> None:
    law = report.fit.law
    for trial in report.trials:
        stdout.print(f"{short(trial.parameters):>6} parameters  {short(trial.tokens):>6} tokens  loss {trial.loss:.4f}")
    formula = f"loss = {law.floor:.3f} + {law.a:.4g} / parameters^{law.alpha:.3f}"
    stdout.print(formula + (f" + {law.b:.4g} / tokens^{law.beta:.3f}" if law.beta else ""))
    for name, (low, high) in report.as_dict()["intervals"].items():
        stdout.print(f"  {name} between {low:.3f} and {high:.3f} ({LEVEL:.0%})")
    stdout.print(_foretold(report.forecast))
    if report.measured is not None:
        stdout.print(f"measured: {report.measured:.4f}, {'within' if report.held else 'outside of'} the interval")


def _foretold(forecast: Forecast) -> str:
    size, tokens = short(forecast.parameters), short(forecast.tokens)
    return (
        f"foretold: {size} parameters on {tokens} tokens will have a loss of {forecast.loss:.4f}, "
        f"between {forecast.low:.4f} and {forecast.high:.4f} ({LEVEL:.0%})"
    )
