r"""Encodes conversations for LLaVA: token IDs, labels on the answers only, and pixel values.

`san_bench.vision_language.template` renders the text. The image precedes the first question, wherever the record has
its marker. The processor inserts the image tokens, and the offset mapping of the tokenizer locates the answers.

LLaVA-1.5 reads an image as one square. LLaVA-NeXT and LLaVA-OneVision split it into tiles by aspect ratio, so tensor
shapes and the number of tokens depend on the image size.
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
"""Image folder, or a function from name to image."""

TEXT = ("input_ids", "labels")
"""Text keys of examples; all other keys belong to the image."""


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Dataset of encoded conversations.

    Args:
        records: The conversations.
        images: Image folder, or a function from name to image.
        processor: A LLaVA processor with a fast tokenizer.
        max_length: Maximum number of tokens, including image tokens.
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
        """Returns the encoded conversation; see `encode`."""
        record = self.records[index]
        image = None if record.image is None else opened(self.images, record.image)
        return encode(record, image, self.processor, self.max_length, self.pad)


def opened(images: Images, name: str) -> Image.Image:
    """Opens an image by its name, as RGB.

    Raises:
        SanError: If it is missing, cannot be decoded, or is outside the folder.
    """
    return images(name) if callable(images) else read_image(images, name)


def encode(
    record: Conversation, image: Image.Image | None, processor: Any, max_length: int, pad: bool = True
) -> dict[str, Tensor]:
    """Encodes a conversation.

    Args:
        record: The conversation.
        image: Its RGB image, if it has one.
        processor: A LLaVA processor with a fast tokenizer.
        max_length: Maximum number of tokens; longer conversations are truncated.
        pad: Pads the image to a square with the processor's mean colour; unsupported with tiles.

    Returns:
        `input_ids` and `labels` of equal length, with `IGNORED` outside the answers and their end tokens; with an
        image, also the image outputs of the processor: `pixel_values` of shape (3, height, width), or (tiles, 3,
        height, width) with `image_sizes`.

    Raises:
        SanError: If the image is missing or unexpected, processor or template is unsupported, the image cannot be
            padded, or truncation would cut through it.
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
        last, more = int(places.max()), (len(places) - 1) * len(MARKER)  # the image precedes the answers
        if last >= max_length:
            raise SanError(
                f"max_length {max_length} cuts through the image of the conversation {record.id!r}, whose "
                f"{len(places)} tokens end at {last + 1}. Increase it."
            )
    learnt = torch.zeros_like(ids, dtype=torch.bool)
    for start, end in written.learnt:
        learnt |= (offsets[:, 0] < end + more) & (offsets[:, 1] > start + more)
    labels = torch.where(learnt, ids, IGNORED)
    return {**read, "input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_question(text: str, image: Image.Image | None, processor: Any, pad: bool = True) -> dict[str, Tensor]:
    """Encodes a question as a generation prompt.

    Args:
        text: The question, without an image marker.
        image: Its RGB image, if it has one.
        processor: A LLaVA processor with a fast tokenizer.
        pad: Pads the image to a square with the processor's mean colour; unsupported with tiles.

    Returns:
        `input_ids` and the image outputs of the processor.

    Raises:
        SanError: If processor or template is unsupported, or the image cannot be padded.
    """
    check_processor(processor, pad and image is not None)
    return _read(write_question(text, image is not None, processor), image, processor, pad)[0]


def check_processor(processor: Any, pad: bool = False) -> None:
    """Validates a processor.

    Raises:
        SanError: If it is not a LLaVA processor, its tokenizer is slow or has no EOS token, a required chat template is
            missing, or `pad` is set and it splits images into tiles.
    """
    wanted = ("image_token", "image_token_id", "vision_feature_select_strategy", "image_processor")
    patches = (
        () if getattr(processor, "num_image_tokens", None) else ("patch_size",)
    )  # either one gives the number of image tokens
    missing = [name for name in (*patches, *wanted) if getattr(processor, name, None) is None]
    kind = type(processor).__name__
    if missing:
        raise SanError(f"{kind} is not a LLaVA processor: it has no {', '.join(missing)}.")
    if processor.image_token != MARKER:
        raise SanError(f"The image token of the processor is {processor.image_token!r}, but the data uses {MARKER!r}.")
    tokenizer = processor.tokenizer
    known = tokenizer.convert_tokens_to_ids(MARKER)
    if known in (None, tokenizer.unk_token_id) or known != processor.image_token_id:
        raise SanError(f"The tokenizer has no image token {MARKER!r}. Add it, as in LLaVA.")
    if not getattr(tokenizer, "is_fast", False):
        raise SanError("The tokenizer is slow and has no offset mapping to locate the answers. Load a fast one.")
    if pad and in_tiles(processor):
        raise SanError(
            f"pad_to_square is true, but a {kind} splits an image into tiles by its aspect ratio. "
            "Set conversation.pad_to_square to false."
        )
    form_of(processor)


def _read(text: str, image: Image.Image | None, processor: Any, pad: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the model inputs for a text and its image, and the character offsets of each token."""
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
    """Returns tokenizer options that prevent a second BOS token."""
    begin = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}


@dataclass(frozen=True)
class Lengths:
    """Lengths of conversations.

    Attributes:
        tokens: Number of tokens of each conversation, including image tokens, before truncation.
        cut: Indices of truncated conversations.
        image_end: Largest number of tokens up to the end of an image; 0 without images. If it exceeds `max_length`,
            truncation cuts through an image.
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
    """Counts the tokens of conversations without decoding images.

    Args:
        records: The conversations.
        processor: A LLaVA processor.
        max_length: Maximum number of tokens.
        images: Image folder, or a function from name to image; required if the number of tokens depends on image size.
        batch_size: Conversations per tokenizer call.

    Raises:
        SanError: If processor or template is unsupported, or a required image size cannot be read.
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
    """Tokenizes rendered conversations; an image marker is one token."""
    return processor.tokenizer(texts, **_specials(texts[0], processor))["input_ids"]


def _taken(records: Sequence[Conversation], processor: Any, images: Images | None) -> list[int]:
    """Returns the number of image tokens of each conversation; 0 without an image."""
    if not in_tiles(processor):
        every = image_tokens(processor)
        return [every if record.image is not None else 0 for record in records]
    names = dict.fromkeys(record.image for record in records if record.image is not None)
    if names and images is None:
        raise SanError(
            f"The number of image tokens of a {type(processor).__name__} depends on the image size. Pass images to "
            "measure."
        )
    sizes = {name: images(name).size if callable(images) else read_size(images or "", name) for name in names}
    counts = {size: image_tokens(processor, size) for size in dict.fromkeys(sizes.values())}
    return [0 if record.image is None else counts[sizes[record.image]] for record in records]


def image_tokens(processor: Any, size: tuple[int, int] | None = None) -> int:
    """Returns the number of tokens of an image: patches and additional tokens, minus the one that `default` drops.

    Args:
        processor: A LLaVA processor.
        size: Width and height of the image; required for processors with tiles, which get a blank image.

    Raises:
        SanError: If the processor is unsupported, or a required size is missing.
    """
    check_processor(processor)
    if in_tiles(processor):
        if size is None:
            raise SanError(
                f"The number of image tokens of a {type(processor).__name__} depends on the image size. Pass size."
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
    """Collates conversations with right padding.

    Args:
        pad_token_id: ID of the padding token.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the padded batch with stacked images."""
        return {**Collator(self.pad_token_id, "right")(examples), **stack_images(examples)}


def stack_images(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks the image tensors of examples that have an image; returns an empty dict if none has.

    Images with fewer tiles are padded with empty tiles, which models ignore.
    """
    shown = [{name: e[name] for name in e if name not in TEXT} for e in examples if "pixel_values" in e]
    out: dict[str, Tensor] = {}
    for name in shown[0] if shown else ():
        parts = [one[name] for one in shown]
        tiled = parts[0].ndim == 4
        out[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) if tiled else torch.stack(parts)
    return out
