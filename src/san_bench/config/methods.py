"""Methods: what a run trains, as recipes and suites name it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field

from san_bench.config.strict import Strict

Propagation = Literal[
    "all", "exact", "feedforward", "reference", "none", "reversed", "skip-one", "permuted", "shuffled"
]
"""A scheme, or one of the ways to break the order of propagation, drawn with the recipe's seed."""

Targets = Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | Literal["all-linear"]


class San(Strict):
    """SAN with its own scale vectors."""

    kind: Literal["san"]
    propagation: Propagation
    exponent: float
    shift: bool
    train_norms: bool
    detach: bool
    gate: bool


class Ssf(Strict):
    """Scale and shift without propagation."""

    kind: Literal["ssf"]
    train_norms: bool


class Lora(Strict):
    """LoRA, or DoRA.

    Attributes:
        targets: Endings of the names of the layers, or `all-linear`: every dense layer but the head.
    """

    kind: Literal["lora", "dora"]
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: Targets


class SanOver(Strict):
    """SAN over LoRA or DoRA: the scale is taken out of the host and propagated."""

    kind: Literal["san-lora", "san-dora"]
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: Targets
    propagation: Propagation
    decomposition: Literal["norm", "projection"]
    exponent: float
    bound: float | None
    detach: bool


class Ia3(Strict):
    """(IA)^3: learned scales on outputs, and on the inputs of `feedforward`, which is part of `targets`."""

    kind: Literal["ia3"]
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    feedforward: Annotated[tuple[str, ...], Field(strict=False)]


class Plain(Strict):
    """No adapter: `linear` trains the head alone, `norm` the normalisations too, `bitfit` the biases, `full` all.

    A model of language has no head of its own, so `linear` would train nothing there.
    """

    kind: Literal["linear", "norm", "bitfit", "full"]


Method = Annotated[San | Ssf | Lora | SanOver | Ia3 | Plain, Discriminator("kind")]
