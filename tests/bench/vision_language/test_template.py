"""How conversations are written for models that see images in tiles: text, labels, numbers of tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.bench.tiled import CHATML, KINDS, MISTRAL, SIZES, TOKENS, VICUNA, processor
from transformers import LlavaNextImageProcessor, LlavaOnevisionImageProcessor

from san_bench.vision_language.encoding import (
    IGNORED,
    ConversationCollator,
    encode,
    encode_question,
    image_tokens,
    measure,
)
from san_bench.vision_language.images import read_size
from san_bench.vision_language.records import Conversation, Turn
from san_bench.vision_language.template import SIGN, form_of, write, write_question
from san_peft.errors import SanError

RECORD = Conversation(
    1, (Turn("human", "What?\n<image>"), Turn("gpt", "red"), Turn("human", "And?"), Turn("gpt", " no ")), "x.png"
)
BARE = Conversation(2, (Turn("human", "Who?"), Turn("gpt", "me")))
PROCESSORS = [("next", VICUNA), ("next", MISTRAL), ("onevision", CHATML)]


@pytest.mark.parametrize(
    ("kind", "template", "text", "learnt"),
    [
        ("next", VICUNA, "USER: <image>\nWhat? ASSISTANT: red</s> USER: And? ASSISTANT:  no </s> ", " {}</s>"),
        ("next", MISTRAL, "[INST] <image>\nWhat? [/INST] red</s>[INST] And? [/INST]  no </s>", " {}</s>"),
        (
            "onevision",
            CHATML,
            "<|im_start|>user <image>\nWhat?<|im_end|><|im_start|>assistant\nred<|im_end|><|im_start|>user \nAnd?"
            "<|im_end|><|im_start|>assistant\n no <|im_end|>",
            "{}<|im_end|>",
        ),
    ],
)
def test_a_conversation_is_written_by_the_processors_template(kind, template, text, learnt):
    ours = processor(kind, template)
    written = write(RECORD, ours)
    assert written.text == text
    assert [text[start:end] for start, end in written.learnt] == [learnt.format("red"), learnt.format(" no ")]
    asked = write(RECORD, ours, ask=True)
    assert asked.text == text[: written.learnt[1][0]]
    assert asked.learnt == written.learnt[:1]
    assert text.startswith(write_question("What?", True, ours))


@pytest.mark.parametrize(("kind", "template"), PROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_labels_are_the_answers_alone(kind, template, size):
    ours, image = processor(kind, template), Image.new("RGB", size, "red")
    out = encode(RECORD, image, ours, 1000, pad=False)
    ids, labels = out["input_ids"], out["labels"]
    assert (ids == ours.image_token_id).sum() == TOKENS[size]
    learnt, form = labels != IGNORED, form_of(ours)
    assert torch.equal(labels[learnt], ids[learnt])
    said = ours.tokenizer.decode(labels[learnt])
    assert said == "".join(form.opening + answer + form.end for answer in ("red", " no "))
    text, tokens = write(RECORD, ours).text, "<image>" * TOKENS[size]
    assert ours.tokenizer.decode(ids).removeprefix("<s>") == text.replace("<image>", tokens)
    assert out["image_sizes"].tolist() == [size[1], size[0]]
    asked = encode_question("What?", image, ours, pad=False)
    n = len(asked["input_ids"])
    assert torch.equal(ids[:n], asked["input_ids"])
    assert (labels[:n] == IGNORED).all()
    assert labels[n] != IGNORED
    assert torch.equal(asked["pixel_values"], out["pixel_values"])


def test_an_answer_ends_where_the_model_stops():
    """At a special token that the template writes; else at the end token of the tokenizer."""
    ours = processor("onevision", end="<|endoftext|>")
    assert form_of(ours).end == "<|im_end|>"
    assert form_of(processor("next", VICUNA)).end == "</s>"
    late = processor("onevision", CHATML.replace("'<|im_end|>'", "'\n<|im_end|>\n'"))
    written = write(BARE, late)
    assert [written.text[start:end] for start, end in written.learnt] == ["me\n<|im_end|>"]
    assert written.text.endswith("me\n<|im_end|>\n")


def test_a_template_that_begins_texts_itself_leaves_nothing_to_the_tokenizer():
    ours = processor("next", "{{ bos_token }}" + MISTRAL)
    for out in (encode(BARE, None, ours, 100), encode_question("Who?", None, ours)):
        assert (out["input_ids"] == ours.tokenizer.bos_token_id).sum() == 1
    assert measure([BARE], ours, 100).tokens == (len(encode(BARE, None, ours, 100)["input_ids"]),)


@pytest.mark.parametrize(("kind", "template"), PROCESSORS)
def test_lengths_are_those_of_what_is_read(kind, template, tmp_path):
    ours = processor(kind, template)
    records = [BARE]
    for number, size in enumerate(SIZES):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
        assert read_size(tmp_path, f"{number}.png") == size
        assert image_tokens(ours, size) == TOKENS[size]
        records.append(Conversation(number, RECORD.turns, f"{number}.png"))
    images = [None, *(Image.new("RGB", size) for size in SIZES)]
    read = [encode(record, image, ours, 1000, pad=False) for record, image in zip(records, images, strict=True)]
    found = measure(records, ours, 1000, tmp_path, batch_size=2)
    assert found.tokens == tuple(len(one["input_ids"]) for one in read)
    assert found.cut == ()
    ends = [int((one["input_ids"] == ours.image_token_id).nonzero().max()) + 1 for one in read[1:]]
    assert found.image_end == max(ends)
    assert measure(records, ours, 1000, lambda name: images[int(name[0]) + 1]) == found  # type: ignore[arg-type, return-value]
    with pytest.raises(SanError, match=rf"cuts through the image .* 24 tokens end at {max(ends)}"):
        encode(records[-1], images[-1], ours, max(ends) - 1, pad=False)
    assert len(encode(records[-1], images[-1], ours, max(ends), pad=False)["input_ids"]) == max(ends)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_fills_tiles_up(kind):
    ours = processor(kind)
    read = [encode(RECORD, Image.new("RGB", size, "red"), ours, 1000, pad=False) for size in SIZES]
    batch = ConversationCollator(2)([encode(BARE, None, ours, 1000), *read])
    assert batch["pixel_values"].shape == (4, 5, 3, 8, 8)
    for row, one in zip(batch["pixel_values"], read, strict=True):
        tiles = len(one["pixel_values"])
        assert torch.equal(row[:tiles], one["pixel_values"])
        assert not row[tiles:].any()
    assert batch["image_sizes"].tolist() == [[height, width] for width, height in SIZES]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_is_explained(kind):
    ours, image = processor(kind), Image.new("RGB", (8, 8))
    with pytest.raises(SanError, match=r"Set conversation\.pad_to_square to false"):
        encode(RECORD, image, ours, 1000)
    with pytest.raises(SanError, match=r"Set conversation\.pad_to_square to false"):
        encode_question("What?", image, ours)
    with pytest.raises(SanError, match=r"has no chat template.*Set its chat_template"):
        encode(BARE, None, processor(kind, None), 1000)
    with pytest.raises(SanError, match=r"depends on the image size"):
        image_tokens(ours)
    with pytest.raises(SanError, match=r"depends on the image size.* measure"):
        measure([RECORD], ours, 1000)
    with pytest.raises(SanError, match="the conversation 3 turn by turn"):
        write(Conversation(3, (Turn("human", "Who?"), Turn("gpt", "me"), Turn("human", SIGN), Turn("gpt", "me"))), ours)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (
            "{% for m in messages %}{{ m.role }}{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}",
            "a question",
        ),
        ("{% for m in messages | reverse %}{{ m.role }}{{ m.content[0].text }}{% endfor %}", "a question"),
        ("{% for m in messages %}{{ m.role }}{{ m.content[-1].text }}{% endfor %}", "the image of the conversation 1"),
        (
            "{% for m in messages %}{{ m.role ~ loop.index }}{{ '<image>' if m.content | length > 1 }}"
            "{{ m.content[-1].text }}{% endfor %}",
            "the conversation 1",
        ),
    ],
)
def test_a_template_that_does_not_write_turn_by_turn_is_refused(template, what):
    with pytest.raises(SanError, match=f"{what}.*chat_template"):
        write(RECORD, processor("next", template))


def test_an_image_takes_as_many_tokens_as_the_page_says():
    """With the grids that the processors have by default, their tiles' sizes, and patches of 14."""
    following, onevision = processor("next"), processor("onevision")
    following.image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    following.patch_size = 14
    onevision.image_processor, onevision.num_image_tokens = LlavaOnevisionImageProcessor(), (384 // 14) ** 2
    page = (Path(__file__).parents[3] / "docs/how-to/vision-language.md").read_text(encoding="utf-8")
    page = " ".join(page.split())
    counts = [image_tokens(one, (640, 480)) for one in (following, onevision)]
    said = re.search(r"640x480 takes (\S+) in LLaVA-NeXT .* and (\S+) in LLaVA-OneVision", page)
    assert said is not None
    assert [f"{count:,}" for count in counts] == list(said.groups())


def test_a_tokenizer_without_an_end_is_refused():
    ours = processor("next")
    ours.tokenizer.eos_token = None
    with pytest.raises(SanError, match=r"no end token \(eos_token\)"):
        form_of(ours)
