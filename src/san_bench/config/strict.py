"""Strict, frozen models read from YAML. All problems are reported at once, with line, key and suggestion.

Used for recipes, protocols and suites. Unknown keys are errors, and so are missing keys without a default value.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer
from pydantic.fields import FieldInfo

from san_bench.config.errors import cause_of, shown


class Strict(BaseModel):
    """Frozen base model: unknown keys are errors, and values are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = self._at_default(UNUSED)
        return {key: value for key, value in dump(self).items() if key not in unused}

    def _at_default(self, mark: Any) -> set[str]:
        """Returns the keys of the fields that have a mark and their default value."""
        fields = type(self).model_fields.items()
        marked = [(name, field) for name, field in fields if field.json_schema_extra == mark]
        return {field.alias or name for name, field in marked if getattr(self, name) == field.default}

    def canonical(self) -> dict[str, Any]:
        """Returns the values as JSON types, without those of `later` fields that have their default."""
        data, left_out = self.model_dump(mode="json"), self._at_default(LATER)
        inner = {field.alias or name: getattr(self, name) for name, field in type(self).model_fields.items()}
        return {
            key: inner[key].canonical() if isinstance(inner.get(key), Strict) else value
            for key, value in data.items()
            if key not in left_out
        }


LATER: Any = {"later": True}
"""Mark of a field that earlier versions did not have."""

UNUSED: Any = {"later": True, "unused": True}
"""Mark of such a field that most recipes have no use for."""


def later(default: Any, unused: bool = False, **options: Any) -> Any:
    """Returns a field that earlier versions did not have: at its default, a recipe keeps its fingerprint.

    Args:
        default: Default value, with which a run is the same as before the field existed.
        unused: Leaves the field out of the written recipe as well, while it has its default.
        options: Other options of pydantic's `Field`.
    """
    return Field(default, json_schema_extra=UNUSED if unused else LATER, **options)


Model = TypeVar("Model", bound=Strict)
Loc = tuple[str, ...]
Lines = dict[Loc, str]
"""Origin of every key, as `FILE:LINE` or `command line`."""

COMMAND_LINE = "command line"
"""Origin of overrides."""

MOST_BYTES = 2**16
"""Maximum size of a YAML file."""

MOST_LINE = 2**14
"""Maximum length of a line of YAML; the time to parse nested lists grows with the square of it."""

MOST_CHARACTERS = 2**20
"""Maximum number of characters and values of a YAML document whose aliases are expanded."""

MOST_DIGITS = 100
"""Maximum length of a number, date or other YAML scalar that is not text."""

MOST_NUMBER = 1e15
"""Largest absolute value of any number."""

MOST_PROBLEMS = 40
"""Problems that one message describes."""

QUOTE = "'"

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, TypeError, KeyError, AttributeError, IndexError, OverflowError)
"""What PyYAML raises for invalid text, explicit tags on other values, and deep nesting."""


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines, list[tuple[Loc, str]]]:
    """Reads a mapping from a YAML file.

    Returns:
        The data, the place of every key, and problems that YAML itself accepts, such as duplicate keys.

    Raises:
        SanError: If the file is not YAML, or not a mapping.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise san_error(f"{path} has {size:,} bytes; a YAML file has at most {MOST_BYTES:,}.")
    data, lines, problems = None, {}, []
    try:
        root, data = _construct(path.read_text(encoding="utf-8"))
    except NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise san_error(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if isinstance(root, yaml.MappingNode):
        lines, problems = _lines(root, path)
    else:
        data = None
    if data is None:
        raise san_error(
            f"{path}: expected a mapping of keys to values. `san recipes --copy demo/san` writes an example."
        )
    return data, lines, problems


def read_model(model: type[Model], path: Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Model:
    """Reads and validates a model.

    Args:
        model: Class of the model.
        path: YAML file.
        overrides: Values by dotted key, or as `key=value` texts whose values are read as YAML.

    Raises:
        SanError: If anything is wrong with it; the message lists every problem with its place.
    """
    return check_file(model, read_file(path, overrides))


@dataclass(frozen=True)
class File:
    """Content of a YAML file before validation.

    Attributes:
        path: The file.
        data: The mapping, with overrides applied.
        lines: Place of every key.
        problems: Problems that YAML itself accepts.
    """

    path: Path
    data: dict[str, Any]
    lines: Lines
    problems: list[tuple[Loc, str]]

    def forget(self, loc: Loc) -> None:
        """Forgets the places of a key and of those under it."""
        for known in [known for known in self.lines if known[: len(loc)] == loc]:
            del self.lines[known]

    def override(self, overrides: Mapping[str, Any] | Sequence[str]) -> File:
        """Sets values by dotted key, and returns the file; see `read_model`."""
        for key, value in parse_overrides(overrides).items():
            put(self.data, key, value)
            loc = tuple(key.split("."))
            for depth in range(1, len(loc)):
                self.lines.setdefault(loc[:depth], COMMAND_LINE)
            self.lines[loc] = COMMAND_LINE
        return self


def read_file(path: Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> File:
    """Reads a YAML file and applies overrides; see `read_model`."""
    return File(path, *read_yaml(path)).override(overrides)


def check_file(model: type[Model], file: File) -> Model:
    """Validates the content of a file; see `read_model`."""
    return check(model, file.data, lambda loc: _place(file.path, file.lines, loc), file.problems)


def check(model: type[Model], data: Any, place: Any = None, problems: Sequence[tuple[Loc, str]] = ()) -> Model:
    """Validates data against a model.

    Args:
        model: Class of the model.
        data: Data to validate.
        place: Returns the location of a key; its dotted name by default.
        problems: Problems found earlier.

    Raises:
        SanError: If there are problems; the message lists every one and its location.
    """
    place, found = place or (lambda loc: ".".join(loc) or model.__name__), [*problems, *_extreme(data)]
    rest = 0
    try:
        result = model.model_validate(data)
    except ValidationError as error:
        extreme, every = {loc for loc, _ in found}, error.errors(include_url=False)
        rest = max(0, len(every) - MOST_PROBLEMS)
        described = [_describe(dict(e), model) for e in every[:MOST_PROBLEMS]]
        found += [one for one in described if one[0] not in extreme]
        result = None
    if found or result is None:
        lines = [f"{place(loc)}: {text}" for loc, text in found]
        raise san_error("\n".join([*lines, *([f"... and {rest:,} more problems."] if rest else [])]))
    return result


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets a value by its dotted key.

    Raises:
        SanError: If a parent key is not a mapping.
    """
    place = data
    *parents, last = key.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise san_error(f"{COMMAND_LINE}: {key}: {parent!r} is a value and has no keys.")
    place[last] = value


def parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> Mapping[str, Any]:
    """Returns overrides as a mapping by dotted key; see `read_model`."""
    if isinstance(overrides, Mapping):
        return overrides
    return dict(_parse_override(text) for text in overrides)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean ...?" with the closest known word, or an empty string."""
    close = difflib.get_close_matches(word[:100], list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the closest known word and all choices."""
    words = list(known)
    return f"{did_you_mean(word, words)} Choose from {', '.join(words)}."


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun.

    Example:
        >>> counted(1, "image"), counted(1200, "image"), counted(2, "class", "classes")
        ('1 image', '1,200 images', '2 classes')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def task_of_suite(suite: str, name: str, known: Iterable[str]) -> str:
    """Returns the name of a task without its suite prefix.

    Raises:
        SanError: If the suite has no such task.
    """
    short, tasks = name.removeprefix(f"{suite}/"), list(known)
    if short not in tasks:
        hint = did_you_mean(f"{suite}/{short}", (f"{suite}/{task}" for task in tasks))
        raise san_error(f"{suite} has no task {short!r}.{hint} Choose from {', '.join(tasks)}.")
    return short


def san_error(message: str) -> Exception:
    """Returns a `SanError`, without importing torch."""
    name = "san_peft.errors"
    if name not in sys.modules:  # an import statement would import the whole package, which takes seconds
        (folder,) = find_spec("san_peft").submodule_search_locations  # type: ignore[union-attr]
        spec: Any = spec_from_file_location(name, Path(folder) / "errors.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name].SanError(message)


class _Loader(yaml.SafeLoader):
    """Loads YAML with floats such as 1e-3, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise san_error(f"{COMMAND_LINE}: {text}: write key=value, such as optimizer.lr=1e-3.")
    try:
        return key, _construct(value)[1]
    except NOT_YAML as error:
        raise san_error(f"{COMMAND_LINE}: {text}: {shown(value)} is not YAML. {cause_of(error)}") from error


def _construct(text: str) -> tuple[yaml.Node | None, Any]:
    """Parses YAML without expanding more than `MOST_CHARACTERS` through its anchors."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > MOST_LINE:
            raise ValueError(f"line {number} has {len(line):,} characters, more than {MOST_LINE:,}")
    root = yaml.compose(text, _Loader)
    if root is None:
        return None, None
    found = _expanded(root, {}, set())
    if found > MOST_CHARACTERS:
        raise ValueError(f"its anchors expand to {found:,} characters, more than {MOST_CHARACTERS:,}")
    return root, _Loader("").construct_document(root)


def _expanded(node: yaml.Node, known: dict[int, int], opened: set[int]) -> int:
    """Returns the number of characters and values of a node with all aliases expanded."""
    if id(node) in opened:
        raise ValueError(f"an anchor in line {node.start_mark.line + 1} contains itself")
    if id(node) not in known:
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > MOST_DIGITS and not node.tag.endswith((":str", ":null")):
                raise ValueError(f"a number in line {node.start_mark.line + 1} has {len(node.value):,} characters")
            known[id(node)] = 1 + len(node.value)
        else:
            parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            known[id(node)] = 1 + sum(_expanded(part, known, opened | {id(node)}) for part in parts)
    return known[id(node)]


def _extreme(value: Any, loc: Loc = ()) -> Iterator[tuple[Loc, str]]:
    """Yields numbers that no setting can have, and texts that are no file name, with their places."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _extreme(inner, (*loc, str(key)))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _extreme(inner, (*loc, str(place)))
    elif isinstance(value, int | float) and MOST_NUMBER < abs(value) < float("inf"):
        yield loc, f"{shown(value)} is too large; numbers are at most {MOST_NUMBER:g}."
    elif isinstance(value, str) and "\0" in value:
        yield loc, f"{shown(value)} contains a null character."


def _lines(root: yaml.MappingNode, path: Path) -> tuple[Lines, list[tuple[Loc, str]]]:
    """Returns the place of every key, and duplicate keys (YAML would silently keep the last)."""
    lines: Lines = {}
    twice: list[tuple[Loc, str]] = []

    def walk(node: yaml.Node, loc: Loc) -> Iterator[None]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*loc, str(key.value) if isinstance(key, yaml.ScalarNode) else "?")
                if here in lines:
                    twice.append((here, f"is a duplicate key, first in line {lines[here].rpartition(':')[2]}"))
                lines[here] = f"{path}:{key.start_mark.line + 1}"
                yield from walk(value, here)

    list(walk(root, ()))
    return lines, twice


def _place(path: Path, lines: Mapping[Loc, str], loc: Loc) -> str:
    known = next((loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in lines), ())
    return f"{lines.get(known, path)}: {'.'.join(loc) or 'recipe'}"


def _describe(error: dict[str, Any], root: type[BaseModel]) -> tuple[Loc, str]:
    """Returns location and text of a pydantic error; union tags are removed from the location."""
    raw = [str(part) for part in error["loc"]]
    loc, model, kinds = _resolve(root, raw)
    kind, given = error["type"], error.get("input")
    if kind == "value_error":
        key, _, text = str(error["ctx"]["error"]).partition("|")  # validators prefix the key: "key|text"
        return (*loc, *([key] if text else [])), f"{text or key}."
    if kind == "extra_forbidden":
        return loc, f"unknown key.{suggest(loc[-1], _keys(model))}"
    if kind == "missing":
        return loc, "is missing, and has no default value."
    if kind == "union_tag_invalid":
        tag = shown(given.get("kind") if isinstance(given, Mapping) else given)
        return (*loc, "kind"), f"unknown {loc[-1]} {tag}.{suggest(tag.strip(QUOTE), kinds)}"
    if kind == "union_tag_not_found":
        return (*loc, "kind"), f"is missing. Choose from {', '.join(kinds)}."
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return loc, f"{shown(given)} is not valid.{suggest(shown(given).strip(QUOTE), choices)}"
    said = WANTED.get(kind, f"{error['msg'][0].lower()}{error['msg'][1:]}")
    return loc, f"{said}, but it is {shown(given)}."


WANTED = {
    "tuple_type": "input should be a list such as [a, b]",
    "dict_type": "input should be a mapping of keys to values",
    "model_type": "input should be a mapping of keys to values",
    "model_attributes_type": "input should be a mapping of keys to values",
}
"""What a value should be, in the words of YAML instead of pydantic's."""


def _resolve(model: type[BaseModel], raw: Sequence[str]) -> tuple[Loc, type[BaseModel], dict[str, type[BaseModel]]]:
    """Resolves an error location: keys without union tags, model of the last key, and possible kinds."""
    loc: list[str] = []
    kinds: dict[str, type[BaseModel]] = {}
    rest = list(raw)
    while rest:
        key = rest.pop(0)
        loc.append(key)
        field: FieldInfo | None = _keys(model).get(key)
        if field is None:
            break
        inner = _models(field.annotation)
        kinds = _kinds(inner)
        if rest and not kinds and not inner:
            loc += rest
            break
        if rest and _is_mapping(field.annotation):
            loc.append(rest.pop(0))
        if rest and kinds and rest[0] in kinds:
            model = kinds[rest.pop(0)]
        elif rest and inner:
            model = inner[0]
    return tuple(loc), model, kinds


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Returns the fields of a model by their keys in YAML."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


def _kinds(models: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """Returns the models of a union discriminated by `kind`."""
    return {
        str(kind): model
        for model in models
        if "kind" in model.model_fields
        for kind in get_args(model.model_fields["kind"].annotation)
    }
