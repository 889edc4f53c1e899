"""From a recipe to a model: what is frozen, what is trained, and a check that it is so."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, set_seed
from transformers.utils import logging as transformers_logging

from san_bench.data.vision import VisionTask, embedded_vit_path
from san_bench.recipe import Lora, Recipe, San, Ssf
from san_peft.errors import SanError

HEAD = "classifier"
"""Name of the task's head in transformers' image classifiers; it is trained by every method."""


def model_path(recipe: Recipe) -> str | Path:
    """Returns what `from_pretrained` takes for the recipe's model."""
    return embedded_vit_path() if recipe.model == "embedded" else recipe.model


def base_model(recipe: Recipe, task: VisionTask) -> nn.Module:
    """Loads the pretrained model in float32 with a fresh head, whose weights come from the recipe's seed."""
    set_seed(recipe.seed)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the head is new on purpose
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForImageClassification.from_pretrained(
            model_path(recipe), num_labels=task.num_classes, dtype=torch.float32
        )
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def calm() -> Iterator[None]:
    """Hides a warning that PEFT causes in transformers and that nobody here can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning)
        yield


def build_model(recipe: Recipe, task: VisionTask) -> nn.Module:
    """Builds the model of a recipe, ready to be trained.

    Args:
        recipe: What to build.
        task: Gives the number of classes.

    Returns:
        A `PeftModel` for an adapter, else the transformers model with its parameters frozen or not.

    Raises:
        SanError: If other parameters would be trained than the method says.
    """
    model = base_model(recipe, task)
    method = recipe.method
    if method.kind == "linear":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(f"{HEAD}."))
    elif method.kind != "full":
        import peft

        with calm():
            model = peft.get_peft_model(model, peft_config(recipe))  # type: ignore[arg-type]
    check_trainable(model, recipe)
    return model


def peft_config(recipe: Recipe) -> Any:
    """Returns PEFT's configuration of the recipe's adapter."""
    method = recipe.method
    if isinstance(method, Lora):
        import peft

        return peft.LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,  # type: ignore[arg-type]  # PEFT divides it, a float is fine
            lora_dropout=method.dropout,
            target_modules=list(method.targets),
            modules_to_save=[HEAD],
            use_dora=method.kind == "dora",
        )
    from san_peft import SanConfig

    if isinstance(method, San):
        options = method.model_dump(exclude={"kind"})
    elif isinstance(method, Ssf):
        options = {"propagation": "none", "shift": True, "train_norms": method.train_norms}
    else:
        raise SanError(f"Method {method.kind!r} has no adapter.")
    return SanConfig(modules_to_save=[HEAD], **options)


def check_trainable(model: nn.Module, recipe: Recipe) -> dict[str, int]:
    """Checks that exactly the right kinds of parameter are trained.

    Returns:
        Numbers of trained values: `head`, and `rest`.

    Raises:
        SanError: If a trained parameter is not of the method, none of the method is trained, or the head is frozen.
    """
    method = recipe.method
    allowed = {"linear": [], "lora": ["lora_"], "dora": ["lora_"], "san": ["san_"], "ssf": ["san_"], "full": ["."]}
    own = allowed[method.kind]
    words = [*own, *(["norm"] if getattr(method, "train_norms", False) else [])]
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = {name for name in trained if re.search(rf"(^|\.){HEAD}\.", name)}
    strange = [name for name in trained if name not in head and not any(word in name for word in words)]
    if strange:
        raise SanError(f"{method.kind} would also train {', '.join(strange[:5])}; {len(strange)} parameters too many.")
    if not head:
        raise SanError(f"The head {HEAD!r} would not be trained, so {method.kind} could learn no task.")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if (method.kind == "full" and frozen) or not all(any(word in name for name in trained) for word in own):
        raise SanError(f"{method.kind} would train too little: {len(trained)} parameters, {len(frozen)} are frozen.")
    size = sum(trained[name] for name in head)
    return {"head": size, "rest": sum(trained.values()) - size}


def saved_activation_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Counts the bytes that one forward pass keeps for the backward pass, parameters left out.

    Each storage counts once, however many tensors share it. Neither gradients nor the random state change; the model is
    left in training mode.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages, so that no address is used twice

    def pack(tensor: torch.Tensor) -> None:
        """Returns nothing for the graph to hold: a tensor that leads back to the graph would never be freed."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage

    model.train()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())
