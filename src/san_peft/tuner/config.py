"""The configuration of SAN."""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from san_peft.errors import AdapterError, GraphError, SanError
from san_peft.propagation.graph import Edge, PropagationGraph
from san_peft.propagation.schemes import SCHEMES
from san_peft.tuner._peft import SAN
from san_peft.tuner.decompose import host_config, kind_of, moves_weight

FORMAT = 2
INNER_REFUSED = {
    "bias": "SAN folds scales into the frozen biases; leave them frozen",
    "layer_replication": "copied layers have one name in two places",
    "target_parameters": "SAN adapts layers, not bare parameters",
    "megatron_config": "Megatron's parallel layers are none that SAN can trace",
}
"""Options of a host that do not go with SAN, with the reason."""
CARD = """
## Loading this adapter

The adapter was trained with [SAN](https://arxiv.org/abs/2409.06706). Import `san_peft` before loading it, so that PEFT
knows the method:

```python
import san_peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/of/this/adapter")
```
"""


@dataclass
class SanConfig(PeftConfig):
    """Configuration of a SAN adapter: which layers carry a scale, and where the scales are propagated.

    Args:
        target_modules: Layers that get a scale of their own. `None` takes every traced layer but the heads; a list is
            matched at the end of module names; a string is a regular expression, or `"all-linear"`.
        exclude_modules: Layers to leave out, as a list or a regular expression.
        modules_to_save: Modules trained and saved as a whole, such as the task's head.
        trainable_token_indices: Tokens whose rows of the embedding are trained and saved, as numbers, or as numbers by
            the name of the embedding; as in `LoraConfig`.
        target_parameters: Not supported: SAN scales the outputs of layers, and the experts that transformers keeps as
            one parameter of three axes (Mixtral, Qwen3-MoE, gpt-oss) are no layers.
        layers_to_transform: Numbers of the blocks to adapt; `None` is all.
        layers_pattern: Name of the list of blocks that `layers_to_transform` counts in.
        train_norms: Whether to train the affine parameters of all normalisation layers. They join `modules_to_save`.
        shift: Whether a layer also learns a shift, which is never propagated.
        propagation: A scheme (`"all"`, `"exact"`, `"feedforward"`, `"reference"`, `"none"`), a `PropagationGraph`, or
            one as plain data or JSON text.
        exponent: Exponent of a propagated scale. 0 switches propagation off; -1 undoes an exact edge's scale.
        exponent_pattern: Exponents of the scales of single anterior layers, by their name or a regular expression that
            its end matches, as `rank_pattern` of LoRA has it: `{"v_proj": 0.0}`.
        bound: Largest distance of a propagated scale from one, reached smoothly; `None` is no bound.
        detach: Whether gradients reach a scale through its own layer alone, not through the layers it is propagated to.
        gate: Whether each posterior layer learns a vector, initially one, multiplied onto what is propagated to it.
            This adds parameters; an ablation.
        init_weights: `True` starts at the identity. `False` or `"random"` draws small random offsets, for tests.
        inner: Configuration of the adapter that hosts SAN, such as `LoraConfig(r=8)`, or its dict. It sits on the same
            layers; the scale is taken out of it, and no parameter is added.
        decomposition: How the scale is taken out of the host: `"norm"`, the ratio of the norms of the adapted and the
            frozen row, or `"projection"`, the least-squares scale of one on the other.
        own_scale: Whether layers with a host get a scale of their own as well. Without a host they always do.
        edges: The resolved edges, filled in when the adapter is injected, or in its first forward pass where no example
            inputs can be derived, and saved with it: loading never traces.
        placement: What the trace saw beside the edges, filled in and saved as they are: which norms are read by layers
            alone (a scale may act in them), and whose outputs are overwritten in place. `None` is not known; every
            scale then acts at the input of its posterior layer.
        format: Version of the adapter's format.

    Raises:
        SanError: For an unknown scheme, a malformed graph, or a value out of its range.

    Example:
        >>> SanConfig(target_modules=["query", "value"], propagation="exact").shift
        False
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers that get a scale; None takes every traced layer but the heads."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out, as a list of names or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved as a whole, such as the head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose rows of the embedding are trained."}
    )
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Not supported."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks that layers_to_transform counts in."}
    )
    train_norms: bool = field(default=False, metadata={"help": "Train all normalisation layers."})
    shift: bool = field(default=False, metadata={"help": "Learn a shift beside each scale."})
    propagation: Any = field(default="all", metadata={"help": "A scheme, a PropagationGraph, plain data or JSON."})
    exponent: float = field(default=1.0, metadata={"help": "Exponent of a propagated scale."})
    exponent_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Exponents of the scales of single anterior layers."}
    )
    bound: float | None = field(default=None, metadata={"help": "Largest distance of a propagated scale from one."})
    detach: bool = field(default=False, metadata={"help": "Stop gradients through propagated scales."})
    gate: bool = field(default=False, metadata={"help": "Learn a vector multiplied onto each propagated scale."})
    init_weights: bool | Literal["random"] = field(
        default=True, metadata={"help": "Start at the identity; False draws small random offsets."}
    )
    inner: Any = field(default=None, metadata={"help": "Configuration of the adapter that hosts SAN, or its dict."})
    decomposition: Literal["norm", "projection"] = field(
        default="norm", metadata={"help": "How the scale is taken out of the host."}
    )
    own_scale: bool = field(default=False, metadata={"help": "A scale of its own on a layer with a host."})
    edges: list[dict] | None = field(
        default=None, metadata={"help": "The resolved edges; filled in when the adapter is injected."}
    )
    placement: dict | None = field(
        default=None, metadata={"help": "What the trace saw beside the edges; filled in when the adapter is injected."}
    )
    format: int = field(default=FORMAT, metadata={"help": "Version of the adapter's format."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SAN
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        if self.format > FORMAT:
            raise AdapterError(
                f"The adapter has format {self.format}, this version reads up to {FORMAT}. Upgrade san-peft."
            )
        if not isinstance(self.init_weights, bool) and self.init_weights != "random":
            raise SanError(f"init_weights is True, False or 'random', got {self.init_weights!r}.")
        if self.target_parameters:
            raise SanError(
                f"target_parameters={self.target_parameters!r}: SAN scales the outputs of layers, and a bare "
                "parameter, such as the experts of Mixtral, Qwen3-MoE or gpt-oss, has none of its own. Leave it out; "
                "the dense layers of the same model can be adapted."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise SanError("layers_pattern says where to count blocks; give layers_to_transform as well.")
        for name, value in {"exponent": self.exponent, **self.exponent_pattern}.items():
            where = name if name == "exponent" else f"exponent_pattern[{name!r}]"
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SanError(f"{where} must be a number, got {value!r}.")
            if not math.isfinite(value):
                raise SanError(f"{where} must be finite, got {value}.")
        if self.bound is not None and not 0 < self.bound < math.inf:
            raise SanError(f"bound must be positive and finite, or None; got {self.bound}.")
        self.propagation = _propagation(self.propagation)
        if self.inner is not None:
            self._take_inner()
        if self.edges is not None:
            self.resolved_edges()
        if self.placement is not None:
            _check_placement(self.placement)

    def exponent_of(self, anterior: str) -> float:
        """Returns the exponent of what is propagated from a layer."""
        return self.exponent_pattern.get(get_pattern_key(list(self.exponent_pattern), anterior), self.exponent)

    def inner_config(self) -> PeftConfig:
        """Returns the host's configuration, without targets: they are those of this one.

        Raises:
            SanError: If there is no host.
        """
        if self.inner is None:
            raise SanError("This adapter has no host: its scales are its own.")
        return host_config(dict(self.inner))

    def _take_inner(self) -> None:
        """Checks the host's configuration, and takes over what it says on targets and saved modules."""
        inner = host_config(copy.deepcopy(self.inner))
        kind_of(inner, self.decomposition)
        if self.shift and not self.own_scale:
            raise SanError("shift belongs to a scale of its own; set own_scale=True, or leave the shift to the host.")
        for name, reason in INNER_REFUSED.items():
            if getattr(inner, name, None) not in (None, "none", [], {}, False):
                raise SanError(f"inner sets {name}={getattr(inner, name)!r}: {reason}.")
        ranks = {"r": getattr(inner, "r", None), **(getattr(inner, "rank_pattern", None) or {})}
        for name, rank in ranks.items() if inner.peft_type != "OFT" else ():
            if rank is not None and rank < 1:
                raise SanError(f"inner has rank {rank} ({name}); it must be at least 1.")
        if moves_weight(inner) and self.decomposition == "projection":
            raise SanError(
                f"init_lora_weights={inner.init_lora_weights!r} moves a part of the frozen weight into the adapter, "  # type: ignore[attr-defined]
                "so the projection on what remains says nothing. Use decomposition='norm'."
            )
        for name in (
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
            "trainable_token_indices",
        ):
            theirs, ours = getattr(inner, name, None), getattr(self, name)
            theirs = set(theirs) if isinstance(theirs, list | tuple) and "modules" in name else theirs
            if theirs is not None and ours is not None and _as_set(theirs) != _as_set(ours):
                raise SanError(
                    f"SAN and its host disagree on {name}: {_shown(ours)} here, {_shown(theirs)} in inner. SAN sits on "
                    "the layers of its host; say it once."
                )
            if ours is None and theirs is not None:
                setattr(self, name, sorted(theirs) if name == "modules_to_save" else theirs)
            if hasattr(inner, name):
                setattr(inner, name, None)
        self.task_type = self.task_type or inner.task_type
        if hasattr(inner, "save_projection"):
            inner.save_projection = False  # type: ignore[attr-defined]  # drawn again from its seed, not saved per layer
        plain = json.loads(json.dumps(inner.to_dict(), default=_jsonable))
        for name in ("peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"):
            plain.pop(name, None)
        self.inner = plain

    def resolved_edges(self) -> tuple[Edge, ...]:
        """Returns the edges in use; empty before injection.

        Raises:
            GraphError: If a stored edge is malformed.
        """
        if not isinstance(self.edges or [], list):
            raise GraphError(f"edges is a list of edges, got {type(self.edges).__name__}.")
        return PropagationGraph(tuple(Edge.from_json(edge) for edge in self.edges or [])).edges

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Loads as PEFT does; of a local folder the tensors are checked too, before a model is touched.

        Raises:
            AdapterError: If the adapter's file is truncated, lacks a scale, or holds one that is not finite or has a
                length that does not fit its edges.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        file = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if isinstance(config, cls) and file.is_file():
            _check_file(file, config)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves as PEFT does, and tells the model card beside it that loading needs `import san_peft`."""
        if self.edges is None and self.propagation != "none":
            warnings.warn(
                "The adapter is saved before its first forward pass, in which its edges are traced: whoever loads it "
                "traces them anew.",
                stacklevel=3,
            )
        super().save_pretrained(str(save_directory), **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            if "import san_peft" not in text:
                draft = card.with_suffix(".tmp")
                draft.write_text(text.rstrip() + "\n" + CARD, encoding="utf-8")
                draft.replace(card)


def _check_placement(value: Any) -> None:
    """Raises `GraphError` where a saved placement is malformed."""
    norms, overwritten = (value.get(key) if isinstance(value, dict) else None for key in ("norms", "overwritten"))
    names = [overwritten, *(norms.values() if isinstance(norms, dict) else [None])]
    if not all(isinstance(one, list) and all(isinstance(name, str) for name in one) for one in names):
        raise GraphError(
            f"placement holds norms, with their readers, and overwritten, a list of layers; got {value!r:.200}."
        )


def _as_set(value: Any) -> Any:
    return frozenset(value) if isinstance(value, list | tuple | set) else value


def _shown(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _jsonable(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    raise SanError(f"inner holds a {type(value).__name__}, which cannot be saved with the adapter.")


def _check_file(file: Path, config: SanConfig) -> None:
    """Raises `AdapterError` where the tensors of an adapter's file do not fit its configuration."""
    lengths = {edge.anterior: edge.channels.source_size for edge in config.resolved_edges()}
    own = config.inner is None or config.own_scale
    prefix = None if config.inner is None else PEFT_TYPE_TO_PREFIX_MAPPING[config.inner["peft_type"]]
    found: dict[str, int] = {}
    hosts = set()
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                name = key.removeprefix("base_model.model.")
                fqn, nested, rest = name.partition(".base_layer.")
                if ".san_" not in key and not nested:
                    continue
                vector = tensors.get_tensor(key)
                if not torch.isfinite(vector).all():
                    bad = int((~torch.isfinite(vector)).sum())
                    raise AdapterError(f"{file}: {bad} of {vector.numel()} entries of {key} are not finite.")
                if key.endswith(".san_scale.weight"):
                    found[name.removesuffix(".san_scale.weight")] = vector.numel()
                if nested and prefix is not None and rest.startswith(prefix):
                    hosts.add(fqn)
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged ({error}). Download or save the adapter again.") from error
    for fqn, length in lengths.items():
        if own and fqn not in found:
            raise AdapterError(f"{file} has no scale for {fqn}, which the adapter's configuration propagates.")
        if own and found[fqn] != length:
            raise AdapterError(f"{file}: the scale of {fqn} has {found[fqn]} entries, its edges need {length}.")
        if prefix is not None and fqn not in hosts:
            raise AdapterError(
                f"{file} has no tensors {prefix}* for {fqn}, which hosts SAN by the adapter's "
                "configuration. Was it saved over another host?"
            )


def _propagation(value: Any) -> str | dict[str, Any]:
    """Returns a scheme's name, or a graph as plain data that JSON and `dataclasses.asdict` leave alone."""
    if isinstance(value, PropagationGraph):
        return value.to_dict()
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        if value not in SCHEMES:
            close = difflib.get_close_matches(value, SCHEMES, n=1)
            raise SanError(
                f"Unknown propagation scheme {value!r}.{f' Did you mean {close[0]!r}?' if close else ''} "
                f"Choose from {', '.join(SCHEMES)}, or give a PropagationGraph."
            )
        return value
    if isinstance(value, str | dict):
        return json.loads(PropagationGraph.from_json(value).to_json())
    raise SanError(f"propagation is a scheme, a PropagationGraph, or one as JSON; got {type(value).__name__}.")
