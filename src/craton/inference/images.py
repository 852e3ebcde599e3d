"""Models that see: vectors of pictures, their classes, what stands where in them, and texts in the same space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import Family
from craton.errors import ContextOverflow, UsageError
from craton.inference import native
from craton.inference.linears import prepare
from craton.inference.plan import DTypeChoice, Plan, make_plan
from craton.modalities.image import FILE_NAME, ImagePreprocessing, check_pixels, read_image, read_preprocessing
from craton.modalities.text import Tokenizer
from craton.models import (
    AnyModel,
    DualEncoder,
    DualEncoderConfig,
    ImageClassifier,
    ImageClassifierConfig,
    VisionConfig,
    VisionTransformer,
)
from craton.store import find

TOKENS: Final = 4096  # patches that are read at once
MOST_SIDE: Final = 4096  # pixels of a side that features are taken of

# A class is named in several ways and the vectors are averaged: a single sentence says too much of its own
# (Radford 2021, section 3.1.4).
TEMPLATES: Final = (
    "a photo of a {}.",
    "a picture of the {}.",
    "a close-up photo of a {}.",
    "a photo of the small {}.",
    "a photo of the large {}.",
    "a drawing of a {}.",
    "a blurry photo of a {}.",
    "a {} on a plain background.",
)

SeeingConfig = VisionConfig | ImageClassifierConfig | DualEncoderConfig

Picture = str | Path | bytes | NDArray[Any]
"""A file, a file's bytes, or pixels [H, W, 3] (0..255)."""


class Guess(NamedTuple):
    """A class of a picture. probability: of all classes together 1, or of each alone for a model of pairs (SigLIP)."""

    label: str
    probability: float


class Features(NamedTuple):
    """What a layer makes of a picture. patches: fp32 [rows, columns, width]. cls: the class token's [width], if any."""

    layer: int
    patches: Tensor
    cls: Tensor | None


class ImageModel:
    """A loaded model that sees. Make one with `craton.load_images`."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        module: VisionTransformer | ImageClassifier | DualEncoder,
        preprocessing: ImagePreprocessing,
        tokenizer: Tokenizer | None,
        plan: Plan,
    ) -> None:
        self.name, self.checkpoint, self.module, self.plan = name, checkpoint, module, plan
        self.preprocessing, self.tokenizer = preprocessing, tokenizer
        self.weights: tuple[Path, ...] = (checkpoint.path,)  # where they come from: a base, and what was merged into it

    @property
    def identity(self) -> str:
        """Another one for other weights: their files, with sizes and times of change."""
        found = []
        for place in self.weights:
            files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
            found += [f"{file.resolve()}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
        return "\n".join(found)

    @property
    def vision(self) -> VisionTransformer:
        """The part that sees."""
        if isinstance(self.module, VisionTransformer):
            return self.module
        return self.module.vision if isinstance(self.module, DualEncoder) else self.module.backbone

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes of a trained head; None for a model without one."""
        return self.module.config.labels if isinstance(self.module, ImageClassifier) else None

    @property
    def reads(self) -> bool:
        """Whether it also gives texts vectors, in the space of the pictures'."""
        return isinstance(self.module, DualEncoder)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        if isinstance(self.module, DualEncoder):
            return self.module.config.projection
        return self.vision.config.width

    @torch.inference_mode()
    def embed_images(
        self, pictures: Sequence[Picture], on_progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """One fp32 vector of length 1 for each picture, [B, width].

        Raises UsageError for a file that is not there, FileFormatError for one that is no picture.
        """
        vectors = []
        for pixels_BCHW in self._batches(pictures):
            pooled = self.vision.encode(pixels_BCHW)
            vectors.append(F.normalize(pooled.float(), dim=-1))
            on_progress(sum(len(part) for part in vectors))
        return torch.cat(vectors) if vectors else torch.empty(0, self.width)

    @torch.inference_mode()
    def embed(self, texts: str | Sequence[str]) -> Tensor:
        """One fp32 vector of length 1 for each text, [B, width], in the space of the pictures'.

        Raises UsageError for a model that reads no text, ContextOverflow for a text that is too long: nothing is cut.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        module, encoded = self._dual(), self._encode(texts)
        parts = [module.encode_texts(encoded[start : start + 64]) for start in range(0, len(encoded), 64)]
        return torch.cat(parts) if parts else torch.empty(0, self.width)

    def classify(
        self, pictures: Sequence[Picture], labels: Sequence[str] | None = None, templates: Sequence[str] = TEMPLATES
    ) -> list[list[Guess]]:
        """The classes of each picture, the likeliest first.

        labels: any, for a model that reads texts too, by the mean vector of `templates` with the label in the place of
        {}. A model with a trained head has its own.

        Raises UsageError for labels that a trained head does not know, and for a model that has neither.
        """
        if labels is not None and (
            not labels or len(set(labels)) < len(labels) or not all(label.strip() for label in labels)
        ):
            raise UsageError("labels are different words, at least one", where=", ".join(labels) or "no label")
        if isinstance(self.module, ImageClassifier):
            names: Sequence[str] = self.module.config.labels
            if labels is not None:
                unknown = [label for label in labels if label not in names]
                if unknown:
                    raise UsageError(
                        f"{self.name} was trained for other classes than {unknown[0]!r}",
                        remedy=f"its classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}",
                    )
            scores = self._trained(pictures)
            if labels is not None:
                scores, names = scores[:, [names.index(label) for label in labels]], labels
            scores = scores.softmax(-1)
        else:
            if labels is None:
                raise UsageError(f"{self.name} has no classes of its own", remedy="name some: --labels cat,dog")
            scores, names = self._zero_shot(pictures, labels, templates), labels
        orders = scores.argsort(dim=-1, descending=True, stable=True).tolist()
        return [
            [Guess(names[i], float(row[i])) for i in order] for row, order in zip(scores.tolist(), orders, strict=True)
        ]

    @torch.inference_mode()
    def features(
        self, picture: Picture, layers: Sequence[int] | None = None, *, size: int | None = None
    ) -> list[Features]:
        """What layers make of a picture's patches (of the last one unless named, through the final norm as all are).

        layers: from 0, or from the end as -1. size: pixels of the shorter side, which become a multiple of a patch; the
        picture then keeps its shape. None: as the model was trained.

        Raises UsageError for a layer that is not there or a size that makes no patch.
        """
        vision = self.vision
        count, norm = len(vision.config.trunk.layers), vision.trunk.final_norm
        wanted = [layer + count if layer < 0 else layer for layer in (layers if layers is not None else [-1])]
        for layer, number in zip(layers if layers is not None else [-1], wanted, strict=True):
            if not 0 <= number < count:
                raise UsageError(
                    f"there is no layer {layer}", where=self.name, remedy=f"it has {count}: 0 to {count - 1}"
                )
        pixels_CHW = self.preprocessing.prepare(_read(picture)) if size is None else self._sized(picture, size)
        pixels_BCHW = torch.from_numpy(pixels_CHW)[None]
        patch = vision.config.patch
        grid = (pixels_BCHW.shape[2] // patch, pixels_BCHW.shape[3] // patch)
        taps = dict.fromkeys(wanted, torch.empty(0))
        vision(pixels_BCHW, taps=taps)
        found = []
        for number in wanted:
            tokens_ND = taps[number][0]
            tokens_ND = (norm(tokens_ND) if norm is not None else tokens_ND).float()
            patches = tokens_ND[vision.config.extra :].unflatten(0, grid)
            found.append(Features(number, patches, tokens_ND[0] if vision.config.class_token else None))
        return found

    def _sized(self, picture: Picture, size: int) -> NDArray[np.float32]:
        patch, pixels = self.vision.config.patch, _read(picture)
        height, width = pixels.shape[:2]
        scale = size / min(height, width)
        sides = [max(1, round(side * scale / patch)) * patch for side in (height, width)]
        if size < patch or max(sides) > MOST_SIDE:
            raise UsageError(
                f"{size} pixels make pictures of {sides[0]} x {sides[1]}",
                where="size",
                remedy=f"take {patch} or more, and at most {MOST_SIDE} for the longer side",
            )
        return self.preprocessing.resized_to(sides[0], sides[1]).prepare(pixels)

    @torch.inference_mode()
    def _trained(self, pictures: Sequence[Picture]) -> Tensor:
        assert isinstance(self.module, ImageClassifier)
        parts = [self.module(pixels_BCHW).float() for pixels_BCHW in self._batches(pictures)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.module.config.labels))

    @torch.inference_mode()
    def _zero_shot(self, pictures: Sequence[Picture], labels: Sequence[str], templates: Sequence[str]) -> Tensor:
        module = self._dual()
        bad = [template for template in templates if template.count("{}") != 1]
        if bad or not templates:
            raise UsageError("a template holds {} once, where the label stands", where=bad[0] if bad else "no template")
        sentences = [template.replace("{}", label) for label in labels for template in templates]
        means_LD = self.embed(sentences).unflatten(0, (len(labels), len(templates))).mean(1)
        logits_BL: Tensor = module.logits(self.embed_images(pictures), F.normalize(means_LD, dim=-1))
        return logits_BL.sigmoid() if module.config.logit_bias else logits_BL.softmax(-1)

    def _dual(self) -> DualEncoder:
        if not isinstance(self.module, DualEncoder):
            raise UsageError(
                f"{self.name} sees and reads no text", remedy="take a model of both, such as CLIP or SigLIP"
            )
        return self.module

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        module = self._dual()
        assert self.tokenizer is not None
        given = [text.lower() for text in texts] if module.config.lower_case else list(texts)
        encoded = self.tokenizer.encode_batch(given)
        for text, ids in zip(texts, encoded, strict=True):
            if not ids:
                raise UsageError("an empty text has no vector", remedy="leave it out")
            if len(ids) > module.config.context:
                raise ContextOverflow(
                    f"{text[:40]!r} has {len(ids)} tokens, more than {self.name}'s {module.config.context}",
                    remedy="say it in fewer words",
                )
        return encoded

    def _batches(self, pictures: Sequence[Picture]) -> Iterator[Tensor]:
        rows, columns = self.vision.config.grid
        together = max(1, TOKENS // (rows * columns))
        for start in range(0, len(pictures), together):
            pixels = [_read(picture) for picture in pictures[start : start + together]]
            yield torch.from_numpy(self.preprocessing.prepare_all(pixels))


def _read(picture: Picture) -> NDArray[np.uint8]:
    return check_pixels(picture) if isinstance(picture, np.ndarray) else read_image(picture)


def sees(name: str | Path) -> bool:
    """Whether this is a model of pictures, for `load_images`. Raises what opening a model raises."""
    found = find(str(name))
    if not (found.path / "adapter_config.json").is_file():
        return isinstance(Checkpoint.open(found.path).config, SeeingConfig)
    # What an adapter changes sees if it was trained with pictures.
    return (found.path / FILE_NAME).is_file()


def load_images(
    name: str | Path,
    *,
    dtype: DTypeChoice = "auto",
    threads: int | None = None,
    adapt: Callable[[AnyModel, Family], AnyModel] | None = None,
) -> ImageModel:
    """Load a model that sees (ViT, DINOv2, DINOv3, CLIP, SigLIP, a ViT or DINOv2 beside a BERT): a stored name,
    "hf:org/name" or a folder.

    dtype, threads: see `craton.inference.model.load`. adapt: gives the model to run, of the float32 one.

    Raises UsageError for a model of texts, and what loading raises.
    """
    checkpoint = Checkpoint.open(find(str(name)).path)
    if not isinstance(checkpoint.config, SeeingConfig):
        raise UsageError(
            f"{name} makes no vectors of pictures: it is a {checkpoint.hf['architectures'][0]}",
            remedy="take a ViT, DINOv2, DINOv3, CLIP or SigLIP; a SamModel is for craton segment",
        )
    preprocessing = read_preprocessing(checkpoint.folder)
    plan = make_plan(checkpoint, dtype, threads)
    torch.set_num_threads(plan.threads)
    native.set_threads(plan.threads)
    tokenizer = checkpoint.tokenizer() if isinstance(checkpoint.config, DualEncoderConfig) else None
    if adapt is None:
        module = checkpoint.load(plan.dtype, packed=plan.packed)
    else:
        module = adapt(checkpoint.load(torch.float32), checkpoint.family)
        module.to(plan.dtype).requires_grad_(False).eval()
    assert isinstance(module, VisionTransformer | ImageClassifier | DualEncoder)
    if isinstance(module, DualEncoder) and module.config.pad is not None and tokenizer and tokenizer.pad_id is not None:
        # Texts are filled up by the tokeniser's own token, whatever the config's default says.
        module.config = module.config.model_copy(update={"pad": tokenizer.pad_id})
    prepare(module, prepack=plan.prepack, tiles=plan.tiles, release=checkpoint.source.release, parts=plan.parts)
    return ImageModel(str(name), checkpoint, module, preprocessing, tokenizer, plan)
