"""SAN (Synapse and Neuron): parameter-efficient fine-tuning with propagated per-channel scales.

Importing this package registers the method with PEFT.
"""

from san_peft.errors import AdapterError, GraphError, MergeError, SanError, TargetError, TraceError
from san_peft.export import MergeReport, dequantize, merge_and_verify
from san_peft.propagation.graph import Barrier, ChannelMap, Edge, PropagationGraph
from san_peft.propagation.trace import trace
from san_peft.swap import LoraReport, hotswap, save_as_lora
from san_peft.tuner import _peft
from san_peft.tuner.attach import detach_san, propagate
from san_peft.tuner.config import SanConfig
from san_peft.tuner.layer import SanLayer
from san_peft.tuner.loaders import wrap_loaders
from san_peft.tuner.model import SanModel

__all__ = [
    "AdapterError",
    "Barrier",
    "ChannelMap",
    "Edge",
    "GraphError",
    "LoraReport",
    "MergeError",
    "MergeReport",
    "PropagationGraph",
    "SanConfig",
    "SanError",
    "SanLayer",
    "SanModel",
    "TargetError",
    "TraceError",
    "dequantize",
    "detach_san",
    "hotswap",
    "merge_and_verify",
    "propagate",
    "save_as_lora",
    "trace",
]

_peft.register(SanConfig, SanModel)
wrap_loaders()
