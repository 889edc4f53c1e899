"""Conversations about images: prompts, labels, batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from PIL import Image
from tests.bench.copies import write_picture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from san_bench.vision_language.batches import ModalityBatches
from san_bench.vision_language.encoding import (
    IGNORED,
    ConversationCollator,
    ConversationDataset,
    encode,
    image_tokens,
    measure,
)
from san_bench.vision_language.records import Conversation, Turn
from san_bench.vision_language.template import SYSTEM, write
from san_peft.errors import SanError

WORDS = ["<unk>", "<s>", "</s>", "<image>", "<pad>", *(f"▁{word}" for word in SYSTEM.split())]
VOCABULARY = {
    word: number
    for number, word in enumerate(
        dict.fromkeys([*WORDS, "▁USER:", "▁ASSISTANT:", "USER:", "\nwhat", "▁what", "▁now", "▁cat", "▁dog", "▁"])
    )
}
"""Words with the space in front of them, as tokenizers of Llama's kind have them."""


def processor(strategy="default", additional=1):
    """A processor for images of 8x8 pixels in patches of 4, so 4 of them, and words that are tokens."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=additional,
    )


def ids(*words):
    return [VOCABULARY[word] for word in words]


SEEN = Conversation(
    1,
    (
        Turn("human", "what\n<image>"),
        Turn("gpt", "a cat"),
        Turn("human", "what now"),
        Turn("gpt", "dog"),
    ),
    "x.png",
)
UNSEEN = Conversation(2, (Turn("human", "what now"), Turn("gpt", "a dog")))
HEAD = ids("<s>", *(f"▁{word}" for word in SYSTEM.split()), "▁USER:")


def test_the_prompt_is_vicunas():
    start = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: "
    )
    assert (
        write(SEEN, processor()).text == start + "<image>\nwhat ASSISTANT: a cat</s>USER: what now ASSISTANT: dog</s>"
    )
    assert write(SEEN, processor(), ask=True).text == (
        start + "<image>\nwhat ASSISTANT: a cat</s>USER: what now ASSISTANT:"
    )
    alone = Conversation(3, (Turn("human", "<image>"), Turn("gpt", "dog")), "x.png")
    assert write(alone, processor()).text == start + "<image> ASSISTANT: dog</s>"


@pytest.mark.parametrize(
    ("strategy", "additional", "count"),
    [("default", 1, 4), ("full", 1, 5), ("full", 0, 4), ("default", 0, 3)],  # 4 patches, and what comes and goes
)
def test_tokens_and_labels_are_those_built_by_hand(strategy, additional, count):
    ours = processor(strategy, additional)
    assert image_tokens(ours) == count
    out = encode(SEEN, Image.new("RGB", (10, 4), "white"), ours, max_length=100)
    shown = [*HEAD, *ids("▁"), *ids("<image>") * count, *ids("\nwhat", "▁ASSISTANT:")]
    first, between, second = (
        ids("▁a", "▁cat", "</s>"),
        ids("USER:", "▁what", "▁now", "▁ASSISTANT:"),
        ids("▁dog", "</s>"),
    )
    assert out["input_ids"].tolist() == [*shown, *first, *between, *second]
    assert out["labels"].tolist() == [*[IGNORED] * len(shown), *first, *[IGNORED] * len(between), *second]
    assert out["pixel_values"].shape == (3, 8, 8)


def test_a_conversation_without_an_image():
    out = encode(UNSEEN, None, processor(), max_length=100)
    asked, answer = [*HEAD, *ids("▁what", "▁now", "▁ASSISTANT:")], ids("▁a", "▁dog", "</s>")
    assert set(out) == {"input_ids", "labels"}
    assert out["input_ids"].tolist() == asked + answer
    assert out["labels"].tolist() == [IGNORED] * len(asked) + answer


def test_the_image_is_padded_before_it_is_resized():
    """White, 8x4 pixels: padded it has 2 rows of the mean colour above and below, which come out as 0 but for rounding;
    cropped it is white all over."""
    image = Image.new("RGB", (8, 4), "white")
    padded = encode(SEEN, image, processor(), 100)["pixel_values"]
    assert padded[:, [0, 1, 6, 7]].abs().max() < 0.02
    assert padded[:, 2:6].min() > 1
    assert encode(SEEN, image, processor(), 100, pad=False)["pixel_values"].min() > 1


def test_what_is_too_long_is_cut_off_and_counted():
    ours, image = processor(), Image.new("RGB", (8, 8))
    whole = encode(SEEN, image, ours, 100)
    length = len(whole["input_ids"])
    assert length == len(HEAD) + 1 + 4 + 2 + 3 + 4 + 2
    cut = encode(SEEN, image, ours, length - 1)
    assert cut["input_ids"].tolist() == whole["input_ids"].tolist()[:-1]
    assert cut["labels"].tolist() == whole["labels"].tolist()[:-1]
    end = len(HEAD) + 1 + 4  # of the image
    assert len(encode(SEEN, image, ours, end)["input_ids"]) == end
    with pytest.raises(SanError, match=rf"max_length {end - 1} cuts through the image .* end at {end}"):
        encode(SEEN, image, ours, end - 1)
    short = len(HEAD) + 6  # of UNSEEN, whose answer begins after len(HEAD) + 3
    assert measure([UNSEEN, SEEN], ours, 100).tokens == (short, length)
    assert measure([UNSEEN, SEEN], ours, short).cut == (1,)
    found = measure([UNSEEN, SEEN, UNSEEN], ours, len(HEAD) + 3, batch_size=2)
    assert found.cut == (0, 1, 2)


def test_what_cannot_be_encoded_is_explained():
    ours = processor()
    with pytest.raises(SanError, match="conversation 1 has an image, but none was given"):
        encode(SEEN, None, ours, 100)
    with pytest.raises(SanError, match="conversation 2 has no image, but one was given"):
        encode(UNSEEN, Image.new("RGB", (2, 2)), ours, 100)
    with pytest.raises(SanError, match=r"LLaVA.* patch_size"):
        encode(UNSEEN, None, ours.tokenizer, 100)
    ours.patch_size = None
    with pytest.raises(SanError, match="no patch_size"):
        image_tokens(ours)


def test_a_batch_of_different_lengths(tmp_path):
    write_picture(tmp_path / "x.png", 1)
    data = ConversationDataset([SEEN, UNSEEN], tmp_path, processor(), max_length=100)
    collate = ConversationCollator(VOCABULARY["<pad>"])
    batch = collate([data[0], data[1]])
    long, short = len(data[0]["input_ids"]), len(data[1]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, long)
    assert batch["attention_mask"].sum(1).tolist() == [long, short]
    assert batch["input_ids"][1, short:].unique().tolist() == ids("<pad>")
    assert batch["labels"][1, short:].unique().tolist() == [IGNORED]
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    assert set(collate([data[1], data[1]])) == {"input_ids", "attention_mask", "labels"}


def test_a_small_llava_reads_both_kinds_of_batches(tmp_path):
    write_picture(tmp_path / "x.png", 1)
    data = ConversationDataset([SEEN, UNSEEN], tmp_path, processor(), max_length=100)
    collate = ConversationCollator(VOCABULARY["<pad>"])
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY["<image>"])
    ).eval()
    with torch.no_grad():
        mixed, alone = model(**collate([data[0], data[1]])), model(**collate([data[1]]))
    assert torch.isfinite(mixed.loss)
    assert torch.isfinite(alone.loss)
    n = alone.logits.shape[1]  # what fills up a row is not attended to
    torch.testing.assert_close(mixed.logits[1, :n], alone.logits[0], atol=1e-5, rtol=1e-4)


def mix(pictured, texts, seed=0):
    random = np.random.default_rng(seed)
    kinds = random.permutation([True] * pictured + [False] * texts).tolist()
    return kinds, random.integers(1, 1000, pictured + texts).tolist()


@pytest.mark.parametrize(
    ("pictured", "texts", "size", "world"),
    [(50, 23, 4, 1), (50, 23, 4, 2), (51, 24, 4, 3), (9, 0, 2, 4), (33, 9, 2, 4)],
)
def test_every_index_comes_once_in_batches_of_one_modality(pictured, texts, size, world):
    kinds, lengths = mix(pictured, texts)
    batches = ModalityBatches(kinds, lengths, size, seed=3, world_size=world)
    out = list(batches)
    assert len(out) == len(batches)
    assert len(out) % world == 0
    assert Counter(index for batch in out for index in batch) == Counter(range(len(kinds)))
    assert batches.repeated == 0
    for start in range(0, len(out), world):
        step = out[start : start + world]
        assert len({kinds[index] for batch in step for index in batch}) == 1
        assert all(1 <= len(batch) <= size for batch in step)
        assert max(map(len, step)) - min(map(len, step)) <= 1


def test_the_order_is_a_matter_of_seed_and_epoch():
    kinds, lengths = mix(40, 20)
    first, second, other = (ModalityBatches(kinds, lengths, 4, seed) for seed in (3, 3, 4))
    assert list(first) == list(first) == list(second) != list(other)
    second.set_epoch(1)
    assert list(first) != list(second)
    first.set_epoch(1)
    assert list(first) == list(second)


def test_batches_are_of_similar_lengths():
    """Of each step of 32, the first of 8 processes gets the longest, the ninth longest, and so on."""
    _, lengths = mix(64, 0)
    batches = list(ModalityBatches([True] * 64, lengths, 4, seed=0, world_size=8))
    for start in range(0, 16, 8):
        dealt = [[lengths[index] for index in batch] for batch in batches[start : start + 8]]
        ordered = sorted((length for batch in dealt for length in batch), reverse=True)
        assert dealt == [ordered[process::8] for process in range(8)]


def test_too_few_to_go_round_are_repeated_and_counted():
    batches = ModalityBatches([True] * 5, [1] * 5, batch_size=1, seed=0, world_size=4)
    assert (batches.repeated, len(batches)) == (3, 8)
    assert Counter(i for batch in batches for i in batch).total() == 8
    assert ModalityBatches([True, False], [1, 1], batch_size=4, seed=0, world_size=3).repeated == 4


def test_accelerate_deals_whole_batches_to_the_processes():
    kinds, lengths = mix(21, 9)
    batches = ModalityBatches(kinds, lengths, 4, seed=0, world_size=2)
    shares = [list(BatchSamplerShard(batches, 2, who)) for who in (0, 1)]  # type: ignore[arg-type]
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == list(batches)
    for mine, yours in zip(*shares, strict=True):
        assert {kinds[i] for i in mine} == {kinds[i] for i in yours}
    loader = torch.utils.data.DataLoader(list(range(30)), batch_sampler=batches)  # type: ignore[arg-type]
    mine = prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
    assert [batch.tolist() for batch in mine] == shares[1]
    second = [batch.tolist() for batch in mine]  # the loader counts epochs, and says so to its batches
    batches.set_epoch(1)
    assert second == list(BatchSamplerShard(batches, 2, 1)) != shares[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"world_size": 0}, {"lengths": [1]}])
def test_batches_that_cannot_be_made(change):
    options = {"with_image": [True, True], "lengths": [1, 1], "batch_size": 1, "seed": 0, **change}
    with pytest.raises(SanError, match=r"it must be 1 or more|1 entries|2 entries"):
        ModalityBatches(**options)
