"""Low-rank adapters on linear layers: LoRA, rank-stabilised LoRA and DoRA; several on one base, at most one active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.errors import UnknownName, UsageError
from craton.finetuning.adapters import DEFAULT_ADAPTER, LoraSettings, lora_scale, select_linears
from craton.finetuning.quantized_base import dense_weight, is_linear, keep_blocks
from craton.models import Classifier, ImageClassifier
from craton.trunk import replace_linears


class LowRank(nn.Module):
    """One adapter of one layer: scale B A (Hu 2021, arXiv 2106.09685), and DoRA's magnitudes where it has them.

    a[R, in], b[out, R], magnitude[out] or None; kept in fp32 and cast to the activations' dtype.
    """

    def __init__(
        self,
        base: nn.Module,
        a_RI: Tensor,
        b_OR: Tensor,
        magnitude_O: Tensor | None = None,
        *,
        alpha: float,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a_RI), nn.Parameter(b_OR)
        self.magnitude = nn.Parameter(magnitude_O) if magnitude_O is not None else None
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.scale = lora_scale(self.rank, alpha, rslora=rslora)
        squares_O = dense_weight(base, a_RI.dtype).square().sum(1) if magnitude_O is not None else None
        self.register_buffer("base_squares", squares_O, persistent=False)

    @classmethod
    def fresh(cls, base: nn.Module, settings: LoraSettings) -> LowRank:
        """An adapter that changes nothing yet: A random, B zero, and DoRA's magnitudes those of the base's rows."""
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        device = device_of(base)
        bound = 1 / sqrt(inputs)  # as nn.Linear starts, and PEFT with it
        a_RI = torch.empty(settings.rank, inputs, device=device).uniform_(-bound, bound)
        b_OR = torch.zeros(outputs, settings.rank, device=device)
        magnitude_O = dense_weight(base).norm(dim=1) if settings.dora else None
        return cls(
            base, a_RI, b_OR, magnitude_O, alpha=settings.alpha, rslora=settings.rslora, dropout=settings.dropout
        )

    @property
    def rank(self) -> int:
        """Columns of B and rows of A."""
        return len(self.a)

    def forward(self, x_TI: Tensor, y_TO: Tensor, base: nn.Module) -> Tensor:
        """What the layer gives instead of y = base(x), in x's dtype."""
        dropped_TI = F.dropout(x_TI, self.dropout, self.training) if self.dropout else x_TI
        h_TR = F.linear(dropped_TI, self.a.to(x_TI.dtype))
        b_RO = self.b.to(x_TI.dtype).T
        if self.magnitude is None:
            # Patches come by pictures, with one dimension more.
            return torch.addmm(y_TO.flatten(0, -2), h_TR.flatten(0, -2), b_RO, alpha=self.scale).view_as(y_TO)
        # m (W + s B A) x / |W + s B A|, written as a change of y; the norm is taken as a constant (DoRA, section 4.3).
        gain_O = self.magnitude / self.row_norms(base)
        update_TO = (h_TR @ b_RO) * (self.scale * gain_O).to(x_TI.dtype)
        return y_TO + update_TO + _without_bias(y_TO, base) * (gain_O - 1).to(x_TI.dtype)

    @torch.no_grad()
    def row_norms(self, base: nn.Module) -> Tensor:
        """|W + s B A| of each row, [out], without making the matrix:
        |w|^2 + 2 s w.(A^T b) + s^2 b.(A A^T) b for each row w of W and b of B."""
        assert isinstance(self.base_squares, Tensor)
        wa_RO = _without_bias(base(self.a), base)
        cross_O = (wa_RO.T * self.b).sum(1)
        update_O = ((self.b @ (self.a @ self.a.T)) * self.b).sum(1)
        squares_O: Tensor = self.base_squares + 2 * self.scale * cross_O + self.scale**2 * update_O
        return squares_O.clamp_min(torch.finfo(squares_O.dtype).tiny).sqrt()

    @torch.no_grad()
    def merged(self, weight_OI: Tensor) -> Tensor:
        """The weight of one linear layer that does what base and adapter do, in `weight`'s dtype."""
        dtype = weight_OI.dtype
        merged_OI = torch.addmm(weight_OI, self.b.to(dtype), self.a.to(dtype), alpha=self.scale)
        if self.magnitude is not None:
            norms_O = merged_OI.norm(dim=1).clamp_min(torch.finfo(dtype).tiny)  # a row may be all zeros
            merged_OI *= (self.magnitude.to(dtype) / norms_O)[:, None]
        return merged_OI


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's numbers lie; a checkpoint's own blocks are always in the CPU's memory."""
    return next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))


def _without_bias(y_TO: Tensor, base: nn.Module) -> Tensor:
    return y_TO - base.bias.to(y_TO.dtype) if isinstance(base.bias, Tensor) else y_TO


class LoraLinear(nn.Module):
    """A frozen linear layer with its adapters, in its place. x[T, in] -> [T, out] in x's dtype."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = self.base(x_TI)
        if self.active is None or self.active not in self.adapters:
            return y_TO
        adapted_TO: Tensor = self.adapters[self.active](x_TI, y_TO, self.base)
        return adapted_TO


def apply_lora(model: nn.Module, settings: LoraSettings, name: str = DEFAULT_ADAPTER) -> list[str]:
    """Put a fresh adapter on the layers that `settings.targets` mean and make it the active one; give their names.

    Every other parameter of the model is frozen, but for a classifier's head. Block-quantised layers are put in a form
    that gradients pass through without keeping their weights.

    Raises UnknownName or UsageError for a target that means no layer, and for a name that is taken.
    """
    chosen = select_linears(settings.targets, linear_layers(model))
    add_adapters(model, name, chosen, lambda _, base: LowRank.fresh(base, settings))
    return chosen


def add_adapters(model: nn.Module, name: str, layers: Iterable[str], make: Callable[[str, nn.Module], LowRank]) -> None:
    """Give each of `layers` the adapter `make(layer, base)` under `name`, freeze all else, and make it the active one.

    Raises UsageError for a name that is taken or cannot be one.
    """
    if not name.isidentifier():
        raise UsageError(f"{name!r} cannot be an adapter's name", remedy="use letters, digits and _")
    if name in adapter_names(model):
        raise UsageError(f"the model has an adapter {name!r} already", remedy="give this one another name")
    keep_blocks(model)
    chosen = list(layers)
    replace_linears(model, lambda n, m: n in chosen and not isinstance(m, LoraLinear), lambda _, m: LoraLinear(m))
    for layer in chosen:
        module = model.get_submodule(layer)
        assert isinstance(module, LoraLinear)
        module.adapters[name] = make(layer, module.base)
    model.requires_grad_(False)
    for _, parameter in model.head_parameters() if isinstance(model, Classifier | ImageClassifier) else ():
        parameter.requires_grad_(True)
    use_adapter(model, name)


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Make `name` the active adapter, the only one that is trained; None: the base alone. Raises UnknownName."""
    if name is not None and name not in adapter_names(model):
        raise UnknownName("adapter", name, adapter_names(model))
    for layer in lora_layers(model).values():
        layer.active = name
        for key, adapter in layer.adapters.items():
            adapter.requires_grad_(key == name)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base: the reference model of preference objectives, without a second copy."""
    layers = list(lora_layers(model).values())
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = None
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off the model; layers that have no other become plain again. Raises UnknownName."""
    if name not in adapter_names(model):
        raise UnknownName("adapter", name, adapter_names(model))
    for layer in lora_layers(model).values():
        if name in layer.adapters:
            del layer.adapters[name]
        if layer.active == name:
            layer.active = None
    bare = {path for path, layer in lora_layers(model).items() if not layer.adapters}
    replace_linears(model, lambda path, _: path in bare, lambda _, layer: layer.base)  # type: ignore[arg-type, return-value]


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters on the model."""
    return sorted({name for layer in lora_layers(model).values() for name in layer.adapters})


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters of adapter `name` (by default the active one), by their names in the model."""
    return {
        f"{path}.adapters.{key}.{parameter_name}": parameter
        for path, layer in lora_layers(model).items()
        for key, adapter in layer.adapters.items()
        if key == (name or layer.active)
        for parameter_name, parameter in adapter.named_parameters()
    }


def adapters_of(model: nn.Module, name: str) -> dict[str, LowRank]:
    """By layer, the parts of adapter `name`. Raises UnknownName."""
    if name not in adapter_names(model):
        raise UnknownName("adapter", name, adapter_names(model))
    layers = lora_layers(model)
    return {path: layer.adapters[name] for path, layer in layers.items() if name in layer.adapters}  # type: ignore[misc]


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that carry adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the model's linear layers, whatever form they have. What lies within one is not listed, nor is a
    classifier's head, which is trained in full."""
    wrapped = tuple(f"{name}." for name in lora_layers(model))
    head = model.config.head_modules if isinstance(model, Classifier | ImageClassifier) else ()
    names = [name for name, module in model.named_modules() if is_linear(module) and name not in head]
    return [name for name in names if not name.startswith(wrapped)]
