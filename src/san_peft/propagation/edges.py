"""Parts of a propagation graph: layers, norms, edges and barriers, as frozen dataclasses with JSON serialization."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from san_peft.errors import GraphError
from san_peft.propagation.channels import ChannelMap
from san_peft.propagation.rules import ATTENTION, path_kind


@dataclass(frozen=True, slots=True)
class Layer:
    """A traced layer that SAN can adapt.

    Args:
        fqn: Dotted name of the module.
        type: Name of its class.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        overwritten: Whether an in-place operation overwrites its output, which the backward pass then cannot use.
        left_out: Why the default `target_modules` exclude it; empty if they do not.
    """

    fqn: str
    type: str
    in_channels: int
    out_channels: int
    overwritten: bool = False
    left_out: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the layer as a JSON-compatible dict."""
        data = {"fqn": self.fqn, "type": self.type, "in": self.in_channels, "out": self.out_channels}
        optional = {"overwritten": self.overwritten, "left_out": self.left_out}
        return {**data, **{name: value for name, value in optional.items() if value}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layer:
        """Creates a layer from the output of `to_json`; raises `GraphError` if it is malformed."""
        needed = {"fqn": str, "type": str, "in": int, "out": int}
        fields = read_fields(data, "layer", needed, {"overwritten": bool, "left_out": str})
        return cls(
            fqn=fields["fqn"],
            type=fields["type"],
            in_channels=fields["in"],
            out_channels=fields["out"],
            overwritten=fields.get("overwritten", False),
            left_out=fields.get("left_out", ""),
        )

    def __str__(self) -> str:
        return f"{self.fqn} ({self.type} {self.in_channels} -> {self.out_channels})"


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation module whose output is read only by layers, its channel j as their input channel j.

    A factor on its output, or on its weight and bias, therefore scales the inputs of these layers and nothing else.

    Args:
        fqn: Dotted name of the module.
        readers: Names of the layers that read its output, in execution order.
    """

    fqn: str
    readers: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.readers, str) or not all(isinstance(name, str) for name in self.readers):
            raise GraphError(f"norm {self.fqn}: readers must be a tuple of layer names, got {self.readers!r:.100}.")
        object.__setattr__(self, "readers", tuple(self.readers))

    def to_json(self) -> dict[str, Any]:
        """Returns the norm as a JSON-compatible dict."""
        return {"fqn": self.fqn, "readers": list(self.readers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Norm:
        """Creates a norm from the output of `to_json`; raises `GraphError` if it is malformed."""
        return cls(**read_fields(data, "norm", {"fqn": str, "readers": list | tuple}))

    def __str__(self) -> str:
        return f"{self.fqn} -> {', '.join(self.readers)}"


@dataclass(frozen=True, slots=True)
class Edge:
    """A propagation of the scale of one layer's outputs to the inputs of another layer.

    Args:
        anterior: Name of the layer whose scale is propagated.
        posterior: Name of the layer whose input channels are scaled.
        channels: Source channel of each input channel of the posterior.
        via: Operations between the two layers that do more than move channels, in order, without duplicates.
        closed: Whether the edge is exact and, as far as the trace could see, only the posterior reads these channels:
            scaling them at the anterior's output is then the same as at the posterior's input.

    Raises:
        GraphError: If a name is empty, or both ends are the same layer without an attention in between.

    Example:
        >>> edge = Edge("fc1", "fc2", ChannelMap.identity(64), via=("gelu",))
        >>> edge.kind, str(edge)
        ('activation', 'fc1 -> fc2 [identity] (through gelu)')
    """

    anterior: str
    posterior: str
    channels: ChannelMap
    via: tuple[str, ...] = ()
    closed: bool = False

    def __post_init__(self) -> None:
        for name in (self.anterior, self.posterior):
            if not isinstance(name, str) or not name:
                raise GraphError(f"an edge needs two layer names, got {self.anterior!r} -> {self.posterior!r}.")
        if self.anterior == self.posterior and ATTENTION not in self.via:
            raise GraphError(f"{self.anterior} -> {self.posterior}: a layer cannot propagate its scale to itself.")
        if not isinstance(self.channels, ChannelMap):
            raise GraphError(f"{self.anterior} -> {self.posterior}: channels must be a ChannelMap.")
        if isinstance(self.via, str) or not all(isinstance(name, str) for name in self.via):
            raise GraphError(f"{self.anterior} -> {self.posterior}: via must be a tuple of operation names.")
        object.__setattr__(self, "via", tuple(self.via))

    @property
    def kind(self) -> str:
        """Strongest kind of operation on the edge: `exact` (the scale commutes), `activation`, `norm`, `residual`."""
        return path_kind(self.via)

    def to_json(self) -> dict[str, Any]:
        """Returns the edge as a JSON-compatible dict."""
        data = {
            "anterior": self.anterior,
            "posterior": self.posterior,
            "channels": self.channels.to_json(),
            "via": list(self.via),
        }
        return {**data, "closed": True} if self.closed else data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Edge:
        """Creates an edge from the output of `to_json`; raises `GraphError` if it is malformed."""
        needed = {"anterior": str, "posterior": str, "channels": Mapping}
        fields = read_fields(data, "edge", needed, {"via": list | tuple, "closed": bool})
        name = f"edge {fields['anterior']} -> {fields['posterior']}"
        try:
            channels = ChannelMap.from_json(fields["channels"])
        except GraphError as error:
            raise GraphError(f"{name}: {error}") from error
        via, closed = tuple(fields.get("via", ())), fields.get("closed", False)
        return cls(fields["anterior"], fields["posterior"], channels, via, closed)

    def __str__(self) -> str:
        path = f" (through {', '.join(self.via)})" if self.via else ""
        return f"{self.anterior} -> {self.posterior} [{self.channels}]{path}"


@dataclass(frozen=True, slots=True)
class Barrier:
    """An operation at which the trace lost the channels that a layer reads, with the reason."""

    operation: str
    layer: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Returns the barrier as a JSON-compatible dict."""
        return {"operation": self.operation, "layer": self.layer, "reason": self.reason}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Barrier:
        """Creates a barrier from the output of `to_json`; raises `GraphError` if it is malformed."""
        return cls(**read_fields(data, "barrier", {"operation": str, "layer": str, "reason": str}))

    def __str__(self) -> str:
        return f"{self.operation} at {self.layer}: {self.reason}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns a sentence that suggests close matches, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""


def read_fields(
    data: Any, what: str, needed: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the fields of a JSON object.

    Raises:
        GraphError: If a field is missing, unknown or has the wrong type.
    """
    if not isinstance(data, Mapping):
        raise GraphError(f"a {what} must be a JSON object, got {data!r}.")
    types = {**needed, **(optional or {})}
    for name in needed:
        if name not in data:
            raise GraphError(f"{what} {dict(data)!r:.200}: the field {name!r} is missing.")
    for name, value in data.items():
        if name not in types:
            raise GraphError(f"{what}: unknown field {name!r}.{suggestion(str(name), types)}")
        if not isinstance(value, types[name]) or (isinstance(value, bool) and types[name] is int):
            raise GraphError(f"{what}: the field {name!r} has the wrong type, got {value!r:.100}.")
    return dict(data)
