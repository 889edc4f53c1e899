"""Tokenizer preparation: one BOS token, the right EOS, and a padding token.

LLaMA 1 and 2 have no padding token; published code pads with the unknown token, ID 0. In LLaMA 3, ID 0 is an ordinary
token, so a reserved one is used. BOS is added exactly once, whether or not the tokenizer adds it.

Padding is identified by masks only, so the padding token may equal EOS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from san_peft.errors import SanError

Family = Literal["llama", "llama-3", "other"]
"""Tokenizer family; LLaMA 1 and 2 share their vocabulary."""

RESERVED = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
"""Padding tokens for LLaMA 3: the dedicated one (since 3.1), or else a reserved one."""

ENDS = ("<|end_of_text|>", "<|eot_id|>")
"""End of text and end of turn in LLaMA 3."""


@dataclass(frozen=True)
class PreparedTokenizer:
    """A prepared tokenizer.

    Attributes:
        tokenizer: The transformers tokenizer, with the padding token set.
        family: Tokenizer family.
        bos: ID of the BOS token, or `None` if texts do not start with one.
        eos: ID of the EOS token for training.
        stops: Stop tokens for generation: `eos` and other end tokens of the family.
        pad: ID of the padding token.
    """

    tokenizer: Any
    family: Family
    bos: int | None
    eos: int
    stops: tuple[int, ...]
    pad: int

    def encode(self, text: str) -> list[int]:
        """Tokenizes a text with one BOS token and no EOS."""
        return self._begin(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_after(self, prompt: str, continuation: str) -> tuple[list[int], int]:
        """Tokenizes prompt and continuation as one text, and returns the index where the continuation starts.

        A token that spans the boundary belongs to the continuation.

        Args:
            prompt: The prompt.
            continuation: The text after it.

        Raises:
            SanError: If a token spans the boundary and the tokenizer has no offset mapping.
        """
        alone, whole = self.encode(prompt), self.encode(prompt + continuation)
        if whole[: len(alone)] == alone:
            return whole, len(alone)
        if not getattr(self.tokenizer, "is_fast", False):
            raise SanError(
                f"{type(self.tokenizer).__name__} has no offset mapping, so the start of the answer is unknown. Load a "
                "fast tokenizer with AutoTokenizer, or train on the full text (loss_on 'full')."
            )
        read = self.tokenizer(prompt + continuation, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in read["offset_mapping"]]
        first = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))
        return whole, first + len(whole) - len(ends)

    def decode(self, tokens: list[int]) -> str:
        """Decodes tokens, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _begin(self, tokens: list[int]) -> list[int]:
        return tokens if self.bos is None or tokens[:1] == [self.bos] else [self.bos, *tokens]


def prepare_tokenizer(tokenizer: Any, pad: str = "auto", rows: int | None = None) -> PreparedTokenizer:
    """Prepares a tokenizer and sets its padding token.

    Args:
        tokenizer: A transformers tokenizer.
        pad: `unk`, `eos`, or a token. `auto` uses `<unk>` for LLaMA 1 and 2, the first available token of `RESERVED`
            for LLaMA 3, and otherwise the existing padding token, else unknown, else EOS.
        rows: Number of rows of the model's embedding, to check the token IDs; unchecked by default.

    Returns:
        The prepared tokenizer.

    Raises:
        SanError: If a required token is missing, or the embedding is too small.
    """
    vocabulary = tokenizer.get_vocab()
    family = _family(vocabulary)
    name = f"The tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
    eos = tokenizer.eos_token_id
    if eos is None:
        raise SanError(f"{name} has no EOS token, so no answer would end. Set its eos_token.")
    bos = _beginning(tokenizer, family)
    if bos is None and family != "other":
        raise SanError(f"{name} is a LLaMA tokenizer without a BOS token. Set its bos_token.")
    token = _padding(tokenizer, family, vocabulary, pad, name)
    tokenizer.pad_token = token
    stops = [eos, *(vocabulary[end] for end in ENDS if family == "llama-3" and end in vocabulary)]
    prepared = PreparedTokenizer(tokenizer, family, bos, eos, tuple(dict.fromkeys(stops)), vocabulary[token])
    beyond = {what: i for what, i in (("padding", prepared.pad), ("end", eos), ("beginning", bos)) if _beyond(i, rows)}
    if beyond:
        what = ", ".join(f"{key} {i}" for key, i in beyond.items())
        raise SanError(
            f"{name} has tokens beyond the {rows} rows of the model's embedding: {what}. Choose another padding "
            "token with pad, or resize the model with resize_token_embeddings."
        )
    return prepared


def _beyond(token: int | None, rows: int | None) -> bool:
    return token is not None and rows is not None and token >= rows


def _family(vocabulary: dict[str, int]) -> Family:
    if "<|begin_of_text|>" in vocabulary and "<|end_of_text|>" in vocabulary:
        return "llama-3"
    return "llama" if [vocabulary.get(t) for t in ("<unk>", "<s>", "</s>")] == [0, 1, 2] else "other"


def _beginning(tokenizer: Any, family: Family) -> int | None:
    """Returns BOS: always for LLaMA, for others only if their tokenizer adds it."""
    bos = tokenizer.bos_token_id
    if family != "other" or bos is None:
        return bos
    return bos if tokenizer("a")["input_ids"][:1] == [bos] else None


def _padding(tokenizer: Any, family: Family, vocabulary: dict[str, int], pad: str, name: str) -> str:
    wanted = {"unk": tokenizer.unk_token, "eos": tokenizer.eos_token}.get(pad, pad)
    if pad != "auto":
        if wanted not in vocabulary:
            raise SanError(
                f"{name} has no token {pad!r} for padding. Choose auto, unk, eos or a token of its vocabulary."
            )
        return wanted
    if family == "llama":
        return "<unk>"
    present = tokenizer.pad_token
    if family == "llama-3":
        if present in vocabulary and re.fullmatch(r"<\|.+\|>", present):
            return present
        kept = next((token for token in RESERVED if token in vocabulary), None)
        if kept is None:
            raise SanError(
                f"{name} is a LLaMA 3 tokenizer without a reserved token for padding: none of {', '.join(RESERVED)}. "
                "Set pad to 'eos' or another token."
            )
        return kept
    choices = (present, tokenizer.unk_token, tokenizer.eos_token)
    return next(token for token in choices if token is not None and token in vocabulary)
