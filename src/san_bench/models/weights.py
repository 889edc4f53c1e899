"""Load pretrained language and vision-language models in a given dtype or quantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from san_bench.config.errors import cause_of
from san_bench.models.checkpoint import Checkpoint
from san_peft.errors import SanError
from san_peft.tuner.quantized import keep_exact

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by their names in recipes; quantised weights compute in bfloat16."""


def load_pretrained(auto: Any, checkpoint: Checkpoint, recipe: Any, whole: Sequence[str] = ()) -> Any:
    """Loads a model in the recipe's dtype, and prepares a quantised one for training.

    Args:
        auto: One of transformers' `AutoModelFor...` classes.
        checkpoint: The checkpoint to load.
        recipe: A recipe with `weights` and `gradient_checkpointing`.
        whole: Modules that are not quantised.

    Raises:
        SanError: If the model cannot be loaded, or weights are missing or have other shapes.
    """
    quantised = recipe.weights in ("nf4", "int8")
    options: dict[str, Any] = {
        **checkpoint.options,
        "dtype": DTYPES.get(recipe.weights, torch.bfloat16),
        "ignore_mismatched_sizes": True,  # reported below
    }
    if quantised:
        kept = ["lm_head", *whole] if whole else None  # by default transformers skips only the output layer
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
        model, report = auto.from_pretrained(checkpoint.path, output_loading_info=True, **options)
    except Exception as error:  # transformers raises errors of many types for another kind of model and damaged files
        name = f"{checkpoint.path}{'' if checkpoint.revision is None else f'@{checkpoint.revision}'}"
        raise SanError(
            f"{name} cannot be loaded as a language model: {cause_of(error)} Set model to a folder or a name "
            "on the hub of a model of this kind."
        ) from error
    strange = misfits(report)
    if strange:
        raise SanError(
            f"Weights of {recipe.model} are missing or mismatched for {len(strange)} parameters of "
            f"{type(model).__name__}, such as {strange[0]}."
        )
    model.config.use_cache = False  # not needed in training; generation enables it itself
    if not quantised:
        return model
    keep_exact(model)  # for LoRA too, whose scales are read and merged after training
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, recipe.gradient_checkpointing, {"use_reentrant": False})


def train_in_float32(model: nn.Module) -> Callable[[], None]:
    """Upcasts trainable parameters to float32, since half precision would round small updates away.

    A module with upcast parameters casts its inputs to float32, and its outputs back to its former dtype, so the rest
    of the model is unaffected.

    Args:
        model: The model, with `requires_grad` set on trainable parameters.

    Returns:
        A function that casts the parameters back to their former dtypes.
    """
    half = (torch.bfloat16, torch.float16)
    owners = {
        module: [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype in half]
        for module in model.modules()
    }
    types = {parameter: parameter.dtype for own in owners.values() for parameter in own}  # tied parameters once
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
    """Lists missing and mismatched parameters from the loading info of `from_pretrained`.

    Returns:
        Their names, with the actual and expected shapes of mismatched ones.
    """
    sizes = [f"{name} ({tuple(has)}, not {tuple(wants)})" for name, has, wants in report["mismatched_keys"]]
    return sorted([*report["missing_keys"], *sizes])


def move_to_gpu(model: Any) -> None:
    """Moves a model from the CPU to the GPU, if there is one."""
    if torch.cuda.is_available() and all(parameter.device.type == "cpu" for parameter in model.parameters()):
        model.to("cuda")
