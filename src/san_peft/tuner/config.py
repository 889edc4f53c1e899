"""Configuration class of SAN."""

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
"""Version of the adapter format. Format 1 has no `placement`; adapters without a format have no edges either."""
INNER_REFUSED = {
    "bias": "SAN folds scales into the frozen biases; leave them frozen",
    "layer_replication": "SAN does not support layers that share weights under several names",
    "target_parameters": "SAN adapts layers, not bare parameters",
    "megatron_config": "SAN cannot trace the parallel layers of Megatron",
}
"""Options of the host's config that SAN does not support, with the reason."""
CARD = """
## Loading this adapter

This adapter was trained with [SAN](https://arxiv.org/abs/2409.06706). Import `san_peft` before you load it: the import
registers the method with PEFT.

```python
import san_peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")
```
"""


@dataclass
class SanConfig(PeftConfig):
    """Stores the configuration of a [`SanModel`]: which layers get a scale, and where the scales are propagated.

    Args:
        target_modules: The names of the modules to apply the adapter to. A list matches modules whose name ends with
            one of the names; a string is a regular expression that must match the full name, or `"all-linear"` for all
            linear layers except the heads. `None` (the default) selects every traced layer except the heads.
        exclude_modules: The names of the modules to leave out, as a list of name endings or a regular expression.
        modules_to_save: Modules to train and save in full besides the adapter, such as a randomly initialised
            classification head.
        trainable_token_indices: Token indices whose embedding rows are trained and saved, as in `LoraConfig`. Pass a
            list for the input embedding, or a dict from the embedding's name to a list.
        target_parameters: Not supported. SAN scales the outputs of layers, and the experts that transformers stores as
            one 3D parameter (Mixtral, Qwen3-MoE, gpt-oss) are not layers.
        layers_to_transform: The indices of the transformer blocks to adapt. `None` adapts all blocks.
        layers_pattern: The name of the module list that `layers_to_transform` indexes, if PEFT cannot infer it.
        train_norms: Whether to also train the affine parameters of all normalisation layers. Adds them to
            `modules_to_save`.
        shift: Whether to learn a shift in addition to each scale. Shifts are not propagated.
        propagation: Where scales are propagated: a scheme (`"all"`, `"exact"`, `"feedforward"`, `"reference"` or
            `"none"`), or a `PropagationGraph`, also as a dict or a JSON string.
        exponent: The exponent of propagated scales. 0 disables propagation, and -1 cancels the scale on exact edges.
        exponent_pattern: Exponents for individual anterior layers that override `exponent`. Keys are layer names or
            regular expressions, matched like `rank_pattern` of `LoraConfig`: `{"v_proj": 0.0}`.
        bound: The maximum distance of a propagated scale from one; values are squashed smoothly. `None` applies no
            bound.
        detach: Whether to detach propagated scales, so that a scale receives gradients only through its own layer.
        gate: Whether each posterior layer learns a vector, initialised to one, that is multiplied onto its propagated
            scale. Adds parameters; meant for ablations.
        init_weights: How to initialise the adapter. `True` starts at the identity, so that the model's output is
            unchanged. `False` or `"random"` draws small random offsets, for tests.
        inner: The config of the adapter that hosts SAN, such as `LoraConfig(r=8)`, or its dict. The host adapts the
            same layers; its scale is derived from the host's weights, without adding parameters.
        decomposition: How to derive the scale from the host. `"norm"` divides the norm of each adapted row by the norm
            of the frozen row; `"projection"` is the least-squares fit of the adapted row by the frozen row;
            `"feature"` fits what the host adds to the output by the frozen output, with second moments of the inputs
            from the first training batch (see `SanModel.calibrate`).
        own_scale: Whether layers with a host also get a trainable scale. Layers without a host always have one.
        edges: The resolved edges. Filled in when the adapter is injected, or in the first forward pass if example
            inputs cannot be derived. They are saved with the adapter, so loading does not trace the model.
        placement: Where scales may be applied. Filled in and saved together with `edges`: the norms that are read only
            by adapted layers, which can absorb a scale, and the layers whose outputs are modified in place. With
            `None`, every scale is applied at the input of its posterior layer.
        format: The version of the adapter format.

    Raises:
        SanError: If the scheme is unknown, the graph is malformed, or a value is out of range.

    Example:
        >>> SanConfig(target_modules=["query", "value"], propagation="exact").shift
        False
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "The names of the modules to apply the adapter to: a list of name endings, a regular expression, or "
                "'all-linear'. None selects every traced layer except the heads."
            )
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "The names of the modules to leave out, as a list of name endings or a regular expression."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to train and save in full besides the adapter, such as a classification head."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Token indices to train, as a list or a dict from the embedding's name to a list; see LoraConfig."
        },
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Not supported: SAN adapts layers, not parameters."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "The indices of the transformer blocks to adapt; None adapts all blocks."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the module list that layers_to_transform indexes."}
    )
    train_norms: bool = field(
        default=False, metadata={"help": "Whether to train the affine parameters of all normalisation layers."}
    )
    shift: bool = field(default=False, metadata={"help": "Whether to learn a shift in addition to each scale."})
    propagation: Any = field(
        default="all",
        metadata={
            "help": (
                "Where scales are propagated: 'all', 'exact', 'feedforward', 'reference', 'none', or a "
                "PropagationGraph, also as a dict or a JSON string."
            )
        },
    )
    exponent: float = field(
        default=1.0, metadata={"help": "The exponent of propagated scales; 0 disables propagation."}
    )
    exponent_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "A mapping from layer names or regular expressions to exponents that override `exponent`."},
    )
    bound: float | None = field(
        default=None, metadata={"help": "The maximum distance of a propagated scale from one; None applies no bound."}
    )
    detach: bool = field(default=False, metadata={"help": "Whether to stop gradients through propagated scales."})
    gate: bool = field(
        default=False, metadata={"help": "Whether to learn a gate for each propagated scale; meant for ablations."}
    )
    init_weights: bool | Literal["random"] = field(
        default=True,
        metadata={"help": "Whether to start at the identity; False or 'random' draws small random offsets, for tests."},
    )
    inner: Any = field(
        default=None,
        metadata={"help": "The config of the adapter that hosts SAN, such as LoraConfig(r=8), or its dict."},
    )
    decomposition: Literal["norm", "projection", "feature"] = field(
        default="norm", metadata={"help": "How to derive the scale from the host: 'norm', 'projection' or 'feature'."}
    )
    own_scale: bool = field(default=False, metadata={"help": "Whether layers with a host also get a trainable scale."})
    edges: list[dict] | None = field(
        default=None, metadata={"help": "The resolved edges; filled in when the adapter is injected."}
    )
    placement: dict | None = field(
        default=None, metadata={"help": "Where scales may be applied; filled in together with the edges."}
    )
    format: int = field(default=FORMAT, metadata={"help": "The version of the adapter format."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SAN
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        if self.format > FORMAT:
            raise AdapterError(
                f"The adapter has format {self.format}, but this version supports up to {FORMAT}. Upgrade san-peft."
            )
        if not isinstance(self.init_weights, bool) and self.init_weights != "random":
            raise SanError(f"init_weights must be True, False or 'random', got {self.init_weights!r}.")
        if self.target_parameters:
            raise SanError(
                f"target_parameters={self.target_parameters!r} is not supported: SAN scales the outputs of layers, and "
                "a parameter such as the experts of Mixtral, Qwen3-MoE or gpt-oss has no output of its own. Leave it "
                "out and adapt the dense layers of the model."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise SanError("layers_pattern requires layers_to_transform; set both or neither.")
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
        """Returns the exponent of the scale that is propagated from a layer."""
        return self.exponent_pattern.get(get_pattern_key(list(self.exponent_pattern), anterior), self.exponent)

    def inner_config(self) -> PeftConfig:
        """Returns the host's config without `target_modules`, since it adapts the targets of this config.

        Raises:
            SanError: If the adapter has no host.
        """
        if self.inner is None:
            raise SanError("This adapter has no host: SanConfig(inner=...) was not set.")
        return host_config(dict(self.inner))

    def _take_inner(self) -> None:
        """Validates the host's config and adopts its targets and saved modules."""
        inner = host_config(copy.deepcopy(self.inner))
        kind_of(inner, self.decomposition)
        if self.shift and not self.own_scale:
            raise SanError("shift requires a trainable scale; set own_scale=True, or shift=False.")
        for name, reason in INNER_REFUSED.items():
            if getattr(inner, name, None) not in (None, "none", [], {}, False):
                raise SanError(f"inner sets {name}={getattr(inner, name)!r}: {reason}.")
        ranks = {"r": getattr(inner, "r", None), **(getattr(inner, "rank_pattern", None) or {})}
        for name, rank in ranks.items() if inner.peft_type != "OFT" else ():
            if rank is not None and rank < 1:
                raise SanError(f"inner has rank {rank} ({name}); the rank must be at least 1.")
        if moves_weight(inner) and self.decomposition != "norm":
            raise SanError(
                f"init_lora_weights={inner.init_lora_weights!r} moves part of the frozen weight into the adapter, so "  # type: ignore[attr-defined]
                f"decomposition={self.decomposition!r} is undefined. Use decomposition='norm'."
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
                    f"SAN and its host disagree on {name}: {_shown(ours)} here, {_shown(theirs)} in inner. SAN adapts "
                    "the layers of its host; set it in one place only."
                )
            if ours is None and theirs is not None:
                setattr(self, name, sorted(theirs) if name == "modules_to_save" else theirs)
            if hasattr(inner, name):
                setattr(inner, name, None)
        self.task_type = self.task_type or inner.task_type
        if hasattr(inner, "save_projection"):
            inner.save_projection = False  # type: ignore[attr-defined]  # regenerated from its seed when loading
        plain = json.loads(json.dumps(inner.to_dict(), default=_jsonable))
        for name in ("peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"):
            plain.pop(name, None)
        self.inner = plain

    def resolved_edges(self) -> tuple[Edge, ...]:
        """Returns the resolved edges; empty before injection.

        Raises:
            GraphError: If a stored edge is malformed.
        """
        if not isinstance(self.edges or [], list):
            raise GraphError(f"edges must be a list of edges, got {type(self.edges).__name__}.")
        return PropagationGraph(tuple(Edge.from_json(edge) for edge in self.edges or [])).edges

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Loads the config as PEFT does, and validates the checkpoint next to it if the folder is local.

        Raises:
            AdapterError: If the checkpoint is damaged or lacks a scale, or if a scale is not finite or does not have
                the length that its edges need.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        file = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if isinstance(config, cls) and file.is_file():
            _check_file(file, config)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the config as PEFT does, and adds loading instructions to the model card next to it."""
        if self.edges is None and self.propagation != "none":
            warnings.warn(
                "The adapter is saved before its first forward pass, so its edges have not been traced yet. They will "
                "be traced after loading.",
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
    """Raises `GraphError` if a saved placement is malformed."""
    norms, overwritten = (value.get(key) if isinstance(value, dict) else None for key in ("norms", "overwritten"))
    names = [overwritten, *(norms.values() if isinstance(norms, dict) else [None])]
    if not all(isinstance(one, list) and all(isinstance(name, str) for name in one) for one in names):
        raise GraphError(
            f"placement must have 'norms', a dict of lists, and 'overwritten', a list; got {value!r:.200}."
        )


def _as_set(value: Any) -> Any:
    return frozenset(value) if isinstance(value, list | tuple | set) else value


def _shown(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _jsonable(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    raise SanError(f"inner contains a {type(value).__name__}, which cannot be serialised to JSON.")


def _check_file(file: Path, config: SanConfig) -> None:
    """Raises `AdapterError` if the tensors of a checkpoint do not match its config."""
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
            raise AdapterError(f"{file} has no scale for {fqn}, which the adapter's config propagates.")
        if own and found[fqn] != length:
            raise AdapterError(f"{file}: the scale of {fqn} has {found[fqn]} entries, but its edges need {length}.")
        if prefix is not None and fqn not in hosts:
            raise AdapterError(
                f"{file} has no tensors {prefix}* for {fqn}, which hosts SAN according to the adapter's "
                "config. Was the adapter saved with another host?"
            )


def _propagation(value: Any) -> str | dict[str, Any]:
    """Returns the name of a scheme, or a graph as a JSON-serialisable dict."""
    if isinstance(value, PropagationGraph):
        return value.to_dict()
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        if value not in SCHEMES:
            close = difflib.get_close_matches(value, SCHEMES, n=1)
            raise SanError(
                f"Unknown propagation scheme {value!r}.{f' Did you mean {close[0]!r}?' if close else ''} "
                f"Choose from {', '.join(SCHEMES)}, or pass a PropagationGraph."
            )
        return value
    if isinstance(value, str | dict):
        return json.loads(PropagationGraph.from_json(value).to_json())
    raise SanError(
        f"propagation must be a scheme, a PropagationGraph, a dict or a JSON string; got {type(value).__name__}."
    )
