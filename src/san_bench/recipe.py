"""Recipes: everything that decides a run, in one strict and frozen YAML file.

Every key must be there, no other key may be, and nothing outside the file decides the result. All errors of a file come
at once, each with its line, the place in the recipe, and the likely word where one was mistyped.

Example:
    >>> recipe = load_recipe("demo/san")
    >>> recipe.method.kind, recipe.seed, len(recipe.fingerprint)
    ('san', 0, 64)
    >>> load_recipe("demo/san", {"seed": 1}).fingerprint == recipe.fingerprint
    False
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class San(_Strict):
    """SAN with its own scale vectors."""

    kind: Literal["san"]
    propagation: Literal["all", "exact", "feedforward", "reference", "none"]
    exponent: float
    shift: bool
    train_norms: bool
    detach: bool
    gate: bool


class Ssf(_Strict):
    """Scale and shift without propagation."""

    kind: Literal["ssf"]
    train_norms: bool


class Lora(_Strict):
    """LoRA, or DoRA, on the layers whose names end in one of `targets`."""

    kind: Literal["lora", "dora"]
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: tuple[str, ...] = Field(min_length=1, strict=False)


class SanOver(_Strict):
    """SAN over LoRA or DoRA: the scale is taken out of the host and propagated."""

    kind: Literal["san-lora", "san-dora"]
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: tuple[str, ...] = Field(min_length=1, strict=False)
    propagation: Literal["all", "exact", "feedforward", "reference", "none"]
    decomposition: Literal["norm", "projection"]
    exponent: float
    bound: float | None
    detach: bool


class Linear(_Strict):
    """Linear probe: the head alone."""

    kind: Literal["linear"]


class Full(_Strict):
    """Full fine-tuning: every parameter."""

    kind: Literal["full"]


Method = Annotated[San | Ssf | Lora | SanOver | Linear | Full, Discriminator("kind")]


class Optimizer(_Strict):
    """AdamW and its schedule."""

    lr: float = Field(gt=0, description="Largest learning rate, after the warm-up.")
    weight_decay: float = Field(ge=0)
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    warmup: float = Field(ge=0, lt=1, description="Share of the steps in which the learning rate rises from zero.")
    schedule: Literal["constant", "linear", "cosine"]
    max_grad_norm: float = Field(gt=0)


class Recipe(_Strict):
    """One run: what is trained, on what, how, and where the result goes.

    Attributes:
        task: Name of a task of `san_bench.data`.
        train_split: Split to train with.
        eval_split: Split to score once, after the last step; nothing is chosen by it.
        model: `embedded`, a folder, or a name that transformers resolves.
        method: What is trained; the task's head always is.
        optimizer: AdamW and its schedule.
        seed: Seeds the head, the adapter, and the order of the data.
        precision: Of the arithmetic; weights stay in float32.
        checkpoint_steps: Steps between checkpoints, 0 for none; resuming continues from the last one.
        output: Folder of the run. The only key that is not part of the fingerprint.
    """

    task: Literal["digits"]
    train_split: Literal["train800", "train800val200"]
    eval_split: Literal["val200", "test"]
    model: str = Field(min_length=1)
    method: Method
    optimizer: Optimizer
    seed: int = Field(ge=0, lt=2**32)
    precision: Literal["fp32", "bf16"]
    checkpoint_steps: int = Field(ge=0)
    output: str = Field(min_length=1)

    @model_validator(mode="after")
    def _scored_on_unseen_images(self) -> Recipe:
        if (self.train_split, self.eval_split) == ("train800val200", "val200"):
            raise ValueError("val200 is part of train800val200; train with train800, or score on test")
        return self

    @property
    def fingerprint(self) -> str:
        """The sha256 of the recipe as canonical JSON, without `output`."""
        text = json.dumps(self.model_dump(mode="json", exclude={"output"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """Writes the recipe as YAML, keys in the order of the class."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with the package, by name such as `demo/san`."""
    root = Path(str(resources.files("san_bench"))) / "recipes"
    return {str(p.relative_to(root).with_suffix("").as_posix()): p for p in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """Finds a recipe by the path of its file or by the name under which it ships.

    Raises:
        SanError: If there is neither.
    """
    shipped = shipped_recipes()
    if Path(name).is_file():
        return Path(name)
    if str(name) in shipped:
        return shipped[str(name)]
    close = difflib.get_close_matches(str(name), shipped, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise _error(f"There is no recipe {str(name)!r}.{hint} Give a file, or one of {', '.join(shipped)}.")


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        name: Path of a YAML file, or the name of a shipped recipe.
        overrides: Values by dotted key, or as `key=value` texts whose values are read as YAML.

    Returns:
        The recipe, frozen.

    Raises:
        SanError: If anything is wrong with it; the message lists every problem with its place.
    """
    path = find_recipe(name)
    data, lines, problems = _read(path)
    if not isinstance(overrides, Mapping):
        overrides = dict(_parse_override(text) for text in overrides)
    for key, value in overrides.items():
        place = data
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise _error(f"--set {key}: {parent!r} holds a value, no keys.")
        place[last] = value
        for depth in range(1, len(parents) + 1):
            lines.setdefault(tuple(parents[:depth]), None)
        lines[(*parents, last)] = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += [_describe(dict(e), data) for e in error.errors(include_url=False)]
        recipe = None
    if problems or recipe is None:
        raise _error("\n".join(f"{_place(path, lines, loc)}: {text}" for loc, text in problems))
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML whose floats may be written 1e-3, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


_Lines = dict[tuple[str, ...], int | None]
_Problems = list[tuple[tuple[str, ...], str]]


def _read(path: Path) -> tuple[dict[str, Any], _Lines, _Problems]:
    """Content of a YAML file, the line of every key, and the problems that YAML itself lets pass."""
    data, lines, problems = None, {}, []
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), _Loader)
        if isinstance(root, yaml.MappingNode):
            lines, problems = _lines(root)
            data = _Loader("").construct_document(root)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise _error(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if data is None:
        raise _error(f"{path}: a recipe is a mapping of keys to values. `san recipes --copy demo/san` gives one.")
    return data, lines, problems


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise _error(f"--set {text}: write key=value, such as optimizer.lr=1e-3.")
    try:
        return key, yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise _error(f"--set {text}: {value!r} is not YAML.") from error


def _lines(root: yaml.MappingNode) -> tuple[_Lines, _Problems]:
    """Line of every key, and the keys that are there twice (YAML would silently take the last)."""
    lines: _Lines = {}
    twice: _Problems = []

    def walk(node: yaml.Node, loc: tuple[str, ...]) -> Iterator[None]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*loc, str(key.value))
                if here in lines:
                    twice.append((here, f"is there twice, first in line {lines[here]}"))
                lines[here] = key.start_mark.line + 1
                yield from walk(value, here)

    list(walk(root, ()))
    return lines, twice


def _place(path: Path, lines: _Lines, loc: tuple[str, ...]) -> str:
    known = next((loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in lines), ())
    line = lines.get(known)
    if known and line is None:
        return f"--set {'.'.join(loc)}"
    return f"{path}{f':{line}' if line else ''}: {'.'.join(loc) or 'recipe'}"


def _describe(error: dict[str, Any], data: Any) -> tuple[tuple[str, ...], str]:
    """Place and text of one of pydantic's errors; the union's tag is taken out of the place."""
    raw = [str(part) for part in error["loc"]]
    model: type[BaseModel] = Recipe
    if raw[:1] == ["method"] and len(raw) > 1:
        model = _METHODS.get(raw[1], Recipe)
        del raw[1]
    elif raw[:1] == ["optimizer"] and len(raw) > 1:
        model = Optimizer
    loc, kind = tuple(raw), error["type"]
    if kind == "value_error":
        return ("eval_split",), f"{error['ctx']['error']}."
    given = error.get("input")
    if kind == "extra_forbidden":
        return loc, f"unknown key.{_suggest(loc[-1], model.model_fields)}"
    if kind == "missing":
        return loc, "is missing; a recipe leaves nothing to defaults."
    if kind == "union_tag_invalid":
        tag = given.get("kind") if isinstance(given, Mapping) else given
        return (*loc, "kind"), f"unknown method {tag!r}.{_suggest(str(tag), _METHODS)}"
    if kind == "union_tag_not_found":
        return (*loc, "kind"), f"is missing. Choose from {', '.join(_METHODS)}."
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return loc, f"{given!r} is not a choice.{_suggest(str(given), choices)}"
    return loc, f"{error['msg'][0].lower()}{error['msg'][1:]}, but it is {given!r}."


def _suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Choose from {', '.join(known)}."


_METHODS: dict[str, type[BaseModel]] = {
    "san": San,
    "ssf": Ssf,
    "lora": Lora,
    "dora": Lora,
    "linear": Linear,
    "full": Full,
}


def _error(message: str) -> Exception:
    from san_peft.errors import SanError  # brings in torch, so only when it is needed

    return SanError(message)
