"""A result in the three blocks of PEFT's method comparison, so that its scripts and tables read our rows too.

The names of the fields are those of the result files in `method_comparison/` of https://github.com/huggingface/peft.
What a run does not have is 0 there (the tokens of images) or `None` (a branch of PEFT).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from san_bench.config.recipe import Recipe

PACKAGES = ("transformers", "datasets", "peft", "accelerate", "bitsandbytes", "torch", "san-peft")


def comparison(
    recipe: Recipe, result: dict[str, Any], model: Any, created: str, seconds: float, memory: Sequence[int]
) -> dict[str, Any]:
    """Returns `run_info`, `train_info` and `meta_info` of a run that succeeded.

    Args:
        recipe: The run's recipe.
        result: Its flat result.
        model: What was trained and saved.
        created: When it began, ISO 8601.
        seconds: Seconds from then to the last score.
        memory: Bytes that the allocator of the GPU held after each step; empty without one.
    """
    config = getattr(model, "peft_config", {}).get("default")
    seen = result["steps"] * recipe.optimizer.batch_size
    held = np.asarray(memory or [0])
    metrics = {
        "step": result["steps"],
        "test accuracy": result["accuracy"],
        "train loss": result["final_loss"],
        "train samples": min(seen, result["n_train"] * recipe.optimizer.epochs),
        "train time": result["train_seconds"],
        "train total tokens": result.get("train_tokens", 0),
    }
    return {
        "run_info": {
            "created_at": created,
            "total_time": round(seconds, 3),
            "experiment_name": f"{recipe.task}/{result['backbone']}-{recipe.method.kind}-seed{recipe.seed}",
            "peft_branch": None,
            "train_config": {"model_id": recipe.model, **recipe.model_dump(mode="json", exclude={"output"})},
            "peft_config": json.loads(json.dumps(config.to_dict(), default=_jsonable)) if config else None,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": round(float(held.mean())),
            "accelerator_memory_max": int(held.max()),
            "accelerator_memory_reserved_99th": round(float(np.percentile(held, 99))),
            "train_time": result["train_seconds"],
            "file_size": sum(file.stat().st_size for file in (Path(recipe.output) / "adapter").glob("*.safetensors")),
            "num_trainable_params": result["trainable_parameters"],
            "num_total_params": result["total_parameters"],
            "status": "success",
            "metrics": [metrics],
        },
        "meta_info": {
            "model_info": {"sha": result["checkpoint_sha256"], "created_at": None},
            "dataset_info": {recipe.task: {"sha": result["task_fingerprint"], "created_at": None}},
            "package_info": {f"{name}-version": _version(name) for name in PACKAGES},
            "system_info": {
                "system": platform.system(),
                "machine": platform.machine(),
                "processor": result["cpu"],
                "accelerator": "N/A" if result["device"] == "cpu" else result["device"],
            },
        },
    }


def _jsonable(value: Any) -> Any:
    """Sets, as of target modules, become sorted lists; what else JSON has no form for becomes its text."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
