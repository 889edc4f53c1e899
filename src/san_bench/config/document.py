"""Validate any YAML file of this package: a recipe, a suite or a protocol."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from san_bench.config.recipe import find, load_recipe, shipped
from san_bench.config.strict import check_file, parse_overrides, put, read_file, read_yaml
from san_bench.config.suite import Choice, load_suite, plan
from san_bench.kinds import recipe_class

PLACEHOLDERS = {
    "data": "data", "model": "model", "method": {"kind": "san"}, "output": "output", "optimizer.lr": 0.001
}  # fmt: skip
"""Values of a recipe that a protocol leaves to the suite."""


def document_kind(name: str | Path) -> tuple[str, Path]:
    """Tells whether a name or file is a recipe, a suite or a protocol.

    Args:
        name: Path of a YAML file, or a shipped name, with or without the prefix `suites/` or `protocols/`.

    Returns:
        `recipe`, `suite` or `protocol`, and its path.

    Raises:
        SanError: If it does not exist, or is not a mapping.
    """
    if not Path(name).is_file():
        word = str(name)
        for kind in ("suites", "protocols"):
            if word.startswith(f"{kind}/"):
                return kind[:-1], find(word.removeprefix(f"{kind}/"), kind)
        known = [kind for kind in ("recipes", "suites", "protocols") if word in shipped(kind)]
        return (known[0][:-1] if known else "recipe"), find(word, known[0] if known else "recipes")
    data, _, _ = read_yaml(Path(name))
    if {"groups", "methods"} & data.keys():
        return "suite", Path(name)
    named = {"extends", "task", "model", "method", "output"} & data.keys()  # a protocol leaves these to the suite
    return ("recipe" if named else "protocol"), Path(name)


def check_document(name: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> tuple[str, Any]:
    """Validates a recipe, a suite or a protocol.

    Args:
        name: Its path or shipped name.
        overrides: Values of a recipe, or of the recipes of a suite or protocol, by dotted key.

    Returns:
        A sentence that says what was valid, and the recipe, or `None` for a suite or protocol.

    Raises:
        SanError: If it is invalid; the message lists every problem and its location.
    """
    kind, path = document_kind(name)
    if kind == "recipe":
        recipe = load_recipe(path, overrides)
        return f"The recipe {name} is valid. Fingerprint {recipe.fingerprint}", recipe
    if kind == "suite":
        suite = load_suite(path)
        values = {"optimizer.lr": 0.001, **parse_overrides(overrides)}
        runs = plan(suite, Choice(data=Path("data"), overrides=values))
        sizes = f"{len(suite.tasks)} tasks, {len(suite.models)} models, {len(suite.methods)} methods"
        return f"The suite {name} is valid: {sizes}, {len(runs)} runs per seed.", None
    file = read_file(path, overrides)
    data = copy.deepcopy(file.data)
    task = "llava" if (data.get("answering") or {}).get("benchmarks") else "mini-vl"
    task = task if "conversation" in data else "commonsense" if "text" in data else "digits"
    for missing, value in {**PLACEHOLDERS, "task": task}.items():
        put(data, missing, value)
    check_file(recipe_class(data), replace(file, data=data))
    return f"The protocol {name} is valid.", None
