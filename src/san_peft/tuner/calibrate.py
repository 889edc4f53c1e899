"""Measures the second moments of the inputs of layers, which the decomposition `feature` needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from san_peft.errors import AdapterError, SanError
from san_peft.propagation.trace import arguments_of
from san_peft.propagation.untouched import untouched
from san_peft.tuner.first_pass import copied_call


class Calibrating:
    """The calibration methods of `SanModel`."""

    def calibrate(self: Any, batches: Iterable[Any], adapter_name: str = "default") -> None:
        r"""Measures the inputs of the layers, which an adapter with `decomposition="feature"` weighs channels by.

        The scale $g_j = 1 + c \langle B, W_0 (A C)^\top \rangle_j / \sum_k C_k w_{jk}^2$ depends on the second moments
        $C$ of a layer's input, one number per channel. They are saved with the adapter, and not trained. Without a call
        of this method they are measured on the first batch in training mode. Until then all are one, as with
        `decomposition="projection"`. The model runs in eval mode, without gradients; its adapters stay active. With
        `torch.distributed`, all processes must call this method, each with its own batches.

        Args:
            batches: The batches: dicts of keyword arguments, tuples of arguments, or tensors.
            adapter_name: The name of the adapter.

        Raises:
            AdapterError: If the adapter does not exist, is merged, or has another decomposition.
            SanError: If there are no batches, or a layer receives an input that is not finite.
        """
        layers = {
            fqn: layer for fqn, layer in self.scales.layers.items() if moments_of(layer, adapter_name) is not None
        }
        if adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name!r} does not exist; there are {', '.join(self.peft_config)}.")
        if not layers:
            raise AdapterError(
                f"Adapter {adapter_name!r} has decomposition={self.peft_config[adapter_name].decomposition!r}, or no "
                "host, so there is nothing to calibrate. Only decomposition='feature' uses the moments of inputs."
            )
        if any(layer.merged for layer in layers.values()):
            raise AdapterError(f"{adapter_name!r} is merged; call unmerge_adapter() before you calibrate it.")

        def run() -> None:
            number = 0
            for number, batch in enumerate(batches, 1):  # noqa: B007
                args, kwargs = arguments_of(batch)
                self.model(*args, **kwargs)
            if not number:
                raise SanError("batches is empty; calibration needs at least one batch.")

        calibrate(self.model, layers, adapter_name, run)
        self.scales.calibrating.pop(adapter_name, None)

    def calibrate_later(self: Any, adapter_name: str) -> None:
        """Calibrates an adapter with the first training batch, if it needs that and was not loaded."""
        if any(moments_of(layer, adapter_name) is not None for layer in self.scales.layers.values()):
            self.scales.calibrating[adapter_name] = partial(self._calibrate_with, adapter_name)

    def _calibrate_with(self: Any, adapter_name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        layers = self.scales.layers
        if adapter_name not in self.active_adapters or any(x.merged or x.disable_adapters for x in layers.values()):
            return
        del self.scales.calibrating[adapter_name]
        if waiting := uncalibrated(layers, adapter_name):
            call = copied_call(self.model, args, kwargs)
            calibrate(self.model, waiting, adapter_name, lambda: self.model(*call.args, **call.kwargs))


def moments_of(layer: Any, adapter_name: str) -> Tensor | None:
    """Returns the moments of a layer's input for an adapter, or `None` if it does not use them."""
    return layer.san_host[adapter_name].moments if adapter_name in layer.san_host else None


def uncalibrated(layers: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """Returns the layers whose moments have their initial value, one, for an adapter; by name."""
    found = {}
    for fqn, layer in layers.items():
        moments = moments_of(layer, adapter_name)
        if moments is not None and not moments.is_meta and bool((moments == 1).all()):
            found[fqn] = layer
    return found


@torch.no_grad()
def calibrate(model: nn.Module, layers: Mapping[str, Any], adapter_name: str, run: Callable[[], None]) -> None:
    """Sets the moments of layers from the inputs that they receive.

    The mean of the moments of a layer is normalised to one, which does not change its scale. A layer that receives no
    input keeps its moments. With `torch.distributed`, inputs of all processes count; all must call this function.

    Args:
        model: The model, which is in eval mode while it runs.
        layers: The layers, by name.
        adapter_name: The name of the adapter.
        run: Runs the model on one or more batches.

    Raises:
        SanError: If a layer receives an input that is not finite. No moments are changed.
    """
    sums = {fqn: torch.zeros(layer.in_features, dtype=torch.float32) for fqn, layer in layers.items()}

    def record(fqn: str, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        if not x.numel():
            return
        channels = module.channel_dim % x.dim()
        squares = x.float().square().sum([axis for axis in range(x.dim()) if axis != channels])
        sums[fqn] = sums[fqn].to(x.device) + squares

    handles = [layer.register_forward_pre_hook(partial(record, fqn), with_kwargs=True) for fqn, layer in layers.items()]
    try:
        with untouched(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = dict(zip(layers, _over_processes(list(sums.values())), strict=True))
    for fqn, total in found.items():
        if not bool(torch.isfinite(total).all()):
            raise SanError(
                f"{fqn} receives inputs that are not finite, so decomposition='feature' cannot be calibrated."
            )
    for fqn, layer in layers.items():
        squares = found[fqn]
        if bool(squares.any()):
            moments: Any = moments_of(layer, adapter_name)
            moments.copy_(squares / squares.mean())


def _over_processes(totals: list[Tensor]) -> list[Tensor]:
    """Sums over all processes of `torch.distributed`, in one exchange."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return totals
    home = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    joined = torch.cat([total.to(home) for total in totals])
    torch.distributed.all_reduce(joined)
    return list(joined.split([total.numel() for total in totals]))
