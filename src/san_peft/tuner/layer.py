"""`SanLayer`: a frozen layer with a scale, a shift, and the scales propagated to its input."""

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
from san_peft.tuner.decompose import HostScale, has_adapter, type_of
from san_peft.tuner.fill import Vectors
from san_peft.tuner.frozen import TRANSPOSED, stored_weight
from san_peft.tuner.hosted import PLAIN, HostedLayer, is_quiet
from san_peft.tuner.merge import Factors, MergingLayer
from san_peft.tuner.quantized import is_packed, is_quantized
from san_peft.tuner.row_norms import RowNorms
from san_peft.tuner.scales import Scales
from san_peft.tuner.tools import ToolLayer
from san_peft.tuner.vectors import Incoming, ScaleVector, total_scale

MODES = ("both", "neuron", "synapse", "off")
"""Modes of analysis; see `SanModel.set_mode`."""
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
"""Supported layer types. Nothing is propagated to an `nn.Embedding`, since it has no input channels; for
`nn.MultiheadAttention` see `SanAttention`."""


class SanLayer(nn.Module, ActingLayer, HostedLayer, ToolLayer, MergingLayer):
    r"""Adapts a frozen layer, or a layer of another PEFT method that hosts SAN, such as LoRA.

    $$ y = g \odot \bigl( W (s \odot x) + b \bigr) + t, \qquad s = \prod_e P_e(g_e)^k $$

    Here $g$ is the layer's scale, $t$ its shift, and $s$ the product of the scales $g_e$ of its anterior layers, mapped
    to its input channels by $P_e$ and raised to the exponent $k$. With a host, $y = \operatorname{Host}(s \odot x)$,
    and $g$ is derived from the host's parameters and only propagated. Several active adapters are combined by
    multiplying scales and adding shifts, so their order does not matter.

    Other public attributes, such as `stride`, are forwarded to the frozen layer.

    Args:
        base_layer: A layer of one of `LAYER_TYPES`, or PEFT's layer around one.

    Raises:
        TargetError: If the layer type is not supported.
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
            raise TargetError(f"base_layer is {cannot_adapt(base)}")
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
        """Sets the numbers of channels and the channel axis from the frozen layer."""
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
            # private attributes belong to other libraries, such as accelerate's hooks, and are not forwarded
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.get_base_layer(), name)

    @property
    def host(self) -> Any:
        """Returns PEFT's layer that hosts SAN, or `None`."""
        return self.base_layer if isinstance(self.base_layer, BaseTunerLayer) else None

    def update_layer(self, adapter_name: str, config: SanConfig, inference_mode: bool = False) -> None:
        """Adds an adapter's trainable vectors, or the scale of its host, to this layer."""
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
        """Sets the incoming edges of an adapter, replacing earlier ones."""
        self.san_incoming[adapter_name] = incoming
        if gate and incoming and adapter_name not in self.san_gate:
            self.san_gate[adapter_name] = ScaleVector(self.in_features, **self._factory())

    def _factory(self) -> dict[str, Any]:
        """Returns dtype and device of new vectors: those of the frozen layer, or float32 if it is quantised."""
        base: Any = self.get_base_layer()
        weight = stored_weight(base)
        dtype = torch.float32 if is_quantized(base) else weight.dtype
        device = torch.get_default_device()
        return {"dtype": dtype, "device": device if device.type == "meta" else weight.device}

    def reset_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Initialises an adapter's vectors to the identity, or to small random offsets."""
        for bank in (self.san_scale, self.san_shift, self.san_gate):
            if adapter_name in bank:
                weight: Any = bank[adapter_name].weight
                if init_weights is True:
                    nn.init.zeros_(weight)
                else:
                    nn.init.normal_(weight, std=0.02)

    # ------------------------------------------------------------------ PEFT's methods, applied to the host as well

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Sets the active adapters of this layer and its host."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if self.host is not None:
            self.host.set_adapter(adapter_names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Enables or disables the adapters of this layer and its host."""
        super().enable_adapters(enabled)
        if self.host is not None:
            self.host.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter from this layer and its host."""
        if self.host is not None:
            self.host.delete_adapter(adapter_name)
        super().delete_adapter(adapter_name)

    # ------------------------------------------------------------------ strength

    def set_scale(self, adapter: str, scale: float) -> None:
        r"""Sets the strength of an adapter: scales become $g^s$ and shifts $s\,t$.

        Negative entries of a scale keep their sign. At strength 0 the layer equals the frozen layer. A host's strength
        is set by its own `set_scale`, which changes the derived scale as well. Does nothing if the adapter has no part
        in this layer. The strength is not saved.

        Args:
            adapter: The name of the adapter.
            scale: The strength $s$; 1 is the trained adapter.

        Raises:
            SanError: If the strength is negative or not finite, the adapter is merged, or its host does not support a
                strength.
        """
        self.check_strength(adapter, scale)
        if has_adapter(self.host, adapter):
            self.host.set_scale(adapter, scale)
        self._set_strength(adapter, scale)

    def check_strength(self, adapter: str, scale: float) -> None:
        """Checks that `set_scale` succeeds, without changing the layer."""
        if not 0 <= scale < math.inf:
            raise SanError(f"The strength of {adapter!r} must be finite and not negative, got {scale}.")
        if adapter in self.merged_adapters:
            raise SanError(f"{adapter!r} is merged, so its strength cannot change; unmerge first.")
        if has_adapter(self.host, adapter) and not hasattr(self.host, "set_scale"):
            raise SanError(f"A {type_of(self.host)} host does not support set_scale. Leave its strength at 1.")

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters' trainable vectors.

        The host is not included: it has its own `scale_layer`, and code that iterates over all layers of a model, as in
        diffusers, calls both.
        """
        for name in self.active_adapters:
            if name in self.san_scale:
                strength: Any = self.san_scale[name].strength
                self._set_strength(name, strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters' trainable vectors; `None` sets it to one."""
        for name in self.active_adapters:
            if name in self.san_scale:
                strength: Any = self.san_scale[name].strength
                self._set_strength(name, 1.0 if scale is None else strength / scale)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Returns the strength of every adapter with trainable vectors in this layer."""
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

    # ------------------------------------------------------------------ scales and shifts

    def get_scale(self, adapter_name: str = "default") -> Float32[Tensor, " out"] | None:
        """Returns an adapter's scale, trainable times derived from the host, or `None` if this layer has none."""
        return total_scale((self.san_scale, self.san_host), adapter_name)

    def get_shift(self, adapter_name: str = "default") -> Float32[Tensor, " out"] | None:
        """Returns an adapter's shift, or `None` if this layer has none."""
        return self.san_shift[adapter_name]() if adapter_name in self.san_shift else None

    def get_input_scale(self, adapter_name: str = "default") -> Float32[Tensor, " in"] | None:
        """Returns the product of all scales propagated to this layer, or `None` if there are none."""
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
        """Returns a mask of the input channels that receive a scale."""
        fed = torch.zeros(self.in_features, dtype=torch.bool)
        for edge in incoming:
            fed |= torch.ones_like(fed) if edge.index is None else (edge.index >= 0).cpu()
        return fed

    def _output_vectors(self, adapter_names: list[str]) -> tuple[Tensor | None, Tensor | None]:
        """Returns the combined scale and shift of several adapters in the current mode."""
        scale = shift = None
        for name in adapter_names if self.san_mode in ("both", "neuron") else ():
            if name in self.san_scale:
                one = self.san_scale[name]()
                scale = one if scale is None else scale * one
            if (one := self.get_shift(name)) is not None:
                shift = one if shift is None else shift + one
        return scale, shift

    def _input_vector(self, adapter_names: list[str]) -> Tensor | None:
        """Returns the combined input scale of several adapters in the current mode."""
        product = None
        for name in adapter_names if self.san_mode in ("both", "synapse") else ():
            if (one := self.get_input_scale(name)) is not None:
                product = one if product is None else product * one
        return product

    def vectors_alone(self, adapter_names: list[str]) -> Vectors:
        """Computes the vectors of this layer alone, when no pass is running."""
        names = [name for name in adapter_names if self.san_incoming.get(name)]
        scale, shift = self._output_vectors(adapter_names)
        input_scale = self._input_vector(names)
        if input_scale is not None and input_scale.is_meta and not stored_weight(self.get_base_layer()).is_meta:
            anteriors = dict.fromkeys(edge.anterior for name in names for edge in self.san_incoming[name])
            raise SanError(
                f"The input scale of a layer needs the parameters of {', '.join(anteriors)}, which are offloaded. "
                "Dispatch the model without preload_module_classes, or merge the adapter first."
            )
        given = {"scale": scale, "input_scale": input_scale}
        factors = [None if v is None else Factor(v, None, not near_zero(v), False, SALT[k]) for k, v in given.items()]
        return Vectors(factors[0], shift, factors[1])

    # ------------------------------------------------------------------ forward

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Scales the input, runs the frozen layer or the host, and scales and shifts the output.

        The vectors come from the current pass; see `Vectors` in `fill.py`.
        """
        if x is None:
            x = kwargs.pop("input")  # torch's name of the argument
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
        """Scales the input, once for all layers that share the same input and input scale."""
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
        """Returns the shape that broadcasts a vector along the channel axis of a tensor."""
        return [-1 if d == self.channel_dim % x.dim() else 1 for d in range(x.dim())]

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Runs a batch with one adapter name per sample; `"__base__"` stands for the base model."""
        if self.merged:
            raise AdapterError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        count = x.shape[0] if x.dim() else 0
        if not count or not adapter_names or count % len(adapter_names):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {count} respectively, at {self.san_name} with an input of shape "
                f"{tuple(x.shape)}. The batch must be the first axis."
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
        """Returns copies of an adapter's vectors in this layer.

        Raises:
            MergeError: If the mode is not `both`, since modes are not merged.
        """
        if self.san_mode != "both":
            raise MergeError(f"Mode {self.san_mode!r} is for analysis, not for merging; call set_mode('both') first.")
        scale, shift = self._output_vectors([name])
        return Factors(*(v if v is None else v.clone() for v in (scale, self._input_vector([name]), shift)))

    def __repr__(self) -> str:
        return "san." + super().__repr__()


def cannot_adapt(module: nn.Module) -> str:
    """Returns the end of an error message for an unsupported module."""
    kinds = ", ".join(t.__name__ for t in LAYER_TYPES)
    what = f"a {type(module).__name__}, which SAN cannot adapt; it adapts {kinds}. "
    if is_packed(module):
        return what + (
            "Its weight is packed. Use the unquantised model, or one quantised with bitsandbytes or torchao; to "
            "deploy, merge the adapter and quantise the merged model."
        )
    return what + "Leave it out of target_modules."


def index_of(channels: Any) -> Int[Tensor, " size"] | None:
    """Returns the index of a channel map, or `None` for the identity."""
    return None if channels.kind == "identity" else channels.index
