"""Loading of pretrained models of language, with or without sight, in a type of numbers or quantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from san_peft.errors import SanError
from san_peft.tuner.quantized import keep_exact

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of numbers by their names in recipes; quantised weights compute in bfloat16."""


def load_pretrained(auto: Any, path: str | Path, recipe: Any, whole: Sequence[str] = (), **version: str) -> Any:
    """Loads a model with its weights in the recipe's type, and makes a quantised one ready to be trained on.

    Args:
        auto: One of transformers' `AutoModelFor...`.
        path: What `from_pretrained` takes.
        recipe: A recipe with `weights` and `gradient_checkpointing`.
        whole: Parts of a model that are not quantised.
        version: A `revision`, of a model on the hub.

    Raises:
        SanError: If it cannot be loaded, or holds no fitting weights.
    """
    quantised = recipe.weights in ("nf4", "int8")
    options: dict[str, Any] = {
        **version,
        "dtype": DTYPES.get(recipe.weights, torch.bfloat16),
        "ignore_mismatched_sizes": True,  # they are named below
    }
    if quantised:
        kept = ["lm_head", *whole] if whole else None  # by default transformers keeps the output alone
        options["quantization_config"] = (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
                llm_int8_skip_modules=kept,
            )
            if recipe.weights == "nf4"
            else BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
        )
    try:
        model, report = auto.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise SanError(f"{recipe.model} cannot be loaded as a language model: {error}") from error
    strange = misfits(report)
    if strange:
        raise SanError(
            f"{recipe.model} holds no fitting weights for {len(strange)} parameters of its {type(model).__name__}, "
            f"such as {strange[0]}."
        )
    model.config.use_cache = False  # of no use in training; generation asks for it itself
    if not quantised:
        return model
    keep_exact(model)  # of LoRA too: its scales are read, and merged, after it has run
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, recipe.gradient_checkpointing, {"use_reentrant": False})


def train_in_float32(model: nn.Module) -> Callable[[], None]:
    """Keeps what is trained in float32, whatever the type of the rest: half precision would round small steps away.

    A module whose own parameters are trained casts its inputs, and its outputs back to its former type, so the modules
    beside it see no difference.

    Args:
        model: The model, with what is trained marked by `requires_grad`.

    Returns:
        What rounds all of it back to its former type.
    """
    half = (torch.bfloat16, torch.float16)
    owners = {
        module: [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype in half]
        for module in model.modules()
    }
    types = {parameter: parameter.dtype for own in owners.values() for parameter in own}  # tied ones are here once
    handles = []
    for module, own in owners.items():
        if own:
            handles.append(module.register_forward_pre_hook(_widen, with_kwargs=True))
            handles.append(module.register_forward_hook(partial(_narrow, own[0].dtype)))
    for parameter in types:
        parameter.data = parameter.data.float()

    def back() -> None:
        for handle in handles:
            handle.remove()
        for parameter, kind in types.items():
            parameter.data = parameter.data.to(kind)

    return back


def _widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = {key: _cast(arg, torch.float32) for key, arg in kwargs.items()}
    return tuple(_cast(arg, torch.float32) for arg in args), named


def _narrow(kind: torch.dtype, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tuple(_cast(one, kind) for one in output) if type(output) is tuple else _cast(output, kind)


def _cast(value: Any, kind: torch.dtype) -> Any:
    return value.to(kind) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def misfits(report: dict[str, Any]) -> list[str]:
    """Parameters that a checkpoint lacks, or has in another size, by transformers' report of a loading.

    Returns:
        Their names; behind those of another size, what it is and what it should be.
    """
    sizes = [f"{name} ({tuple(has)}, not {tuple(wants)})" for name, has, wants in report["mismatched_keys"]]
    return sorted([*report["missing_keys"], *sizes])


def place(model: Any) -> None:
    """Moves a model that lies in the memory of the machine to a GPU, where there is one."""
    if torch.cuda.is_available() and all(parameter.device.type == "cpu" for parameter in model.parameters()):
        model.to("cuda")
