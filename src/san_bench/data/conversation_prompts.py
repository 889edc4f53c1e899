r"""From a conversation to what LLaVA reads: token ids, labels of the answers alone, and the pixels of its image.

The template is vicuna v1, as LLaVA-1.5 trains with (`conv_vicuna_v1` of haotian-liu/LLaVA, llava/conversation.py): a
system sentence, `USER: ` and `ASSISTANT: ` before the turns, a space after a question and the end token after an
answer. The image stands in front of the first question, on a line of its own, wherever the record has its marker.
transformers renders it, counts the tokens of the image and finds those of the answers; a checkpoint's own template may
be another one (that of llava-hf/llava-1.5-7b-hf has no system sentence and no end tokens), so it is not asked.

Example:
    >>> from san_bench.data.conversations import Conversation, Turn
    >>> record = Conversation(1, (Turn("human", "What is it?\n<image>"), Turn("gpt", "A bus.")), "bus.jpg")
    >>> messages(record)[0]
    {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from san_bench.data.conversation_images import mean_colour, pad_to_square, read_image
from san_bench.data.conversations import MARKER, Conversation
from san_bench.data.prompts import IGNORED
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
    + "{% else %}ASSISTANT:"
    + "{% generation %} {{ message.content[0].text }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Vicuna v1 as a chat template of transformers. What is learnt begins at the space in front of the answer, since
tokenizers of Llama's kind write that space and the first word as one token."""


Images = str | Path | Callable[[str], Image.Image]
"""Folder that images are below, or what makes an image of its name."""


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Conversations as the tensors that LLaVA and transformers' Trainer read.

    Args:
        records: The conversations.
        images: Folder that their images are below, or what makes an image of its name.
        processor: A `LlavaProcessor` with a fast tokenizer.
        max_length: Tokens after which a conversation is cut off, those of the image included.
        pad: Pads images to squares with the processor's mean colour, as LLaVA-1.5 does.
    """

    def __init__(
        self, records: Sequence[Conversation], images: Images, processor: Any, max_length: int, pad: bool = True
    ) -> None:
        self.records, self.images, self.processor = records, images, processor
        self.max_length, self.pad = max_length, pad

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns `input_ids` and `labels`, and `pixel_values` of shape (3, height, width) where there is an image."""
        record = self.records[index]
        image = None if record.image is None else opened(self.images, record.image)
        return encode(record, image, self.processor, self.max_length, self.pad)


def opened(images: Images, name: str) -> Image.Image:
    """Returns an image in RGB by its name.

    Raises:
        SanError: If it is missing, cannot be decoded, or leaves the folder.
    """
    return images(name) if callable(images) else read_image(images, name)


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


def render(record: Conversation, processor: Any, ask: bool = False) -> str:
    """Returns a conversation as text, with one marker for its image.

    Args:
        record: The conversation; with `ask`, its last answer is left out.
        processor: A `LlavaProcessor`.
        ask: Ends with the words after which the model answers.
    """
    turns = messages(record)
    return processor.apply_chat_template(
        turns[:-1] if ask else turns, chat_template=TEMPLATE, add_generation_prompt=ask, tokenize=False
    )


def encode(
    record: Conversation, image: Image.Image | None, processor: Any, max_length: int, pad: bool = True
) -> dict[str, Tensor]:
    """Returns a conversation as tensors.

    Args:
        record: The conversation.
        image: Its image in RGB, if it has one.
        processor: A `LlavaProcessor` with a fast tokenizer.
        max_length: Tokens after which it is cut off.
        pad: Pads the image to a square with the processor's mean colour.

    Returns:
        `input_ids` and `labels` of one length, the labels `IGNORED` outside the answers and their end tokens; and
        `pixel_values` of shape (3, height, width) where there is an image.

    Raises:
        SanError: If there is an image without need or none where one is needed, the processor is of another kind, or
            the cut would go through the image.
    """
    _check_processor(processor)
    if (image is None) != (record.image is None):
        has, given = "no" if record.image is None else "an", "none" if image is None else "one"
        raise SanError(f"The conversation {record.id!r} has {has} image, but {given} was given.")
    out, read = _read(messages(record), image, processor, pad, return_assistant_tokens_mask=True)
    ids, learnt = read["input_ids"], torch.as_tensor(out["assistant_masks"][0], dtype=torch.bool)
    if image is not None:
        last = int((ids == processor.image_token_id).nonzero().max())
        if last >= max_length:
            raise SanError(
                f"max_length {max_length} cuts through the image of the conversation {record.id!r}, whose "
                f"{image_tokens(processor)} tokens end at {last + 1}. Make it larger; LLaVA-1.5 has 2048."
            )
    labels = torch.where(learnt, ids, IGNORED)
    return {**read, "input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_question(text: str, image: Image.Image | None, processor: Any, pad: bool = True) -> dict[str, Tensor]:
    """Returns a question as tensors, after which the model answers.

    Args:
        text: The question, without a marker of the image.
        image: Its image in RGB, if it has one.
        processor: A `LlavaProcessor` with a fast tokenizer.
        pad: Pads the image to a square with the processor's mean colour.

    Returns:
        `input_ids`, and `pixel_values` of shape (3, height, width) where there is an image.

    Raises:
        SanError: If the processor is of another kind.
    """
    _check_processor(processor)
    content = [{"type": "text", "text": text}]
    turns = [{"role": "user", "content": content if image is None else [{"type": "image"}, *content]}]
    return _read(turns, image, processor, pad, add_generation_prompt=True)[1]


def _read(
    turns: list[dict[str, Any]], image: Image.Image | None, processor: Any, pad: bool, **options: bool
) -> tuple[Any, dict[str, Tensor]]:
    """What the processor makes of turns, of which the first begins with the image; whole, and as tensors."""
    if image is not None:
        square = pad_to_square(image, mean_colour(processor.image_processor.image_mean)) if pad else image
        turns[0]["content"][0] = {"type": "image", "image": square}
    out = processor.apply_chat_template([turns], chat_template=TEMPLATE, tokenize=True, return_dict=True, **options)
    read = {"input_ids": torch.as_tensor(out["input_ids"][0], dtype=torch.int64)}
    if image is not None:
        read["pixel_values"] = torch.as_tensor(out["pixel_values"][0], dtype=torch.float32)
    return out, read


@dataclass(frozen=True)
class Lengths:
    """How long conversations are.

    Attributes:
        tokens: Tokens of each conversation, those of its image included, before it is cut off.
        cut: Indices of those that are cut off.
        silent: Indices of those of which no token of an answer is left, so that nothing is learnt from them.
    """

    tokens: tuple[int, ...]
    cut: tuple[int, ...]
    silent: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.cut):,} of {len(self.tokens):,} conversations are cut off, and {len(self.silent):,} of them "
            "before their first answer"
        )


def measure(records: Sequence[Conversation], processor: Any, max_length: int, batch_size: int = 1000) -> Lengths:
    """Counts the tokens of conversations without opening an image.

    Args:
        records: The conversations.
        processor: A `LlavaProcessor`.
        max_length: Tokens after which they are cut off.
        batch_size: Conversations that the tokenizer gets at a time.

    Raises:
        SanError: If the processor is of another kind.
    """
    _check_processor(processor)
    extra = image_tokens(processor) - 1

    def count(chosen: Sequence[Conversation]) -> list[int]:
        counts: list[int] = []
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            ids = processor.tokenizer([render(record, processor) for record in part])["input_ids"]
            counts += [len(i) + (extra if r.image is not None else 0) for i, r in zip(ids, part, strict=True)]
        return counts

    tokens = count(records)
    cut = [index for index, number in enumerate(tokens) if number > max_length]
    questions = [processor.tokenizer(render(_opening(records[i]), processor, ask=True))["input_ids"] for i in cut]
    before = [len(q) + (extra if records[i].image is not None else 0) for q, i in zip(questions, cut, strict=True)]
    silent = [index for index, number in zip(cut, before, strict=True) if number >= max_length]
    return Lengths(tuple(tokens), tuple(cut), tuple(silent))


def image_tokens(processor: Any) -> int:
    """Returns how many tokens an image takes: its patches and additional tokens, less the one that `default` drops.

    Args:
        processor: A `LlavaProcessor`.

    Raises:
        SanError: If it says too little.
    """
    _check_processor(processor)
    vision = processor.image_processor
    size = vision.crop_size if getattr(vision, "do_center_crop", False) else vision.size
    height = size["height"] if "height" in size else size["shortest_edge"]
    width = size["width"] if "width" in size else size["shortest_edge"]
    patches = (height // processor.patch_size) * (width // processor.patch_size)
    return patches + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")


class ConversationCollator:
    """Makes a batch of conversations of different lengths.

    Args:
        pad_token_id: Token that shorter ones are filled up with, on the right; attention leaves it out.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the batch; `pixel_values` only where there are images, one row for each example that has one."""
        ids: list[Int64[Tensor, " n"]] = [example["input_ids"] for example in examples]
        labels: list[Int64[Tensor, " n"]] = [example["labels"] for example in examples]
        pixels: list[Float32[Tensor, "3 h w"]] = [e["pixel_values"] for e in examples if "pixel_values" in e]
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=IGNORED),
        }
        return {**batch, "pixel_values": torch.stack(pixels)} if pixels else batch


def _opening(record: Conversation) -> Conversation:
    return Conversation(record.id, record.turns[:2], record.image)


def _check_processor(processor: Any) -> None:
    wanted = ("image_token", "image_token_id", "patch_size", "vision_feature_select_strategy", "image_processor")
    missing = [name for name in wanted if getattr(processor, name, None) is None]
    if missing:
        raise SanError(f"The processor {type(processor).__name__} is no LlavaProcessor: no {', '.join(missing)}.")
    if processor.image_token != MARKER:
        raise SanError(f"The processor's token of an image is {processor.image_token!r}, but the data has {MARKER!r}.")
    tokenizer = processor.tokenizer
    known = tokenizer.convert_tokens_to_ids(MARKER)
    if known in (None, tokenizer.unk_token_id) or known != processor.image_token_id:
        raise SanError(f"The tokenizer has no token {MARKER!r}, which stands for an image. Add it, as LLaVA's has it.")
    if tokenizer.eos_token_id is None:
        raise SanError("The tokenizer has no end token (eos_token), so a model could not learn where answers end.")
    if not getattr(processor.tokenizer, "is_fast", False):
        raise SanError("The tokenizer is a slow one, which cannot say where the answers are. Load a fast one.")
