"""The layer: a frozen layer with its own scale, a shift, and the scales propagated to its input."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Int
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from san_peft.errors import AdapterError, MergeError, TargetError
from san_peft.functional import channels_of, fold, propagate, scale_input, scale_output, unfold
from san_peft.tuner._peft import TunerLayer
from san_peft.tuner.config import SanConfig

MODES = ("both", "neuron", "synapse", "off")
LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)


class ScaleVector(nn.Module):
    """A trainable vector kept as its offset from a constant: one for a scale and a gate, zero for a shift.

    Weight decay then pulls toward the identity, and half precision keeps small scales. Calling it gives a new tensor,
    never the parameter, so sharded and offloaded parameters work in a posterior layer as well.
    """

    def __init__(self, size: int, constant: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.constant = constant
        self.weight = nn.Parameter(torch.zeros(size, **factory))

    def forward(self) -> Tensor:
        """Returns constant plus offset, in float32 at least."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) + self.constant

    def extra_repr(self) -> str:
        """Returns size and constant for `print`."""
        return f"{self.weight.numel()}, constant={self.constant}"


class Incoming:
    """One edge as its posterior layer sees it: the anterior's vectors, by adapter, and the channel map.

    It holds the anterior's container, not a parameter: casting, assigning and moving replace parameters.
    """

    def __init__(self, anterior: str, scales: nn.ModuleDict, index: Tensor | None, exponent: float, detach: bool):
        self.anterior, self.scales, self.exponent, self.detach = anterior, scales, exponent, detach
        self.index = index

    def factor(self, adapter_name: str) -> Tensor:
        """Returns what this edge multiplies onto the input scale."""
        scale = self.scales[adapter_name]()
        if self.index is not None and self.index.device != scale.device:
            self.index = self.index.to(scale.device)
        return propagate(scale.detach() if self.detach else scale, self.index, self.exponent)


class _Folded(NamedTuple):
    """What one merge put into the weights, and a copy of them where a zero makes it impossible to take out."""

    scale: Tensor | None
    input_scale: Tensor | None
    shift: Tensor | None
    kept: tuple[Tensor, Tensor | None] | None


class SanLayer(nn.Module, TunerLayer):
    r"""A frozen dense or convolutional layer under SAN.

    $$ y = g \odot \bigl( W (s \odot x) + b \bigr) + t, \qquad s = \prod_e P_e(g_e)^k $$

    With several active adapters the scales are multiplied and the shifts added, so their order does not matter.

    Args:
        base_layer: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or transformers' `Conv1D`.

    Raises:
        TargetError: For any other layer.
    """

    adapter_layer_names = ("san_scale", "san_shift", "san_gate")
    other_param_names = ("san_incoming",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        if not isinstance(base, LAYER_TYPES):
            raise TargetError(
                f"SAN cannot adapt a {type(base).__name__}, only {', '.join(t.__name__ for t in LAYER_TYPES)}. "
                "Leave it out of target_modules."
            )
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.san_mode = "both"
        self.san_scale, self.san_shift, self.san_gate = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.san_incoming: dict[str, list[Incoming]] = {}
        self._folded: list[_Folded] = []
        self._made_bias = False
        self.groups = getattr(base, "groups", 1)
        self.transposed = isinstance(base, Conv1D)
        self.channel_dim = -1 if isinstance(base, nn.Linear | Conv1D) else -1 - len(base.kernel_size)
        if isinstance(base, nn.Linear):
            self.in_features, self.out_features = base.in_features, base.out_features
        elif isinstance(base, Conv1D):
            self.out_features, self.in_features = channels_of(base.weight, 1, True)
        else:
            self.in_features, self.out_features = base.in_channels, base.out_channels

    def update_layer(self, adapter_name: str, config: SanConfig, inference_mode: bool = False) -> None:
        """Adds an adapter's own vectors to this layer."""
        self.san_scale[adapter_name] = ScaleVector(self.out_features, **self._factory())
        if config.shift:
            self.san_shift[adapter_name] = ScaleVector(self.out_features, 0.0, **self._factory())
        self.reset_parameters(adapter_name, config.init_weights)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def connect(self, adapter_name: str, incoming: list[Incoming], gate: bool = False) -> None:
        """Lets scales propagate to this layer's input, replacing what the adapter propagated before."""
        self.san_incoming[adapter_name] = incoming
        if gate and incoming and adapter_name not in self.san_gate:
            self.san_gate[adapter_name] = ScaleVector(self.in_features, **self._factory())

    def _factory(self) -> dict[str, Any]:
        """Type and device of new vectors: the frozen layer's, or float32 over a quantised one."""
        weight: Any = self.get_base_layer().weight
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        device = torch.get_default_device()
        return {"dtype": dtype, "device": device if device.type == "meta" else weight.device}

    def reset_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Sets an adapter's vectors to the identity, or to small random offsets."""
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                weight = getattr(self, name)[adapter_name].weight
                if init_weights is True:
                    nn.init.zeros_(weight)
                else:
                    nn.init.normal_(weight, std=0.02)

    def get_scale(self, adapter_name: str = "default") -> Float32[Tensor, " out"] | None:
        """Returns an adapter's scale, or `None` if it has none here."""
        return self.san_scale[adapter_name]() if adapter_name in self.san_scale else None

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
            product = product * edge.factor(adapter_name)
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

    def _vectors(self, adapter_names: list[str]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns scale, input scale and shift of several adapters together, as the mode lets them through."""
        own, synapse = self.san_mode in ("both", "neuron"), self.san_mode in ("both", "synapse")
        scale = input_scale = shift = None
        for name in adapter_names:
            if own and (one := self.get_scale(name)) is not None:
                scale = one if scale is None else scale * one
            if own and (one := self.get_shift(name)) is not None:
                shift = one if shift is None else shift + one
            if synapse and (one := self.get_input_scale(name)) is not None:
                input_scale = one if input_scale is None else input_scale * one
        return scale, input_scale, shift

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the frozen layer between its input scale and its own scale."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        scale, input_scale, shift = self._vectors(self.active_adapters)
        if input_scale is not None:
            x = scale_input(x, input_scale, self.channel_dim)
        z = self.base_layer(x, *args, **kwargs)
        return scale_output(z, scale, shift, self.channel_dim, inplace=self._output_is_fresh())

    def _output_is_fresh(self) -> bool:
        """Whether nobody but this layer holds the frozen layer's output, so that it may be overwritten."""
        base = self.base_layer
        return type(base) in (nn.Linear, nn.Conv1d, nn.Conv2d) and not base._forward_hooks

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Runs a batch in which every sample names its adapter; `"__base__"` is the frozen layer."""
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, unmerge them first.")
        if x.shape[0] % len(adapter_names):
            raise AdapterError(f"{len(adapter_names)} adapter names do not fit a batch of {x.shape[0]} samples.")
        names = sorted(set(adapter_names))
        sets = [self._vectors([name] if name != "__base__" else []) for name in names]
        rows = torch.tensor([names.index(name) for name in adapter_names], device=x.device)
        rows = rows.repeat_interleave(x.shape[0] // len(adapter_names))

        def per_sample(position: int, size: int, neutral: float, like: Tensor) -> Tensor | None:
            chosen = [vectors[position] for vectors in sets]
            if all(vector is None for vector in chosen):
                return None
            filled = [torch.full((size,), neutral, device=like.device) if v is None else v for v in chosen]
            dim = self.channel_dim % like.dim()
            shape = [like.shape[0] if d == 0 else size if d == dim else 1 for d in range(like.dim())]
            return torch.stack(filled)[rows].to(like.dtype).view(shape)

        input_scale = per_sample(1, self.in_features, 1.0, x)
        y = self.base_layer(x if input_scale is None else x * input_scale, *args, **kwargs)
        scale, shift = per_sample(0, self.out_features, 1.0, y), per_sample(2, self.out_features, 0.0, y)
        y = y if scale is None else y * scale
        return y if shift is None else y + shift

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds adapters into this layer's own weight and bias; the neighbours' weights are theirs to fold.

        Args:
            safe_merge: Whether to compute everything and check it for NaN before touching the weight.
            adapter_names: Which adapters; `None` is all active ones.

        Raises:
            ValueError: With `safe_merge`, if the merged weight or bias is not finite.
            MergeError: If the mode is not `both`: the merged model would not be the one that was looked at.
        """
        if self.san_mode != "both":
            raise MergeError(f"Mode {self.san_mode!r} is for analysis; set_mode('both') before merging.")
        for name in check_adapters_to_merge(self, adapter_names):
            step, weight, bias = self._fold_step(name)
            if safe_merge:
                self._check_finite(name, weight, bias)
            self._write(weight, bias)
            self._folded.append(step)
            self.merged_adapters.append(name)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raises what `merge(safe_merge=True)` would raise, and changes nothing."""
        for name in adapter_names or self.active_adapters:
            if name not in self.merged_adapters:
                _, weight, bias = self._fold_step(name)
                self._check_finite(name, weight, bias)

    @torch.no_grad()
    def _fold_step(self, name: str) -> tuple[_Folded, Tensor, Tensor | None]:
        base: Any = self.get_base_layer()
        scale, input_scale, shift = (v if v is None else v.clone() for v in self._vectors([name]))
        merged = self._merged_shift()
        if merged is not None and scale is not None:
            carried = merged * (1 - scale)
            shift = carried if shift is None else shift + carried
        zeros = any(v is not None and bool((v == 0).any()) for v in (scale, input_scale))
        kept = (base.weight.clone(), None if base.bias is None else base.bias.clone()) if zeros else None
        weight, bias = fold(
            base.weight, base.bias, scale, input_scale, shift, groups=self.groups, transposed=self.transposed
        )
        return _Folded(scale, input_scale, shift, kept), weight, bias

    def _merged_shift(self) -> Tensor | None:
        """The sum of the shifts merged so far: what the scale of the next adapter must leave alone."""
        total = None
        for step in self._folded:
            if step.shift is not None:
                total = step.shift if total is None else total + step.shift
        return total

    def _check_finite(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    @torch.no_grad()
    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        base = self.get_base_layer()
        base.weight.data = weight
        if base.bias is not None and bias is not None:
            base.bias.data = bias
        elif bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=False)
            self._made_bias = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes all merged adapters out of the weight again, dividing by what was multiplied in."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        while self._folded:
            step = self._folded.pop()
            if step.kept is not None:
                weight, bias = step.kept
            else:
                weight, bias = unfold(
                    base.weight,
                    base.bias,
                    step.scale,
                    step.input_scale,
                    step.shift,
                    groups=self.groups,
                    transposed=self.transposed,
                )
            base.weight.data = weight
            if base.bias is not None and bias is not None:
                base.bias.data = bias
        if self._made_bias:
            base.bias, self._made_bias = None, False
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "san." + super().__repr__()


def index_of(channels: Any) -> Int[Tensor, " size"] | None:
    """Returns the index vector of a channel map, or `None` where it is the identity."""
    return None if channels.kind == "identity" else channels.index
