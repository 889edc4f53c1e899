"""From a recipe to a model: what is frozen, what is trained, and a check that it is so."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, set_seed
from transformers.utils import logging as transformers_logging

from san_bench.data.vision import VisionTask, embedded_path
from san_bench.recipe import Ia3, Lora, Recipe, San, SanOver, Ssf
from san_peft.errors import SanError
from san_peft.tuner.resolve import norms_of


def head_of(model: Any) -> str:
    """Returns the name of the task's head, which every method trains: transformers' `classifier`, or timm's own."""
    inside = getattr(model, "timm_model", None)
    return "classifier" if inside is None else f"timm_model.{inside.pretrained_cfg['classifier']}"


def model_path(recipe: Recipe) -> str | Path:
    """Returns what `from_pretrained` takes for the recipe's model."""
    name, _, which = recipe.model.partition("/")
    return embedded_path(which or "vit") if name == "embedded" else recipe.model


def base_model(recipe: Recipe, task: VisionTask) -> nn.Module:
    """Loads the pretrained model in float32 with a fresh head, whose weights come from the recipe's seed.

    A folder or name of timm's loads as transformers' `TimmWrapperForImageClassification`.
    """
    set_seed(recipe.seed)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the head is new on purpose
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model_path(recipe), num_labels=task.num_classes)
        if isinstance(options := getattr(config, "model_args", None), dict):
            options.pop("num_classes", None)  # timm writes the old head's size here, which would stand twice
        _set_drop_path(config, recipe)
        model, report = AutoModelForImageClassification.from_pretrained(
            model_path(recipe),
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # of the head alone, see below
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
    strange = [key for key in _keys(report, "missing", "mismatched") if not key.startswith(f"{head_of(model)}.")]
    if strange:
        raise SanError(
            f"{recipe.model} holds no fitting weights for {len(strange)} parameters of its {type(model).__name__}, "
            f"such as {strange[0]}. Only the head may be new."
        )
    return model


def _set_drop_path(config: Any, recipe: Recipe) -> None:
    """Writes the rate of stochastic depth into a configuration.

    Raises:
        SanError: If a rate is wanted and the model has none.
    """
    if hasattr(config, "pretrained_cfg"):  # timm's, through transformers
        if recipe.drop_path:
            config.model_args = {**(config.model_args or {}), "drop_path_rate": recipe.drop_path}
    elif hasattr(config, "drop_path_rate"):
        config.drop_path_rate = recipe.drop_path
    elif recipe.drop_path:
        raise SanError(
            f"drop_path is {recipe.drop_path:g}, but {config.model_type} of transformers has no stochastic depth. Set "
            "it to 0, or take the model from timm."
        )


def checkpoint_sha256(model: nn.Module) -> str:
    """Returns a sha256 over the names, types, shapes and bytes of a pretrained model's weights, its head left out."""
    digest, head = hashlib.sha256(), head_of(model)
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(f"{head}."):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _keys(report: dict[str, Any], *kinds: str) -> list[str]:
    """Names of parameters in transformers' report of a loading, where a mismatch comes with its two sizes."""
    found = [key for kind in kinds for key in report[f"{kind}_keys"]]
    return sorted(key if isinstance(key, str) else key[0] for key in found)


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
    return with_method(base_model(recipe, task), recipe)


def with_method(model: Any, recipe: Recipe) -> nn.Module:
    """Freezes a pretrained model, and puts an adapter on it, as the recipe's method says; see `build_model`."""
    method = recipe.method
    if method.kind in PLAIN:
        head, names = head_of(model), _plain_parameters(model, method.kind)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(f"{head}.") or name in names)
    else:
        import peft

        with calm():
            model = peft.get_peft_model(model, peft_config(recipe, model))  # type: ignore[arg-type]
    check_trainable(model, recipe)
    return model


PLAIN = ("linear", "norm", "bitfit", "full")
"""Methods without an adapter, whose runs save a whole model."""

SAN = ("san", "ssf", "san-lora", "san-dora")
"""Methods whose adapters are SAN's."""


def _plain_parameters(model: nn.Module, kind: str) -> set[str]:
    """Names of the parameters that a method without an adapter trains beside the head."""
    names = {name for name, _ in model.named_parameters()}
    if kind == "bitfit":
        return {name for name in names if name.rpartition(".")[2] == "bias"}
    if kind == "norm":
        norms = set(norms_of(model))
        return {name for name in names if name.rpartition(".")[0] in norms}
    return names if kind == "full" else set()


def peft_config(recipe: Recipe, model: nn.Module) -> Any:
    """Returns PEFT's configuration of the recipe's adapter; the head is trained as a whole."""
    method, head = recipe.method, head_of(model)
    if isinstance(method, Lora):
        return _lora(method, model)
    if isinstance(method, Ia3):
        import peft

        return peft.IA3Config(
            target_modules=list(method.targets), feedforward_modules=list(method.feedforward), modules_to_save=[head]
        )
    from san_peft import SanConfig

    if isinstance(method, SanOver):
        names = ("propagation", "decomposition", "exponent", "bound", "detach")
        options = {name: getattr(method, name) for name in names}
        return SanConfig(inner=_lora(method, model), **_broken(options, recipe, model))
    if isinstance(method, San):
        options = _broken(method.model_dump(exclude={"kind"}), recipe, model)
    elif isinstance(method, Ssf):
        options = {"propagation": "none", "shift": True, "train_norms": method.train_norms}
    else:
        raise SanError(f"Method {method.kind!r} has no adapter.")
    return SanConfig(modules_to_save=[head], **options)


def _broken(options: dict[str, Any], recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """The options of SAN, with the graph itself where the recipe wants its order broken."""
    from san_peft import trace
    from san_peft.propagation import ABLATIONS, ablate

    if options["propagation"] not in ABLATIONS:
        return options
    graph = ablate(trace(model).select("all"), options["propagation"], seed=recipe.seed)
    return {**options, "propagation": graph}


def _lora(method: Lora | SanOver, model: nn.Module) -> Any:
    import peft

    head = head_of(model)
    targets = method.targets
    if targets == "all-linear":
        dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = [name for name in dense if name != head and not name.startswith(f"{head}.")]

    return peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # PEFT divides it, a float is fine
        lora_dropout=method.dropout,
        target_modules=list(targets),
        modules_to_save=[head],
        use_dora=method.kind in ("dora", "san-dora"),
    )


def check_trainable(model: nn.Module, recipe: Recipe) -> dict[str, int]:
    """Checks that exactly the right kinds of parameter are trained.

    Returns:
        Numbers of trained values: `head`, and `rest`.

    Raises:
        SanError: If a trained parameter is not of the method, none of the method is trained, or the head is frozen.
    """
    method = recipe.method
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    inside: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    place = head_of(inside)
    head = {name for name in trained if re.search(rf"(^|\.){re.escape(place)}\.", name)}
    if method.kind in PLAIN:
        wanted = _plain_parameters(model, method.kind)
        strange = [name for name in trained if name not in head and name not in wanted]
        complete = wanted <= set(trained)
    else:
        own = "san_" if method.kind in ("san", "ssf") else "ia3_" if method.kind == "ia3" else "lora_"
        norms = norms_of(inside) if getattr(method, "train_norms", False) else []
        words = [own, *(f".{name}." for name in norms)]
        strange = [name for name in trained if name not in head and not any(word in name for word in words)]
        complete = any(own in name for name in trained)
    if strange:
        raise SanError(f"{method.kind} would also train {', '.join(strange[:5])}; {len(strange)} parameters too many.")
    if not head:
        raise SanError(f"The head {place!r} would not be trained, so {method.kind} could learn no task.")
    if not complete:
        frozen = sum(not p.requires_grad for p in model.parameters())
        raise SanError(f"{method.kind} would train too little: {len(trained)} parameters, {frozen} are frozen.")
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
