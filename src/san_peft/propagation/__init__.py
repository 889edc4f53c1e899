"""Traces which output channels of one layer become which input channels of another; see README.md in this folder."""

from san_peft.propagation.channels import ChannelMap
from san_peft.propagation.graph import Barrier, Edge, Layer, Norm, PropagationGraph
from san_peft.propagation.placement import describe as describe_placement
from san_peft.propagation.placement import place
from san_peft.propagation.schemes import ABLATIONS, SCHEMES, ablate, select
from san_peft.propagation.trace import trace

__all__ = [
    "ABLATIONS",
    "SCHEMES",
    "Barrier",
    "ChannelMap",
    "Edge",
    "Layer",
    "Norm",
    "PropagationGraph",
    "ablate",
    "describe_placement",
    "place",
    "select",
    "trace",
]
