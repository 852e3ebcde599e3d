"""Pictures, and texts beside them, to calibrate a model with that sees."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.compression.blocks import BATCH_TOKENS, Flow, Source, Tower
from craton.compression.calibration import HELD_OUT
from craton.compression.material import TEXTS, VECTORS, Material
from craton.compression.quantize_settings import CalibrationSettings
from craton.data.pictures import PictureSet, read_pictures
from craton.errors import DataError, FileFormatError, UsageError
from craton.inference.images import TEMPLATES, SeeingConfig
from craton.modalities.image import ImagePreprocessing, list_images, read_preprocessing
from craton.models import (
    AnyModel,
    DualEncoder,
    DualEncoderConfig,
    ImageClassifier,
    ImageClassifierConfig,
    VisionConfig,
    VisionTransformer,
)
from craton.pretraining.image_text.data import encode_captions

MOST_CAPTION: Final = 1 << 20  # bytes of a caption's file
# Where pictures have no captions, the side of texts is judged by plain sentences (and calibrated with none).
WORDS: Final = ("dog", "car", "house", "tree", "woman", "street", "food", "boat", "chair", "mountain")


class PictureMaterial(Material):
    """pictures, held_out: uint8 [N, H, W, channels], resized as the model will see them; captions, held_out_captions:
    ids, filled up with -1."""

    @classmethod
    def read(cls, checkpoint: Checkpoint, settings: CalibrationSettings) -> PictureMaterial:
        """Raises UsageError where no pictures are named, DataError for too few, and what reading them raises."""
        if not settings.calibration:
            raise UsageError(
                "a model that sees is judged by pictures",
                where="--calibration",
                remedy="name a folder of pictures like those that it will see: --calibration FOLDER",
            )
        wanted = settings.samples + HELD_OUT
        shape = _shape(checkpoint)
        sources = _drawn(settings.calibration, wanted, settings.seed)
        found = read_pictures(sources, size=max(shape.size), channels=shape.channels, shape=shape, labelled=False)
        if len(found) < wanted:
            raise DataError(
                f"there are {len(found)} pictures; {settings.samples} to calibrate with and {HELD_OUT} to judge by are "
                "needed",
                where=", ".join(settings.calibration),
                remedy="name more pictures, or lower --samples",
            )
        chosen = np.random.default_rng(settings.seed).permutation(len(found))[:wanted]
        found = found.take(chosen)
        tensors = {
            "calibration": torch.from_numpy(found.pixels[: settings.samples]),
            "held_out": torch.from_numpy(found.pixels[settings.samples :]),
        }
        facts: dict[str, Any] = {
            "pictures": list(settings.calibration),
            "pictures_sha256": found.digest,
            "samples": settings.samples,
            "held_out_pictures": HELD_OUT,
            "size": list(found.pixels.shape[1:3]),
            "seed": settings.seed,
        }
        if isinstance(checkpoint.config, DualEncoderConfig):
            captions = _captions(found)
            facts["captions"] = captions is not None
            if captions is not None:
                tensors["captions"] = _encoded(checkpoint, captions[: settings.samples])
            sentences = [TEMPLATES[i % len(TEMPLATES)].format(word) for i, word in enumerate(WORDS)]
            judged = captions[settings.samples :] if captions is not None else sentences
            facts["held_out_texts"] = len(judged)
            tensors["held_out_captions"] = _encoded(checkpoint, judged)
        return cls(checkpoint, tensors, facts)

    def flow(self, source: Source, tower: Tower, *, held_out: bool, done: Mapping[str, Flow]) -> Flow | None:
        """Of the pictures; of the side of texts, of the captions."""
        model = source.model
        if isinstance(model, DualEncoder) and tower.trunk is model.text.trunk:
            name = "held_out_captions" if held_out else "captions"
            if name not in self.tensors:
                return None
            texts, together = self._texts(name), max(1, BATCH_TOKENS // model.config.context)
            parts = [texts[first : first + together] for first in range(0, len(texts), together)]
            return Flow(tower.trunk, [partial(model.encode_texts, part) for part in parts])
        vision = _vision(model)
        pixels = self._pixels("held_out" if held_out else "calibration", vision.config)
        return Flow(tower.trunk, [partial(vision, pixels_BCHW) for pixels_BCHW in pixels])

    @torch.inference_mode()
    def judge(self, model: AnyModel) -> dict[str, Tensor]:
        """The vectors of pictures, and of texts."""
        vision = _vision(model)
        found = {VECTORS: torch.cat([vision.encode(one) for one in self._pixels("held_out", vision.config)])}
        if isinstance(model, DualEncoder):
            found[TEXTS] = model.encode_texts(self._texts("held_out_captions"))
        return found

    @torch.inference_mode()
    def expected(self, model: AnyModel, done: Mapping[str, Flow]) -> list[Tensor]:
        """Vectors (of a classifier: logits) of the pictures, and the vectors of texts."""
        flows, vision = list(done.values()), _vision(model)
        norm, count = vision.trunk.final_norm, len(self.tensors["held_out"])
        hidden_TD = flows[0].hidden_TD if norm is None else norm(flows[0].hidden_TD)
        vectors_BD = vision.pool(hidden_TD.unflatten(0, (count, -1)))
        if isinstance(model, ImageClassifier):
            return [model.head(vectors_BD)]
        if not isinstance(model, DualEncoder):
            return [vectors_BD]
        norm = model.text.trunk.final_norm
        hidden_TD = flows[1].hidden_TD if norm is None else norm(flows[1].hidden_TD)
        lengths_B = torch.tensor([len(ids) for ids in self._texts("held_out_captions")])
        return [vectors_BD, model.pool_texts(hidden_TD, lengths_B)]

    @torch.inference_mode()
    def given(self, model: AnyModel) -> list[Tensor]:
        """See `expected`."""
        if isinstance(model, ImageClassifier):
            return [torch.cat([model(one) for one in self._pixels("held_out", model.config.backbone)])]
        return list(self.judge(model).values())

    def _pixels(self, name: str, config: VisionConfig) -> Iterator[Tensor]:
        """The pictures as the model reads them, some at a time."""
        preprocessing, pixels_NHWC = _shape(self.checkpoint), self.tensors[name]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        height, width = pixels_NHWC.shape[1:3]
        tokens = (height // config.patch) * (width // config.patch) + config.extra
        for part_BHWC in pixels_NHWC.split(max(1, BATCH_TOKENS // tokens)):
            yield (part_BHWC.permute(0, 3, 1, 2).float() * preprocessing.rescale - mean) / std

    def _texts(self, name: str) -> list[list[int]]:
        return [[token for token in ids if token >= 0] for ids in self.tensors[name].tolist()]


def _vision(model: AnyModel) -> VisionTransformer:
    if isinstance(model, VisionTransformer):
        return model
    assert isinstance(model, ImageClassifier | DualEncoder)
    return model.vision if isinstance(model, DualEncoder) else model.backbone


def _shape(checkpoint: Checkpoint) -> ImagePreprocessing:
    """How pictures are prepared, all to one size. What a model resizes in floating point is rounded between the two
    steps here: to calibrate it that is the same."""
    config = checkpoint.config
    assert isinstance(config, SeeingConfig)
    shape = read_preprocessing(checkpoint.folder).model_copy(update={"floating": False})
    if shape.crop is not None or shape.resize == "exactly":
        return shape
    if isinstance(config, VisionConfig):
        return shape.resized_to(*config.image)
    return shape.resized_to(*(config.backbone if isinstance(config, ImageClassifierConfig) else config.vision).image)


def _drawn(sources: Sequence[str], wanted: int, seed: int) -> list[str]:
    """The same sources, but of a folder with more pictures than are wanted only so many of its files."""
    found: list[str] = []
    for source in sources:
        folder = Path(source).expanduser()
        files = [str(path) for path in list_images(folder)] if folder.is_dir() else [source]
        found += sorted(random.Random(seed).sample(files, min(wanted, len(files))))
    return found


def _captions(pictures: PictureSet) -> list[str] | None:
    """A caption of each: of a table's records, or the first line of NAME.txt beside NAME.png; None if one has none."""
    if pictures.captions is not None:
        return list(pictures.captions)
    found = [caption for origin in pictures.origins if (caption := _caption_beside(Path(origin).with_suffix(".txt")))]
    return found if len(found) == len(pictures) else None


def _caption_beside(path: Path) -> str | None:
    if not path.is_file() or path.stat().st_size > MOST_CAPTION:
        return None
    try:
        return path.read_text(encoding="utf-8-sig").strip().partition("\n")[0].strip()
    except UnicodeDecodeError:
        raise FileFormatError("the caption is not UTF-8", where=str(path), remedy="save it as UTF-8") from None


def _encoded(checkpoint: Checkpoint, captions: Sequence[str]) -> Tensor:
    """Ids of captions [N, longest], -1 behind each; those of a model that fills its texts up are full."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    assert isinstance(config, DualEncoderConfig)
    encoded, _ = encode_captions(tokenizer, captions, config.context, lower=config.lower_case)
    longest = max(len(ids) for ids in encoded)
    fill = -1
    if config.pad is not None:
        # The tokeniser's own token, whatever the config's default says, as `load_images` has it.
        longest, fill = config.context, config.pad if tokenizer.pad_id is None else tokenizer.pad_id
    return torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in encoded])
