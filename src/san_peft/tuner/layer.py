"""The layer: a frozen layer with its own scale, a shift, and the scales propagated to its input."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float32, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from san_peft.errors import AdapterError, MergeError, SanError, TargetError
from san_peft.functional import channels_of, propagate, scale_input, scale_output
from san_peft.tuner.config import SanConfig
from san_peft.tuner.decompose import HostScale, RowNorms
from san_peft.tuner.lean import in_one_pass, make_lean, make_plain, output_is_fresh
from san_peft.tuner.merge import Factors, MergingLayer
from san_peft.tuner.quantized import is_packed, is_quantized
from san_peft.tuner.sharded import whole
from san_peft.tuner.shared import SharedInput

MODES = ("both", "neuron", "synapse", "off")
LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)


class ScaleVector(nn.Module):
    """A trainable vector kept as its offset from a constant: one for a scale and a gate, zero for a shift.

    Weight decay then pulls toward the identity, and half precision keeps small scales. Calling it gives a new tensor,
    never the parameter, so sharded and offloaded parameters work in a posterior layer as well. Of a vector in shards it
    is the whole one, so that a posterior in another unit of FSDP2 needs no unit for every vector.
    """

    def __init__(self, size: int, constant: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.constant = constant
        self.weight = nn.Parameter(torch.zeros(size, **factory))

    def forward(self) -> Tensor:
        """Returns constant plus offset, in float32 at least."""
        weight = whole(self.weight)
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.constant

    def extra_repr(self) -> str:
        """Returns size and constant for `print`."""
        return f"{self.weight.numel()}, constant={self.constant}"


class Incoming:
    """One edge as its posterior layer sees it: the anterior's scales, by adapter, and the channel map.

    It holds the anterior's containers, not a parameter: casting, assigning and moving replace parameters.
    """

    def __init__(
        self,
        anterior: str,
        banks: tuple[nn.ModuleDict, ...],
        index: Tensor | None,
        config: SanConfig,
    ) -> None:
        self.anterior, self.banks, self.index = anterior, banks, index
        self.exponent, self.detach, self.bound = config.exponent, config.detach, config.bound

    def factor(self, adapter_name: str) -> Tensor:
        """Returns what this edge multiplies onto the input scale."""
        scale: Any = total_scale(self.banks, adapter_name)
        if self.index is not None and self.index.device != scale.device:
            self.index = self.index.to(scale.device)
        return propagate(scale.detach() if self.detach else scale, self.index, self.exponent, self.bound)


def total_scale(banks: tuple[nn.ModuleDict, ...], adapter_name: str) -> Tensor | None:
    """Returns the product of a layer's own scale and its host's, of those it has."""
    total = None
    for bank in banks:
        if adapter_name in bank:
            scale = bank[adapter_name]()
            total = scale if total is None else total * scale
    return total


class SanLayer(nn.Module, MergingLayer):
    r"""A frozen dense or convolutional layer under SAN, or one that hosts another adapter, such as LoRA.

    $$ y = g \odot \bigl( W (s \odot x) + b \bigr) + t, \qquad s = \prod_e P_e(g_e)^k $$

    Over a host $y = \operatorname{Host}(s \odot x)$, and $g$, which only the layers that follow see, comes out of the
    host's parameters. With several active adapters the scales are multiplied and the shifts added, so their order does
    not matter.

    Args:
        base_layer: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or transformers' `Conv1D`, or PEFT's layer around one.

    Raises:
        TargetError: For any other layer.
    """

    adapter_layer_names = ("san_scale", "san_shift", "san_gate", "san_host")
    other_param_names = ("san_incoming", "san_shared")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        if not isinstance(base, LAYER_TYPES):
            raise TargetError(f"The layer is {cannot_adapt(base)}")
        self._disable_adapters = False
        self.san_mode = "both"
        self.san_scale, self.san_shift, self.san_gate = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.san_host = nn.ModuleDict()
        self.san_incoming: dict[str, list[Incoming]] = {}
        self.san_shared: dict[str, tuple[SharedInput, int]] = {}
        self.init_merging()
        self.groups = getattr(base, "groups", 1)
        self.transposed = isinstance(base, Conv1D)
        self.channel_dim = -1 if isinstance(base, nn.Linear | Conv1D) else -1 - len(base.kernel_size)
        if isinstance(base, nn.Linear):
            self.in_features, self.out_features = base.in_features, base.out_features
        elif isinstance(base, Conv1D):
            self.out_features, self.in_features = channels_of(base.weight, 1, True)
        else:
            self.in_features, self.out_features = base.in_channels, base.out_channels

    @property
    def host(self) -> Any:
        """PEFT's layer that hosts SAN here, or `None`."""
        return self.base_layer if isinstance(self.base_layer, BaseTunerLayer) else None

    def update_layer(self, adapter_name: str, config: SanConfig, inference_mode: bool = False) -> None:
        """Adds an adapter's own vectors to this layer, or the scale of its host."""
        if config.inner is None or config.own_scale:
            self.san_scale[adapter_name] = ScaleVector(self.out_features, **self._factory())
            if config.shift:
                self.san_shift[adapter_name] = ScaleVector(self.out_features, 0.0, **self._factory())
            self.reset_parameters(adapter_name, config.init_weights)
        if config.inner is not None:
            norms = RowNorms(self.host, adapter_name in getattr(self.host, "lora_magnitude_vector", ()))
            if not self.get_base_layer().weight.is_meta:
                norms()
            make_lean(self.host, adapter_name, norms)
            if not getattr(self.host, "is_feedforward", False):
                self.san_host[adapter_name] = HostScale(self.host, adapter_name, config.decomposition, norms)
                self.san_host[adapter_name].train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def connect(self, adapter_name: str, incoming: list[Incoming], gate: bool = False) -> None:
        """Lets scales propagate to this layer's input, replacing what the adapter propagated before."""
        self.san_incoming[adapter_name] = incoming
        if gate and incoming and adapter_name not in self.san_gate:
            self.san_gate[adapter_name] = ScaleVector(self.in_features, **self._factory())

    def _factory(self) -> dict[str, Any]:
        """Type and device of new vectors: the frozen layer's, or float32 over a quantised one."""
        base: Any = self.get_base_layer()
        weight = base.weight
        dtype = torch.float32 if is_quantized(base) else weight.dtype
        device = torch.get_default_device()
        return {"dtype": dtype, "device": device if device.type == "meta" else weight.device}

    def reset_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Sets an adapter's vectors to the identity, or to small random offsets."""
        for bank in (self.san_scale, self.san_shift, self.san_gate):
            if adapter_name in bank:
                weight: Any = bank[adapter_name].weight
                if init_weights is True:
                    nn.init.zeros_(weight)
                else:
                    nn.init.normal_(weight, std=0.02)

    # ------------------------------------------------------------------ what PEFT does to a host as well

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activates adapters here and in the host."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if self.host is not None:
            self.host.set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter here and in the host."""
        if self.host is not None:
            self.host.delete_adapter(adapter_name)
        super().delete_adapter(adapter_name)

    def unwrap(self) -> nn.Module:
        """Returns the layer without SAN: the frozen layer, or the host as it was before."""
        if self.host is not None:
            for adapter_name in self.san_host:
                make_plain(self.host, adapter_name)
        return self.base_layer

    # ------------------------------------------------------------------ reading

    def get_scale(self, adapter_name: str = "default") -> Float32[Tensor, " out"] | None:
        """Returns an adapter's scale, its own times its host's, or `None` if it has none here."""
        return total_scale((self.san_scale, self.san_host), adapter_name)

    def get_shift(self, adapter_name: str = "default") -> Float32[Tensor, " out"] | None:
        """Returns an adapter's shift, or `None` if it has none here."""
        return self.san_shift[adapter_name]() if adapter_name in self.san_shift else None

    def get_input_scale(self, adapter_name: str = "default") -> Float32[Tensor, " in"] | None:
        """Returns the product of all scales propagated to this layer's input, or `None` if there are none."""
        incoming = self.san_incoming.get(adapter_name)
        if not incoming:
            return None
        product = incoming[0].factor(adapter_name)
        for edge in incoming[1:]:
            product = product * edge.factor(adapter_name).to(product.device)
        if adapter_name in self.san_gate:
            gate = self.san_gate[adapter_name]()
            product = product * torch.where(self._fed(incoming).to(gate.device), gate, torch.ones_like(gate))
        return product

    def _fed(self, incoming: list[Incoming]) -> Tensor:
        """Which input channels have a source."""
        fed = torch.zeros(self.in_features, dtype=torch.bool)
        for edge in incoming:
            fed |= torch.ones_like(fed) if edge.index is None else (edge.index >= 0).cpu()
        return fed

    def _output_vectors(self, adapter_names: list[str]) -> tuple[Tensor | None, Tensor | None]:
        """Returns own scale and shift of several adapters together, as the mode lets them through."""
        scale = shift = None
        for name in adapter_names if self.san_mode in ("both", "neuron") else ():
            if name in self.san_scale:
                one = self.san_scale[name]()
                scale = one if scale is None else scale * one
            if (one := self.get_shift(name)) is not None:
                shift = one if shift is None else shift + one
        return scale, shift

    def _input_vector(self, adapter_names: list[str]) -> Tensor | None:
        """Returns the input scale of several adapters together, as the mode lets it through."""
        product = None
        for name in adapter_names if self.san_mode in ("both", "synapse") else ():
            if (one := self.get_input_scale(name)) is not None:
                product = one if product is None else product * one
        return product

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the frozen layer, or the host, between its input scale and its own scale."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        inside = self.base_layer if self.san_mode in ("both", "neuron") else self.get_base_layer()
        x = self._scaled(x)
        z = in_one_pass(inside, x) if inside is self.host and not (args or kwargs) else None
        if z is None:
            z = inside(x, *args, **kwargs)
        scale, shift = self._output_vectors(self.active_adapters)
        return scale_output(z, scale, shift, self.channel_dim, inplace=output_is_fresh(inside))

    def _scaled(self, x: Tensor) -> Tensor:
        names = [name for name in self.active_adapters if self.san_incoming.get(name)]
        if not names or self.san_mode not in ("both", "synapse"):
            return x

        def make() -> Tensor:
            scale: Any = self._input_vector(names)
            if scale.is_meta and not x.is_meta:
                anteriors = dict.fromkeys(edge.anterior for name in names for edge in self.san_incoming[name])
                raise SanError(
                    f"The input scale of a layer comes from {', '.join(anteriors)}, of which a module above keeps the "
                    "parameters offloaded. Dispatch without preload_module_classes, or merge the adapter first."
                )
            return scale_input(x, scale, self.channel_dim, keep_output=self.host is not None)

        if len(names) > 1 or names[0] not in self.san_shared:
            return make()
        shared, reader = self.san_shared[names[0]]
        return shared.fetch(reader, x, (names[0], self.san_mode), make)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Runs a batch in which every sample names its adapter; `"__base__"` is the frozen layer."""
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, unmerge them first.")
        if x.shape[0] % len(adapter_names):
            raise AdapterError(f"{len(adapter_names)} adapter names do not fit a batch of {x.shape[0]} samples.")
        names = sorted(set(adapter_names))
        sets = [[name] if name != "__base__" else [] for name in names]
        rows = torch.tensor([names.index(name) for name in adapter_names], device=x.device)
        rows = rows.repeat_interleave(x.shape[0] // len(adapter_names))

        def per_sample(chosen: list[Tensor | None], size: int, neutral: float, like: Tensor) -> Tensor | None:
            if all(vector is None for vector in chosen):
                return None
            filled = [torch.full((size,), neutral, device=like.device) if v is None else v for v in chosen]
            dim = self.channel_dim % like.dim()
            shape = [like.shape[0] if d == 0 else size if d == dim else 1 for d in range(like.dim())]
            return torch.stack(filled)[rows].to(like.dtype).view(shape)

        input_scale = per_sample([self._input_vector(one) for one in sets], self.in_features, 1.0, x)
        x = x if input_scale is None else x * input_scale
        if self.host is not None:
            each = [names[row] for row in rows.tolist()]
            y = self.host(x, *args, adapter_names=each, **kwargs)
        else:
            y = self.base_layer(x, *args, **kwargs)
        vectors = [self._output_vectors(one) for one in sets]
        scale = per_sample([v[0] for v in vectors], self.out_features, 1.0, y)
        shift = per_sample([v[1] for v in vectors], self.out_features, 0.0, y)
        y = y if scale is None else y * scale
        return y if shift is None else y + shift

    @torch.no_grad()
    def factors(self, name: str) -> Factors:
        """Returns a copy of what an adapter multiplies and adds here.

        Raises:
            MergeError: If the mode is not `both`: the merged model would not be the one that was looked at.
        """
        if self.san_mode != "both":
            raise MergeError(f"Mode {self.san_mode!r} is for analysis; set_mode('both') before merging.")
        scale, shift = self._output_vectors([name])
        return Factors(*(v if v is None else v.clone() for v in (scale, self._input_vector([name]), shift)))

    def __repr__(self) -> str:
        return "san." + super().__repr__()


def cannot_adapt(module: nn.Module) -> str:
    """Says of a module what it is, what SAN adapts in its place, and the way out."""
    kinds = ", ".join(t.__name__ for t in LAYER_TYPES)
    what = f"a {type(module).__name__}, which SAN cannot adapt; it adapts {kinds}. "
    if is_packed(module):
        return what + (
            "It keeps its weight packed. Put the adapter on the model before it was quantised, or on one quantised by "
            "bitsandbytes or torchao; merge, and quantise the merged model."
        )
    return what + "Leave it out of target_modules."


def index_of(channels: Any) -> Int[Tensor, " size"] | None:
    """Returns the index vector of a channel map, or `None` where it is the identity."""
    return None if channels.kind == "identity" else channels.index
