"""Apply the method of a recipe to a model: freeze parameters, add the adapter, and check what is trainable."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from san_bench.config.methods import Ia3, Lora, San, SanOver, Ssf
from san_bench.config.recipe import Recipe
from san_bench.models.checkpoint import checkpoint_of
from san_bench.models.start import start_of, with_graph, with_start
from san_peft.errors import SanError
from san_peft.tuner.resolve import norms_of


def head_of(model: Any) -> str | None:
    """Returns the name of the classification head, which every method trains: transformers' `classifier` or timm's.

    Language models have none: their output layer is pretrained and stays frozen.
    """
    inside = getattr(model, "timm_model", None)
    if inside is not None:
        return f"timm_model.{inside.pretrained_cfg['classifier']}"
    return "classifier" if hasattr(model, "classifier") else None


def checkpoint_sha256(model: nn.Module) -> str:
    """Returns a sha256 over the names, dtypes, shapes and bytes of a pretrained model's weights without its head."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not _is_head(model, name):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def calm() -> Iterator[None]:
    """Suppresses warnings that a user of a recipe cannot act on.

    One is a deprecation in transformers that PEFT triggers; the other is SAN's note on edges from modules that the
    recipe excludes, such as a frozen vision tower.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".* edges are dropped because their anterior layer")
        yield


def with_method(model: Any, recipe: Recipe) -> nn.Module:
    """Applies the recipe's method to a pretrained model: freezes parameters and adds an adapter.

    Returns:
        A `PeftModel` for an adapter, else the same model with `requires_grad` set.

    Raises:
        SanError: If the trainable parameters are not those of the method.
    """
    method = recipe.method
    if method.kind in PLAIN:
        names = _plain_parameters(model, recipe)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_is_head(model, name) or name in names)
    elif start_of(method) is not None:
        with calm():
            model = with_start(model, recipe)
    else:
        import peft

        with calm():
            revision = checkpoint_of(recipe).revision
            model = peft.get_peft_model(model, peft_config(recipe, model), revision=revision)  # type: ignore[arg-type]
    check_trainable(model, recipe)
    return model


PLAIN = ("linear", "norm", "bitfit", "full")
"""Methods without an adapter, whose runs save a full model."""

SAN = ("san", "ssf", "san-lora", "san-dora")
"""Methods with a SAN adapter."""


def _is_head(model: Any, name: str) -> bool:
    """Returns whether a parameter or buffer belongs to the classification head."""
    head = head_of(model)
    return head is not None and name.startswith(f"{head}.")


PROJECTOR = "multi_modal_projector"
"""Name of the multimodal projector in transformers' vision-language models."""

TOWER = "vision_tower"
"""Name of the vision tower in transformers' vision-language models."""


def left_out(recipe: Any) -> str | None:
    """Returns a regular expression of the modules that methods exclude, or `None` if they exclude nothing.

    In a vision-language model these are the projector, which is trained fully or not at all, and the vision tower
    unless the recipe adapts it.
    """
    tower = getattr(recipe, "tower", None)
    if tower is None:
        return None
    return rf"(.*\.)?({PROJECTOR}{'' if tower == 'adapted' else f'|{TOWER}'})(\..*)?"


def _plain_parameters(model: nn.Module, recipe: Recipe) -> set[str]:
    """Returns the names of the parameters that a method without an adapter trains in addition to the head."""
    kind, pattern = recipe.method.kind, left_out(recipe)
    every = {name for name, _ in model.named_parameters()}
    names = {name for name in every if pattern is None or not re.fullmatch(pattern, name)}
    if kind == "bitfit":
        names = {name for name in names if name.rpartition(".")[2] == "bias"}
    elif kind == "norm":
        norms = set(norms_of(model))
        names = {name for name in names if name.rpartition(".")[0] in norms}
    elif kind != "full":
        names = set()
    return names | {name for name in every if _is_projected(name, recipe)}


def _is_projected(name: str, recipe: Any) -> bool:
    """Returns whether a parameter belongs to a fully trained projector."""
    return getattr(recipe, "projector_lr", None) is not None and f".{PROJECTOR}." in f".{name}"


def peft_config(recipe: Recipe, model: nn.Module) -> Any:
    """Returns the PEFT configuration of the recipe's adapter; the head is in `modules_to_save`."""
    method, shared = recipe.method, _shared(recipe, model)
    if isinstance(method, Lora):
        return _lora(recipe, model)
    if isinstance(method, Ia3):
        import peft

        return peft.IA3Config(
            target_modules=list(method.targets), feedforward_modules=list(method.feedforward), **shared
        )
    from san_peft import SanConfig

    if isinstance(method, SanOver):
        names = ("propagation", "decomposition", "exponent", "bound", "detach")
        options = {name: getattr(method, name) for name in names}
        return SanConfig(inner=_lora(recipe, model), **with_graph(options, recipe, model))
    if isinstance(method, San):
        names = ("propagation", "exponent", "shift", "train_norms", "detach", "gate")
        options = with_graph({name: getattr(method, name) for name in names}, recipe, model)
    elif isinstance(method, Ssf):
        options = {"propagation": "none", "shift": True, "train_norms": method.train_norms}
    else:
        raise SanError(f"Method {method.kind!r} has no adapter.")
    pattern = left_out(recipe)
    if pattern is not None and options["train_norms"]:  # norms of excluded modules stay frozen
        norms = [name for name in norms_of(model) if not re.fullmatch(pattern, name)]
        shared["modules_to_save"] = [*shared.get("modules_to_save", []), *norms]
        options["train_norms"] = False
    return SanConfig(**shared, **options)


def _shared(recipe: Any, model: nn.Module) -> dict[str, Any]:
    """Returns the options that all configurations share: `modules_to_save`, `exclude_modules` and `task_type`."""
    head, pattern = head_of(model), left_out(recipe)
    if head is not None:
        return {"modules_to_save": [head]}
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if pattern is not None:
        shared["exclude_modules"] = pattern
    if getattr(recipe, "projector_lr", None) is not None:
        shared["modules_to_save"] = [PROJECTOR]
    return shared


def _lora(recipe: Recipe, model: nn.Module) -> Any:
    import peft

    method: Any = recipe.method
    pattern = left_out(recipe)
    head, output = head_of(model), None if head_of(model) else model.get_output_embeddings()  # type: ignore[operator]
    targets = method.targets
    if targets == "all-linear":
        dense = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output
        ]
        dense = [name for name in dense if head is None or (name != head and not name.startswith(f"{head}."))]
        targets = [name for name in dense if pattern is None or not re.fullmatch(pattern, name)]

    return peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # PEFT divides it, a float is fine
        lora_dropout=method.dropout,
        target_modules=list(targets),
        use_dora=method.kind in ("dora", "san-dora"),
        **_shared(recipe, model),
    )


def check_trainable(model: nn.Module, recipe: Recipe) -> dict[str, int]:
    """Checks that exactly the parameters of the method and the head are trainable.

    Returns:
        Number of trainable values in the `head`, and in the `rest`.

    Raises:
        SanError: If other parameters are trainable, none of the method is, or the head is frozen.
    """
    method = recipe.method
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    inside: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    place = head_of(inside)
    head = {name for name in trained if place and re.search(rf"(^|\.){re.escape(place)}\.", name)}
    if method.kind in PLAIN:
        wanted = _plain_parameters(model, recipe)
        strange = [name for name in trained if name not in head and name not in wanted]
        complete = wanted <= set(trained)
    else:
        own = "san_" if method.kind in ("san", "ssf") else "ia3_" if method.kind == "ia3" else "lora_"
        norms = norms_of(inside) if getattr(method, "train_norms", False) else []
        words = [own, *(f".{name}." for name in norms)]
        loose = [name for name in trained if name not in head and not _is_projected(name, recipe)]
        strange = [name for name in loose if not any(word in name for word in words)]
        complete = any(own in name for name in trained)
    if strange:
        raise SanError(f"{method.kind} would train {len(strange)} unexpected parameters: {', '.join(strange[:5])}.")
    if place and not head:
        raise SanError(f"The head {place!r} is frozen, so {method.kind} cannot learn the task.")
    if not complete:
        frozen = sum(not p.requires_grad for p in model.parameters())
        raise SanError(f"{method.kind} trains too few parameters: {len(trained)} are trainable, {frozen} are frozen.")
    size = sum(trained[name] for name in head)
    return {"head": size, "rest": sum(trained.values()) - size}


def saved_activation_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Counts the bytes of activations that one forward pass saves for the backward pass, without parameters.

    A storage that several tensors share counts once. Gradients and the random state do not change; the model is left in
    training mode.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is reused

    def pack(tensor: torch.Tensor) -> None:
        """Records the storage, and returns nothing: a tensor that refers to the graph would never be freed."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage

    model.train()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())
