"""Distillation: the divergences are those of a dense reference, the table says what the teacher says, a student gets
closer to its teacher, and an interrupted run ends where it would have ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from craton import store
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.llama import LLAMA
from craton.checkpoints.save import save_checkpoint
from craton.compression.distill import distill, resume
from craton.compression.distill_job import steps_within
from craton.compression.distill_objective import (
    SAMPLED,
    Distillation,
    ProjectedStudent,
    TopK,
    divergence,
    known_loss,
    layer_pairs,
)
from craton.compression.distill_settings import DistillSettings
from craton.compression.distill_text import prompt_of
from craton.compression.teacher_table import LiveTeacher, TeacherTable, build_table
from craton.data.batch import collate
from craton.data.example import Example, next_token_targets
from craton.errors import TrainingError, UsageError
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.models import CausalLM, CausalLMConfig
from craton.store.runs import Run
from craton.training.cross_entropy import NextToken
from craton.training.session import Hooks
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig

VOCAB = 50
WORDS = "the cat sat on the mat and the dog sat on the log while the sun rose over the quiet hill and all was well "


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make(seed: int = 0, *, vocab: int = VOCAB, width: int = 32, layers: int = 2, **switches: Any) -> CausalLM:
    torch.manual_seed(seed)
    layer = LayerConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=8, rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=48, activation="silu", gated=True),
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=width, layers=(layer,) * layers, final_norm=NormConfig(kind="rms"))
    model = CausalLM(CausalLMConfig(**{"vocab": vocab, "context": 64, "trunk": trunk, "tied": True} | switches))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def batch_of(seed: int = 0, count: int = 5, vocab: int = VOCAB):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        n = int(rng.integers(4, 20))
        examples.append(Example((next_token_targets(rng.integers(0, vocab, n), rng.random(n) < 0.8),)))
    return collate(examples)


def live(model: CausalLM, top_k: int, temperature: float = 1.0) -> LiveTeacher:
    return LiveTeacher(model, top_k=top_k, temperature=temperature, dtype=torch.float32)


def dense(loss: str, p: torch.Tensor, q: torch.Tensor, skew: float) -> torch.Tensor:
    """The divergence of whole distributions, by torch's own function."""
    if loss == "forward":
        return F.kl_div(q.log(), p, reduction="none").sum(-1)
    if loss == "reverse":
        return F.kl_div(p.log(), q, reduction="none").sum(-1)
    return F.kl_div((skew * p + (1 - skew) * q).log(), p, reduction="none").sum(-1)


def folded(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A distribution over the known tokens and "any other"."""
    known = probabilities.gather(-1, ids)
    return torch.cat((known, 1 - known.sum(-1, keepdim=True)), -1)


# --- the divergence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["forward", "reverse", "skew"])
@pytest.mark.parametrize("known", [3, 20, VOCAB])
def test_the_divergences_are_those_of_a_dense_reference(loss, known):
    torch.manual_seed(0)
    logits_p, logits_q = torch.randn(7, VOCAB) * 2, torch.randn(7, VOCAB) * 2
    p, q = logits_p.softmax(-1), logits_q.softmax(-1)
    top, ids = p.log().topk(known, -1)
    rest = 1 - top.exp().sum(-1) if known < VOCAB else torch.zeros(7)
    found = divergence(loss, logits_q.log_softmax(-1).gather(-1, ids), TopK(ids, top, rest), 0.3)
    expected = dense(loss, p, q, 0.3) if known == VOCAB else dense(loss, folded(p, ids), folded(q, ids), 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # What is folded together can only look more alike than it is.
    assert (found <= dense(loss, p, q, 0.3) + 1e-5).all()


def test_of_a_distribution_from_itself_it_is_nothing():
    q = torch.randn(4, VOCAB).log_softmax(-1)
    top, ids = q.topk(6, -1)
    teacher = TopK(ids, top, 1 - top.exp().sum(-1))
    for loss in ("forward", "reverse", "skew"):
        torch.testing.assert_close(divergence(loss, top, teacher), torch.zeros(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("loss", ["forward", "reverse", "skew"])
@pytest.mark.parametrize("switches", [{}, {"logit_softcap": 5.0}])
def test_gradients_of_all_tokens_are_those_of_the_full_divergence(loss, temperature, switches):
    student, teacher, batch = make(1, **switches), make(2), batch_of()
    wanted = batch.targets_T != -100
    objective = Distillation(live(teacher, VOCAB, temperature), loss=loss, alpha=0.7, temperature=temperature)
    parts = objective(student, batch)
    parts.loss_sum.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    with torch.no_grad():
        p = (teacher(batch.ids_T, batch.positions_T, batch.segments_T)[wanted] / temperature).softmax(-1)
    logits = student(batch.ids_T, batch.positions_T, batch.segments_T)[wanted]
    full = dense(loss, p, (logits / temperature).softmax(-1), 0.1).sum()
    entropy = F.cross_entropy(logits, batch.targets_T[wanted], reduction="sum")
    expected = 0.7 * temperature**2 * full + 0.3 * entropy
    expected.backward()
    torch.testing.assert_close(parts.loss_sum, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.metrics["divergence"], full.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.metrics["cross_entropy"], entropy.detach(), rtol=1e-4, atol=1e-4)
    assert parts.count == int(wanted.sum())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_the_sum_of_chunks_is_that_of_one(monkeypatch):
    from craton.compression import distill_objective

    student, batch = make(1), batch_of()
    objective = Distillation(live(make(2), 8))
    whole = objective(student, batch)
    monkeypatch.setattr(distill_objective, "chunk_rows", lambda vocab, dtype: 7)
    monkeypatch.setattr(distill_objective, "CACHE_BYTES", 4 * VOCAB * 3)
    cut = objective(student, batch)
    torch.testing.assert_close(cut.loss_sum, whole.loss_sum)
    for one, other in zip(
        *(torch.autograd.grad(p.loss_sum, list(student.parameters())) for p in (whole, cut)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_alpha_zero_is_next_token_training():
    student, batch = make(1), batch_of()
    plain, distilled = NextToken()(student, batch), Distillation(live(make(2), 8), alpha=0.0)(student, batch)
    torch.testing.assert_close(distilled.loss_sum, plain.loss_sum)
    for one, other in zip(
        *(torch.autograd.grad(p.loss_sum, list(student.parameters())) for p in (plain, distilled)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_the_student_wrote_has_no_right_token():
    student, batch = make(1), batch_of(count=2)
    labels = torch.tensor([-1, SAMPLED])
    object.__setattr__(batch, "labels", labels)
    mixed = Distillation(live(make(2), 8))(student, batch)
    first = batch.segments_T == 0
    object.__setattr__(batch, "labels", torch.tensor([-1, -1]))
    logits = student(batch.ids_T, batch.positions_T, batch.segments_T)
    counted = first & (batch.targets_T != -100)
    expected = F.cross_entropy(logits[counted], batch.targets_T[counted], reduction="sum")
    torch.testing.assert_close(mixed.metrics["cross_entropy"], expected)
    whole = Distillation(live(make(2), 8))(student, batch)
    torch.testing.assert_close(mixed.metrics["divergence"], whole.metrics["divergence"])


def test_a_batch_without_targets_gives_nothing_that_can_be_differentiated():
    student = make(1)
    batch = collate([Example((next_token_targets([1, 2, 3], [False] * 3),))])
    parts = Distillation(live(make(2), 8), hidden=1.0)(student, batch)
    assert parts.count == 0
    parts.loss_sum.backward()


def test_known_loss_of_one_token_is_cross_entropy():
    model, hidden = make(1), torch.randn(9, 32, requires_grad=True)
    targets = torch.arange(9)
    found = known_loss(model, hidden, targets[:, None], lambda log_q, part: -log_q.sum(), 1.0)
    torch.testing.assert_close(found, F.cross_entropy(model.logits(hidden), targets, reduction="sum"))


# --- hidden states -------------------------------------------------------------------------------------------------


def test_layers_are_mapped_evenly_and_the_last_to_the_last():
    assert layer_pairs(2, 4) == [(0, 1), (1, 3)]
    assert layer_pairs(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs(23, 30)[-1] == (22, 29)


def test_hidden_states_of_the_teacher_itself_are_no_distance():
    teacher, batch = make(2), batch_of()
    same = Distillation(live(teacher, 8), hidden=1.0)
    assert float(same(make(2), batch).metrics["hidden"]) == pytest.approx(0, abs=1e-6)
    other = same(make(3), batch)
    assert float(other.metrics["hidden"]) > 0.1
    other.loss_sum.backward()


def test_a_narrower_student_is_compared_through_a_map_that_learns():
    student = make(1, width=16)
    model, batch = ProjectedStudent(student, 32), batch_of()
    parts = Distillation(live(make(2), 8), hidden=1.0, alpha=0.0)(model, batch)
    parts.loss_sum.backward()
    assert all(projection.weight.grad.abs().sum() > 0 for projection in model.projections)
    assert student.trunk.layers[0].attention.q.weight.grad.abs().sum() > 0


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_table_says_what_the_teacher_says(tmp_path):
    teacher, batches = live(make(2), 8), [batch_of(seed) for seed in range(3)]
    table = build_table(tmp_path / "table", teacher, batches, torch.device("cpu"))
    again = TeacherTable(tmp_path / "table")
    assert again.positions == table.positions == sum(batch.trained for batch in batches)
    for batch in reversed(batches):
        expected, found = teacher(batch), again(batch)
        assert torch.equal(found.ids_NK, expected.ids_NK)
        torch.testing.assert_close(found.log_p_NK, expected.log_p_NK, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.rest_N, expected.rest_N)
        torch.testing.assert_close(found.log_p_NK.exp().sum(-1) + found.rest_N, torch.ones(len(found.rest_N)))


def test_the_table_knows_sequences_in_any_order_and_no_others(tmp_path):
    one, other = batch_of(0), batch_of(1)
    table = build_table(tmp_path / "table", live(make(2), 4), [one, one], torch.device("cpu"))
    assert table.positions == one.trained
    with pytest.raises(TrainingError, match="has not read"):
        table(other)


def test_a_table_that_was_interrupted_is_none(tmp_path):
    def broken():
        yield batch_of(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_table(tmp_path / "table", live(make(2), 4), broken(), torch.device("cpu"))
    assert list(tmp_path.glob("*table*")) == []


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher that has learnt the text, a fresh student, one with another tokeniser, text and chats."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([WORDS * 30], TokenizerSettings(vocab=330))
    other = train_tokenizer([WORDS[::-1] * 30], TokenizerSettings(vocab=300))
    teacher = make(0, vocab=tokenizer.vocab_size, width=48, layers=4)
    ids = torch.tensor(tokenizer.encode(WORDS * 6)[:128]).view(4, 32)
    optimiser = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(80):
        loss = sum(F.cross_entropy(teacher(ids_T, torch.arange(32))[:-1], ids_T[1:]) for ids_T in ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    save_checkpoint(teacher, LLAMA, folder / "teacher", tokenizer=tokenizer)
    save_checkpoint(make(1, vocab=tokenizer.vocab_size), LLAMA, folder / "student", tokenizer=tokenizer)
    save_checkpoint(make(1, vocab=other.vocab_size, context=128), LLAMA, folder / "stranger", tokenizer=other)
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i:02}.txt").write_text(f"story {i}: " + WORDS * (2 + i % 3), encoding="utf-8")
    rows = [{"prompt": f"say {i}: the cat", "completion": " sat on the mat and the dog"} for i in range(24)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {path.stem: path for path in folder.iterdir()}


def settings_of(steps: int = 4, **values: Any) -> DistillSettings:
    training = {
        "steps": steps,
        "batch": 4,
        "micro_tokens": 128,
        "learning_rate": 3e-3,
        "threads": 1,
        "dtype": "float32",
    }
    training |= values.pop("training", {})
    return DistillSettings(**{"context": 32, "holdout": 0.1, "training": training, "top_k": 16, **values})


def run(models: dict[str, Path], student: str = "student", data: str = "text", **values: Any):
    origins = {"training.steps": "--steps"} if values.get("minutes") is None else {}
    return distill(
        str(models["teacher"]), str(models.get(student, student)), [str(models[data])], settings_of(**values), origins
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint.open(path).load(torch.float32).state_dict())


def test_a_distilled_student_is_closer_to_its_teacher_than_a_trained_one(models):
    taught = run(models, steps=40, alpha=1.0, name="taught")
    trained = run(models, steps=40, alpha=0.0, name="trained")
    assert taught.outcome.evaluation["divergence"] < 0.9 * trained.outcome.evaluation["divergence"]
    assert [(p.relation, Path(p.name).name) for p in store.find("taught").parents] == [
        ("distilled_from", "teacher"),
        ("base", "student"),
        ("trained_on", "text"),
    ]
    assert Run.open(taught.run.id).record.result["model"] == "taught@v1"
    assert not list(taught.run.folder.glob("teacher-*"))  # of no use any more


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"data": "chats", "loss": "skew", "temperature": 2.0},
        {"hidden": 0.5},
        {"on_policy": 0.5, "on_policy_every": 3},
        {"student": "depth:0.75", "loss": "reverse"},
    ],
)
def test_an_interrupted_run_ends_where_it_would_have_ended(models, values):
    whole = run(models, steps=5, name="whole", **values)

    class Stop:
        def on_step(self, progress, steps, values):
            if progress.step == 2:
                raise KeyboardInterrupt

        def on_evaluation(self, progress, values): ...
        def on_checkpoint(self, progress, path): ...

    data, student = values.pop("data", "text"), values.pop("student", "student")
    with pytest.raises(KeyboardInterrupt):
        distill(
            str(models["teacher"]),
            str(models.get(student, student)),
            [str(models[data])],
            settings_of(5, name="again", **values),
            {"training.steps": "--steps"},
            Hooks(observers=[Stop()]),
        )
    stopped = Run.open("last")
    assert stopped.status == "interrupted"
    assert bool(list(stopped.folder.glob("teacher-*"))) == (not values.keys() & {"hidden", "on_policy"})
    again = resume(stopped)
    assert again.outcome.progress.step == 5
    expected, found = weights(whole.model.path), weights(again.model.path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_student_is_cut_from_its_teacher(models):
    deep, wide = run(models, "depth:0.75", name="deep"), run(models, "width:0.5", name="wide")
    assert len(Checkpoint.open(deep.model.path).config.trunk.layers) == 3
    assert Checkpoint.open(wide.model.path).config.trunk.layers[0].feedforward.hidden == 24
    assert [p.relation for p in deep.model.parents] == ["distilled_from", "pruned_from", "trained_on"]


def test_another_tokeniser_is_refused_or_bridged_by_text(models, craton_home):
    with pytest.raises(UsageError, match="other tokens") as caught:
        run(models, "stranger")
    assert "--bridge text" in caught.value.remedy
    assert not (craton_home / "runs").exists()
    for data in ("text", "chats"):
        result = run(models, "stranger", data, steps=3, bridge="text", name="bridged")
        rows = [json.loads(line) for line in (result.run.folder / "written.jsonl").read_text().splitlines()]
        assert len(rows) == 12
        assert set(rows[0]) == ({"text"} if data == "text" else {"prompt", "completion"})
        assert np.isfinite(result.outcome.loss)


def test_minutes_become_steps(models):
    result = run(models, steps=None, minutes=0.02)
    plan = json.loads((result.run.folder / "plan.json").read_text())
    assert plan["training"]["steps"] == result.outcome.progress.step >= 1
    # 100 tokens a step, 10 steps an epoch, the teacher twice as fast as the student.
    assert steps_within(75.0, 100, 20.0, 40.0, 10) == pytest.approx(10)
    assert steps_within(80.0, 100, 20.0, 40.0, 10) == pytest.approx(11)


def test_a_dry_run_keeps_nothing(models, craton_home):
    assert (
        distill(str(models["teacher"]), str(models["student"]), [str(models["text"])], settings_of(), {}, dry_run=True)
        is None
    )
    assert not (craton_home / "runs").exists()


@pytest.mark.parametrize(
    ("student", "values", "match"),
    [
        ("depth:0.95", {}, "removes none"),
        ("student", {"bridge": "text", "hidden": 1.0}, "no hidden states"),
        ("width:0.5", {"bridge": "text"}, "has its tokeniser"),
    ],
)
def test_what_does_not_go_together_is_refused(models, student, values, match):
    with pytest.raises(UsageError, match=match):
        run(models, student, **values)


def test_data_that_changed_meanwhile_is_noticed(models, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_bytes(models["chats"].read_bytes())

    class Stop:
        def on_step(self, progress, steps, values):
            raise KeyboardInterrupt

        def on_evaluation(self, progress, values): ...
        def on_checkpoint(self, progress, path): ...

    asked = (str(models["teacher"]), str(models["student"]), [str(data)], settings_of(name="x"), {})
    with pytest.raises(KeyboardInterrupt):
        distill(*asked, Hooks(observers=[Stop()]))
    data.write_text(data.read_text().replace("mat", "hat"))
    with pytest.raises(TrainingError, match="the data changed"):
        resume(Run.open("last"))


def test_a_prompt_is_what_is_not_trained_or_half_of_a_text():
    assert prompt_of(next_token_targets(list(range(40)), [i >= 20 for i in range(40)])) == list(range(20))
    assert prompt_of(next_token_targets(list(range(40)), [True] * 40)) == list(range(20))
