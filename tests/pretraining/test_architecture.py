"""Fresh models are of published families: what is saved opens again, here and elsewhere, and says the same."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.save import save_checkpoint
from craton.errors import UsageError
from craton.models import build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import causal_config, encoder_config, experts_config, family_of_fresh
from craton.pretraining.sizing import SizeOverrides, size
from craton.training.flops import token_flops
from craton.trunk import ExpertsConfig
from craton.trunk.feedforward import Experts

VOCAB, CONTEXT = 320, 128
MAKERS = {"causal": causal_config, "encoder": encoder_config, "experts": experts_config}
CLASSES = {
    "causal": ("LlamaForCausalLM", "AutoModelForCausalLM"),
    "encoder": ("ModernBertModel", "AutoModel"),
    "experts": ("DeepseekV3ForCausalLM", "AutoModelForCausalLM"),
}


def fresh(kind, dial="0.5m", context=CONTEXT, **overrides):
    plan = size(dial, vocab=VOCAB, context=context, encoder=kind == "encoder", overrides=SizeOverrides(**overrides))
    model = build(MAKERS[kind](plan, VOCAB, context))
    initialise(model, 0)
    for module in model.modules():
        if isinstance(module, Experts) and module.router_bias is not None:
            module.router_bias.copy_(torch.linspace(-0.3, 0.3, module.config.count))
    return model.eval()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("context", [CONTEXT, 8192])
def test_what_is_saved_is_what_is_loaded(kind, context, tmp_path):
    model = fresh(kind, context=context)
    save_checkpoint(model, family_of_fresh(model.config), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == model.config
    assert checkpoint.hf["architectures"] == [CLASSES[kind][0]]
    again = checkpoint.load(torch.float32).state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.peer
@pytest.mark.parametrize("kind", MAKERS)
def test_transformers_opens_it_and_computes_the_same(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = fresh(kind, width=128, heads=4, layers=3) if kind == "causal" else fresh(kind)
    save_checkpoint(model, family_of_fresh(model.config), tmp_path)
    name, auto = CLASSES[kind]
    theirs = getattr(transformers, auto).from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert type(theirs).__name__ == name
    ids = torch.randint(5, VOCAB, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out = theirs.eval()(ids[None])
        reference = out.last_hidden_state[0] if kind == "encoder" else out.logits[0]
        torch.testing.assert_close(model(ids, torch.arange(40)), reference, rtol=1e-3, atol=1e-4)


def test_a_mixture_computes_about_as_much_as_the_dense_model_of_its_plan_and_holds_more():
    plan = size("5m", vocab=1024, context=CONTEXT)
    with torch.device("meta"):
        dense, sparse = (build(make(plan, 1024, CONTEXT)) for make in (causal_config, experts_config))
    held = sum(parameter.numel() for parameter in sparse.parameters())
    assert held > 1.7 * plan.parameters
    # Its attention is another one, with somewhat larger query heads.
    assert 0.9 < token_flops(sparse, 64).training / token_flops(dense, 64).training < 1.2


def test_a_mixture_has_a_dense_layer_first_and_no_more_experts_than_asked_for():
    plan = size("5m", vocab=1024, context=CONTEXT)
    first, *others = experts_config(plan, 1024, CONTEXT, experts=16, per_token=4).trunk.layers
    assert not isinstance(first.feedforward, ExpertsConfig)
    assert all((layer.feedforward.count, layer.feedforward.per_token) == (16, 4) for layer in others)
    for experts, per_token in ((4, 5), (4, 0)):
        with pytest.raises(UsageError, match=f"{per_token} of 4 experts"):
            experts_config(plan, 1024, CONTEXT, experts=experts, per_token=per_token)


def test_sizes_of_the_user_reach_the_model():
    config = causal_config(
        size("2m", vocab=VOCAB, context=64, overrides=SizeOverrides(width=192, heads=6, kv_heads=2, hidden=500)),
        VOCAB,
        64,
    )
    attention = config.trunk.layers[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_size) == (6, 2, 32)
    assert config.trunk.layers[0].feedforward.hidden == 500
