"""Table of supported hosts (LoRA, DoRA, (IA)3 and other PEFT methods), and how a scale is derived from each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from san_peft.decomposition import check_decomposition, dense_scale, floored, low_rank_scale
from san_peft.errors import AdapterError, SanError
from san_peft.tuner.quantized import is_quantized, row_matrix, unpacked_product
from san_peft.tuner.row_norms import RowNorms, input_channels, per_column, state_of
from san_peft.tuner.sharded import is_sharded, onloaded, whole, whole_product

MOVES_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that move part of the frozen weight into the adapter."""
REFUSED = {
    "LN_TUNING": "it trains norms and no dense layer; set train_norms=True instead",
    "TRAINABLE_TOKENS": "it trains embedding rows; set trainable_token_indices instead",
    "ADALORA": "it changes its ranks during training, on a schedule that the training loop must drive",
    "MIXED": "it combines several tuners; use one of them",
}
"""PEFT types that cannot host SAN, with the reason."""


class HostScale(nn.Module):
    """Computes the scale of one adapter of a host layer; has no parameters of its own.

    A forward pass of the full model does not call it, since `Scales` computes the scales of all layers together. While
    the host is merged, it returns the scale from before merging.
    """

    reference: Tensor | None
    moments: Tensor | None

    def __init__(self, host: BaseTunerLayer, adapter_name: str, decomposition: str, norms: RowNorms) -> None:
        super().__init__()
        self._host = (host,)  # a tuple, so that the host is not registered as a submodule twice
        self.adapter_name, self.decomposition, self.norms = adapter_name, decomposition, norms
        self.register_buffer("reference", None, persistent=False)
        self.register_buffer("moments", None)
        self.frozen: Tensor | None = None
        self._columns: tuple[Any, Tensor] | None = None
        if decomposition == "feature":
            base: Any = host.get_base_layer()
            default = torch.get_default_device()
            device = default if default.type == "meta" else base.weight.device
            self.moments = torch.ones(input_channels(base), device=device)
            norms.moments = self.columns

    @property
    def host(self) -> Any:
        """Returns PEFT's layer."""
        return self._host[0]

    def columns(self) -> Float32[Tensor, " in"] | None:
        """Returns the second moments of the input, one per column of the frozen weight; `None` if they are not used.

        Returns the same tensor until the moments change.
        """
        moments = self.moments
        if moments is None:
            return None
        base: Any = self.host.get_base_layer()
        if torch.compiler.is_compiling():
            return per_column(base, moments)
        now = state_of(moments)
        if self._columns is None or self._columns[0] != now:
            with torch.no_grad():
                self._columns = now, per_column(base, moments)
        return self._columns[1]

    def forward(self) -> Float32[Tensor, " out"]:
        """Returns the scale in at least float32."""
        if self.frozen is not None:
            return self.frozen
        host = self.host
        weight = host.get_base_layer().weight
        if not weight.is_meta:
            return self._scale(host)
        with onloaded(host, weight):
            if host.get_base_layer().weight.is_meta:  # a meta tensor gives a meta scale
                return torch.empty(weight.shape[isinstance(host.get_base_layer(), Conv1D)], device="meta")
            return self._scale(host)

    def _scale(self, host: Any) -> Tensor:
        # autocast would round the products
        with torch.autocast(host.get_base_layer().weight.device.type, enabled=False):
            return _kind(host).scale(host, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostScale:
        before = {"reference": self.reference, "moments": self.moments}
        super()._apply(fn, recurse)
        if self.frozen is not None:
            self.frozen = self.frozen.to(fn(self.frozen).device)
        for name, kept in before.items():
            now = getattr(self, name)
            if kept is not None and now is not None and now.dtype != kept.dtype:
                setattr(self, name, kept.to(now.device))  # moves to another device, but keeps its dtype
        return self

    def extra_repr(self) -> str:
        """Returns the type of the host and the decomposition for `print`."""
        return f"{_kind(self.host).name}, {self.decomposition}"


# ---------------------------------------------------------------------- the scale of each host


def _fits(base: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Kind:
    """Describes a type of host.

    Attributes:
        name: The PEFT type.
        scale: Computes the scale of one of its layers.
        layers: The layer types that it adapts.
        decompositions: The supported decompositions.
        forms_delta: Whether the scale needs the full delta weight in every step, which costs O(out * in * in) for
            rotations. Other hosts cost O(out * in * r) or nothing.
        variants: Config fields that change the forward pass and are supported by SAN. Other fields that PEFT marks as a
            variant (`is_lora_variant`) are refused.
        refused: Variants that are known not to work, with the reason.
        unfit: Returns why the host cannot adapt a layer of these types, or `None` if it can.
    """

    name: str
    scale: Callable[[Any, HostScale], Tensor]
    layers: tuple[type[nn.Module], ...]
    decompositions: tuple[str, ...] = ("norm", "projection", "feature")
    forms_delta: bool = False
    variants: tuple[str, ...] = ()
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    unfit: Callable[[Any], str | None] = _fits


def _lora(host: Any, scale: HostScale) -> Tensor:
    name = scale.adapter_name
    if name in host.lora_magnitude_vector:
        magnitude = whole(host.lora_magnitude_vector[name].weight)
        return over_norm(magnitude, scale.norms())
    return _low_rank(host, scale, host.lora_A[name].weight, host.lora_B[name].weight, host.scaling[name])


def _low_rank(host: Any, scale: HostScale, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    base = host.get_base_layer()
    down, up = whole(lora_A).flatten(1), whole(lora_B).flatten(1)
    columns = scale.columns()
    rows = down if columns is None else down * columns
    product = unpacked_product(base, rows) if is_quantized(base) else whole_product(row_matrix(base), rows)
    return low_rank_scale(product, down, up, scale.norms(), scaling, scale.decomposition, scale.reference)


def _vera(host: Any, scale: HostScale) -> Tensor:
    name = scale.adapter_name
    down = whole(host.vera_lambda_d[name])[:, None] * host.vera_A[name][:, : host.in_features]
    up = whole(host.vera_lambda_b[name])[:, None] * host.vera_B[name][: host.out_features]
    return _low_rank(host, scale, down, up, 1.0)


def _ia3(host: Any, scale: HostScale) -> Tensor:
    vector = whole(host.ia3_l[scale.adapter_name]).flatten()
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def _delta(host: Any, scale: HostScale) -> Tensor:
    _check_whole(host)
    delta = host.get_delta_weight(scale.adapter_name)
    delta = delta.t() if isinstance(host.get_base_layer(), Conv1D) else delta.flatten(1)
    return dense_scale(delta, row_matrix(host.get_base_layer()), scale.decomposition, scale.columns())


def _rotation(host: Any, scale: HostScale) -> Tensor:
    """Computes the scale of a host that multiplies the frozen weight by an orthogonal matrix on its input side."""
    _check_whole(host)
    rows = row_matrix(host.get_base_layer())
    rotation = host.get_delta_weight(scale.adapter_name)
    wide = torch.promote_types(rotation.dtype, torch.float32)
    rows = rows.to(wide)
    # OFT applies the transpose of its matrix, HRA the matrix itself: the projection is the same
    return dense_scale(rows @ rotation.to(wide) - rows, rows, scale.decomposition, scale.columns())


def _check_whole(host: Any) -> None:
    if any(is_sharded(parameter) for parameter in host.parameters()):
        raise SanError(
            f"The scale of a {_kind(host).name} host needs its full delta weight, which cannot be computed from "
            "sharded parameters. With FSDP2 use LoRA, DoRA, (IA)3 or VeRA as the host, or propagation='none'."
        )


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _mixing_groups(base: Any) -> str | None:
    groups = getattr(base, "groups", 1)
    if isinstance(base, nn.Conv3d) and base.kernel_size[:2] == (1, 1):
        return f"with kernel_size {base.kernel_size}, which PEFT treats as two-dimensional and cannot merge"
    if groups > 1:
        return f"in {groups} groups: LoRA mixes channels across groups, which PEFT cannot merge"
    if any(step != 1 for step in getattr(base, "dilation", ())):
        return f"with dilation {base.dilation}, which PEFT's LoRA ignores"
    if getattr(base, "padding_mode", "zeros") != "zeros":
        return f"with padding_mode {base.padding_mode!r}, which PEFT's LoRA ignores"
    if _pads_by_itself(base):
        return "with custom padding, which PEFT's LoRA ignores"
    return None


@torch.no_grad()
def _pads_by_itself(base: Any) -> bool:
    """Returns whether a convolution pads in its forward pass, as timm's `Conv2dSame` does."""
    if not isinstance(base, CONVOLUTIONS) or any(type(base).forward is kind.forward for kind in CONVOLUTIONS):
        return False
    axes = len(base.kernel_size)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
    for size in (max(base.kernel_size) + 4, max(base.kernel_size) + 5):
        x = base.weight.new_zeros((1, base.in_channels, *[size] * axes))
        plain = convolve(x, base.weight, None, base.stride, base.padding, base.dilation, base.groups)
        if base(x).shape != plain.shape:
            return True
    return False


def _overlapping(base: Any) -> str | None:
    if max(getattr(base, "kernel_size", (1,))) > 1:
        return f"with kernel_size {base.kernel_size}, for which PEFT's OFT sums overlapping patches"
    return None


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "LORA",
            _lora,
            (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D),
            variants=("use_dora", "velora_config"),
            refused={
                "kasa_config": "KaSA has a diagonal matrix between A and B, which SAN does not support",
                "alora_invocation_tokens": "activated LoRA adapts only some tokens, but a scale applies to all",
                "use_bdlora": "BD-LoRA has block-diagonal matrices, which SAN does not support",
                "use_qalora": "QA-LoRA pools the input of A, which SAN does not support",
                "arrow_config": "Arrow routes each token to its own adapters, but a scale applies to all tokens",
                "monteclora_config": "MonteCLoRA samples its matrices in every forward pass",
            },
            unfit=_mixing_groups,
        ),
        Kind("IA3", _ia3, (nn.Linear, nn.Conv2d, nn.Conv3d, Conv1D), ("norm", "projection")),
        Kind("VERA", _vera, (nn.Linear, Conv1D)),
        Kind("LOHA", _delta, (nn.Linear, nn.Conv1d, nn.Conv2d), forms_delta=True),
        Kind("LOKR", _delta, (nn.Linear, nn.Conv1d, nn.Conv2d), forms_delta=True),
        Kind("RANDLORA", _delta, (nn.Linear, Conv1D), forms_delta=True),
        Kind("OFT", _rotation, (nn.Linear, nn.Conv2d), ("projection", "feature"), forms_delta=True, unfit=_overlapping),
        Kind("HRA", _rotation, (nn.Linear, nn.Conv2d), ("projection", "feature"), forms_delta=True),
    )
}
"""Supported hosts by PEFT type."""


def _check_variants(kind: Kind, config: Any) -> None:
    """Raises `AdapterError` if a config uses a variant that SAN does not support."""
    marked = {f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")} | kind.refused.keys()
    for name in sorted(marked - set(kind.variants)):
        if getattr(config, name, None) not in (None, False):
            reason = kind.refused.get(name, "SAN does not support this variant")
            raise AdapterError(
                f"{kind.name} with {name}={getattr(config, name)!r} cannot host SAN: {reason}. Leave {name} out; "
                f"supported variants are {', '.join(kind.variants)}."
            )


def type_of(host: BaseTunerLayer) -> str:
    """Returns the PEFT type of a tuner layer, such as LORA."""
    return type(host).__module__.split(".")[-2].upper()


def has_adapter(host: Any, adapter_name: str) -> bool:
    """Returns whether a tuner layer has tensors of an adapter; `False` for `None`."""
    return host is not None and any(adapter_name in getattr(host, bank) for bank in host.adapter_layer_names)


def _kind(host: BaseTunerLayer) -> Kind:
    return KINDS[type_of(host)]


def kind_of(config: PeftConfig, decomposition: str) -> Kind:
    """Returns the entry of `KINDS` for a host's config.

    Raises:
        AdapterError: If the host, its variant or the decomposition is not supported.
    """
    check_decomposition(decomposition)
    name = str(getattr(config.peft_type, "value", config.peft_type))
    if name not in KINDS:
        if config.is_prompt_learning or config.is_adaption_prompt:
            reason = "it adds tokens or attention and adapts no layer"
        else:
            reason = REFUSED.get(name, "SAN cannot derive a scale per channel from it")
        raise AdapterError(f"{name} cannot host SAN: {reason}. Supported hosts are {', '.join(KINDS)}.")
    kind = KINDS[name]
    _check_variants(kind, config)
    if decomposition not in kind.decompositions:
        why = (
            "rotates the frozen weight and preserves the norms of its rows, so that the scale would always be one"
            if decomposition == "norm"
            else "trains its scale as a vector, and has nothing to decompose"
        )
        raise AdapterError(
            f"{name} does not support decomposition={decomposition!r}: it {why}. "
            f"Use decomposition={kind.decompositions[0]!r}."
        )
    if decomposition == "feature" and getattr(config, "use_dora", False):
        raise AdapterError(
            "LORA with use_dora=True does not support decomposition='feature': DoRA's magnitude is its scale. "
            "Use decomposition='norm'."
        )
    return kind


def unfit(peft_type: str, base: Any) -> str | None:
    """Returns why a host cannot adapt a frozen layer, starting with the layer's type, or `None` if it can."""
    kind = KINDS[peft_type]
    if not isinstance(base, kind.layers):
        taken = ", ".join(layer.__name__ for layer in kind.layers)
        return f"a {type(base).__name__}, which {kind.name} cannot adapt; it adapts {taken}"
    reason = kind.unfit(base)
    return None if reason is None else f"a {type(base).__name__} {reason}"


def moves_weight(config: Any) -> bool:
    """Returns whether a host's initialisation moves part of the frozen weight into the adapter."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower().startswith(MOVES_WEIGHT)


def is_feedforward(config: Any, fqn: str) -> bool:
    """Returns whether (IA)3 scales the input of a layer instead of its output, so that it has no scale to propagate."""
    targets = getattr(config, "feedforward_modules", None) or ()
    if isinstance(targets, str):
        return re.fullmatch(targets, fqn) is not None
    return any(fqn == t or fqn.endswith(f".{t}") for t in targets)


def host_config(value: PeftConfig | dict[str, Any]) -> PeftConfig:
    """Returns the config of a host, given the config or its dict.

    Raises:
        SanError: If the value is neither, or its PEFT type is unknown.
    """
    if isinstance(value, PeftConfig):
        return value
    if not isinstance(value, dict):
        raise SanError(f"inner must be a PEFT config such as LoraConfig(r=8), or its dict; got {value!r}.")
    name = value.get("peft_type")
    if name is None or name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise SanError(f"inner has unknown peft_type {name!r}. Supported hosts are {', '.join(KINDS)}.")
    return PeftConfig.from_peft_type(**value)


def over_norm(magnitude: Tensor, norm: Tensor, floor: Tensor | None = None) -> Tensor:
    """Divides DoRA's magnitudes by row norms; for rows near zero, returns one plus the change relative to a floor.

    Args:
        magnitude: The magnitudes.
        norm: The row norms of the frozen weight.
        floor: The `floored` norms, computed per layer; `None` if the norms are those of one layer.
    """
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    magnitude, norm = magnitude.flatten().to(wide), norm.to(wide)
    floor = floored(norm) if floor is None else floor.to(wide)
    empty = floor == 0
    floor = torch.where(empty, torch.ones_like(floor), floor)
    scale = torch.where(norm < floor, 1 + (magnitude - norm) / floor, magnitude / floor)
    return torch.where(empty, torch.ones_like(scale), scale)
