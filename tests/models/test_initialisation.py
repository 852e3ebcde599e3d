"""Fresh weights: how large they are, that they depend on seed and name alone, and the loss that they give."""

from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from craton.models import build
from craton.models.initialisation import initialise
from craton.models.masked_lm import MaskedLM, MaskedLMConfig
from craton.pretraining.architecture import causal_config, encoder_config, experts_config
from craton.pretraining.sizing import SizeOverrides, size
from craton.trunk import NormConfig

VOCAB = 4096


def config(make=causal_config, width=256, layers=4, vocab=VOCAB):
    overrides = SizeOverrides(width=width, layers=layers, hidden=2 * width)
    return make(size("5m", vocab=vocab, context=128, overrides=overrides), vocab, 128)


def fresh(config, seed=0, dtype=torch.float32):
    model = build(config).to(dtype)
    initialise(model, seed)
    return model


def test_each_parameter_depends_on_seed_and_name_alone():
    model = fresh(config(), 7)
    again, other = (fresh(config(), seed).state_dict() for seed in (7, 8))
    deeper, half = fresh(config(layers=6), 7).state_dict(), fresh(config(), 7, torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor.bfloat16(), half[name])
        is_random = tensor.dim() == 2
        assert torch.equal(tensor, other[name]) is not is_random
        # Only what writes to the residual stream knows how deep the model is.
        scale = (4 / 6) ** 0.5 if name.endswith(("attention.o.weight", "down.weight")) else 1.0
        torch.testing.assert_close(deeper[name], tensor * scale)
    q = [layer.attention.q.weight for layer in model.trunk.layers]
    assert abs(torch.corrcoef(torch.stack([w.flatten() for w in q]))[0, 1]) < 0.02


def test_scales():
    model = fresh(config())
    layer = model.trunk.layers[1]
    for weight, std in (
        (model.embedding.weight, 0.4 / 16),
        (layer.attention.q.weight, 1 / 16),
        (layer.feedforward.up.weight, 1 / 16),
        (layer.attention.o.weight, 1 / 16 / 8**0.5),
        (layer.feedforward.down.weight, 512**-0.5 / 8**0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert weight.mean().item() == pytest.approx(0.0, abs=0.02 * std)
    assert model.head.weight is model.embedding.weight


def test_norms_are_the_identity_and_biases_zero_whatever_was_there():
    shifted = config().trunk.layers[0].norm.model_copy(update={"offset": 1.0})
    layers = tuple(layer.model_copy(update={"norm": shifted}) for layer in config().trunk.layers)
    attention = layers[0].attention.model_copy(update={"bias": ("q", "o")})
    layers = (layers[0].model_copy(update={"attention": attention}), *layers[1:])
    model = build(config().model_copy(update={"trunk": config().trunk.model_copy(update={"layers": layers})}))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 9.0)
    initialise(model, 0)
    assert (model.trunk.layers[0].attention_norm["input"].weight == 0).all()  # the scale is 1 + weight
    assert (model.trunk.final_norm.weight == 1).all()
    assert (model.trunk.layers[0].attention.q.bias == 0).all()


@pytest.mark.parametrize("make", [causal_config, experts_config])
@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_model_knows_nothing(make, width, tied):
    model = fresh(config(make, width).model_copy(update={"tied": tied}))
    ids = torch.randint(VOCAB, (257,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = F.cross_entropy(model(ids[:-1], torch.arange(256)), ids[1:])
    assert float(loss) == pytest.approx(log(VOCAB), rel=0.02)


def test_a_fresh_masked_language_model_knows_nothing():
    encoder = config(encoder_config)
    model = MaskedLM(MaskedLMConfig(encoder=encoder, activation="gelu", norm=NormConfig(kind="layer")))
    initialise(model, 0)
    ids, targets = torch.randint(VOCAB, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = F.cross_entropy(model(ids, torch.arange(128)), targets)
    assert float(loss) == pytest.approx(log(VOCAB), rel=0.02)


def test_hidden_states_keep_their_scale_through_many_layers():
    model = fresh(config(layers=24))
    ids = torch.randint(VOCAB, (64,), generator=torch.Generator().manual_seed(0))
    scales = []
    for layer in model.trunk.layers:
        layer.register_forward_hook(lambda *call: scales.append(float(call[2].std())))
    with torch.inference_mode():
        model.hidden(ids, torch.arange(64))
    assert len(scales) == 24
    assert scales[-1] < 1.0


def test_an_unknown_module_is_not_left_as_it_was():
    model = build(config())
    model.trunk.layers[0].attention.q = nn.Bilinear(2, 2, 2)
    with pytest.raises(TypeError, match=r"attention\.q\.weight.*Bilinear"):
        initialise(model, 0)
