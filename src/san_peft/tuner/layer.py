"""The layer: a frozen layer with its own scale, a shift, and the scales propagated to its input."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float32, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from san_peft.errors import AdapterError, MergeError, SanError, TargetError
from san_peft.functional import channels_of
from san_peft.rounding import multiply
from san_peft.scaling import SALT, Factor, near_zero, scale_channels
from san_peft.tuner.acting import ActingLayer
from san_peft.tuner.config import SanConfig
from san_peft.tuner.decompose import HostScale, RowNorms, has_adapter, type_of
from san_peft.tuner.fill import Vectors
from san_peft.tuner.frozen import TRANSPOSED, stored_weight
from san_peft.tuner.hosted import PLAIN, HostedLayer, is_quiet
from san_peft.tuner.merge import Factors, MergingLayer
from san_peft.tuner.quantized import is_packed, is_quantized
from san_peft.tuner.scales import Scales
from san_peft.tuner.tools import ToolLayer
from san_peft.tuner.vectors import Incoming, ScaleVector, total_scale

MODES = ("both", "neuron", "synapse", "off")
LAYER_TYPES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    Conv1D,
    nn.Embedding,
    nn.MultiheadAttention,
)
"""What SAN adapts. An `nn.Embedding` reads no channels, so nothing is propagated to it; for an attention see
`SanAttention`."""


class SanLayer(nn.Module, ActingLayer, HostedLayer, ToolLayer, MergingLayer):
    r"""A frozen layer under SAN, or one that hosts another adapter, such as LoRA.

    $$ y = g \odot \bigl( W (s \odot x) + b \bigr) + t, \qquad s = \prod_e P_e(g_e)^k $$

    Over a host $y = \operatorname{Host}(s \odot x)$, and $g$, which only the layers that follow see, comes out of the
    host's parameters. With several active adapters the scales are multiplied and the shifts added, so their order does
    not matter.

    Public attributes that it does not have itself, such as `stride`, are those of the frozen layer.

    Args:
        base_layer: One of `LAYER_TYPES`: a dense layer, a convolution, a transposed convolution, transformers' `Conv1D`
            or an embedding; or PEFT's layer around one.

    Raises:
        TargetError: For any other layer.
    """

    adapter_layer_names = ("san_scale", "san_shift", "san_gate", "san_host")
    other_param_names = ("san_incoming",)
    cast_input_dtype_enabled = True
    san_scales: Scales
    san_name: str

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
        self.san_keep = "input"
        self.init_merging()
        self.groups = getattr(base, "groups", 1)
        self.transposed = isinstance(base, TRANSPOSED)
        self._set_sizes(base)

    def _set_sizes(self, base: Any) -> None:
        """Takes the numbers of channels, and their axis, from the frozen layer."""
        self.channel_dim = -1
        if isinstance(base, nn.Linear):
            self.in_features, self.out_features = base.in_features, base.out_features
        elif isinstance(base, Conv1D):
            self.out_features, self.in_features = channels_of(base.weight, 1, True)
        elif isinstance(base, nn.Embedding):
            self.in_features, self.out_features = 0, base.embedding_dim
        else:
            self.in_features, self.out_features = base.in_channels, base.out_channels
            self.channel_dim = -1 - len(base.kernel_size)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names are another module's business, such as the hooks that accelerate keeps there
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.get_base_layer(), name)

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
            if not stored_weight(self.get_base_layer()).is_meta:
                norms()
            if not getattr(self.host, "is_feedforward", False):
                self.san_host[adapter_name] = HostScale(self.host, adapter_name, config.decomposition, norms)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def connect(self, adapter_name: str, incoming: list[Incoming], gate: bool = False) -> None:
        """Lets scales propagate to this layer's input, replacing what the adapter propagated before."""
        self.san_incoming[adapter_name] = incoming
        if gate and incoming and adapter_name not in self.san_gate:
            self.san_gate[adapter_name] = ScaleVector(self.in_features, **self._factory())

    def _factory(self) -> dict[str, Any]:
        """Type and device of new vectors: the frozen layer's, or float32 over a quantised one."""
        base: Any = self.get_base_layer()
        weight = stored_weight(base)
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

    def enable_adapters(self, enabled: bool) -> None:
        """Switches adapters on or off here and in the host."""
        super().enable_adapters(enabled)
        if self.host is not None:
            self.host.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter here and in the host."""
        if self.host is not None:
            self.host.delete_adapter(adapter_name)
        super().delete_adapter(adapter_name)

    # ------------------------------------------------------------------ strength

    def set_scale(self, adapter: str, scale: float) -> None:
        r"""Sets the strength of an adapter: $g^s$, linear in the logarithm of the scale, and $s\,t$ of the shift.

        An entry that has turned negative keeps its sign. At 0 the layer is the frozen one. A host gets the same
        strength by its own `set_scale`, and the scale that is taken out of it follows. Adapters without a part in this
        layer are passed over. The strength is not saved.

        Args:
            adapter: Name of the adapter.
            scale: The strength $s$; 1 is the adapter as it was trained.

        Raises:
            SanError: If the strength is negative or not finite, the adapter is merged, or its host has no strength.
        """
        self.check_strength(adapter, scale)
        if has_adapter(self.host, adapter):
            self.host.set_scale(adapter, scale)
        self._set_strength(adapter, scale)

    def check_strength(self, adapter: str, scale: float) -> None:
        """Raises what `set_scale` would raise, and changes nothing."""
        if not 0 <= scale < math.inf:
            raise SanError(f"The strength of {adapter!r} must be finite and not negative, got {scale}.")
        if adapter in self.merged_adapters:
            raise SanError(f"{adapter!r} is merged, which fixes its strength; unmerge first.")
        if has_adapter(self.host, adapter) and not hasattr(self.host, "set_scale"):
            raise SanError(f"A {type_of(self.host)} host has no strength that could be set.")

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters' own vectors.

        A host is a layer of PEFT of its own, with a `scale_layer` of its own: code that goes through all layers of a
        model, as that of diffusers does, reaches both.
        """
        for name in self.active_adapters:
            if name in self.san_scale:
                strength: Any = self.san_scale[name].strength
                self._set_strength(name, strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters' own vectors; `None` sets it to one."""
        for name in self.active_adapters:
            if name in self.san_scale:
                strength: Any = self.san_scale[name].strength
                self._set_strength(name, 1.0 if scale is None else strength / scale)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength of every adapter with vectors of its own here."""
        return tuple(bank.strength for bank in self.san_scale.values())  # type: ignore[misc]

    def _set_strength(self, adapter_name: str, strength: float) -> None:
        if not 0 <= strength < math.inf:
            raise SanError(f"The strength of {adapter_name!r} must be finite and not negative, got {strength}.")
        for bank in (self.san_scale, self.san_shift):
            vector: Any = bank[adapter_name] if adapter_name in bank else None
            if vector is not None:
                vector.strength = float(strength)
        if hasattr(self, "san_scales"):
            self.san_scales.prepare()

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

    def vectors_alone(self, adapter_names: list[str]) -> Vectors:
        """Returns what the layer applies where no pass is running: computed for this layer by itself."""
        names = [name for name in adapter_names if self.san_incoming.get(name)]
        scale, shift = self._output_vectors(adapter_names)
        input_scale = self._input_vector(names)
        if input_scale is not None and input_scale.is_meta and not stored_weight(self.get_base_layer()).is_meta:
            anteriors = dict.fromkeys(edge.anterior for name in names for edge in self.san_incoming[name])
            raise SanError(
                f"The input scale of a layer comes from {', '.join(anteriors)}, of which a module above keeps the "
                "parameters offloaded. Dispatch without preload_module_classes, or merge the adapter first."
            )
        given = {"scale": scale, "input_scale": input_scale}
        factors = [None if v is None else Factor(v, None, not near_zero(v), False, SALT[k]) for k, v in given.items()]
        return Vectors(factors[0], shift, factors[1])

    # ------------------------------------------------------------------ forward

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Runs the frozen layer, or the host, between its input scale and its own scale.

        Which scales act here was decided when the adapter was put on, and their values are those of the pass that is
        running: see `Vectors` in `fill.py`.
        """
        if x is None:
            x = kwargs.pop("input")  # the name that torch gives it
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        vectors = self.san_scales.of(self)
        if vectors.input_scale is not None and self.san_mode in ("both", "synapse"):
            x = self._scaled(x, vectors)
        if self.san_mode in ("synapse", "off"):
            return self.get_base_layer()(x, *args, **kwargs)
        if self.host is not None and not (args or kwargs) and (adapter_name := self._runs_here()):
            return self._run_host(x, adapter_name, vectors)
        z = self.base_layer(x, *args, **kwargs)
        return self._finished(z, vectors.scale, vectors.shift)

    def _scaled(self, x: Tensor, vectors: Vectors) -> Tensor:
        """Scales the input, once for all layers that read it by the same scales."""
        keep = "input" if self.host is None else "output"
        factor: Any = vectors.input_scale

        def make() -> Tensor:
            return scale_channels(x, factor, None, self.channel_dim, keep=keep)

        return self.san_scales.share(self, vectors, x, make)

    def _finished(self, z: Tensor, scale: Factor | None, shift: Tensor | None, fresh: bool | None = None) -> Tensor:
        """Scales and shifts the output."""
        if scale is None and shift is None:
            return z
        if scale is None:
            return z + shift.to(z.device, z.dtype).view(self._view(z))  # type: ignore[union-attr]
        if fresh is None:
            fresh = self.host is None and is_quiet(self.base_layer) and type(self.base_layer) in PLAIN
        return scale_channels(z, scale, shift, self.channel_dim, inplace=fresh, keep=self.san_keep)

    def _view(self, x: Tensor) -> list[int]:
        """Shape of a vector along the channels of a tensor."""
        return [-1 if d == self.channel_dim % x.dim() else 1 for d in range(x.dim())]

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Runs a batch in which every sample names its adapter; `"__base__"` is the frozen layer."""
        if self.merged:
            raise AdapterError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        count = x.shape[0] if x.dim() else 0
        if not count or not adapter_names or count % len(adapter_names):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {count} respectively, at {self.san_name} with an input of shape "
                f"{tuple(x.shape)}. Samples must be the first axis."
            )
        names = sorted(set(adapter_names))
        found = [None if name == "__base__" else self.san_scales.of_adapter(self, name) for name in names]
        rows = torch.tensor([names.index(name) for name in adapter_names], device=x.device)
        rows = rows.repeat_interleave(x.shape[0] // len(adapter_names))

        def per_sample(field: str, size: int, neutral: float, like: Tensor) -> Tensor | None:
            chosen = [None if one is None else getattr(one, field) for one in found]
            if all(vector is None for vector in chosen):
                return None
            vectors = [v.wide if isinstance(v, Factor) else v for v in chosen]
            dtype = next(v.dtype for v in vectors if v is not None)
            plain = torch.full((size,), neutral, dtype=dtype, device=like.device)
            filled = [plain if v is None else v.to(plain.device, plain.dtype) for v in vectors]
            shape = [-1 if d == self.channel_dim % like.dim() else 1 for d in range(1, like.dim())]
            return torch.stack(filled)[rows].view(len(rows), *shape)

        if self.san_mode in ("both", "synapse"):
            input_scale = per_sample("input_scale", self.in_features, 1.0, x)
            x = x if input_scale is None else multiply(x, input_scale, self.channel_dim, salt=SALT["input_scale"])
        if self.host is not None:
            each = [names[row] for row in rows.tolist()]
            y = self.host(x, *args, adapter_names=each, **kwargs)
        else:
            y = self.base_layer(x, *args, **kwargs)
        if self.san_mode not in ("both", "neuron"):
            return y
        scale = per_sample("scale", self.out_features, 1.0, y)
        shift = per_sample("shift", self.out_features, 0.0, y)
        if scale is None:
            return y if shift is None else y + shift.to(y.dtype)
        return multiply(y, scale, self.channel_dim, shift)

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
