"""Conversations as tokens: which template, and which tokens have loss."""

from __future__ import annotations

import pytest
from tests.bench.texts import llama2
from transformers import AutoTokenizer

from san_bench.language.chat import (
    CHAT_TEMPLATES,
    check_chat_template,
    encode_asked,
    encode_chat,
    ends_of_turn,
    set_chat_template,
)
from san_bench.language.formats import Chat
from san_bench.models.embedded import embedded_path
from san_peft.errors import SanError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": " Hello  you "},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Yes."},
]
PLAIN = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""A template without generation marks."""
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""Marks that leave out the end of a turn, as some published templates have them."""


@pytest.fixture(scope="module", params=["bytes", "blanks"])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(embedded_path("decoder")) if request.param == "bytes" else llama2()


def learnt_text(tokenizer, record):
    ids, learnt = encode_chat(tokenizer, record)
    assert len(ids) == len(learnt)
    return "".join(tokenizer.decode([i for i, own in zip(ids, learnt, strict=True) if own]))


@pytest.mark.parametrize(
    "template", [*CHAT_TEMPLATES.values(), PLAIN, MARKED], ids=[*CHAT_TEMPLATES, "plain", "marked"]
)
def test_loss_is_on_the_turns_of_the_assistant_and_their_ends(tokenizer, template):
    tokenizer.chat_template = template
    text = learnt_text(tokenizer, Chat(TURNS))
    assert [part.strip() for part in text.split("</s>")] == ["Hello  you", "Yes.", ""]
    ids, learnt = encode_chat(tokenizer, Chat(TURNS))
    whole = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=True)["input_ids"]
    assert ids == whole  # nothing is added to what the template renders
    asked = encode_asked(tokenizer, Chat([*TURNS[:4], {"role": "assistant", "content": "Yes."}]))
    assert ids[: len(asked)] == asked
    assert learnt[len(asked)]
    assert ends_of_turn(tokenizer) == {tokenizer.eos_token_id}


def test_marks_and_prefixes_agree(tokenizer):
    from san_bench.language import chat

    for name in CHAT_TEMPLATES:
        set_chat_template(tokenizer, name)
        assert encode_chat(tokenizer, Chat(TURNS)) == chat._by_prefix(tokenizer, Chat(TURNS))


def test_a_template_is_a_file_or_a_built_in_one(tokenizer, tmp_path):
    set_chat_template(tokenizer, "chatml", begins=False)
    assert tokenizer.chat_template == CHAT_TEMPLATES["chatml"]
    set_chat_template(tokenizer, "chatml")
    assert tokenizer.apply_chat_template(TURNS[1:2], tokenize=False) == "<s><|im_start|>user\nHi  there</s>\n"
    (tmp_path / "mine.jinja").write_text(PLAIN)
    set_chat_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == PLAIN
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == PLAIN
    with pytest.raises(SanError, match=r"text.chat_template: chatmll .*chatml, alpaca.*'chatml'"):
        set_chat_template(tokenizer, "chatmll")
    for wrong in (str(tmp_path), "a" * 300, "a\0b"):
        with pytest.raises(SanError, match=r"text.chat_template"):
            set_chat_template(tokenizer, wrong)
    check_chat_template(tokenizer)
    tokenizer.chat_template = {"rag": PLAIN, "tool_use": PLAIN}
    with pytest.raises(SanError, match=r"no default: rag, tool_use.*text.chat_template"):
        check_chat_template(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(SanError, match=r"no chat template.*text.chat_template.*chatml, alpaca"):
        check_chat_template(tokenizer)


def test_templates_that_do_not_fit_are_errors(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SanError, match="refuses the conversation: roles must alternate"):
        encode_chat(tokenizer, Chat(TURNS))
    tokenizer.chat_template = PLAIN.replace("m.content +", "(m.content if loop.last else '') +")  # forgets old turns
    with pytest.raises(SanError, match=r"does not append turn 2.*text.chat_template"):
        encode_chat(tokenizer, Chat(TURNS))
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    with pytest.raises(SanError, match="no tool calls"):
        encode_chat(tokenizer, Chat([*TURNS, {"role": "assistant", "content": "", "tool_calls": [{}]}]))
    with pytest.raises(SanError, match="no tools"):
        encode_chat(tokenizer, Chat(TURNS, [{"name": "f"}]))


def test_a_conversation_may_start_with_the_assistant(tokenizer):
    tokenizer.chat_template = PLAIN
    assert learnt_text(tokenizer, Chat(TURNS[4:])).strip() == "Yes.</s>"
