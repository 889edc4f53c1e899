"""Small models that see images in tiles, LLaVA-NeXT and LLaVA-OneVision, with their processors and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

GRID = [[8, 16], [16, 8], [16, 16], [8, 24]]
"""Sizes, height first, to which images may be drawn out; a tile has 8x8 pixels in 2x2 patches."""

SIZES = ((8, 8), (20, 9), (7, 16), (30, 30))
"""Sizes of images, width first; in tiles: two of which one is half empty, three, two, and four."""

TOKENS = {(8, 8): 4 + 2 * 3, (20, 9): 4 + 2 * 5, (7, 16): 4 + 4 * 3, (30, 30): 4 + 4 * 5}
"""Tokens that they take: patches of the whole, and those of the tiles with a new line a row, without empty columns."""

IMAGES = "{% for part in message.content | selectattr('type', 'equalto', 'image') %}"
TEXTS = "{% for part in message.content | selectattr('type', 'equalto', 'text') %}"
VICUNA = (
    "{% for message in messages %}{{ message.role.upper() + ': ' }}"
    + IMAGES + "{{ '<image>\n' }}{% endfor %}" + TEXTS + "{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    + "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)  # fmt: skip
"""Writes no end of an answer, and a blank after what the model is asked with."""

MISTRAL = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' }}"
    + IMAGES + "{{ '<image>\n' }}{% endfor %}" + TEXTS + "{{ part.text }}{% endfor %}{{ ' [/INST]' }}"
    + "{% else %}{{ ' ' + message.content[0].text + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
"""Asks with nothing but the end of a question."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' }}"
    + IMAGES + "{{ '<image>' }}{% endfor %}" + TEXTS + "{{ '\n' + part.text }}{% endfor %}{{ '<|im_end|>' }}"
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
"""Writes a blank after a role, but none where it asks."""

KINDS = ("next", "onevision")


def tokenizer(specials: tuple[str, ...], begin: bool, end: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and special ones."""
    names = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    if begin:
        letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>" if begin else None, eos_token=end, pad_token="<pad>",
        additional_special_tokens=[name for name in specials if name not in ("<s>", end, "<pad>")],
    )  # fmt: skip


def processor(kind: str, template: str | None = "", end: str | None = None) -> Any:
    """A processor; with the template of its kind, unless another one or none is given."""
    if kind == "next":
        words = tokenizer(("<s>", "</s>", "<pad>", "<image>"), True, end or "</s>")
        images = LlavaNextImageProcessor(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_grid_pinpoints=GRID
        )
        return LlavaNextProcessor(
            images, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=VICUNA if template == "" else template,
        )  # fmt: skip
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<image>", "<video>")
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size={"height": 8, "width": 8}, image_grid_pinpoints=GRID),
        tokenizer(names, False, end or "<|im_end|>"), LlavaOnevisionVideoProcessor(size={"height": 8, "width": 8}),
        num_image_tokens=4, vision_feature_select_strategy="full", chat_template=CHATML if template == "" else template,
    )  # fmt: skip


def model(kind: str) -> Any:
    """A model that fits the processor."""
    torch.manual_seed(0)
    sees: dict[str, Any] = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    speaks: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    ours: dict[str, Any] = {
        "image_grid_pinpoints": GRID, "image_token_id": processor(kind).image_token_id, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "next":
        return LlavaNextForConditionalGeneration(
            LlavaNextConfig(vision_config=CLIPVisionConfig(**sees), text_config=LlamaConfig(**speaks), **ours)
        )
    parts = {"vision_config": SiglipVisionConfig(**sees, vision_use_head=False), "text_config": Qwen2Config(**speaks)}
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**parts, **ours, video_token_id=5))


def picture(number: int) -> Image.Image:
    """One of `SIZES`, red or blue."""
    return Image.new("RGB", SIZES[number % 4], "red" if number % 2 else "blue")


def talk(number: int, shown: bool) -> dict[str, Any]:
    """A record: with an image, of what colour it is; without one, always of the same answer."""
    turns = [{"from": "human", "value": "What?\n<image>" if shown else "Who?"}]
    turns.append({"from": "gpt", "value": "me" if not shown else "red" if number % 2 else "blue"})
    return {"id": number, "conversations": turns} | ({"image": f"{number}.png"} if shown else {})


def place(folder: Path, kind: str) -> Path:
    """Writes a model with its processor, nine conversations and six questions."""
    model(kind).save_pretrained(folder / "model")
    processor(kind).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for number in range(12):
        picture(number).save(folder / "data" / f"{number}.png")
    (folder / "data" / "train.json").write_text(json.dumps([talk(n, n < 7) for n in range(9)]))
    (folder / "data" / "test.json").write_text(json.dumps([talk(n, n < 12) for n in range(8, 14)]))
    return folder
