"""Conversations as tokens: the chat template of a model, and the tokens with loss.

The text is what the template renders, special tokens included: nothing is added, so training matches what
`apply_chat_template` gives at inference. The loss is on the assistant's turns with the token that ends each. They are
found by the template's generation marks, or else by rendering the conversation up to each turn.

Example:
    >>> from transformers import AutoTokenizer
    >>> from san_bench.models.embedded import embedded_path
    >>> tokenizer = AutoTokenizer.from_pretrained(embedded_path("decoder"))
    >>> set_chat_template(tokenizer, "alpaca")
    >>> record = Chat([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}])
    >>> ids, learnt = encode_chat(tokenizer, record)
    >>> tokenizer.decode([i for i, own in zip(ids, learnt) if own])
    'Hello.</s>'
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from san_bench.config.strict import did_you_mean
from san_bench.language.formats import Chat
from san_peft.errors import SanError

_NO_TOOLS = (
    "{% if tools %}{{ raise_exception('this built-in template has no tools') }}{% endif %}"
    "{% for message in messages %}{% if message.tool_calls %}"
    "{{ raise_exception('this built-in template has no tool calls') }}{% endif %}{% endfor %}"
)

CHAT_TEMPLATES = {
    "chatml": _NO_TOOLS
    + (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ message.content + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "alpaca": _NO_TOOLS
    + (
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ '### Response:\n' }}"
        "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
        "{% elif message.role == 'user' %}{{ '### Instruction:\n' + message.content }}"
        "{% elif message.role == 'tool' %}{{ '### Input:\n' + message.content }}"
        "{% else %}{{ message.content }}{% endif %}{{ '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
}
"""Built-in chat templates by name. Turns end with the tokenizer's EOS token, so no tokens are added to the model."""

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Generation mark of a chat template."""


def set_chat_template(tokenizer: Any, template: str | None, begins: bool = True) -> None:
    """Sets the chat template of a tokenizer, which is then saved with it.

    Args:
        tokenizer: A transformers tokenizer.
        template: A file, or a name of `CHAT_TEMPLATES`; `None` keeps the tokenizer's own.
        begins: Whether a built-in template starts with the BOS token.

    Raises:
        SanError: If it is neither.
    """
    if template is None:
        return
    path = Path(template)
    if template in CHAT_TEMPLATES and not path.is_file():
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + CHAT_TEMPLATES[template]
        return
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path
        raise SanError(
            f"text.chat_template: {template} is neither a readable file ({error}) nor one of "
            f"{', '.join(CHAT_TEMPLATES)}.{did_you_mean(template, CHAT_TEMPLATES)}"
        ) from error


def check_chat_template(tokenizer: Any) -> None:
    """Checks that a tokenizer has a chat template, and offsets to locate the assistant's turns.

    Raises:
        SanError: If it has none, or is a slow tokenizer.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise SanError(
            f"The tokenizer {name} has several chat templates and no default: {names}. Save one of them to a file, and "
            "set text.chat_template to it."
        )
    if not tokenizer.chat_template:
        raise SanError(
            f"The tokenizer {name} has no chat template, which conversations need. Set text.chat_template to a file "
            f"with one, or to a built-in: {', '.join(CHAT_TEMPLATES)}."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise SanError(f"The tokenizer {name} is slow and has no offsets to locate the answers. Load a fast one.")


def encode_chat(tokenizer: Any, record: Chat) -> tuple[list[int], list[bool]]:
    """Tokenizes a conversation.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        record: The conversation.

    Returns:
        Token IDs, and for each whether it belongs to the assistant.

    Raises:
        SanError: If the template refuses the conversation, or does not render it turn by turn.
    """
    if MARK.search(tokenizer.get_chat_template(tools=record.tools)):
        out = _render(tokenizer, record, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, learnt = out["input_ids"], list(map(bool, out["assistant_masks"]))
        turns = sum(one["role"] == "assistant" and bool(one.get("content")) for one in record.messages)
        if sum(own for own, _ in groupby(learnt)) >= turns:
            return ids, _with_ends(ids, learnt, tokenizer)
    return _by_prefix(tokenizer, record)


def encode_asked(tokenizer: Any, record: Chat) -> list[int]:
    """Tokenizes a conversation up to its last answer, with the generation prompt."""
    return _render(
        tokenizer, Chat(record.asked, record.tools), tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]


def ends_of_turn(tokenizer: Any) -> set[int]:
    """Returns the special tokens that directly follow an answer in the chat template; empty if none does."""
    probe = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    try:
        ids, learnt = encode_chat(tokenizer, probe)
    except SanError:  # reported with the records
        return set()
    last = [token for token, own in zip(ids, learnt, strict=True) if own][-1:]
    return set(last) & set(tokenizer.all_special_ids)


def _render(tokenizer: Any, record: Chat, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(record.messages, tools=record.tools, **options)
    except (TemplateError, ValueError, TypeError) as error:
        raise SanError(f"the chat template refuses the conversation: {error}") from error


def _with_ends(ids: list[int], learnt: list[bool], tokenizer: Any) -> list[bool]:
    """Adds the special token after each turn; marks of some templates exclude it."""
    special = set(tokenizer.all_special_ids)
    return [
        own or (place > 0 and learnt[place - 1] and ids[place] in special and ids[place - 1] not in special)
        for place, own in enumerate(learnt)
    ]


def _by_prefix(tokenizer: Any, record: Chat) -> tuple[list[int], list[bool]]:
    """Locates each turn of the assistant between the renderings up to it, with the generation prompt, and with it."""
    whole, spans = _render(tokenizer, record, tokenize=False), []
    for place, message in enumerate(record.messages):
        if message["role"] == "assistant":
            after = _render(tokenizer, Chat(record.messages[: place + 1], record.tools), tokenize=False)
            before = Chat(record.messages[:place], record.tools)
            start = _render(tokenizer, before, tokenize=False, add_generation_prompt=True) if place else None
            start = _opening(after, tokenizer) if start is None else start
            if not (after.startswith(start) and whole.startswith(after)):
                raise SanError(
                    f"the chat template does not append turn {place} to the text before it, so its tokens cannot be "
                    "located; set text.chat_template to one that does, or that has {% generation %} marks"
                )
            spans.append((len(start), _end(after, len(start), tokenizer)))
    out = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, learnt = list(out["input_ids"]), [False] * len(out["input_ids"])
    for start, end in spans:
        own = [i for i, (first, last) in enumerate(out["offset_mapping"]) if first < end and last > start]
        for i in range(own[0], own[-1] + 1) if own else ():  # with tokens of blanks, whose offsets may be empty
            learnt[i] = True
    return ids, learnt


def _opening(text: str, tokenizer: Any) -> str:
    """Returns the start of a text up to the header of its first turn, which is the assistant's."""
    asked = Chat([{"role": "user", "content": "a"}])
    before = _render(tokenizer, asked, tokenize=False)
    header = _render(tokenizer, asked, tokenize=False, add_generation_prompt=True).removeprefix(before)
    return text[: text.index(header) + len(header)] if header in text else ""


def _end(text: str, start: int, tokenizer: Any) -> int:
    """Returns the end of a turn: after its last special token if only blanks follow, else the end of the text."""
    bare = text[start:].rstrip()
    ends = any(bare.endswith(token) for token in tokenizer.all_special_tokens)
    return start + len(bare) if ends else len(text)
