"""Write the model card of a run: base model, method, training data, recipe and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from san_bench.config.recipe import Recipe, split_revision
from san_bench.models import FAMILIES
from san_bench.run.provenance import write_atomically
from san_bench.run.results import by_task

MOST_CLASSES = 200
"""Classes that a model card lists."""

CODE_OF_SAN = "import san_peft  # registers SAN with PEFT\nfrom peft import PeftModel"


def write_card(folder: Path, recipe: Recipe, result: dict[str, Any], model: Any) -> None:
    """Writes the model card `README.md` into the folder of an adapter or a full model.

    Metadata that PEFT wrote there is kept, and scores are added in the hub's format.

    Args:
        folder: Folder that `save_pretrained` wrote.
        recipe: The run's recipe.
        result: The run's result.
        model: The saved model.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    file = folder / "README.md"
    data: Any = ModelCard.load(file).data if file.is_file() else ModelCardData()
    name = f"{recipe.method.kind} on {recipe.task}, seed {recipe.seed}"
    if recipe.model.partition("/")[0] in FAMILIES or Path(recipe.model).is_dir():
        data.base_model = None  # a local or shipped folder is not a model on the hub
        data.tags = [tag for tag in data.tags or [] if not tag.startswith("base_model:")]
    data.model_name = name
    rows = by_task(result)
    data.eval_results = [
        EvalResult(
            task_type="text-generation" if "way" in row else "image-classification",
            dataset_type=row["task"],
            dataset_name=row["task"],
            dataset_split=row["split"],
            metric_type="accuracy",
            metric_name=f"accuracy by {row['way']}" if "way" in row else "accuracy",
            metric_value=row["accuracy"],
        )
        for row in rows
    ]
    write_atomically(
        file, f"---\n{data.to_yaml().strip()}\n---\n\n{_text(name, recipe, result, rows, model, folder.parent)}"
    )


def _text(
    name: str, recipe: Recipe, result: dict[str, Any], rows: list[dict[str, Any]], model: Any, folder: Path
) -> str:
    base = Path(recipe.model).name if Path(recipe.model).is_dir() else split_revision(recipe.model)[0]
    of = f" revision `{result['model_revision']}`," if result["model_revision"] else ""
    facts = {
        "Base model": f"`{base}`,{of} weights with sha256 `{result['checkpoint_sha256']}`",
        "Method": ", ".join(f"{key} {value}" for key, value in recipe.method.model_dump(mode="json").items()),
        "Trained parameters": f"{result['trainable_parameters']:,} of {result['total_parameters']:,}"
        + (f", of which {result['trainable_head']:,} in the head" if result["trainable_head"] else ""),
        "Trained on": f"{recipe.task}, {result['train_split']}, n = {result['n_train']:,}, {result['steps']:,} steps; "
        f"data with fingerprint `{result['task_fingerprint']}`",
        "Recipe": f"`recipe.yaml` in the folder above, fingerprint `{result['recipe_fingerprint']}`",
        "Code": f"san-peft {result['versions'].get('san-peft')}, commit {result['commit']}, on {result['device']}, "
        f"finished {result['finished']}",
    }
    lines = [f"# {name}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    lines += ["## Scores", "", "| task | split | found by | accuracy | n |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['task']} | {row['split']} | {row.get('way', 'largest logit')} | {row['accuracy']:.4f} | "
        f"{row['n_test']:,} |"
        for row in rows
    ]
    if len(rows) > 1:
        lines += ["", f"Unweighted mean of the tasks, by {result['way']}: {result['accuracy']:.4f}."]
    return "\n".join([*lines, "", *_classes(folder), *_loading(recipe, model), ""])


def _classes(folder: Path) -> list[str]:
    """Returns a table of the classes, from the `classes.json` of a run whose classes have names."""
    file = folder / "classes.json"
    if not file.is_file():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))
    lines = [f"## Classes: {len(rows)}", "", "| label | name | correct | n |", "|---|---|---|---|"]
    for index, row in enumerate(rows[:MOST_CLASSES]):
        name = " ".join(row["class"].split()).replace("|", "\\|")
        lines.append(f"| {index} | {name} | {row['correct']:,} | {row['n']:,} |")
    more = len(rows) - MOST_CLASSES
    return [*lines, *(["", f"{more:,} more classes are in `labels.json`."] if more > 0 else []), ""]


def _loading(recipe: Recipe, model: Any) -> list[str]:
    """Returns lines on how to load an adapter, and on the edges of a SAN adapter."""
    kind = getattr(model, "peft_type", None)
    if kind is None:
        return ["This folder holds a full model; load it with transformers."]
    imports = CODE_OF_SAN if kind == "SAN" else "from peft import PeftModel"
    lines = ["## Loading", "", "```python", imports, "", 'model = PeftModel.from_pretrained(base_model, "this/folder")']
    lines += ["```"]
    if kind == "SAN":
        edges = model.base_model.propagation_graph.edges
        lines += [
            "",
            f"## Edges: {len(edges)}",
            "",
            "The scale of the layer on the left propagates to the input channels of",
        ]
        lines += ["the layer on the right.", "", "```text", *(f"{e.anterior} -> {e.posterior}" for e in edges), "```"]
    return lines
