"""The loop's promises: one gradient however a step is cut, exact resume, nothing updated by a broken step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from craton.data.batch import collate
from craton.data.loader import ListSource, Loader
from craton.errors import StoreError, TrainingError
from craton.training.cross_entropy import NextToken
from craton.training.hardware import gemm_peak
from craton.training.loop import Trainer, evaluate
from craton.training.optimisers import Optimisers, parameter_groups
from craton.training.ranks import Ranks
from craton.training.settings import TrainingSettings
from craton.training.state import checkpoints

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_examples, make_model


def trainer(model, tmp_path=None, examples=None, *, micro=64, objective=None, held_out=(), observers=(), **settings):
    chosen = TrainingSettings(**{"steps": 6, "batch": 8, "learning_rate": 1e-2, "warmup": 0.2} | settings)
    examples = make_examples() if examples is None else examples
    loader = Loader(ListSource(examples), batch=chosen.batch, micro_tokens=micro, seed=chosen.seed)
    return Trainer(
        model,
        objective or NextToken(),
        loader,
        chosen,
        dtype=torch.float32,
        folder=tmp_path,
        held_out=held_out,
        observers=observers,
    )


class Recorder:
    def __init__(self):
        self.steps, self.evaluations, self.saved = [], [], []

    def on_step(self, progress, steps, values):
        self.steps.append(dict(values))

    def on_evaluation(self, progress, values):
        self.evaluations.append((progress.step, dict(values)))

    def on_checkpoint(self, progress, path):
        self.saved.append(progress.step)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("empty", [(), tuple(range(0, 24, 3)), tuple(range(24))])
def test_a_step_has_one_gradient_however_it_is_cut_into_micro_batches(empty):
    examples, gradients, counts = make_examples(empty=empty), [], []
    for micro in (1, 100, 10_000):  # 8 micro-batches of one example, a few, and one of all
        run = trainer(make_model(), examples=examples, micro=micro, clip=0.0)
        batches = run.data.step(0)
        _, count, _ = run._accumulate(batches)
        run._scale_gradients(0.0, count)
        counts.append((len(batches), count))
        gradients.append({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})
    assert counts[0][0] == 8
    assert counts[2][0] == 1
    assert len({count for _, count in counts}) == 1
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    if len(empty) == 24:
        assert counts[0][1] == 0
        assert not any(g.any() for g in gradients[0].values())


def test_the_gradient_is_that_of_the_mean_over_all_trained_tokens():
    run = trainer(make_model(), micro=30, clip=0.0)
    _, count, _ = run._accumulate(run.data.step(0))
    run._scale_gradients(0.0, count)
    reference = make_model()
    whole = collate([run.data.source[int(i)] for i in run.data.indices(0)])
    logits = reference(whole.ids_T, whole.positions_T, whole.segments_T)
    torch.nn.functional.cross_entropy(logits, whole.targets_T, ignore_index=-100).backward()
    for (name, ours), theirs in zip(run.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_in_which_nothing_is_trained_changes_no_weight():
    model = make_model()
    before = weights(model)
    recorder = Recorder()
    trainer(model, examples=make_examples(empty=tuple(range(24))), observers=[recorder], steps=2).fit()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert [step["loss"] for step in recorder.steps] == [0.0, 0.0]


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_learning_lowers_the_loss(optimiser):
    recorder = Recorder()
    trainer(make_model(), steps=40, observers=[recorder], optimiser=optimiser).fit()
    assert recorder.steps[-1]["loss"] < 0.8 * recorder.steps[0]["loss"]


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 3, 5])  # an epoch has 3 steps
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_never_stopped(tmp_path, optimiser, stop):
    whole = Recorder()
    straight = make_model()
    run = trainer(straight, tmp_path / "a", observers=[whole], steps=6, optimiser=optimiser)
    run.fit()

    class Stop(Recorder):
        def on_step(self, progress, steps, values):
            super().on_step(progress, steps, values)
            if progress.step == stop:
                raise KeyboardInterrupt

    first, second = Stop(), Recorder()
    with pytest.raises(KeyboardInterrupt):
        trainer(make_model(), tmp_path / "b", observers=[first], steps=6, optimiser=optimiser).fit()
    ((step, checkpoint),) = checkpoints(tmp_path / "b")
    assert step == stop
    resumed = make_model(seed=99)  # other weights: everything must come from the checkpoint
    again = trainer(resumed, tmp_path / "b", observers=[second], steps=6, optimiser=optimiser)
    again.fit(checkpoint)
    losses = [s["loss"] for s in first.steps + second.steps]
    assert losses == [s["loss"] for s in whole.steps]
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(run.optimisers.state().items(), again.optimisers.state().values(), strict=True):
        assert torch.equal(a, b), name
    assert run.progress.tokens == again.progress.tokens


class WithDropout:
    """An objective whose randomness is the global generator's."""

    def __call__(self, model, batch):
        parts = NextToken()(model, batch)
        noise = torch.nn.functional.dropout(torch.ones(8), 0.5, training=model.training).sum()
        return parts._replace(loss_sum=parts.loss_sum * (1 + 0.01 * noise))


def test_random_numbers_go_on_where_they_were(tmp_path):
    straight = make_model()
    trainer(straight, objective=WithDropout(), steps=4).fit()
    model = make_model()
    trainer(model, tmp_path, objective=WithDropout(), steps=4, save_every=2, keep_last=5).fit()
    resumed = make_model()
    trainer(resumed, objective=WithDropout(), steps=4).fit(dict(checkpoints(tmp_path))[2])
    for a, b, c in zip(straight.parameters(), model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class Broken:
    """A loss that is not finite at the third step."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch):
        parts = NextToken()(model, batch)
        self.calls += 1
        return parts._replace(loss_sum=parts.loss_sum * float("nan")) if self.calls == 3 else parts


def test_a_step_that_is_not_finite_updates_nothing_and_says_so(tmp_path):
    model = make_model()
    kept = []
    recorder = Recorder()
    recorder.on_step = lambda progress, steps, values: kept.append(weights(model))
    run = trainer(model, tmp_path, objective=Broken(), micro=10_000, observers=[recorder], save_every=1)
    with pytest.raises(TrainingError, match="step 3"):
        run.fit()
    assert len(kept) == 2
    assert all(torch.equal(kept[-1][name], p) for name, p in model.named_parameters())
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2]


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = make_model(tied=False)
    groups = {group.name: group for group in parameter_groups(model, TrainingSettings(weight_decay=0.5))}
    names = [name for group in groups.values() for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert set(groups["embeddings"].parameters) == {"embedding.weight"}
    assert all(parameter.dim() == 1 for parameter in groups["vectors"].parameters.values())
    assert {name: group.weight_decay for name, group in groups.items()} == {
        "matrices": 0.5,
        "embeddings": 0.0,
        "vectors": 0.0,
    }


def test_muon_leaves_kernels_of_convolutions_to_adamw():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    settings = TrainingSettings(optimiser="muon", weight_decay=0.5)
    groups = {group.name: group for group in parameter_groups(model, settings)}
    assert set(groups["kernels"].parameters) == {"0.weight"}
    assert groups["kernels"].weight_decay == 0.5
    before = [parameter.clone() for parameter in model.parameters()]
    optimisers = Optimisers(list(groups.values()), settings)
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimisers.step(1.0)
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_evaluation_is_a_sum_over_a_count_and_keeps_the_mode():
    run = trainer(make_model())
    batches = [collate(make_examples(5, seed)) for seed in range(3)]
    run.model.train()
    values = evaluate(run.step_module, batches, Ranks(torch.device("cpu")))
    together = collate([example for seed in range(3) for example in make_examples(5, seed)])
    loss, count, _ = NextToken()(run.model, together)
    assert values["targets"] == count
    assert values["loss"] == pytest.approx(loss.item() / count, rel=1e-5)
    assert run.model.training


def test_the_best_checkpoint_and_the_newest_are_kept(tmp_path):
    recorder = Recorder()
    held_out = [collate(make_examples(6, seed=9))]
    run = trainer(
        make_model(), tmp_path, held_out=held_out, observers=[recorder], steps=12, evaluate_every=2, keep_last=1
    )
    run.fit()
    steps = [step for step, _ in checkpoints(tmp_path)]
    best = min(recorder.evaluations, key=lambda item: item[1]["loss"])[0]
    assert steps == sorted({best, 12})
    assert run.progress.best_step == best


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path):
    trainer(make_model(), tmp_path).fit()
    other = make_model(tied=False)
    with pytest.raises(TrainingError, match="does not fit"):
        trainer(other).fit(checkpoints(tmp_path)[-1][1])


def test_a_full_disk_is_an_error_in_words_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    trainer(make_model(), tmp_path, steps=2).fit()

    def full(path, tensors, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("craton.training.state.write_safetensors", full)
    with pytest.raises(StoreError, match="No space"):
        trainer(make_model(), tmp_path, steps=4).fit(checkpoints(tmp_path)[-1][1])
    assert [step for step, _ in checkpoints(tmp_path)] == [2]
    assert not list(tmp_path.glob(".step-*"))


def test_trained_weights_in_bfloat16_are_refused():
    with pytest.raises(TrainingError, match="float32"):
        trainer(make_model().bfloat16())


@pytest.mark.slow
def test_compute_in_bfloat16_keeps_masters_in_float32_and_learns():
    model = make_model()
    run = trainer(model, steps=40)
    model.compute_dtype = torch.bfloat16
    recorder = Recorder()
    run.observers = [recorder]
    run.fit()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert recorder.steps[-1]["loss"] < 0.8 * recorder.steps[0]["loss"]


def test_recomputing_activations_changes_no_number():
    kept, recomputed = make_model(), make_model()
    trainer(kept).fit()
    trainer(recomputed, checkpointing=True).fit()
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), recomputed.parameters(), strict=True))


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_loop
from conftest import make_model
from craton.training.state import checkpoints
torch.set_num_threads(1)
folder = Path(sys.argv[1])
found = checkpoints(folder)
model = make_model()
run = test_loop.trainer(model, folder, steps=60, save_every=1)
print("ready", flush=True)
run.fit(found[-1][1] if found else None)
"""


@pytest.mark.slow
def test_killed_at_random_moments_a_run_still_ends_as_the_one_that_was_not(tmp_path):
    import random

    # Both in processes of their own: tests before this one may have left torch with another number of threads here,
    # and a sum split over other threads has other last bits.
    def command(name: str) -> list[str]:
        return [sys.executable, "-c", KILLED, str(tmp_path / name), str(Path(__file__).parent)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("straight"), check=True, capture_output=True, env=environment)
    rng = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, env=environment)
        process.stdout.readline()
        time.sleep(rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    subprocess.run(command("killed"), check=True, capture_output=True, env=environment)
    ends = [checkpoints(tmp_path / name)[-1] for name in ("straight", "killed")]
    assert ends[0][0] == ends[1][0] == 60
    for name in ("trained.safetensors", "optimiser.safetensors"):
        assert (ends[0][1] / name).read_bytes() == (ends[1][1] / name).read_bytes()


def test_the_peak_is_measured_however_busy_the_machine_is():
    assert gemm_peak(torch.float32, torch.device("cpu"), seconds=0.0) > 0
