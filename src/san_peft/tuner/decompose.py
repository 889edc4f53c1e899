"""What can host SAN, in one table, and how a scale comes out of each: LoRA, DoRA, (IA)3 and others of PEFT's tuners."""

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

from san_peft.decomposition import dense_scale, floored, low_rank_scale
from san_peft.errors import AdapterError, SanError
from san_peft.tuner.quantized import dense_weight, is_quantized, row_matrix, unpacked_product
from san_peft.tuner.sharded import is_sharded, onloaded, whole, whole_product

MOVES_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that put a part of the frozen weight into the adapter."""
REFUSED = {
    "LN_TUNING": "it trains norms and no dense layer; set train_norms=True in place of it",
    "TRAINABLE_TOKENS": "it trains rows of the embedding, no layer that propagates",
    "ADALORA": "it changes its ranks while it trains, on a schedule that the training loop must drive",
    "MIXED": "it is several tuners in one; name one of them",
}


class RowNorms:
    """Row norms of a frozen weight: constants, made when the adapter is put on and made anew for another weight.

    Args:
        host: The layer that hosts SAN.
        like_dora: Whether to round as PEFT's DoRA does, so that its magnitude over these starts at exactly one.
    """

    def __init__(self, host: BaseTunerLayer, like_dora: bool = False) -> None:
        self.host, self.like_dora = host, like_dora
        # by whether the weight was sharded, since FSDP2 switches back and forth
        self._made: dict[bool, tuple[Any, Tensor]] = {}

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Returns the norms, in float32 at least, on the device of the weight; the same tensor while it is the same."""
        base: Any = self.host.get_base_layer()
        if torch.compiler.is_compiling():  # compiled code has no say in when it would be stale
            return row_norms(base, self.like_dora)
        weight, sharded = base.weight, is_sharded(base.weight)
        address = 0 if sharded or is_quantized(base) else weight.data_ptr()
        now = (id(weight), address, -1 if weight.is_inference() else weight._version, weight.device, weight.dtype)
        made = self._made.get(sharded)
        if made is None or made[0] != now:
            made = self._made[sharded] = (now, row_norms(base, self.like_dora))
        return made[1]


@torch.no_grad()
def row_norms(base: Any, like_dora: bool = False) -> Tensor:
    """Returns the norms of the rows of a frozen layer's weight, in float32 at least."""
    weight = dense_weight(base)
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.t() if isinstance(base, Conv1D) else weight.flatten(1)
    if not like_dora:
        return whole(torch.linalg.vector_norm(rows, dim=1, dtype=wide))
    if weight.dim() == 2:
        return whole(torch.linalg.norm(rows, dim=1)).to(wide)
    return whole(weight.norm(p=2, dim=tuple(range(1, weight.dim())))).to(wide)


def reference_norms(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Returns row norms from before an initialisation moves a part of the weight into the adapter."""
    found = {}
    for name, layer in layers.items():
        base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if not base.weight.is_meta:
            found[name] = row_norms(base)
    return found


class HostScale(nn.Module):
    """The scale of one adapter of a host layer, as something to call; it has no parameter of its own.

    A forward pass of the whole model does not call it: `Scales` computes the scales of all layers together. While the
    host is merged it is the scale from before.
    """

    reference: Tensor | None

    def __init__(self, host: BaseTunerLayer, adapter_name: str, decomposition: str, norms: RowNorms) -> None:
        super().__init__()
        self._host = (host,)  # a tuple, so that the host is no child of two modules
        self.adapter_name, self.decomposition, self.norms = adapter_name, decomposition, norms
        self.register_buffer("reference", None, persistent=False)
        self.frozen: Tensor | None = None

    @property
    def host(self) -> Any:
        """PEFT's layer."""
        return self._host[0]

    def forward(self) -> Float32[Tensor, " out"]:
        """Returns the scale, in float32 at least."""
        if self.frozen is not None:
            return self.frozen
        host = self.host
        weight = host.get_base_layer().weight
        if not weight.is_meta:
            return self._scale(host)
        with onloaded(host, weight):
            if host.get_base_layer().weight.is_meta:  # what has no values gives a scale without values
                return torch.empty(weight.shape[isinstance(host.get_base_layer(), Conv1D)], device="meta")
            return self._scale(host)

    def _scale(self, host: Any) -> Tensor:
        # the parameters' own type decides: under autocast the products would round
        with torch.autocast(host.get_base_layer().weight.device.type, enabled=False):
            return _kind(host).scale(host, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostScale:
        kept = self.reference
        super()._apply(fn, recurse)
        if self.frozen is not None:
            self.frozen = self.frozen.to(fn(self.frozen).device)
        if kept is not None and self.reference is not None and self.reference.dtype != kept.dtype:
            self.reference = kept.to(self.reference.device)  # follows to a device, but is never rounded
        return self

    def extra_repr(self) -> str:
        """Returns the kind of host and the decomposition for `print`."""
        return f"{_kind(self.host).name}, {self.decomposition}"


# ---------------------------------------------------------------------- what each host gives


def _fits(base: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Kind:
    """A kind of host.

    Attributes:
        name: Its name in PEFT.
        scale: How the scale comes out of one of its layers.
        layers: Which frozen layers it takes.
        decompositions: Which decompositions make sense.
        forms_delta: Whether the scale costs the whole delta weight in every step, O(out * in * in) for rotations; the
            others cost O(out * in * r) or nothing.
        variants: Fields of its configuration that change its forward pass and are right under SAN. Fields that PEFT
            marks as a variant (`is_lora_variant`) and that do not stand here are refused.
        refused: Reasons for variants that are known not to be right.
        unfit: Says of a frozen layer of these why the host cannot take it, or `None`.
    """

    name: str
    scale: Callable[[Any, HostScale], Tensor]
    layers: tuple[type[nn.Module], ...]
    decompositions: tuple[str, ...] = ("norm", "projection")
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
    product = unpacked_product(base, down) if is_quantized(base) else whole_product(row_matrix(base), down)
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
    return dense_scale(delta, row_matrix(host.get_base_layer()), scale.decomposition)


def _rotation(host: Any, scale: HostScale) -> Tensor:
    """Of a host that multiplies the frozen weight with an orthogonal matrix from the side of its input."""
    _check_whole(host)
    rows = row_matrix(host.get_base_layer())
    rotation = host.get_delta_weight(scale.adapter_name)
    wide = torch.promote_types(rotation.dtype, torch.float32)
    rows = rows.to(wide)
    # OFT writes the transpose of its matrix into the weight, HRA the matrix itself: the projection is the same
    return dense_scale(rows @ rotation.to(wide) - rows, rows, scale.decomposition)


def _check_whole(host: Any) -> None:
    if any(is_sharded(parameter) for parameter in host.parameters()):
        raise SanError(
            f"The scale of {_kind(host).name} comes out of its whole delta weight, which cannot be formed from "
            "parameters in shards. Under FSDP2 use LoRA, DoRA, (IA)3 or VeRA as the host, or propagation='none'."
        )


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _mixing_groups(base: Any) -> str | None:
    groups = getattr(base, "groups", 1)
    if isinstance(base, nn.Conv3d) and base.kernel_size[:2] == (1, 1):
        return f"of size {base.kernel_size}, which PEFT takes for one of two dimensions and cannot merge"
    if groups > 1:
        return f"in {groups} groups, across which LoRA mixes channels: PEFT cannot merge that"
    if any(step != 1 for step in getattr(base, "dilation", ())):
        return f"with dilation {base.dilation}, which LoRA's matrices lack"
    if getattr(base, "padding_mode", "zeros") != "zeros":
        return f"that pads by {base.padding_mode!r}, where LoRA's matrices pad zeros"
    if _pads_by_itself(base):
        return "that pads in a way of its own, which LoRA's matrices do not follow"
    return None


@torch.no_grad()
def _pads_by_itself(base: Any) -> bool:
    """Whether the output of a convolution has other sizes than its attributes say, as timm's `Conv2dSame`'s has."""
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
        return f"of size {base.kernel_size}, where PEFT's OFT sums overlapping patches of its input"
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
                "kasa_config": "KaSA multiplies a diagonal between A and B, which the scale does not see",
                "alora_invocation_tokens": "activated LoRA acts on some tokens, and a scale would act on all",
                "use_bdlora": "BD-LoRA keeps its matrices in blocks, which the scale does not see",
                "use_qalora": "QA-LoRA pools the input of A, which the scale does not see",
                "arrow_config": "Arrow routes every token to adapters of its own, and a scale would act on all",
                "monteclora_config": "MonteCLoRA draws its matrices anew in every forward pass",
            },
            unfit=_mixing_groups,
        ),
        Kind("IA3", _ia3, (nn.Linear, nn.Conv2d, nn.Conv3d, Conv1D)),
        Kind("VERA", _vera, (nn.Linear, Conv1D)),
        Kind("LOHA", _delta, (nn.Linear, nn.Conv1d, nn.Conv2d), forms_delta=True),
        Kind("LOKR", _delta, (nn.Linear, nn.Conv1d, nn.Conv2d), forms_delta=True),
        Kind("RANDLORA", _delta, (nn.Linear, Conv1D), forms_delta=True),
        Kind("OFT", _rotation, (nn.Linear, nn.Conv2d), ("projection",), forms_delta=True, unfit=_overlapping),
        Kind("HRA", _rotation, (nn.Linear, nn.Conv2d), ("projection",), forms_delta=True),
    )
}
"""The hosts, by PEFT's name of their type."""


def _check_variants(kind: Kind, config: Any) -> None:
    """Raises `AdapterError` where a configuration asks for a variant that is not right under SAN."""
    marked = {f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")} | kind.refused.keys()
    for name in sorted(marked - set(kind.variants)):
        if getattr(config, name, None) not in (None, False):
            reason = kind.refused.get(name, "SAN does not know this variant, so its scale might be wrong")
            raise AdapterError(
                f"{kind.name} with {name}={getattr(config, name)!r} cannot host SAN: {reason}. Leave {name} out; "
                f"variants that can are {', '.join(kind.variants)}."
            )


def type_of(host: BaseTunerLayer) -> str:
    """Returns PEFT's name of a tuner layer's type, such as LORA."""
    return type(host).__module__.split(".")[-2].upper()


def has_adapter(host: Any, adapter_name: str) -> bool:
    """Whether a tuner layer holds tensors of an adapter; `None` holds none."""
    return host is not None and any(adapter_name in getattr(host, bank) for bank in host.adapter_layer_names)


def _kind(host: BaseTunerLayer) -> Kind:
    return KINDS[type_of(host)]


def kind_of(config: PeftConfig, decomposition: str) -> Kind:
    """Returns the kind of a host's configuration.

    Raises:
        AdapterError: If SAN cannot take a scale out of that kind, or not by that decomposition, with the reason.
    """
    name = str(getattr(config.peft_type, "value", config.peft_type))
    if name not in KINDS:
        if config.is_prompt_learning or config.is_adaption_prompt:
            reason = "it adds tokens or attention, and scales no layer"
        else:
            reason = REFUSED.get(name, "SAN does not know how to take a scale per channel out of it")
        raise AdapterError(f"{name} cannot host SAN: {reason}. Hosts are {', '.join(KINDS)}.")
    kind = KINDS[name]
    _check_variants(kind, config)
    if decomposition not in kind.decompositions:
        raise AdapterError(
            f"{name} rotates the frozen weight and leaves the norm of its rows as it is, so decomposition="
            f"{decomposition!r} would give the scale one everywhere. Use decomposition={kind.decompositions[0]!r}."
        )
    return kind


def unfit(peft_type: str, base: Any) -> str | None:
    """Says what a frozen layer is and why a host cannot take it, or returns `None` where it can."""
    kind = KINDS[peft_type]
    if not isinstance(base, kind.layers):
        taken = ", ".join(layer.__name__ for layer in kind.layers)
        return f"a {type(base).__name__}, which {kind.name} cannot adapt; it adapts {taken}"
    reason = kind.unfit(base)
    return None if reason is None else f"a {type(base).__name__} {reason}"


def moves_weight(config: Any) -> bool:
    """Whether a host's initialisation puts a part of the frozen weight into the adapter."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower().startswith(MOVES_WEIGHT)


def is_feedforward(config: Any, fqn: str) -> bool:
    """Whether (IA)3 scales a layer's input in place of its output: then there is no scale to propagate from it."""
    targets = getattr(config, "feedforward_modules", None) or ()
    if isinstance(targets, str):
        return re.fullmatch(targets, fqn) is not None
    return any(fqn == t or fqn.endswith(f".{t}") for t in targets)


def host_config(value: PeftConfig | dict[str, Any]) -> PeftConfig:
    """Returns a host's configuration from one, or from its dict.

    Raises:
        SanError: If it is neither, or its type is unknown.
    """
    if isinstance(value, PeftConfig):
        return value
    if not isinstance(value, dict):
        raise SanError(f"inner is a configuration of PEFT, such as LoraConfig(r=8), or its dict; got {value!r}.")
    name = value.get("peft_type")
    if name is None or name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise SanError(f"inner has peft_type {name!r}, which this PEFT does not know. Hosts are {', '.join(KINDS)}.")
    return PeftConfig.from_peft_type(**value)


def over_norm(magnitude: Tensor, norm: Tensor, floor: Tensor | None = None) -> Tensor:
    """DoRA's magnitude over row norm; for nearly dead rows one plus what it has gained over the floor.

    Args:
        magnitude: Magnitudes.
        norm: Norms of the rows of the frozen weight.
        floor: `floored` of them, layer by layer; `None` is one layer.
    """
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    magnitude, norm = magnitude.flatten().to(wide), norm.to(wide)
    floor = floored(norm) if floor is None else floor.to(wide)
    empty = floor == 0
    floor = torch.where(empty, torch.ones_like(floor), floor)
    scale = torch.where(norm < floor, 1 + (magnitude - norm) / floor, magnitude / floor)
    return torch.where(empty, torch.ones_like(scale), scale)
