"""Graphs that the tests of drawings share."""

from __future__ import annotations

from functools import cache

from tests.golden.models import MODELS

from san_peft import Barrier, ChannelMap, Edge, PropagationGraph, trace
from san_peft.propagation.graph import Layer

DRAWN = ("timm-vit", "timm-swinv2", "timm-resnet", "llama", "mixtral", "t5", "whisper", "llava", "clip")
"""Golden models whose graphs are drawn in every form."""


@cache
def traced(name: str) -> PropagationGraph:
    """Graph of a golden model without the edges into heads."""
    return trace(MODELS[name]()).select("all")


HOSTILE = PropagationGraph(
    (Edge('a<b>&"c\\', "z<script>alert(1)</script>", ChannelMap.identity(4), ("<i>&",)),),
    (Barrier("<op>", 'a<b>&"c\\', 'because "of" <this> & that\\'),),
    (Layer('a<b>&"c\\', 'Li"near<', 4, 4), Layer("z<script>alert(1)</script>", "Linear", 4, 4)),
    ("z<script>alert(1)</script>",),
)
"""Names that would break a file in which they are not escaped."""
