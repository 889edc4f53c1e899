"""Prompts to the last blank, tokens, and padding."""

from __future__ import annotations

import pytest
from tests.bench.texts import PAD, llama2, llama3, record

from san_bench.language.instructions import Instruction
from san_bench.language.prompts import Collator, prompt, tokenise
from san_bench.language.tokenizer import PreparedTokenizer, prepare_tokenizer
from san_peft.errors import SanError

# Prompts


@pytest.mark.parametrize(
    ("template", "phase", "given", "expected"),
    [
        (
            "legacy",
            "training",
            "",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "  \n\n                ### Instruction:\n                do\n\nthis\n                \n"
            "                ### Response:\n                ",
        ),
        (
            "legacy",
            "evaluation",
            "",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
            "\n\n                ### Instruction:\n                do\n\nthis\n\n"
            "                ### Response:\n                ",
        ),
        (
            "legacy",
            "training",
            "it",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request. \n\n                ### Instruction:\n"
            "                do\n\nthis\n                \n                ### Input:\n                it\n"
            "                \n                ### Response:\n                ",
        ),
        (
            "legacy",
            "evaluation",
            "it",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n                ### Instruction:\n"
            "                do\n\nthis\n\n                ### Input:\n                it\n\n"
            "                ### Response:\n                ",
        ),
        *(
            (
                "clean",
                phase,
                "it",
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\ndo\n\nthis\n\n"
                "### Input:\nit\n\n### Response:\n",
            )
            for phase in ("training", "evaluation")
        ),
    ],
)
def test_prompts_to_the_last_blank(template, phase, given, expected):
    assert repr(prompt(Instruction("do\n\nthis", given, "out", "out"), template, phase)) == repr(expected)


# Tokenizers


@pytest.mark.parametrize(("pad", "expected"), [("auto", 0), ("unk", 0), ("eos", 2), ("<s>", 1)])
def test_llama_2_pads_with_the_unknown_token_or_as_chosen(pad, expected):
    tokenizer = llama2()
    ready = prepare_tokenizer(tokenizer, pad)
    assert (ready.family, ready.bos, ready.eos, ready.stops, ready.pad) == ("llama", 1, 2, (2,), expected)
    assert tokenizer.pad_token_id == expected


@pytest.mark.parametrize("kept", [PAD, "<|reserved_special_token_0|>"])
def test_llama_3_pads_with_a_token_kept_for_it_and_never_with_its_first_word(kept):
    tokenizer = llama3(kept)
    assert tokenizer.convert_ids_to_tokens(0) == "!"
    tokenizer.pad_token_id = 0  # as the published code does
    ready = prepare_tokenizer(tokenizer)
    assert ready.pad == tokenizer.convert_tokens_to_ids(kept)
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert (ready.family, ready.eos, list(ready.stops)) == ("llama-3", ends[0], ends)
    tokenizer.eos_token = "<|eot_id|>"  # as a chat model has it
    assert prepare_tokenizer(tokenizer).stops == (ends[1], ends[0])


def test_a_missing_token_is_an_error():
    with pytest.raises(SanError, match=r"LLaMA 3 .* 'eos'"):
        prepare_tokenizer(llama3())
    assert prepare_tokenizer(llama3(), "eos").pad == llama3().eos_token_id
    with pytest.raises(SanError, match="has no token 'PAD'"):
        prepare_tokenizer(llama2(), "PAD")
    for name, message in (("eos_token", "EOS"), ("bos_token", "BOS")):
        tokenizer = llama2()
        setattr(tokenizer, name, None)
        with pytest.raises(SanError, match=message):
            prepare_tokenizer(tokenizer)
    tokenizer = llama2()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    size = len(tokenizer) - 1
    assert prepare_tokenizer(tokenizer, rows=size).pad == 0
    with pytest.raises(SanError, match=f"{size} rows .*padding {size}"):
        prepare_tokenizer(tokenizer, "[PAD]", rows=size)


def test_a_text_begins_once():
    for tokenizer in (llama2(), llama3(PAD), llama3(PAD, bos=False)):
        ready = prepare_tokenizer(tokenizer)
        for text in ("a word", f"{tokenizer.bos_token}a word"):
            tokens = ready.encode(text)
            assert (tokens[0], tokens.count(ready.bos)) == (ready.bos, 1)


def test_other_families_begin_and_pad_as_they_do():
    tokenizer = llama3(bos=False)
    tokenizer.bos_token = tokenizer.eos_token = "<|eot_id|>"
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if token != "<|begin_of_text|>"}
    tokenizer.get_vocab = lambda: vocabulary  # GPT-2's one special token is beginning and end, and put before nothing
    ready = prepare_tokenizer(tokenizer)
    end = vocabulary["<|eot_id|>"]
    assert (ready.family, ready.bos, ready.eos, ready.stops, ready.pad) == ("other", None, end, (end,), end)
    assert ready.encode("a")[0] != end


# Tokens


@pytest.mark.parametrize("make", [llama2, lambda: llama3(PAD)], ids=["llama-2", "llama-3"])
@pytest.mark.parametrize("template", ["legacy", "clean"])
def test_the_loss_is_on_the_answer_to_the_token(make, template):
    ready, one = prepare_tokenizer(make()), record("piqa")
    text = prompt(one, template, "training") + one.output
    (example,) = tokenise([one], ready, template, "answer").examples
    tokens, labels = example["input_ids"], example["labels"]
    assert tokens == [*ready.encode(text), ready.eos]
    assert example["attention_mask"] == [1] * len(tokens)
    start = labels.count(-100)
    assert labels == [-100] * start + tokens[start:]
    # the blanks before the answer: one of the 16 is a part of its first word
    assert ready.tokenizer.decode(tokens[start:-1]).strip() == one.output
    first = ready.tokenizer.convert_ids_to_tokens(tokens[start])
    alone = ready.encode(prompt(one, template, "training"))
    if template == "legacy":
        assert first in ("▁the", "Ġthe")
        assert tokens[: len(alone)] != alone
    else:
        assert first.startswith("t")
        assert tokens[: len(alone)] == alone
        assert start == len(alone)
    (full,) = tokenise([one], ready, template, "full").examples
    assert full == {**example, "labels": tokens}


def test_the_cutoff_takes_the_end_and_is_reported():
    ready = prepare_tokenizer(llama2())
    short, long = record("boolq"), Instruction("word " * 300, "", "the correct answer is true", "true")
    tokens, start = ready.encode_after(prompt(short, "clean", "training"), short.output)
    size = len(tokens)
    whole = tokenise([short], ready, "clean", "answer", size + 1)
    assert (whole.examples[0]["input_ids"], whole.cut) == ([*tokens, ready.eos], ())
    just = tokenise([short], ready, "clean", "answer", size)
    assert (just.examples[0]["input_ids"], just.cut) == (tokens, ())
    less = tokenise([long, short], ready, "clean", "answer", size - 1)
    assert [e["input_ids"] for e in less.examples] == [tokens[:-1]]
    assert less.examples[0]["labels"] == [-100] * start + tokens[start:-1]
    assert (less.cut, len(less)) == ((0, 1), 1)
    full = tokenise([long, short], ready, "clean", "full", size - 1)
    assert len(full) == 2
    assert full[0]["labels"] == full[0]["input_ids"]
    with pytest.raises(SanError, match=r"9 tokens.* 2 records"):
        tokenise([long, short], ready, "clean", "full", 9)


def test_a_tokenizer_that_knows_no_characters_is_refused_where_they_matter():
    tokenizer = llama2()
    ready = prepare_tokenizer(tokenizer)
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    assert ready.encode_after("### Response:\n", "true")[1] == len(ready.encode("### Response:\n"))
    with pytest.raises(SanError, match=r"Slow .* offset"):
        ready.encode_after("### Response:\n    ", "true")


def test_a_token_that_ends_with_the_prompt_is_the_prompts():
    """Where the prompt alone is cut otherwise, characters decide: (a)(bc)(d) for the prompt abc, alone (ab)(c)."""
    whole = {"input_ids": [1, 2, 3], "offset_mapping": [(0, 1), (1, 3), (3, 4)]}
    read = {"abc": {"input_ids": [4, 5]}, "abcd": whole}
    tokenizer = type("Cut", (), {"is_fast": True, "__call__": lambda self, text, **options: read[text]})()
    for bos, expected in ((None, ([1, 2, 3], 2)), (9, ([9, 1, 2, 3], 3))):
        assert PreparedTokenizer(tokenizer, "other", bos, 8, (8,), 8).encode_after("abc", "d") == expected


def test_padding_is_masked_and_without_loss():
    examples = [
        {"input_ids": [1, 7, 2], "attention_mask": [1, 1, 1], "labels": [-100, 7, 2]},
        {"input_ids": [1], "attention_mask": [1], "labels": [1]},
    ]
    right = Collator(pad=2, side="right")(examples)
    assert {name: rows.tolist() for name, rows in right.items()} == {
        "input_ids": [[1, 7, 2], [1, 2, 2]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 7, 2], [1, -100, -100]],  # the end is learnt though it also pads
    }
    left = Collator(pad=0, side="left")([{"input_ids": one["input_ids"]} for one in examples])
    assert {name: rows.tolist() for name, rows in left.items()} == {
        "input_ids": [[1, 7, 2], [0, 0, 1]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
    }
