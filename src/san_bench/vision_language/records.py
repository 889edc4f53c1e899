r"""Conversations about images, in the format of LLaVA's `llava_v1_5_mix665k.json`.

A record has an `id`, turns that alternate between `human` and `gpt`, and optionally an `image`: a path relative to the
image folder. The first human turn contains the marker `<image>` if and only if there is an image. Other keys, such as
`model`, are ignored.

Example:
    >>> record = {
    ...     "id": "000000033471",
    ...     "image": "coco/train2017/000000033471.jpg",
    ...     "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}],
    ... }
    >>> problems_of(record)
    []
    >>> problems_of({**record, "image": None})
    ['the marker <image> is in turn 0, but there is no image']
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from san_bench.config.strict import suggest
from san_bench.image.splits import stored_bytes
from san_bench.language.records import NESTED, file_rows
from san_peft.errors import SanError

MARKER = "<image>"
"""Image placeholder in a turn."""

ROLES = ("human", "gpt")
"""Roles in order of turns."""

SHOWN = 20
"""Maximum number of invalid records listed in a message."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: `human` asks, `gpt` answers.
        text: Text, including the image marker.
    """

    role: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One record.

    Attributes:
        id: ID in the dataset, not necessarily unique.
        turns: Alternating questions and answers.
        image: Image path relative to the image folder, with forward slashes; `None` without an image.
    """

    id: str | int
    turns: tuple[Turn, ...]
    image: str | None = None


@dataclass(frozen=True, slots=True)
class BadRecord:
    """An invalid record.

    Attributes:
        index: Index in the file, from 0.
        id: Its ID, if any.
        problems: All its problems.
    """

    index: int
    id: Any
    problems: tuple[str, ...]

    def __str__(self) -> str:
        return f"record {self.index} (id {self.id!r}): {'; '.join(self.problems)}"


def load_conversations(path: str | Path) -> list[Conversation]:
    """Loads conversations and raises if any record is invalid.

    Args:
        path: A JSON list or JSON lines (`.json`, `.jsonl`), or a table (`.parquet`).

    Raises:
        SanError: If the file cannot be read, has no records, or has invalid ones; the message counts them and lists up
            to `SHOWN`, with index and ID.
    """
    records, bad = read_conversations(path)
    if bad:
        lines = [f"  {record}" for record in bad[:SHOWN]]
        if len(bad) > SHOWN:
            lines.append(f"  and {len(bad) - SHOWN:,} more")
        raise SanError(
            f"{path}: {len(bad):,} of {len(records) + len(bad):,} records are invalid:\n"
            + "\n".join(lines)
            + "\nFix them, or get the valid ones with san_bench.vision_language.records.read_conversations."
        )
    return records


def read_conversations(path: str | Path) -> tuple[list[Conversation], list[BadRecord]]:
    """Reads conversations, and returns invalid records separately.

    Args:
        path: A JSON list or JSON lines (`.json`, `.jsonl`), or a table (`.parquet`).

    Returns:
        Valid and invalid records, both in the order of the file.

    Raises:
        SanError: If the file cannot be read, or has no records.
    """
    raw = _raw_records(Path(path))
    if not raw:
        raise SanError(f"{path} contains no records.")
    records: list[Conversation] = []
    bad: list[BadRecord] = []
    for index, record in enumerate(raw):
        if problems := problems_of(record):
            bad.append(BadRecord(index, record.get("id") if isinstance(record, dict) else None, tuple(problems)))
        else:
            records.append(_converted(record))
    return records, bad


def problems_of(record: Any) -> list[str]:
    """Returns all problems of a record as read by `file_rows`; an empty list if it is valid."""
    if isinstance(record, Exception):
        return [f"it is not JSON ({record})"]
    if not isinstance(record, dict):
        return [f"it is a {type(record).__name__}, not an object with id and conversations"]
    problems = []
    if not isinstance(record.get("id"), str | int) or isinstance(record["id"], bool):
        problems.append(
            "id is missing" if record.get("id") is None else f"id is {record['id']!r}, not a string or integer"
        )
    image = record.get("image")
    if image is not None:
        problems += _problems_of_path(image)
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        what = "missing" if turns is None else "empty" if turns == [] else f"a {type(turns).__name__}, not a list"
        return [*problems, f"conversations is {what}"]
    for number, turn in enumerate(turns):
        problems += [f"turn {number}: {text}" for text in _problems_of_turn(turn, number)]
    if len(turns) % 2:
        problems.append(f"it has {len(turns)} turns, so the last one is not an answer")
    marked = [(n, t["value"].count(MARKER)) for n, t in enumerate(turns) if _has_text(t) and MARKER in t["value"]]
    if image is None:
        problems += [f"the marker {MARKER} is in turn {n}, but there is no image" for n, _ in marked]
    elif not marked:
        problems.append(f"there is an image, but no marker {MARKER} in turn 0")
    else:
        problems += [f"the marker {MARKER} is in turn {n}, not in turn 0" for n, _ in marked if n]
        problems += [f"the marker {MARKER} is {k} times in turn 0" for n, k in marked if n == 0 and k > 1]
    return problems


def conversation_fingerprint(records: Sequence[Conversation], images: str | Path | None = None) -> str:
    """Returns a sha256 over IDs, turns and image names of the records, in order.

    Args:
        records: The conversations.
        images: Image folder; if given, includes the size in bytes of every image, -1 if it is missing.
    """
    digest = hashlib.sha256()
    sizes: dict[str, int] = {}
    for record in records:
        content: list[Any] = [record.id, record.image, [[turn.role, turn.text] for turn in record.turns]]
        if images is not None and record.image is not None:
            if record.image not in sizes:
                sizes[record.image] = stored_bytes(Path(images) / record.image)
            content.append(sizes[record.image])
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


def leaves_root(image: str) -> bool:
    """Returns whether a path is absolute or outside its root folder."""
    plain = posixpath.normpath(image.replace("\\", "/"))
    return plain.startswith("/") or plain == ".." or plain.startswith("../") or plain[1:2] == ":"


def _problems_of_path(image: Any) -> Iterable[str]:
    if not isinstance(image, str) or not image.strip():
        yield f"image is {str(image)[:40]!r}, not a path"
    elif leaves_root(image):
        yield f"image {image!r} is outside the image folder"


def _problems_of_turn(turn: Any, number: int) -> Iterable[str]:
    if not isinstance(turn, dict):
        yield f"it is a {type(turn).__name__}, not an object with from and value"
        return
    role, due = turn.get("from"), ROLES[number % 2]
    if role is None:
        yield "from is missing"
    elif role not in ROLES:
        yield f"unknown role {role!r}.{suggest(str(role), ROLES)}"
    elif role != due:
        yield f"expected {due}, since turns alternate, but it is {role}"
    if not isinstance(turn.get("value"), str):
        yield (
            "value is missing"
            if turn.get("value") is None
            else f"value is a {type(turn['value']).__name__}, not a string"
        )
    elif role == "gpt" and not turn["value"].strip():
        yield "the answer is empty"


def _has_text(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)


def _converted(record: dict[str, Any]) -> Conversation:
    turns = tuple(Turn(turn["from"], turn["value"]) for turn in record["conversations"])
    return Conversation(record["id"], turns, record.get("image"))


def _raw_records(path: Path) -> list[Any]:
    if not path.is_file():
        raise SanError(f"There is no conversation file {path}.")
    if path.suffix not in NESTED:
        raise SanError(f"{path} ends in {path.suffix!r}.{suggest(path.suffix, NESTED)}")
    return [record for _, record in file_rows(path)]
