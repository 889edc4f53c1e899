r"""How a conversation is written for a model: a chat template, and what of its text is learnt.

LLaVA-1.5's conversations are written as LLaVA trains with them (`conv_vicuna_v1` of haotian-liu/LLaVA,
llava/conversation.py): a system sentence, `USER: ` and `ASSISTANT: ` before the turns, a space after a question and the
end token after an answer. A checkpoint's own template may be another one (that of llava-hf/llava-1.5-7b-hf has no
system sentence and no end tokens), so it is not asked. Models that see an image in tiles, LLaVA-NeXT and
LLaVA-OneVision, come with language models of several kinds, so theirs is asked.

Where the answers are in the text is found by rendering it with a sign in place of each of them, whatever the template
marks itself: those of LLaVA-OneVision leave the end of an answer out. Three things are the same for every template:

- What stands before an answer is what the model is asked with, so that it is trained as it is asked. Of
  LLaVA-OneVision's template the two differ by a blank.
- What is learnt begins where the words end that the model is asked with: tokenizers of Llama's kind write the blank in
  front of an answer and its first word as one token.
- What is learnt ends with a token at which the model stops: the first special one that the template writes after an
  answer, else the tokenizer's end token, which is put there.

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
"""The system sentence of vicuna v1."""

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
"""Vicuna v1 as a chat template of transformers."""

SIGN = "\ue000"
"""Stands for an answer: a character that Unicode leaves to private use."""


@dataclass(frozen=True)
class Form:
    """How a template writes an answer.

    Attributes:
        template: The chat template.
        asked: What the model is asked with, after a question.
        lead: What the template itself writes between a question and its answer.
        opening: What is learnt in front of an answer.
        closing: What is learnt after it; its end is `end`.
        rest: What else follows an answer.
        tail: What the template itself writes after an answer.
        end: The token at which the model stops.
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
    """A conversation as text, with one marker for its image.

    Attributes:
        text: The text.
        learnt: Where in it what is learnt begins and ends, once for every answer.
    """

    text: str
    learnt: tuple[tuple[int, int], ...]


def in_tiles(processor: Any) -> bool:
    """Whether a processor cuts images into tiles, as many as their shape asks for, as LLaVA-NeXT's does."""
    return bool(getattr(processor.image_processor, "image_grid_pinpoints", None))


def form_of(processor: Any) -> Form:
    """Returns how conversations are written for a processor.

    Raises:
        SanError: If it has no template of its own where one is needed, or one that does not write turn by turn.
    """
    return _form(processor, _template(processor))


def messages(record: Conversation) -> list[dict[str, Any]]:
    """Returns a conversation in the form of transformers' chat templates, without its pixels."""
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
    """Writes a conversation.

    Args:
        record: The conversation; with `ask`, its last answer is left out.
        processor: A processor of a LLaVA.
        ask: Ends with the words after which the model answers.

    Raises:
        SanError: If the template does not write it turn by turn, with one marker where there is an image.
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
    """Writes a question, after which the model answers.

    Args:
        text: The question, without a marker of an image.
        shown: Whether it is about an image.
        processor: A processor of a LLaVA.

    Raises:
        SanError: If the processor has no fitting template.
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
            f"The processor {type(processor).__name__} has no chat template, by which conversations are written for "
            "its model. Set its chat_template, and save it beside the model."
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
        f"The chat template of the processor {type(processor).__name__} does not write {what} turn by turn, so what is "
        "learnt cannot be told. Give the processor a chat_template that writes each turn after the last, and "
        f"{MARKER} where the image is."
    )
