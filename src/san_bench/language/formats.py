"""Formats of one's own training data, recognised from the columns of the records.

| format | columns | loss |
|---|---|---|
| `messages` | `messages`: turns with `role` and `content`; `tools` | the assistant's turns |
| `sharegpt` | `conversations`: turns with `from` and `value`; `system`, `tools` | the assistant's turns |
| `completion` | `prompt`, `completion` | the completion |
| `alpaca` | `instruction`, `output`; `input`, `answer` | the output |
| `text` | `text` | all tokens |

Columns after the semicolon are optional, others are ignored. The first format whose columns exist is taken.

Example:
    >>> row = {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
    >>> recognise_format(row)
    'sharegpt'
    >>> read_record(row, "sharegpt").messages[1]
    {'role': 'assistant', 'content': 'Hello.'}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from san_bench.config.strict import did_you_mean
from san_bench.language.instructions import Instruction
from san_peft.errors import SanError

COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Formats with their required columns, in order of precedence."""

OPTIONAL = {"messages": ("tools",), "sharegpt": ("system", "tools"), "alpaca": ("input", "answer")}
"""Optional columns of formats."""

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("function", "observation"), "tool"),
}
"""Maps roles to those of chat templates."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: Messages with `role` and `content`, as chat templates take them; at least one of the assistant.
        tools: JSON schemas of the tools, for the chat template.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The messages before the last answer."""
        return self.messages[: self._last]

    @property
    def output(self) -> str:
        """The last answer."""
        return self.messages[self._last].get("content") or ""

    @property
    def _last(self) -> int:
        return max(place for place, one in enumerate(self.messages) if one["role"] == "assistant")


@dataclass(frozen=True)
class Completion:
    """A prompt with its completion, which follows it directly.

    Attributes:
        prompt: The prompt.
        output: The completion.
    """

    prompt: str
    output: str


@dataclass(frozen=True)
class Passage:
    """A text without a prompt.

    Attributes:
        text: The text.
    """

    text: str


Item = Instruction | Chat | Completion | Passage
"""A record of any format."""


def recognise_format(columns: Collection[str]) -> str:
    """Returns the format of records with these columns.

    Raises:
        SanError: If they belong to no format.
    """
    for name, wanted in COLUMNS.items():
        if set(wanted) <= set(columns):
            return name
    known = "; ".join(f"{name}: {', '.join(wanted)}" for name, wanted in COLUMNS.items())
    raise SanError(
        f"The columns {', '.join(map(str, columns)) or '(none)'} belong to no known format ({known}). Rename them."
    )


def read_record(row: Mapping[str, Any], form: str) -> Item:
    """Converts a row without `problems_of_row` to a record."""
    if form == "alpaca":
        return Instruction(**{name: row.get(name) or "" for name in (*COLUMNS[form], *OPTIONAL[form])})
    if form == "completion":
        return Completion(row["prompt"], row["completion"])
    if form == "text":
        return Passage(row["text"])
    messages = [_message(turn) for turn in _parsed(row[COLUMNS[form][0]])]
    if row.get("system") and form == "sharegpt":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Chat(messages, _parsed(row.get("tools")) or None)


def problems_of_row(row: Any, form: str) -> list[str]:
    """Returns what makes a row no record of a format, with the names of its fields; empty if it is one."""
    if isinstance(row, Exception):
        return [f"it cannot be parsed ({row})"]
    if not isinstance(row, Mapping):
        return [f"it is a {type(row).__name__}, not a record"]
    if form in ("messages", "sharegpt"):
        return _problems_of_chat(row, form)
    texts = [*COLUMNS[form], *(name for name in OPTIONAL.get(form, ()) if row.get(name) is not None)]
    found = [text for name in texts for text in _problems_of_text(name, row.get(name))]
    first = row.get(COLUMNS[form][0])
    if form == "alpaca" and isinstance(first, str) and not first.strip():
        found.append("instruction is empty")
    return found


def empty_parts(record: Item) -> list[str]:
    """Returns the names of the parts of a record that are empty, such as an answer or a turn."""
    if isinstance(record, Chat):
        return [
            f"turn {place} ({one['role']})"
            for place, one in enumerate(record.messages)
            if not (one.get("content") or "").strip() and not one.get("tool_calls")
        ]
    if isinstance(record, Passage):
        return [] if record.text.strip() else ["text"]
    empty = [] if record.output.strip() else ["output"]
    return ["prompt", *empty] if isinstance(record, Completion) and not record.prompt.strip() else empty


def misplaced_roles(record: Item) -> list[str]:
    """Returns the turns of a conversation that are out of order.

    Instructions of the system come first, users and the assistant alternate, answers of tools precede the assistant,
    and the last turn is the assistant's.
    """
    if not isinstance(record, Chat):
        return []
    after = {
        "system": ("start", "system"), "developer": ("start", "system"), "user": ("start", "system", "assistant"),
        "assistant": ("user", "tool"), "tool": ("assistant", "tool"),
    }  # fmt: skip
    found, last = [], "start"
    for place, one in enumerate(record.messages):
        if last not in after[one["role"]]:
            found.append(f"turn {place} ({one['role']} after {last})")
        last = "system" if one["role"] == "developer" else one["role"]
    return found if last == "assistant" else [*found, f"turn {len(record.messages) - 1} (the last is {last})"]


def content_key(record: Item) -> str:
    """Returns a text that two records share if and only if they are equal."""
    return json.dumps([type(record).__name__, *astuple(record)], sort_keys=True, default=str)


def _problems_of_chat(row: Mapping[str, Any], form: str) -> list[str]:
    (name,) = COLUMNS[form]
    turns, tools, found = _parsed(row.get(name)), _parsed(row.get("tools")), []
    if form == "sharegpt":
        found += _problems_of_text("system", row.get("system") or "")
    if not isinstance(tools or [], list):
        found.append(_described("tools", tools, "a list"))
    if not isinstance(turns, list):
        return [*found, _described(name, turns, "a list of turns")]
    for place, turn in enumerate(turns):
        found += [f"{name}, turn {place}: {text}" for text in _problems_of_turn(turn)]
    if not found and not any(_message(turn)["role"] == "assistant" for turn in turns):
        found.append(f"{name} has no turn of the assistant, so nothing to learn")
    return found


def _problems_of_turn(turn: Any) -> list[str]:
    if not isinstance(turn, Mapping):
        return [f"it is a {type(turn).__name__}, not a turn with role and content"]
    names = ("role", "content") if "role" in turn else ("from", "value")
    role, text, found = turn.get(names[0]), turn.get(names[1]), []
    if role is None:
        found.append("role is missing" if "content" in turn else f"{names[0]} is missing")
    elif ROLES.get(role if isinstance(role, str) else "") is None:
        hint = did_you_mean(str(role), ROLES)
        found.append(f"{names[0]} is {role!r:.40}, not one of {', '.join(ROLES)}.{hint}".rstrip("."))
    if text is not None or not turn.get("tool_calls"):
        found += _problems_of_text(names[1], _text(text))
    return found


def _problems_of_text(name: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        return [_described(name, value, "a string")]
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return [
            f"{name} has half of a character at {error.start} ({value[error.start]!r}), which no tokenizer can read"
        ]
    return []


def _described(name: str, value: Any, wanted: str) -> str:
    return f"{name} is missing" if value is None else f"{name} is {value!r:.40}, not {wanted}"


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a turn to a message of a chat template; other keys, such as `tool_calls`, are kept."""
    role, text = ("role", "content") if "role" in turn else ("from", "value")
    rest = {key: value for key, value in turn.items() if key not in (role, text) and value is not None}
    return {"role": ROLES[turn[role]], "content": _text(turn[text]) if turn.get(text) is not None else "", **rest}


def _text(content: Any) -> Any:
    """Joins a content of text parts; anything else is returned as it is."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if texts and len(texts) == len(parts):
            return "".join(texts)
    return content


def _parsed(value: Any) -> Any:
    """Parses a list that a table holds as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
