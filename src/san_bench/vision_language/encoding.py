r"""From a conversation to what LLaVA reads: token ids, labels of the answers alone, and the pixels of its image.

`san_bench.vision_language.template` says how it is written; here it becomes tensors. The image stands in front of the
first question, wherever the record has its marker. The processor puts in as many tokens as the image takes, and the
tokenizer says which tokens the answers are.

LLaVA-1.5 reads an image as one square. LLaVA-NeXT and LLaVA-OneVision cut it into tiles, as many as its shape asks for,
so its tensors and its number of tokens depend on its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from san_bench.language.prompts import IGNORED, Collator
from san_bench.vision_language.images import mean_colour, pad_to_square, read_image, read_size
from san_bench.vision_language.records import MARKER, Conversation
from san_bench.vision_language.template import form_of, in_tiles, write, write_question
from san_peft.errors import SanError

Images = str | Path | Callable[[str], Image.Image]
"""Folder that images are below, or what makes an image of its name."""

TEXT = ("input_ids", "labels")
"""What examples hold of text; all else is of their images."""


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Conversations as the tensors that LLaVA and transformers' Trainer read.

    Args:
        records: The conversations.
        images: Folder that their images are below, or what makes an image of its name.
        processor: A processor of a LLaVA with a fast tokenizer.
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
        """Returns what `encode` does."""
        record = self.records[index]
        image = None if record.image is None else opened(self.images, record.image)
        return encode(record, image, self.processor, self.max_length, self.pad)


def opened(images: Images, name: str) -> Image.Image:
    """Returns an image in RGB by its name.

    Raises:
        SanError: If it is missing, cannot be decoded, or leaves the folder.
    """
    return images(name) if callable(images) else read_image(images, name)


def encode(
    record: Conversation, image: Image.Image | None, processor: Any, max_length: int, pad: bool = True
) -> dict[str, Tensor]:
    """Returns a conversation as tensors.

    Args:
        record: The conversation.
        image: Its image in RGB, if it has one.
        processor: A processor of a LLaVA with a fast tokenizer.
        max_length: Tokens after which it is cut off.
        pad: Pads the image to a square with the processor's mean colour; not where images are cut into tiles.

    Returns:
        `input_ids` and `labels` of one length, the labels `IGNORED` outside the answers and their end tokens; and where
        there is an image, what else the processor makes of it: `pixel_values` of shape (3, height, width), or (tiles,
        3, height, width) with `image_sizes`.

    Raises:
        SanError: If there is an image without need or none where one is needed, the processor is of another kind or its
            template cannot be used, the image cannot be padded, or the cut would go through it.
    """
    check_processor(processor, pad and image is not None)
    if (image is None) != (record.image is None):
        has, given = "no" if record.image is None else "an", "none" if image is None else "one"
        raise SanError(f"The conversation {record.id!r} has {has} image, but {given} was given.")
    written = write(record, processor)
    read, offsets = _read(written.text, image, processor, pad)
    ids, more = read["input_ids"], 0
    if image is not None:
        (places,) = (ids == processor.image_token_id).nonzero(as_tuple=True)
        last, more = int(places.max()), (len(places) - 1) * len(MARKER)  # the answers come after the image
        if last >= max_length:
            raise SanError(
                f"max_length {max_length} cuts through the image of the conversation {record.id!r}, whose "
                f"{len(places)} tokens end at {last + 1}. Make it larger."
            )
    learnt = torch.zeros_like(ids, dtype=torch.bool)
    for start, end in written.learnt:
        learnt |= (offsets[:, 0] < end + more) & (offsets[:, 1] > start + more)
    labels = torch.where(learnt, ids, IGNORED)
    return {**read, "input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_question(text: str, image: Image.Image | None, processor: Any, pad: bool = True) -> dict[str, Tensor]:
    """Returns a question as tensors, after which the model answers.

    Args:
        text: The question, without a marker of the image.
        image: Its image in RGB, if it has one.
        processor: A processor of a LLaVA with a fast tokenizer.
        pad: Pads the image to a square with the processor's mean colour; not where images are cut into tiles.

    Returns:
        `input_ids`, and what else the processor makes of an image.

    Raises:
        SanError: If the processor is of another kind, its template cannot be used, or the image cannot be padded.
    """
    check_processor(processor, pad and image is not None)
    return _read(write_question(text, image is not None, processor), image, processor, pad)[0]


def check_processor(processor: Any, pad: bool = False) -> None:
    """Checks that a processor says all that is needed of it, and that images may be padded if they are to be.

    Raises:
        SanError: If it is none of a LLaVA, has a slow tokenizer or one without an end token, lacks a template that it
            needs, or is to pad images that it cuts into tiles.
    """
    wanted = ("image_token", "image_token_id", "vision_feature_select_strategy", "image_processor")
    patches = () if getattr(processor, "num_image_tokens", None) else ("patch_size",)  # one of both says how many
    missing = [name for name in (*patches, *wanted) if getattr(processor, name, None) is None]
    kind = type(processor).__name__
    if missing:
        raise SanError(f"The processor {kind} is none of a LLaVA: no {', '.join(missing)}.")
    if processor.image_token != MARKER:
        raise SanError(f"The processor's token of an image is {processor.image_token!r}, but the data has {MARKER!r}.")
    tokenizer = processor.tokenizer
    known = tokenizer.convert_tokens_to_ids(MARKER)
    if known in (None, tokenizer.unk_token_id) or known != processor.image_token_id:
        raise SanError(f"The tokenizer has no token {MARKER!r}, which stands for an image. Add it, as LLaVA's has it.")
    if not getattr(tokenizer, "is_fast", False):
        raise SanError("The tokenizer is a slow one, which cannot say where the answers are. Load a fast one.")
    if pad and in_tiles(processor):
        raise SanError(
            f"pad_to_square is true, but a {kind} cuts an image into tiles by its shape, which is lost in a square. "
            "Set conversation.pad_to_square to false."
        )
    form_of(processor)


def _read(text: str, image: Image.Image | None, processor: Any, pad: bool) -> tuple[dict[str, Tensor], Tensor]:
    """What a model reads of a text and its image, and where in the text each token begins and ends."""
    if image is not None and pad:
        image = pad_to_square(image, mean_colour(processor.image_processor.image_mean))
    out = processor(
        text=[text],
        images=None if image is None else [image],
        return_offsets_mapping=True,
        **_specials(text, processor),
    )
    read = {"input_ids": torch.as_tensor(out["input_ids"][0], dtype=torch.int64)}
    if image is not None:
        for name in (name for name in processor.image_processor.model_input_names if name in out):
            value = torch.as_tensor(out[name][0])
            read[name] = value.float() if value.is_floating_point() else value.long()
    return read, torch.as_tensor(out["offset_mapping"][0])


def _specials(text: str, processor: Any) -> dict[str, bool]:
    """Options that keep a tokenizer from beginning a text with a second begin token."""
    begin = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}


@dataclass(frozen=True)
class Lengths:
    """How long conversations are.

    Attributes:
        tokens: Tokens of each conversation, those of its image included, before it is cut off.
        cut: Indices of those that are cut off.
        image_end: Tokens up to the end of the image where there are most; 0 without images. If it is more than what
            is left of a conversation, the cut goes through an image.
    """

    tokens: tuple[int, ...]
    cut: tuple[int, ...]
    image_end: int


def measure(
    records: Sequence[Conversation],
    processor: Any,
    max_length: int,
    images: Images | None = None,
    batch_size: int = 1000,
) -> Lengths:
    """Counts the tokens of conversations without decoding an image.

    Args:
        records: The conversations.
        processor: A processor of a LLaVA.
        max_length: Tokens after which they are cut off.
        images: Folder that their images are below, or what makes an image of its name; asked for their sizes where
            the number of tokens depends on them.
        batch_size: Conversations that the tokenizer gets at a time.

    Raises:
        SanError: If the processor is of another kind or its template cannot be used, or the size of an image is needed
            and cannot be read.
    """
    check_processor(processor)
    taken = _taken(records, processor, images)

    tokens: list[int] = []
    image_end = 0
    for start in range(0, len(records), batch_size):
        part = range(len(records))[start : start + batch_size]
        texts = [write(records[index], processor).text for index in part]
        for index, ids in zip(part, _ids(texts, processor), strict=True):
            more = taken[index] - 1 if taken[index] else 0
            if taken[index]:
                image_end = max(image_end, ids.index(processor.image_token_id) + 1 + more)
            tokens.append(len(ids) + more)
    cut = [index for index, number in enumerate(tokens) if number > max_length]
    return Lengths(tuple(tokens), tuple(cut), image_end)


def _ids(texts: Sequence[str], processor: Any) -> list[list[int]]:
    """Tokens of texts that one template wrote; a marker is one token."""
    return processor.tokenizer(texts, **_specials(texts[0], processor))["input_ids"]


def _taken(records: Sequence[Conversation], processor: Any, images: Images | None) -> list[int]:
    """Tokens that the image of each conversation takes; 0 without one."""
    if not in_tiles(processor):
        every = image_tokens(processor)
        return [every if record.image is not None else 0 for record in records]
    names = dict.fromkeys(record.image for record in records if record.image is not None)
    if names and images is None:
        raise SanError(
            f"How many tokens an image takes depends on its size for a {type(processor).__name__}. Give measure the "
            "images too."
        )
    sizes = {name: images(name).size if callable(images) else read_size(images or "", name) for name in names}
    counts = {size: image_tokens(processor, size) for size in dict.fromkeys(sizes.values())}
    return [0 if record.image is None else counts[sizes[record.image]] for record in records]


def image_tokens(processor: Any, size: tuple[int, int] | None = None) -> int:
    """Returns how many tokens an image takes: its patches and additional tokens, less the one that `default` drops.

    Args:
        processor: A processor of a LLaVA.
        size: Width and height of the image, where it is cut into tiles; the processor is given an empty one.

    Raises:
        SanError: If it says too little, or no size is given where one is needed.
    """
    check_processor(processor)
    if in_tiles(processor):
        if size is None:
            raise SanError(
                f"How many tokens an image takes depends on its size for a {type(processor).__name__}. Give its size."
            )
        ids = processor(text=[MARKER], images=[Image.new("RGB", size)])["input_ids"][0]
        return list(ids).count(processor.image_token_id)
    vision = processor.image_processor
    area = vision.crop_size if getattr(vision, "do_center_crop", False) else vision.size
    height = area["height"] if "height" in area else area["shortest_edge"]
    width = area["width"] if "width" in area else area["shortest_edge"]
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
        """Returns the batch, with what `stack_images` makes of the images."""
        return {**Collator(self.pad_token_id, "right")(examples), **stack_images(examples)}


def stack_images(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns what examples hold of images, one row for each that has one; nothing if none has.

    Where images have different numbers of tiles, rows are filled up with empty ones, which models leave out.
    """
    shown = [{name: e[name] for name in e if name not in TEXT} for e in examples if "pixel_values" in e]
    out: dict[str, Tensor] = {}
    for name in shown[0] if shown else ():
        parts = [one[name] for one in shown]
        tiled = parts[0].ndim == 4
        out[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) if tiled else torch.stack(parts)
    return out
