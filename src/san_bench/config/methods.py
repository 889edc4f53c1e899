"""Fine-tuning methods and their hyperparameters, as recipes and suites name them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field

from san_bench.config.strict import Strict

Propagation = Literal[
    "all", "exact", "feedforward", "reference", "none", "reversed", "skip-one", "permuted", "shuffled"
]
"""A propagation scheme, or an ablation that breaks the order of propagation, drawn with the recipe's seed."""

Targets = Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | Literal["all-linear"]


class San(Strict):
    """SAN with its own scale vectors."""

    kind: Literal["san"]
    propagation: Propagation
    exponent: float = Field(ge=-1000, le=1000)
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
        targets: Suffixes of layer names, or `all-linear`: every linear layer except the head.
    """

    kind: Literal["lora", "dora"]
    rank: int = Field(ge=1, le=2**16)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: Targets


class SanOver(Strict):
    """SAN over LoRA or DoRA: the scale is decomposed from the host adapter and propagated."""

    kind: Literal["san-lora", "san-dora"]
    rank: int = Field(ge=1, le=2**16)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: Targets
    propagation: Propagation
    decomposition: Literal["norm", "projection", "feature"]
    exponent: float = Field(ge=-1000, le=1000)
    bound: float | None
    detach: bool


class Ia3(Strict):
    """(IA)^3: learned scales on the outputs of `targets`; for those in `feedforward`, on the inputs."""

    kind: Literal["ia3"]
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    feedforward: Annotated[tuple[str, ...], Field(strict=False)]


class Plain(Strict):
    """Baselines without an adapter: `linear` trains the head, `norm` also norms, `bitfit` also biases, `full` all.

    A language model has no new head, so `linear` would train nothing there.
    """

    kind: Literal["linear", "norm", "bitfit", "full"]


Method = Annotated[San | Ssf | Lora | SanOver | Ia3 | Plain, Discriminator("kind")]
