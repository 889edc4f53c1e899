"""Start the training from a trained adapter or a saved propagation graph."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from san_bench.config.recipe import Recipe
from san_bench.config.strict import san_error

CONFIG = "adapter_config.json"
"""File that PEFT writes beside the weights of an adapter."""


def adapter_folder(name: str) -> Path:
    """Returns the folder of an adapter: the given one, or `adapter/` inside it for the folder of a run."""
    folder = Path(name)
    return folder / "adapter" if not (folder / CONFIG).is_file() and (folder / "adapter" / CONFIG).is_file() else folder


def start_of(method: Any) -> Path | None:
    """Returns the folder of the trained adapter that a method starts from, or `None`."""
    name = getattr(method, "from_", None) or getattr(method, "host", None)
    return None if name is None else adapter_folder(name)


def check_start(method: Any) -> None:
    """Checks that the adapter and the graph file of a method exist and fit its kind; reads no weights.

    Raises:
        SanError: If a file is missing, or the adapter is one of another method.
    """
    graph = getattr(method, "graph", None)
    if graph is not None and not Path(graph).is_file():
        raise san_error(f"method.graph: there is no file {graph}. `san trace MODEL --json --out {graph}` writes one.")
    folder = start_of(method)
    if folder is None:
        return
    key = "from" if method.from_ is not None else "host"
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = _kind_of(config)
    except (OSError, ValueError, AttributeError) as error:
        raise san_error(
            f"method.{key}: {folder} holds no PEFT adapter: {CONFIG} cannot be read ({error}). Give the folder that "
            "save_pretrained wrote, or that of a run."
        ) from error
    wanted = method.kind if key == "from" else method.kind.removeprefix("san-")
    if found != wanted and (found, wanted) != ("san", "ssf"):  # SSF is a SAN adapter without propagation
        raise san_error(
            f"method.{key}: {method.kind} needs an adapter of kind {wanted}, but the one in {folder} is {found}."
        )


def _kind_of(config: dict[str, Any]) -> str:
    """Returns the kind of a saved adapter, in the words of recipes."""
    kind, inner = str(config.get("peft_type")), config.get("inner")
    if kind == "SAN":
        return f"san-{_kind_of(inner)}" if inner else "san"
    return "dora" if kind == "LORA" and config.get("use_dora") else kind.lower()


def with_start(model: Any, recipe: Recipe) -> Any:
    """Loads the trained adapter that the recipe's method starts from, trainable; with `host`, attaches SAN to it.

    Args:
        model: The pretrained model.
        recipe: A recipe whose method has `from` or `host`.

    Raises:
        SanError: If the adapter does not fit the model, tensors are missing, or it was trained with other settings.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from san_peft.tuner.attach import propagate

    method: Any = recipe.method
    check_start(method)
    folder = start_of(method)
    names = ("propagation", "decomposition", "exponent", "bound", "detach")
    options = {} if method.from_ else with_graph({name: getattr(method, name) for name in names}, recipe, model)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, folder, is_trainable=True)  # type: ignore[arg-type]
    except (RuntimeError, KeyError, OSError, SafetensorError) as error:
        said = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
        raise san_error(f"The adapter in {folder} does not fit {recipe.model}: {said}") from error
    for one in caught:
        if "missing adapter keys" in str(one.message):
            raise san_error(f"The adapter in {folder} is incomplete for {recipe.model}: {one.message}")
        warnings.warn(one.message, one.category, stacklevel=2)
    if method.from_ is not None:
        _check_settings(method, model.peft_config["default"], folder)
        return model
    return propagate(model, **options)


NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
"""PEFT's names of settings in recipes."""


def _check_settings(method: Any, config: Any, folder: Path | None) -> None:
    """Raises `SanError` if a trained adapter has other settings than the recipe, which would not be used."""
    inner = getattr(config, "inner", None) or {}
    for key in ("rank", "alpha", "dropout", "exponent", "bound", "detach", "gate", "shift", "decomposition"):
        name = NAMES.get(key, key)
        found = inner.get(name) if name in inner else getattr(config, name, None)
        wanted = getattr(method, key, None)
        if hasattr(method, key) and found != wanted:
            raise san_error(
                f"method.{key} is {wanted}, but the adapter in {folder} was trained with {found}. Set it to {found}."
            )


def with_graph(options: dict[str, Any], recipe: Recipe, model: Any) -> dict[str, Any]:
    """Returns the options of SAN with a graph as `propagation`, if the recipe has a graph file or asks for an ablation.

    Raises:
        GraphError: If the file is not a propagation graph, or does not match the model.
    """
    from san_peft import GraphError, PropagationGraph, trace
    from san_peft.propagation import ABLATIONS, ablate

    scheme, file = options["propagation"], getattr(recipe.method, "graph", None)
    if file is None and scheme not in ABLATIONS:
        return options
    try:
        graph = trace(model) if file is None else PropagationGraph.from_json(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"method.graph: {file} cannot be read: {error}") from error
    if scheme in ABLATIONS:
        return {**options, "propagation": ablate(graph.select("all"), scheme, seed=recipe.seed)}
    return {**options, "propagation": graph.select(scheme)}
