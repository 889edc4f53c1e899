"""Loading of pretrained models of language, with or without sight, in a type of numbers or quantised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from san_peft.errors import SanError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of numbers by their names in recipes; quantised weights compute in bfloat16."""


def load_pretrained(auto: Any, path: str | Path, recipe: Any, whole: Sequence[str] = ()) -> Any:
    """Loads a model with its weights in the recipe's type, and makes a quantised one ready to be trained on.

    Args:
        auto: One of transformers' `AutoModelFor...`.
        path: What `from_pretrained` takes.
        recipe: A recipe with `weights` and `gradient_checkpointing`.
        whole: Parts of a model that are not quantised.

    Raises:
        SanError: If it cannot be loaded, or holds no fitting weights.
    """
    quantised = recipe.weights in ("nf4", "int8")
    options: dict[str, Any] = {"dtype": DTYPES.get(recipe.weights, torch.bfloat16)}
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
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, recipe.gradient_checkpointing, {"use_reentrant": False})


def misfits(report: dict[str, Any]) -> list[str]:
    """Names of parameters that a checkpoint lacks or has in another size, in transformers' report of a loading."""
    found = [key for kind in ("missing", "mismatched") for key in report[f"{kind}_keys"]]
    return sorted(key if isinstance(key, str) else key[0] for key in found)  # a mismatch comes with its two sizes


def place(model: Any) -> None:
    """Moves a model that lies in the memory of the machine to a GPU, where there is one."""
    if torch.cuda.is_available() and all(parameter.device.type == "cpu" for parameter in model.parameters()):
        model.to("cuda")
