"""Fine-tuning methods and their hyperparameters, as recipes and suites name them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, model_validator

from san_bench.config.strict import Strict, later

Propagation = Literal[
    "all", "exact", "feedforward", "reference", "none", "reversed", "skip-one", "permuted", "shuffled"
]
"""A propagation scheme, or an ablation that breaks the order of propagation, drawn with the recipe's seed."""

Targets = Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | Literal["all-linear"]


Exponent = Annotated[float, Field(ge=-1000, le=1000)]
"""Exponent of propagated scales."""

Rank = Annotated[int, Field(ge=1, le=2**16)]


class Adapter(Strict):
    """Settings of all methods that train an adapter.

    Attributes:
        from_: Key `from`: folder of a trained adapter of the same method, from which the training goes on.
    """

    from_: str | None = later(None, alias="from", min_length=1)


class San(Adapter):
    """SAN with its own scale vectors.

    Attributes:
        propagation: Propagation scheme, or an ablation.
        exponent: Exponent of propagated scales.
        shift: Whether to learn a shift in addition to each scale.
        train_norms: Whether to train the normalisation layers too.
        detach: Whether to detach propagated scales from the gradient.
        gate: Whether each posterior layer learns a vector that is multiplied onto its propagated scale.
        graph: JSON file of the propagation graph, as `san trace MODEL --json` writes it; traced by default.
    """

    kind: Literal["san"]
    propagation: Propagation = "all"
    exponent: Exponent = 1.0
    shift: bool = False
    train_norms: bool = True
    detach: bool = False
    gate: bool = False
    graph: str | None = later(None, min_length=1)


class Ssf(Adapter):
    """Scale and shift without propagation."""

    kind: Literal["ssf"]
    train_norms: bool = True


class Lora(Adapter):
    """LoRA, or DoRA.

    Attributes:
        rank: Rank of the update.
        alpha: The update is scaled by `alpha / rank`.
        dropout: Dropout probability of the adapter's input.
        targets: Suffixes of layer names, or `all-linear`: every linear layer except the head.
    """

    kind: Literal["lora", "dora"]
    rank: Rank = 8
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Targets = "all-linear"


class SanOver(Adapter):
    """SAN over LoRA or DoRA: the scale is decomposed from the host adapter and propagated.

    Attributes:
        rank: As in `Lora`; `null` with `host`, which has its own.
        alpha: As `rank`.
        dropout: As `rank`.
        targets: As `rank`.
        propagation: Propagation scheme, or an ablation.
        decomposition: How the scale is computed from the host; see `SanConfig`.
        exponent: Exponent of propagated scales.
        bound: Maximum distance of a propagated scale from one, or `null`.
        detach: Whether to detach propagated scales from the gradient.
        graph: JSON file of the propagation graph, as `san trace MODEL --json` writes it; traced by default.
        host: Folder of a trained LoRA or DoRA adapter to attach SAN to; a new adapter by default.
    """

    kind: Literal["san-lora", "san-dora"]
    rank: Rank | None = 8
    alpha: float | None = Field(16.0, gt=0)
    dropout: float | None = Field(0.0, ge=0, lt=1)
    targets: Targets | None = "all-linear"
    propagation: Propagation = "all"
    decomposition: Literal["norm", "projection", "feature"] = "norm"
    exponent: Exponent = 1.0
    bound: float | None = None
    detach: bool = False
    graph: str | None = later(None, min_length=1)
    host: str | None = later(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _of_host(cls, data: Any) -> Any:
        return {**dict.fromkeys(OF_HOST), **data} if isinstance(data, dict) and data.get("host") else data

    @model_validator(mode="after")
    def _has_one_host(self) -> SanOver:
        given = [key for key in OF_HOST if getattr(self, key) is not None]
        if self.host is not None and given:
            raise ValueError(f"{given[0]}|the adapter in {self.host} has its own; leave out {', '.join(given)}")
        if self.host is not None and self.from_ is not None:
            raise ValueError("host|give either host, a LoRA or DoRA adapter, or from, a SAN adapter")
        if self.host is None and len(given) < len(OF_HOST):
            missing = next(key for key in OF_HOST if key not in given)
            raise ValueError(f"{missing}|may only be null with host, the folder of a trained adapter")
        return self


OF_HOST = ("rank", "alpha", "dropout", "targets")
"""Settings of `SanOver` that a trained host has already."""


class Ia3(Adapter):
    """(IA)^3: learned scales on the outputs of `targets`; for those in `feedforward`, on the inputs."""

    kind: Literal["ia3"]
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    feedforward: Annotated[tuple[str, ...], Field(strict=False)] = ()


class Plain(Strict):
    """Baselines without an adapter: `linear` trains the head, `norm` also norms, `bitfit` also biases, `full` all.

    A language model has no new head, so `linear` would train nothing there.
    """

    kind: Literal["linear", "norm", "bitfit", "full"]


Method = Annotated[San | Ssf | Lora | SanOver | Ia3 | Plain, Discriminator("kind")]
