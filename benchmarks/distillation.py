"""What is left of a model when a quarter of its layers is removed, and what distillation brings back.

Cases, of SmolLM2-135M-Instruct, 30 layers to 23 (more is better unless the unit says otherwise)
    depth/loss (less)           nats a token of held-out text without the layers that `prune_structured` removes; peer:
                                those that change their stream least (block influence, ShortGPT, arXiv 2403.03853);
                                limit: the whole model
    depth/decode, depth/prefill tokens a second at batch 1 in one number format; peer: the whole model
    distill/loss (less)         after some minutes of `craton distill` on the same machine; peers: plain next-token
                                training of the same student on the same text for the same steps, and no training at
                                all; limit: the teacher
    distill/recovered           of what the removal lost, the share that is back; peer: plain training

How the figures are made
    Held out: the first 16 windows of 512 tokens of wikitext2's validation text. Layers are chosen and the student is
    trained on the rest of that text and on the docstrings of Python's standard library. One thread unless
    OMP_NUM_THREADS says otherwise. Data lies in ../shared/data beside the checkout; without it nothing is measured.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import Case, Document, case, machine, parser, report
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.compression.calibration import MODULES
from craton.compression.distill import distill
from craton.compression.distill_settings import DistillSettings
from craton.compression.importance import block_influence, text_nats
from craton.compression.structured import least_layers, save_cut, speeds, without_layers
from craton.modalities.text import Tokenizer
from craton.models import CausalLM
from craton.retrieval.reading.docstrings import find_modules
from craton.store import find
from craton.store.folders import HOME_VARIABLE

SHARED = Path(__file__).parents[2] / "shared" / "data"
PACKAGES = ("craton", "torch")
MODEL = "smollm2-135m-instruct"
HELD_OUT = (16, 512)
CALIBRATION = (8, 256)
REMOVED = 7


def main() -> int:
    """Run the cases whose data is here, and report."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--model", default=MODEL, help="a name or a path of a model of 30 layers")
    flags.add_argument("--steps", type=int, default=0, help="steps of 4 windows of 512 tokens (0: as the mode says)")
    arguments = flags.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = str(find(arguments.model).path)
    document: Document = {"machine": machine(PACKAGES), "cases": {}}
    text = SHARED / "wikitext2" / "valid.txt"
    if text.is_file():
        with tempfile.TemporaryDirectory() as home:
            os.environ[HOME_VARIABLE] = home  # runs and models of a benchmark are nobody's
            steps = arguments.steps or (2 if arguments.quick else 40)
            document["cases"] = measure(model, text, Path(home), steps, quick=arguments.quick)
    report(document, arguments.json)
    return 0


def measure(model: str, text: Path, home: Path, steps: int, *, quick: bool) -> dict[str, Case]:
    """All cases."""
    checkpoint = Checkpoint.open(model)
    whole, tokenizer = checkpoint.load(torch.float32), checkpoint.tokenizer()
    assert isinstance(whole, CausalLM)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    windows, length = (4, 256) if quick else HELD_OUT
    held_out = torch.tensor(ids[: windows * length]).view(windows, length)
    documents = training_texts(tokenizer, ids[HELD_OUT[0] * HELD_OUT[1] :])
    calibration = calibration_windows(tokenizer, documents, (2, 128) if quick else CALIBRATION)
    removed = 2 if quick else REMOVED
    cases: dict[str, Case] = {}

    def told(name: str, one: Case) -> None:
        cases[name] = one
        print(f"{name}: {json.dumps(one)}", file=sys.stderr, flush=True)

    teacher_loss = loss_of(whole, held_out)
    chosen = least_layers(whole, removed, calibration)
    student = without_layers(whole, chosen)
    by_influence = without_layers(whole, least(block_influence(whole, calibration), removed))
    cut_loss = loss_of(student, held_out)
    told(
        "depth/loss",
        case(
            cut_loss,
            {"block influence": loss_of(by_influence, held_out)},
            "nats",
            less_is_better=True,
            limit=teacher_loss,
            settings={"Craton": f"without {', '.join(map(str, chosen))}"},
        ),
    )
    folder = home / "student"
    save_cut(student, checkpoint.family, folder, tokenizer, torch.float32)
    prefill, decode = speeds(Path(model), folder)
    for name, (before, after) in {"prefill": prefill, "decode": decode}.items():
        told(f"depth/{name}", case(after, {"whole model": before}, "tokens/s"))
    data = home / "text.jsonl"
    data.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    healed, minutes = taught(model, folder, data, held_out, steps, alpha=0.9, quick=quick)
    plain, _ = taught(model, folder, data, held_out, steps, alpha=0.0, quick=quick)
    settings = {"Craton": f"{steps} steps, {minutes:.1f} min"}
    told(
        "distill/loss",
        case(
            healed,
            {"plain training": plain, "no training": cut_loss},
            "nats",
            less_is_better=True,
            limit=teacher_loss,
            settings=settings,
        ),
    )
    lost = cut_loss - teacher_loss
    told(
        "distill/recovered",
        case(
            (cut_loss - healed) / lost,
            {"plain training": (cut_loss - plain) / lost},
            "of the lost nats",
            settings=settings,
        ),
    )
    return cases


def taught(
    teacher: str, student: Path, data: Path, held_out: Tensor, steps: int, *, alpha: float, quick: bool
) -> tuple[float, float]:
    """(held-out loss, minutes) of `craton distill TEACHER STUDENT DATA`; alpha 0 is plain training."""
    training = {"steps": steps, "batch": 4, "learning_rate": 3e-4, "threads": torch.get_num_threads()}
    if quick:
        training |= {"batch": 2}
    settings = DistillSettings(
        alpha=alpha,
        context=256 if quick else 512,
        holdout=0.0,
        name="bench",
        training=training,  # type: ignore[arg-type]
    )
    started = time.perf_counter()
    result = distill(teacher, str(student), [str(data)], settings, {"training.steps": "benchmark"})
    minutes = (time.perf_counter() - started) / 60
    assert result is not None
    assert result.model is not None
    made = Checkpoint.open(result.model.path).load(torch.float32)
    assert isinstance(made, CausalLM)
    return loss_of(made, held_out), minutes


def training_texts(tokenizer: Tokenizer, rest: Sequence[int]) -> list[str]:
    """The rest of the text in pieces, and docstrings, shuffled."""
    pieces = [tokenizer.decode(rest[i : i + 2048]) for i in range(0, len(rest), 2048)]
    docstrings = [document.text for name in MODULES for module in find_modules(name) for document in module.documents()]
    documents = [*pieces, *(text for text in docstrings if len(text) > 400)]
    random.Random(0).shuffle(documents)
    return documents


def calibration_windows(tokenizer: Tokenizer, documents: Sequence[str], shape: tuple[int, int]) -> Tensor:
    """Windows of the training texts."""
    ids: list[int] = []
    for text in documents:
        ids += tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= shape[0] * shape[1]:
            break
    return torch.tensor(ids[: shape[0] * shape[1]]).view(shape)


def loss_of(model: CausalLM, held_out: Tensor) -> float:
    """Nats a token."""
    return text_nats(model, list(held_out)) / (held_out.numel() - len(held_out))


def least(values: Sequence[float], count: int) -> list[int]:
    """The places of the lowest values."""
    return sorted(range(len(values)), key=values.__getitem__)[:count]


if __name__ == "__main__":
    sys.exit(main())
