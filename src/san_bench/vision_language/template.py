r"""Renders conversations with a chat template, and locates the text with loss.

LLaVA-1.5 conversations are rendered as in LLaVA's training code (`conv_vicuna_v1` of haotian-liu/LLaVA,
llava/conversation.py): a system prompt, `USER: ` and `ASSISTANT: ` before the turns, a space after a question and the
EOS token after an answer. The checkpoint's chat template may differ (that of llava-hf/llava-1.5-7b-hf has no system
prompt and no EOS tokens), so it is ignored. LLaVA-NeXT and LLaVA-OneVision, which split images into tiles, have
different language models, so their own chat template is used.

Answers are located by rendering the conversation with a placeholder for each, not by generation marks in the template:
those of LLaVA-OneVision exclude the end of an answer. For every template:

- The text before an answer equals the generation prompt, so that training matches inference. In the template of
  LLaVA-OneVision the two differ by a space.
- The loss starts right after the generation prompt, since Llama tokenizers merge the space before an answer and its
  first word into one token.
- The loss ends with a stop token: the first special token after an answer in the template, or else the EOS token of the
  tokenizer, which is inserted.

Example:
    >>> from san_bench.vision_language.records import Conversation, Turn
    >>> record = Conversation(1, (Turn("human", "What is it?\n<image>"), Turn("gpt", "A bus.")), "bus.jpg")
    >>> messages(record)[0]
    {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]}
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from san_bench.vision_language.records import MARKER, Conversation
from san_peft.errors import SanError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System prompt of Vicuna v1."""

TEMPLATE = (
    SYSTEM
    + " {% for message in messages %}{% if message.role == 'user' %}USER: "
    + "{% for part in message.content %}"
    + "{% if part.type == 'image' %}"
    + MARKER
    + "{{ '\\n' if message.content | length > 1 else '' }}{% else %}{{ part.text }}{% endif %}{% endfor %} "
    + "{% else %}ASSISTANT: {{ message.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Vicuna v1 as a transformers chat template."""

SIGN = "\ue000"
"""Placeholder for an answer: a private-use character of Unicode."""


@dataclass(frozen=True)
class Form:
    """Text around an answer in a chat template.

    Attributes:
        template: The chat template.
        asked: Generation prompt after a question.
        lead: Text between question and answer in the template.
        opening: Text with loss before an answer.
        closing: Text with loss after an answer; it ends with `end`.
        rest: Text without loss after an answer.
        tail: Text after an answer in the template.
        end: Stop token.
    """

    template: str
    asked: str
    lead: str
    opening: str
    closing: str
    rest: str
    tail: str
    end: str


@dataclass(frozen=True)
class Written:
    """A rendered conversation, with one marker for its image.

    Attributes:
        text: The text.
        learnt: Start and end of the text with loss, for every answer.
    """

    text: str
    learnt: tuple[tuple[int, int], ...]


def in_tiles(processor: Any) -> bool:
    """Returns whether a processor splits images into tiles, as LLaVA-NeXT does."""
    return bool(getattr(processor.image_processor, "image_grid_pinpoints", None))


def form_of(processor: Any) -> Form:
    """Returns the text around answers for a processor.

    Raises:
        SanError: If a required chat template is missing, or it does not render turn by turn.
    """
    return _form(processor, _template(processor))


def messages(record: Conversation) -> list[dict[str, Any]]:
    """Converts a conversation to transformers chat messages, without pixels."""
    out = []
    for turn in record.turns:
        if turn.role == "gpt":
            out.append({"role": "assistant", "content": [{"type": "text", "text": turn.text}]})
            continue
        shown = record.image is not None and MARKER in turn.text
        text = turn.text.replace(MARKER, "").strip() if shown else turn.text
        content = [{"type": "image"}] if shown else []
        out.append({"role": "user", "content": content + ([{"type": "text", "text": text}] if text else [])})
    return out


def write(record: Conversation, processor: Any, ask: bool = False) -> Written:
    """Renders a conversation.

    Args:
        record: The conversation.
        processor: A LLaVA processor.
        ask: Replaces the last answer by the generation prompt.

    Raises:
        SanError: If the template does not render turn by turn, with one marker for the image.
    """
    form, answers = form_of(processor), [turn.text for turn in record.turns if turn.role == "gpt"]
    turns = [_answer(SIGN) if one["role"] == "assistant" else one for one in messages(record)]
    before = _render(processor, form.template, turns).split(SIGN)
    text, learnt = "", []
    for number, answer in enumerate(answers):
        start = form.tail if number else ""
        if not (len(before) == len(answers) + 1 and before[number].startswith(start)):
            raise SanError(_strange(processor, f"the conversation {record.id!r}"))
        question = before[number].removeprefix(start)
        if not question.endswith(form.lead):
            raise SanError(_strange(processor, f"the conversation {record.id!r}"))
        text += question.removesuffix(form.lead) + form.asked
        if not (ask and number == len(answers) - 1):
            said = form.opening + answer + form.closing
            learnt.append((len(text), len(text) + len(said)))
            text += said + form.rest
    if (record.image is not None) != (MARKER in text):
        raise SanError(_strange(processor, f"the image of the conversation {record.id!r}"))
    return Written(text, tuple(learnt))


def write_question(text: str, shown: bool, processor: Any) -> str:
    """Renders a question as a generation prompt.

    Args:
        text: The question, without an image marker.
        shown: Whether it has an image.
        processor: A LLaVA processor.

    Raises:
        SanError: If the processor has no usable template.
    """
    content = [{"type": "image"}] * shown + [{"type": "text", "text": text}]
    return _render(processor, form_of(processor).template, [{"role": "user", "content": content}], ask=True)


def _template(processor: Any) -> str:
    if not in_tiles(processor):
        return TEMPLATE
    own = processor.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if not own:
        raise SanError(
            f"The processor {type(processor).__name__} has no chat template. Set its chat_template and save it "
            "with the model."
        )
    return own


@lru_cache(maxsize=8)
def _form(processor: Any, template: str) -> Form:
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    before = _render(processor, template, question)
    asked, whole = (
        _render(processor, template, question, ask=True),
        _render(processor, template, [*question, _answer(SIGN)]),
    )
    if not (asked.startswith(before) and whole.startswith(before) and whole.count(SIGN) == 1):
        raise SanError(_strange(processor, "a question and its answer"))
    asked, (lead, tail) = asked.removeprefix(before), whole.removeprefix(before).split(SIGN)
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise SanError("The tokenizer has no end token (eos_token), so a model could not learn where answers end.")
    found = [(tail.index(token), token) for token in tokenizer.all_special_tokens if token in tail]
    place, end = min(found, default=(0, tokenizer.eos_token))
    closing = tail[:place] + end
    return Form(
        template, asked, lead, lead.removeprefix(asked) if lead.startswith(asked) else "", closing,
        tail.removeprefix(closing) if found else tail, tail, end,
    )  # fmt: skip


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _render(processor: Any, template: str, turns: list[dict[str, Any]], ask: bool = False) -> str:
    return processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=ask, tokenize=False)


def _strange(processor: Any, what: str) -> str:
    return (
        f"The chat template of the processor {type(processor).__name__} does not render {what} turn by turn, so the "
        "text with loss cannot be located. Set a chat_template that appends each turn to the previous ones, with "
        f"{MARKER} for the image."
    )
