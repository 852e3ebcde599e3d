"""One rank of a small run, started by torchrun from test_distributed.py: trains, saves, resumes, prints its losses."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_examples, make_model
from craton.data.loader import ListSource, Loader
from craton.training.cross_entropy import NextToken
from craton.training.loop import Trainer
from craton.training.ranks import joined
from craton.training.settings import TrainingSettings
from craton.training.state import checkpoints


class Losses:
    def __init__(self, stop: int | None) -> None:
        self.values: list[tuple[float, float]] = []
        self.stop = stop

    def on_step(self, progress, steps, values) -> None:
        self.values.append((values["loss"], values["gradient_norm"]))
        if progress.step == self.stop:
            raise SystemExit  # every rank stops here, as if it had been killed between two steps

    def on_evaluation(self, progress, values) -> None:
        self.evaluation = values

    def on_checkpoint(self, progress, path) -> None:
        pass


def main() -> None:
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    settings = TrainingSettings(steps=6, batch=8, learning_rate=1e-2, save_every=3, **arguments.get("settings", {}))
    with joined(settings.tensor_parallel) as ranks:
        model = make_model()
        loader = Loader(
            ListSource(make_examples(empty=(1, 5, 6))),
            batch=8,
            micro_tokens=arguments.get("micro", 64),
            seed=0,
            rank=ranks.data_rank,
            world=ranks.data_world,
        )
        folder = Path(arguments["folder"]) if "folder" in arguments else None
        losses = Losses(arguments.get("stop"))
        run = Trainer(
            model,
            NextToken(),
            loader,
            settings,
            dtype=torch.float32,
            ranks=ranks,
            folder=folder,
            observers=[losses],
            held_out=loader.step(0),
        )
        found = checkpoints(folder) if folder is not None and arguments.get("resume") else []
        with contextlib.suppress(SystemExit):
            run.fit(found[-1][1] if found else None)
        agreed = ranks.agreed(float(ranks.rank))
        weights = {}
        for name, parameter in model.named_parameters():
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            weights[name] = full.detach().double().sum().item(), full.detach().flatten()[:3].tolist()
        if ranks.is_first:
            result = {"losses": losses.values, "weights": weights, "evaluation": getattr(losses, "evaluation", None)}
            result["agreed"] = agreed
            Path(arguments["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    os._exit(0)  # as the command line does, see craton.cli.main
