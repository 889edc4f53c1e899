"""Times a training step of SAN over LoRA and over DoRA beside the hosts alone, as `step.py` does it.

    python benchmarks/hosts.py                     # both shapes, eager
    python benchmarks/hosts.py --dtype bfloat16 --out runs/bfloat16
    python benchmarks/hosts.py --shapes vit --rounds 4

| name | what is trained |
|---|---|
| lora, dora | PEFT's, rank 16 |
| san-lora | the same LoRA as a host: its scale is taken out by norm and propagated |
| san-lora-projection | the same, taken out by projection |
| san-dora | the same DoRA as a host; compared with PEFT's DoRA |
| lean-lora, lean-dora | the hosts with the forward passes they have under SAN, nothing propagated |
"""

from __future__ import annotations

import dataclasses

import tyro
from step import Builder, Goals, Options, lora_config, on_dense, run

from san_peft import SanConfig


def over(propagation: str = "all", decomposition: str = "norm", **host: bool) -> Builder:
    """Builds SAN over LoRA, or DoRA, on every dense layer but the head."""
    return on_dense(
        lambda dense: SanConfig(inner=lora_config(dense, **host), propagation=propagation, decomposition=decomposition)
    )


METHODS: dict[str, Builder] = {
    "lora": on_dense(lora_config),
    "dora": on_dense(lambda dense: lora_config(dense, use_dora=True)),
    "san-lora": over(),
    "san-lora-projection": over(decomposition="projection"),
    "san-dora": over(use_dora=True),
    "lean-lora": over("none"),
    "lean-dora": over("none", use_dora=True),
}
AGAINST = {"san-dora": "dora", "lean-dora": "dora"}
GOALS: Goals = {"san-lora": (1.03, 1.03)}


@dataclasses.dataclass(frozen=True)
class HostOptions(Options):
    """Times training steps of SAN over LoRA and DoRA beside the hosts alone."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods, with those that others are compared with."""


if __name__ == "__main__":
    run(tyro.cli(HostOptions), METHODS, AGAINST, "hosts", GOALS)
