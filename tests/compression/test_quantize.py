"""Quantising and pruning whole models: what is published is what was made, an interrupted run ends with the same bytes,
and what cannot be done is refused before anything is begun."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import craton
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.bert import BERT
from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.gpt2 import GPT2
from craton.checkpoints.families.llama import LLAMA
from craton.checkpoints.families.mixtral import MIXTRAL
from craton.checkpoints.safetensors import SafetensorsFile
from craton.checkpoints.save import save_checkpoint
from craton.compression import walk as walking
from craton.compression.blocks import Stream, in_fp32, open_source
from craton.compression.job import Outcome, Watch
from craton.compression.prune import prune
from craton.compression.prune import resume as resume_pruning
from craton.compression.quantize import quantize, resume
from craton.compression.quantize_settings import PruneSettings, QuantizeSettings, parse_bytes
from craton.errors import CheckpointError, DataError, UnknownName, UsageError
from craton.modalities.text import tokenizer_from_gguf
from craton.modalities.text.token_pieces import byte_level_alphabet
from craton.models import CausalLM, Encoder, EncoderConfig, build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import causal_config
from craton.pretraining.sizing import SizeOverrides, size
from craton.store import find
from craton.store.models import list_models
from craton.store.runs import Run, list_runs
from craton.trunk import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    LearnedPositions,
    NormConfig,
    TrunkConfig,
)

TEXT = {"samples": 6, "window": 48}


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that is read faster than Python's docstrings."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "code", "of", "red", "blue", "green", "zim", "zam", "what", "class", "answer"]
    path.write_text(" ".join(words[n * n % 7] + words[n % 11] for n in range(4000)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16 with a head of its own, and a tokeniser that GGUF can describe."""
    tokens = [*sorted(byte_level_alphabet()), "ab", "<s>", "</s>", "<pad>"]
    tokenizer = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 257 + [3] * 3,
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 257,
            "tokenizer.ggml.eos_token_id": 258,
        }
    )
    shape = SizeOverrides(width=64, layers=2, heads=4, kv_heads=4, hidden=96)
    config = causal_config(size("0.1m", vocab=260, context=128, overrides=shape), 260, 128)
    model = build(config.model_copy(update={"tied": False}))
    initialise(model, 1)
    folder = tmp_path_factory.mktemp("byte-model")
    save_checkpoint(model.to(torch.bfloat16), LLAMA, folder, tokenizer=tokenizer)
    return folder


def settings(text: str, **values: Any) -> QuantizeSettings:
    return QuantizeSettings(**{"calibration": (text,), **TEXT, **values})


def run(model: Path, chosen: QuantizeSettings, name: str = "small", watch: Watch | None = None) -> Outcome:
    return quantize(str(model), chosen, {}, name, watch)


def weights_of(model: str) -> bytes:
    return (find(model).path / "model.safetensors").read_bytes()


class Stop:
    """Interrupts a run when it comes to a block."""

    def __init__(self, block: int) -> None:
        self.block = block

    def __call__(self, doing: str) -> None:
        if doing.startswith(f"block {self.block} of"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "hqq"])
def test_what_is_published_is_what_was_made(tiny_model: Path, text: str, method: str) -> None:
    outcome = run(tiny_model, settings(text, method=method))
    assert outcome.difference < 0.02
    assert outcome.bytes_after < 0.4 * outcome.bytes_before
    found = find("small")
    assert [(parent.relation, parent.name) for parent in found.parents] == [("quantised_from", str(tiny_model))]
    checkpoint = Checkpoint.open(found.path)
    assert checkpoint.quantized_kinds() <= {"Q4_0", "Q4_1"}
    # The embedding, which is the head as well, and what is no matrix stay as they were (but for norms that AWQ folds).
    before = Checkpoint.open(tiny_model).load(torch.float32).state_dict()
    after = checkpoint.load(torch.float32).state_dict()
    assert torch.equal(before["embedding.weight"], after["embedding.weight"])
    norm = "trunk.layers.0.attention_norm.input.weight"
    assert torch.equal(before[norm], after[norm]) == (method != "awq")
    for name, tensor in after.items():
        if "attention.q" in name:
            assert 0 < float((tensor - before[name]).norm() / before[name].norm()) < (0.2 if method != "awq" else 9)
    measured = outcome.measured.as_dict()
    assert abs(measured["loss_after"] - measured["loss_before"]) < 0.3
    assert len(outcome.rows) == 14
    assert outcome.bits == pytest.approx(4.5 if method != "hqq" else 4.625, abs=1e-6)
    assert all((row["output_error"] is not None) == (method in ("gptq", "awq")) for row in outcome.rows)
    assert Run.open(outcome.run).status == "done"
    assert craton.load("small").generate("red", max_tokens=3).text is not None


def test_a_calibrated_method_is_nearer_to_the_model_than_rounding(tiny_model: Path, text: str) -> None:
    """On what the model itself makes of the held-out text."""
    source = Checkpoint.open(tiny_model).load(torch.float32)
    errors = {}
    for method in ("rtn", "gptq", "awq"):
        outcome = run(tiny_model, settings(text, method=method, bits=3, samples=24), method)
        made = Checkpoint.open(find(outcome.model).path).load(torch.float32)
        ids_T = SafetensorsFile.open(Run.open(outcome.run).folder / "calibration.safetensors").tensor("held_out")[0]
        position_T = torch.arange(len(ids_T))
        expected, given = source(ids_T, position_T), made(ids_T, position_T)  # type: ignore[call-arg]
        errors[method] = float((given - expected).norm() / expected.norm())
    assert errors["gptq"] < errors["rtn"]
    assert errors["awq"] < errors["rtn"]


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({"bits": 8, "act": "int8", "method": "rtn"}, {"Q8_0"}),
        ({"bits": 3, "group": 64}, {"Q4_1"}),
        ({"bits": 2, "group": 64, "method": "hqq"}, {"Q4_1"}),
        ({"bits": 4, "zeros": True}, {"Q4_1"}),
        ({"bits": 4, "keep": ("lm_head", "down_proj", "layers.0")}, {"Q4_0"}),
    ],
    ids=str,
)
def test_forms(tiny_model: Path, text: str, values: dict[str, Any], kinds: set[str]) -> None:
    outcome = run(tiny_model, settings(text, **values))
    checkpoint = Checkpoint.open(find("small").path)
    assert checkpoint.quantized_kinds() == kinds
    assert checkpoint.int8_activations == ("act" in values)
    kept = outcome.facts["kept"]
    if "keep" in values:
        assert len(kept) == 8  # the first layer and the second one's down projection
        assert not any("layers.0" in row["matrix"] or "down_proj" in row["matrix"] for row in outcome.rows)
    else:
        assert kept == []


@pytest.mark.parametrize("values", [{"method": "gptq"}, {"method": "hqq"}, {"bits": 8, "method": "rtn"}], ids=str)
def test_a_gguf_file_of_a_bf16_model(byte_model: Path, text: str, values: dict[str, Any]) -> None:
    outcome = run(byte_model, settings(text, format="gguf", **values))
    path = find("small").path
    assert path.suffix == ".gguf"
    checkpoint = Checkpoint.open(path)
    expected = {"gptq": "Q4_0", "hqq": "Q4_1", "rtn": "Q8_0"}[values["method"]]
    assert checkpoint.quantized_kinds() == {expected, "Q8_0"}  # the ends have 8 bits
    assert outcome.bytes_after == path.stat().st_size
    assert outcome.difference < 0.02


def test_a_head_of_its_own_is_kept_unless_it_is_named(byte_model: Path, text: str) -> None:
    kept = run(byte_model, settings(text))
    assert kept.facts["kept"] == ["lm_head"]
    both = run(byte_model, settings(text, keep=()), "all")
    assert both.facts["kept"] == []
    assert any(row["matrix"] == "lm_head" for row in both.rows)
    assert both.bytes_after < kept.bytes_after
    assert both.difference < 1e-4


@pytest.mark.parametrize(
    "values",
    [
        {"method": "gptq"},
        {"method": "awq", "bits": 3},
        {"method": "rtn", "size": "0.16MB"},
        {"method": "awq", "tune": 4},
    ],
    ids=str,
)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tiny_model: Path, text: str, values: dict[str, Any]
) -> None:
    whole = run(tiny_model, settings(text, **values), "whole")
    watch = Watch()
    watch.on_progress = Stop(2)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, settings(text, **values), "stopped", watch)
    stopped = next(one for one in list_runs() if one.name == "stopped")
    assert stopped.status == "interrupted"
    assert [path.name for path in (stopped.folder / "blocks").iterdir()] == ["00000.safetensors"]
    assert [model.name for model in list_models()] == ["whole"]
    told: list[str] = []
    watch.on_progress = told.append
    again = resume(stopped, watch)
    assert any("block 1 of 2: done before" in line for line in told)
    assert weights_of(again.model) == weights_of(whole.model)
    assert again.measured == whole.measured
    assert again.rows == whole.rows


def test_bits_are_chosen_under_a_budget(tiny_model: Path, text: str) -> None:
    outcome = run(tiny_model, settings(text, method="rtn", size="0.142MB"))
    counts = outcome.facts["matrices_of_bits"]
    assert len(counts) > 1
    assert sum(counts.values()) == 14
    tensors = SafetensorsFile.open(find("small").path / "model.safetensors").tensors
    assert 0.95 * 142_000 < sum(info.nbytes for info in tensors.values()) <= 142_000 + 14 * 16  # and the shapes
    with pytest.raises(
        UsageError, match=r"too few: what is kept takes .* with 2 bits for every matrix it is 0\.1\d+ MB"
    ):
        run(tiny_model, settings(text, size="0.05MB"), "none")
    assert "none" not in [model.name for model in list_models()]


def test_an_encoder_is_judged_by_its_vectors(tmp_path: Path, tiny_model: Path, text: str) -> None:
    norm = NormConfig(kind="layer", bias=True)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=2, head_size=32, mask="full", bias=("q", "k", "v", "o")),
        feedforward=FeedForwardConfig(hidden=128, activation="gelu", bias=True),
        norm=norm,
        attention_norms=("residual",),
        feedforward_norms=("residual",),
    )
    tokenizer = Checkpoint.open(tiny_model).tokenizer()
    trunk = TrunkConfig(width=64, layers=(layer, layer), positions=LearnedPositions(count=64), input_norm=norm)
    model = build(EncoderConfig(vocab=tokenizer.vocab_size, context=64, token_types=2, trunk=trunk))
    initialise(model, 0)
    save_checkpoint(model, BERT, tmp_path / "encoder", tokenizer=tokenizer)
    cosines = []
    for bits in (2, 8):
        outcome = run(tmp_path / "encoder", settings(text, method="awq" if bits == 2 else "gptq", bits=bits))
        assert outcome.measured.loss_before is None
        assert outcome.measured.cosine is not None
        cosines.append(outcome.measured.cosine)
        assert isinstance(Checkpoint.open(find(outcome.model).path).load(torch.float32), Encoder)
    assert 0.5 < cosines[0] < 0.999 < cosines[1] <= 1 + 1e-9


def test_weights_that_are_quantised_already_are_rounded_again_and_said_so(byte_model: Path, text: str) -> None:
    run(byte_model, settings(text, method="rtn", keep=()), "first")
    outcome = run(find("first").path, settings(text, method="rtn", keep=("lm_head", "down_proj")), "second")
    assert "quantised already (Q4_0)" in outcome.notes[0]
    first, second = (Checkpoint.open(find(name).path).load(torch.float32).state_dict() for name in ("first", "second"))
    # On the same grid they stay where they are.
    name = "trunk.layers.1.attention.o.weight"
    torch.testing.assert_close(first[name], second[name], rtol=2e-3, atol=1e-5)


def test_only_one_block_is_ever_in_fp32(byte_model: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    most = 0

    def counted(block: Any, *rest: Any) -> Any:
        nonlocal most
        made = in_fp32(block, *rest)
        alive.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in alive))
        return made

    monkeypatch.setattr(walking, "in_fp32", counted)
    run(byte_model, settings(text, method="gptq"))
    assert len(alive) == 4  # each block once for what it reads, once as it has become
    assert most <= 2
    source = open_source(Checkpoint.open(byte_model))
    assert {p.dtype for p in source.model.parameters()} == {torch.bfloat16}


def test_the_stream_is_the_models_own_forward(byte_model: Path) -> None:
    source = open_source(Checkpoint.open(byte_model))
    assert isinstance(source.model, CausalLM)
    ids_NT = torch.arange(5 * 32).view(5, 32) % 250
    stream = Stream(source.model, ids_NT)
    for number, block in enumerate(source.model.trunk.layers):
        stream.advance(block, number)  # type: ignore[arg-type]
    norm = source.model.trunk.final_norm
    assert norm is not None
    for row, ids_T in enumerate(ids_NT):
        expected_TD = source.model.hidden(ids_T, torch.arange(32))
        torch.testing.assert_close(norm(stream.hidden_TD.view(5, 32, -1)[row]), expected_TD, rtol=1e-4, atol=1e-5)


def test_refusals_leave_nothing(tiny_model: Path, byte_model: Path, text: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (adapter, {}, CheckpointError, "adapter, which needs its base"),
        (tiny_model, {"keep": ("down_porj",)}, UnknownName, "unknown layer to keep"),
        (byte_model, {"group": 64}, UsageError, "rows of 96 weights, which are not whole groups of 64"),
        (tiny_model, {"samples": 100_000}, DataError, "100000 to calibrate with"),
        (tiny_model, {"window": 4096}, UsageError, "reads 512 tokens at most"),
        (tiny_model, {"format": "gguf", "bits": 3}, UsageError, "would take the room of 4"),
        (tiny_model, {"format": "gguf", "act": "int8"}, UsageError, "cannot ask for int8"),
        (tiny_model, {"format": "gguf"}, CheckpointError, "GGUF cannot express"),
    ]
    for model, values, error, words in cases:
        with pytest.raises(error, match=words) as refused:
            run(model, settings(text, **values))
        assert getattr(refused.value, "remedy", None)
    assert list_models() == []
    assert list_runs() == []


def test_a_layout_that_cannot_hold_a_family_is_refused_before_the_work(
    byte_model: Path, tmp_path: Path, text: str
) -> None:
    values = {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2.config(Keys({"architectures": ["GPT2LMHeadModel"], **values}, "config.json"))
    model = build(config)
    initialise(model, 0)
    save_checkpoint(model, GPT2, tmp_path / "gpt2", tokenizer=Checkpoint.open(byte_model).tokenizer())
    with pytest.raises(CheckpointError, match="inputs and outputs exchanged") as refused:
        run(tmp_path / "gpt2", settings(text))
    assert refused.value.remedy == "say --format gguf"
    assert list_runs() == []
    for method in ("gptq", "awq"):
        outcome = run(tmp_path / "gpt2", settings(text, method=method, format="gguf"), method)
        assert Checkpoint.open(find(method).path).quantized_kinds() == {"Q4_0", "Q8_0"}
        assert outcome.difference < 0.02


def test_experts_that_read_nothing_are_rounded(byte_model: Path, tmp_path: Path, text: str) -> None:
    base = Checkpoint.open(byte_model)
    layer = base.config.trunk.layers[0]
    assert isinstance(layer.feedforward, FeedForwardConfig)
    sparse = layer.model_copy(update={"feedforward": ExpertsConfig(count=10, per_token=1, expert=layer.feedforward)})
    trunk = base.config.trunk.model_copy(update={"layers": (sparse, sparse)})
    model = build(base.config.model_copy(update={"trunk": trunk}))
    initialise(model, 3)
    save_checkpoint(model, MIXTRAL, tmp_path / "experts", tokenizer=base.tokenizer())
    for method in ("gptq", "awq"):
        chosen = settings(text, method=method, samples=1, window=16)
        outcome = run(tmp_path / "experts", chosen, method)
        assert len(outcome.rows) == 2 * (4 + 10 * 3)  # the router is kept
        assert any("read no token" in note for note in outcome.notes)
        assert outcome.difference < 1e-3


@pytest.mark.parametrize(
    ("text_of", "nbytes"), [("80MB", 80_000_000), ("1.5 GB", 1_500_000_000), ("64MiB", 64 << 20), ("100B", 100)]
)
def test_sizes(text_of: str, nbytes: int) -> None:
    assert parse_bytes(text_of) == nbytes


@pytest.mark.parametrize("text_of", ["80", "MB", "-3MB", "80 megabytes"])
def test_no_sizes(text_of: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text_of)


# --- pruning ------------------------------------------------------------------------------------------------------


def prune_settings(text: str, **values: Any) -> PruneSettings:
    return PruneSettings(**{"calibration": (text,), **TEXT, **values})


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_zeros_are_saved_in_a_plain_checkpoint(byte_model: Path, text: str, method: str, pattern: str) -> None:
    outcome = prune(str(byte_model), prune_settings(text, method=method, sparsity=pattern), {}, "sparse")
    assert outcome.facts["zeros"] == pytest.approx(0.5, abs=0.01)
    found = find("sparse")
    assert [(parent.relation, parent.name) for parent in found.parents] == [("pruned_from", str(byte_model))]
    checkpoint = Checkpoint.open(found.path)
    assert checkpoint.stored_kind() == "BF16"
    model = checkpoint.load(torch.bfloat16)
    matrices = [t for name, t in model.state_dict().items() if ".layers." in name and t.dim() == 2]
    assert len(matrices) == 14
    for matrix in matrices:
        if pattern == "2:4":
            assert int((matrix == 0).view(-1, 4).sum(1).min()) >= 2
        assert float((matrix == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert outcome.difference < 1e-4


def test_an_interrupted_pruning_goes_on_and_ends_with_the_same_bytes(byte_model: Path, text: str) -> None:
    chosen = prune_settings(text, sparsity="4:8")
    whole = prune(str(byte_model), chosen, {}, "whole")
    watch = Watch()
    watch.on_progress = Stop(2)
    with pytest.raises(KeyboardInterrupt):
        prune(str(byte_model), chosen, {}, "stopped", watch)
    again = resume_pruning(next(one for one in list_runs() if one.name == "stopped"))
    assert weights_of(again.model) == weights_of(whole.model)
