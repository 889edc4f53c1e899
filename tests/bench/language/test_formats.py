"""Formats of one's own records: recognised from their columns, converted, and described where they are wrong."""

from __future__ import annotations

import pytest

from san_bench.language.formats import (
    Chat,
    Completion,
    Passage,
    content_key,
    empty_parts,
    misplaced_roles,
    problems_of_row,
    read_record,
    recognise_format,
)
from san_bench.language.instructions import Instruction
from san_bench.language.own import read_rows_of
from san_peft.errors import SanError

HI = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("row", "form", "record"),
    [
        ({"instruction": "a", "input": "b", "output": "c", "answer": "d"}, "alpaca", Instruction("a", "b", "c", "d")),
        ({"instruction": "a", "output": "c", "text": "a c"}, "alpaca", Instruction("a", "", "c", "")),
        ({"instruction": "a", "input": None, "output": ""}, "alpaca", Instruction("a", "", "", "")),
        ({"messages": HI, "prompt": "Hi.", "id": 3}, "messages", Chat(HI)),
        ({"messages": [{**HI[0], "tool_calls": None}, HI[1]]}, "messages", Chat(HI)),
        ({"messages": [{**HI[0], "content": [{"type": "text", "text": "Hi."}]}, HI[1]]}, "messages", Chat(HI)),
        ({"messages": '[{"role": "assistant", "content": "Hello."}]'}, "messages", Chat(HI[1:])),
        (
            {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}], "system": "S"},
            "sharegpt",
            Chat([{"role": "system", "content": "S"}, *HI]),
        ),
        ({"messages": HI, "tools": '[{"name": "f"}]'}, "messages", Chat(HI, [{"name": "f"}])),
        ({"prompt": "a", "completion": "b"}, "completion", Completion("a", "b")),
        ({"text": "a"}, "text", Passage("a")),
    ],
)
def test_a_format_is_recognised_and_read(row, form, record):
    assert recognise_format(row) == form
    assert problems_of_row(row, form) == []
    assert read_record(row, form) == record


@pytest.mark.parametrize(
    ("row", "form", "parts"),
    [
        ({"instruction": "a", "output": 3}, "alpaca", ["output is 3, not a string"]),
        ({"instruction": " ", "output": "a", "answer": 1}, "alpaca", ["answer is 1", "instruction is empty"]),
        ({"instruction": "a"}, "alpaca", ["output is missing"]),
        ({"prompt": HI, "completion": "a"}, "completion", ["prompt is [", "not a string"]),
        ({"text": None}, "text", ["text is missing"]),
        ([], "text", ["a list, not a record"]),
        (ValueError("no"), "text", ["cannot be parsed (no)"]),
        ({"messages": "hello"}, "messages", ["messages is 'hello', not a list"]),
        ({"messages": []}, "messages", ["no turn of the assistant"]),
        ({"messages": HI[:1]}, "messages", ["no turn of the assistant"]),
        ({"messages": [*HI, 3]}, "messages", ["turn 2: it is a int"]),
        ({"messages": [*HI, {"role": "usr", "content": "a"}]}, "messages", ["turn 2: role is 'usr'", "'user'"]),
        ({"messages": [*HI, {"role": "user"}]}, "messages", ["turn 2: content is missing"]),
        ({"messages": [*HI, {"content": "a"}]}, "messages", ["turn 2: role is missing"]),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "sharegpt", ["conversations, turn 0: value is 3"]),
        ({"messages": [{"role": ["user"], "content": ""}]}, "messages", ["turn 0: role is ['user']"]),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, HI[1]]}, "messages", ["content is ["]),
        ({"messages": HI, "tools": "x"}, "messages", ["tools is 'x', not a list"]),
        ({"conversations": [], "system": 3}, "sharegpt", ["system is 3"]),
        ({"messages": [*HI, {"role": "user", "content": "a\ud800"}]}, "messages", ["turn 2: content has half"]),
        ({"text": "\udfff"}, "text", ["text has half of a character at 0"]),
    ],
)
def test_what_is_wrong_names_the_field(row, form, parts):
    (*problems,) = problems_of_row(row, form)
    assert problems
    for part in parts:
        assert any(part in problem for problem in problems), (part, problems)


def test_errors_name_file_record_and_field():
    rows = [("line 1", {"prompt": "a", "completion": "b"}), ("line 7", {"prompt": "a"}), ("line 8", {"text": "a"})]
    with pytest.raises(SanError) as caught:
        read_rows_of(rows, "mine.jsonl").check()
    for part in ("mine.jsonl: 2 of 3 records", "line 7: completion is missing", "line 8: prompt is missing"):
        assert part in str(caught.value)
    with pytest.raises(SanError, match=r"mine.jsonl, line 2: .*question, reply.*instruction, output"):
        read_rows_of([("line 2", {"question": "a", "reply": "b"})], "mine.jsonl")
    (located,) = read_rows_of([("line 1", {"text": "a", "messages": HI})], "mine.jsonl", "text").check()
    assert located.item == Passage("a")  # a named format is taken
    with pytest.raises(SanError, match=r"mine.jsonl contains no records"):
        read_rows_of([], "mine.jsonl").check()


def test_empty_parts_and_roles_out_of_order_are_found():
    turns = [{"role": role, "content": role} for role in ("system", "user", "user", "assistant", "system", "tool")]
    assert misplaced_roles(Chat(turns)) == [
        "turn 2 (user after user)",
        "turn 4 (system after assistant)",
        "turn 5 (tool after system)",
        "turn 5 (the last is tool)",
    ]
    assert misplaced_roles(Chat(HI)) == misplaced_roles(Passage("")) == []
    call = {"role": "assistant", "content": "", "tool_calls": [{}]}
    assert misplaced_roles(Chat([HI[0], call, {"role": "tool", "content": "3"}, HI[1]])) == []
    assert empty_parts(Chat([HI[0], call, {"role": "assistant", "content": " "}])) == ["turn 2 (assistant)"]
    assert empty_parts(Completion("", "")) == ["prompt", "output"]
    assert (empty_parts(Instruction("a", "", "", "")), empty_parts(Passage("\n"))) == (["output"], ["text"])
    assert content_key(Completion("a", "b")) != content_key(Passage("a"))
    assert Chat([*HI, *HI[:1]]).asked == HI[:1]
