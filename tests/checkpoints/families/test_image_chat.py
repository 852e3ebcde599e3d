"""LLaVA, Idefics 3 and SmolVLM on random small models: parity with transformers and the way back."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.save import save_checkpoint
from craton.errors import CheckpointError, UsageError
from craton.models import ImageChat

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

TOLERANCE = 2e-4  # of the largest logit
IMAGE = 98

SIGHT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 99,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llava(text=None, **fields):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIGHT),
        text_config=text or transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        **fields,
    )
    return transformers.LlavaForConditionalGeneration, config


def mistral():
    return transformers.MistralConfig(**TEXT, sliding_window=30)


def tiles(kind, config, text=None, **fields):
    made = config(
        vision_config=dict(SIGHT), text_config={"model_type": "llama", **TEXT, **(text or {})}, image_token_id=IMAGE,
        **{"scale_factor": 2, **fields},
    )  # fmt: skip
    return kind, made


def idefics3(**fields):
    return tiles(transformers.Idefics3ForConditionalGeneration, transformers.Idefics3Config, **fields)


def smolvlm(**fields):
    return tiles(transformers.SmolVLMForConditionalGeneration, transformers.SmolVLMConfig, **fields)


MODELS = {
    "llava": llava,
    "llava, the last layer and its class token": lambda: llava(
        vision_feature_layer=-1, vision_feature_select_strategy="full"
    ),
    "llava, an early layer, no bias, another activation": lambda: llava(
        vision_feature_layer=2, multimodal_projector_bias=False, projector_hidden_act="relu"
    ),
    "llava over mistral": lambda: llava(mistral()),
    "llava, tied": lambda: llava(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "idefics3": idefics3,
    "idefics3, larger squares": lambda: idefics3(scale_factor=3),
    "smolvlm": smolvlm,
    "smolvlm, tied": lambda: smolvlm(tie_word_embeddings=True),
}


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def conversation(count, tokens):
    """Ids with so many pictures, text between them and behind."""
    parts = [torch.tensor([1, 5, 6])]
    for number in range(count):
        parts += [torch.full((tokens,), IMAGE), torch.tensor([10 + number, 11])]
    return torch.cat([*parts, torch.arange(20, 29)])


def pixels(count, seed=0):
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def theirs_logits(model, ids, pixels_BCHW):
    given = pixels_BCHW if isinstance(model, transformers.LlavaForConditionalGeneration) else pixels_BCHW[None]
    with torch.inference_mode():
        return model(input_ids=ids[None], pixel_values=given, attention_mask=torch.ones_like(ids)[None]).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_so_they_are_on_the_way_back(name, random_model, tmp_path):
    kind, config = MODELS[name]()
    theirs, checkpoint, ours = random_model(kind, config)
    assert isinstance(ours, ImageChat)
    ids = conversation(3, ours.config.picture_tokens)
    given = pixels(3)
    expected = theirs_logits(theirs, ids, given)
    with torch.inference_mode():
        logits = ours.logits_of(ids, torch.arange(len(ids)), given)
        other = ours.logits_of(ids, torch.arange(len(ids)), pixels(3, seed=1))
        text = ours(ids[-9:], torch.arange(9))
    assert relative_error(logits, expected) < TOLERANCE
    assert relative_error(other, expected) > 100 * TOLERANCE  # the pictures matter
    alone = theirs(input_ids=ids[None, -9:], attention_mask=torch.ones(1, 9, dtype=torch.long)).logits[0]
    assert relative_error(text, alone) < TOLERANCE

    save_checkpoint(ours, checkpoint.family, tmp_path / "ours")
    again = kind.from_pretrained(tmp_path / "ours").eval()
    assert relative_error(theirs_logits(again, ids, given), expected) < TOLERANCE
    reopened = Checkpoint.open(tmp_path / "ours")
    assert reopened.config == checkpoint.config
    assert torch.equal(reopened.load(torch.float32).logits_of(ids, torch.arange(len(ids)), given), logits)


def test_the_older_and_the_newer_names_of_llavas_tensors_are_one():
    family = family_of({"architectures": ["LlavaForConditionalGeneration"]}, "config.json")
    for newer, older in {
        "model.language_model.layers.0.mlp.up_proj.weight": "language_model.model.layers.0.mlp.up_proj.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "model.vision_tower.vision_model.pre_layrnorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
        "vision_tower.pre_layrnorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
        "model.multi_modal_projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
    }.items():
        assert family.current_name(newer) == older == family.current_name(older)


def test_llava_1_5_as_its_file_shortens_it():
    published = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    config = family_of(published, "config.json").config(Keys(published, "config.json"))
    assert (config.picture_tokens, config.context, config.vocab, config.trunk.width) == (576, 4096, 32064, 4096)
    assert len(config.trunk.layers) == 32
    assert len(config.vision.trunk.layers) == 23
    assert config.vision.trunk.final_norm is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_feature_layer": -9}, "layer -9"),
        ({"vision_feature_select_strategy": "some"}, "not supported"),
        ({"vision_config": {"model_type": "vit"}}, "not supported"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_feature_select_strategy"),
        ({"text_config": {"model_type": "mamba"}}, "mamba"),
        ({"image_token_index": 99}, "vocabulary"),
        ({"vision_feature_layer": [-2, -5]}, "type int"),
    ],
)
def test_what_is_not_supported_says_so(change, said):
    values = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 98,
        "vision_config": SIGHT,
        "text_config": {"model_type": "llama", **TEXT},
        **change,
    }
    with pytest.raises(CheckpointError, match=said):
        family_of(values, "config.json").config(Keys(values, "config.json"))


def test_pictures_of_another_size_or_number_are_refused(tmp_path):
    kind, config = idefics3()
    kind(config).save_pretrained(tmp_path)
    model = Checkpoint.open(tmp_path).load(torch.float32)
    ids = conversation(2, model.config.picture_tokens)
    with pytest.raises(UsageError, match="image tokens"):
        model.logits_of(ids, torch.arange(len(ids)), pixels(3))
    with pytest.raises(UsageError, match="28 x 24"):
        model.see(torch.zeros(1, 3, 28, 24))
