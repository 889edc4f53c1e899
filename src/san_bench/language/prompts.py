"""Prompts, tokenization, and loss masks for language models.

Both templates are Alpaca's. `clean` is the usual one. `legacy` reproduces the published commonsense code exactly: all
lines except the first are indented by 16 spaces, and training and evaluation differ in whitespace at the end of the
first line and on empty lines.

Example:
    >>> from san_bench.language.instructions import Instruction
    >>> record = Instruction("Is water wet?", "", "the correct answer is true", "true")
    >>> print(prompt(record, "clean", "evaluation"))
    Below is an instruction that describes a task. Write a response that appropriately completes the request.
    <BLANKLINE>
    ### Instruction:
    Is water wet?
    <BLANKLINE>
    ### Response:
    <BLANKLINE>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from san_bench.language.chat import encode_asked, encode_chat
from san_bench.language.formats import Chat, Completion, Item, Passage
from san_bench.language.instructions import LISTED, Instruction
from san_bench.language.tokenizer import PreparedTokenizer
from san_peft.errors import SanError

Template = Literal["legacy", "clean"]
Phase = Literal["training", "evaluation"]
LossOn = Literal["full", "answer"]

PREAMBLE = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
RESPONSE = "### Response:"
"""Header before the response."""

INDENT = " " * 16
"""Indentation of all lines of the legacy template except the first, including the response."""

CUTOFF = 256
"""Maximum tokens of a record in the published training, including BOS and EOS."""

IGNORED = -100
"""Label of tokens without loss."""


def prompt(record: Instruction, template: Template, phase: Phase) -> str:
    """Returns the prompt of a record. In training, the output is appended directly.

    Args:
        record: The record.
        template: `legacy` as published, or `clean`.
        phase: Only affects `legacy`.
    """
    middle = ", paired with an input that provides further context. " if record.input else ". "
    first = f"{PREAMBLE}{middle}{REQUEST}"
    parts = ["### Instruction:", record.instruction]
    if record.input:
        parts += ["", "### Input:", record.input]
    parts += ["", RESPONSE, ""]
    if template == "clean":
        return "\n".join([first, "", *parts])
    blanks = {("training", False): 2, ("training", True): 1, ("evaluation", False): 1, ("evaluation", True): 0}
    first += " " * blanks[phase, bool(record.input)]
    empty = INDENT if phase == "training" else ""
    lines = [INDENT + part if part else empty for part in parts[:-1]]
    return "\n".join([first, "", *lines, INDENT])


def encode_item(record: Item, tokenizer: PreparedTokenizer, template: Template) -> tuple[list[int], list[bool]]:
    """Tokenizes a record for training, without truncation and without the EOS token after it.

    Args:
        record: The record.
        tokenizer: A prepared tokenizer.
        template: Prompt template of instructions.

    Returns:
        Token IDs, and for each whether it belongs to the output; in a text without a prompt, all do.

    Raises:
        SanError: If the chat template does not fit a conversation.
    """
    if isinstance(record, Chat):
        return encode_chat(tokenizer.tokenizer, record)
    if isinstance(record, Passage):
        tokens = tokenizer.encode(record.text)
        return tokens, [True] * len(tokens)
    text = record.prompt if isinstance(record, Completion) else prompt(record, template, "training")
    tokens, start = tokenizer.encode_after(text, record.output)
    return tokens, [False] * start + [True] * (len(tokens) - start)


def question_of(record: Item, tokenizer: PreparedTokenizer, template: Template) -> str | list[int]:
    """Returns what comes before the output of a record, to generate the output; of a text without a prompt, all.

    Returns:
        A text without BOS; of a conversation the token IDs, as its chat template decides about BOS.
    """
    if isinstance(record, Chat):
        return encode_asked(tokenizer.tokenizer, record)
    if isinstance(record, Passage):
        return record.text
    return record.prompt if isinstance(record, Completion) else prompt(record, template, "evaluation")


@dataclass(frozen=True)
class Tokenised(Dataset):
    """Tokenized records for the transformers `Trainer`.

    Attributes:
        examples: `input_ids`, `attention_mask` and `labels` of each training record.
        cut: Indices of truncated records.
        skipped: Indices of records without any output token left, if the loss is on the output only.
        total_tokens: Number of tokens of all records before truncation.
        lost_tokens: Number of tokens that truncation removed.
    """

    examples: tuple[dict[str, list[int]], ...]
    cut: tuple[int, ...]
    skipped: tuple[int, ...] = ()
    total_tokens: int = 0
    lost_tokens: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


@dataclass(frozen=True)
class Example:
    """A tokenized record.

    Attributes:
        tokens: Token IDs after truncation.
        learnt: For each token, whether it belongs to the output.
        lost_tokens: Number of tokens that truncation removed.
    """

    tokens: list[int]
    learnt: list[bool]
    lost_tokens: int

    def features(self, loss_on: LossOn) -> dict[str, list[int]]:
        """Returns `input_ids`, `attention_mask` and `labels`."""
        labels = [
            token if own or loss_on == "full" else IGNORED for token, own in zip(self.tokens, self.learnt, strict=True)
        ]
        return {"input_ids": self.tokens, "attention_mask": [1] * len(self.tokens), "labels": labels}


def make_example(record: Item, tokenizer: PreparedTokenizer, template: Template, cutoff: int) -> Example:
    """Tokenizes a record, truncated on the right; one that is not a conversation ends with EOS unless truncated."""
    tokens, learnt = encode_item(record, tokenizer, template)
    if len(tokens) < cutoff and tokens[-1:] != [tokenizer.eos] and not isinstance(record, Chat):
        tokens, learnt = [*tokens, tokenizer.eos], [*learnt, True]
    return Example(tokens[:cutoff], learnt[:cutoff], max(0, len(tokens) - cutoff))


def tokenise(
    records: Sequence[Item],
    tokenizer: PreparedTokenizer,
    template: Template,
    loss_on: LossOn,
    cutoff: int = CUTOFF,
    places: Sequence[str] = (),
) -> Tokenised:
    """Tokenizes records: BOS, prompt, output, and EOS unless truncated; conversations as their template renders them.

    Args:
        records: The records.
        tokenizer: A prepared tokenizer.
        template: Prompt template of instructions.
        loss_on: `full` for all tokens, as published; `answer` for output and EOS.
        cutoff: Maximum number of tokens; longer records are truncated on the right. With `loss_on` `answer`, records
            without any output token left are skipped.
        places: Where each record is from, for messages.

    Returns:
        The examples, in the order of the records, and the truncated records.

    Raises:
        SanError: If truncation removes all answers, or the chat template does not fit a conversation.
    """
    examples: list[dict[str, list[int]]] = []
    cut: list[int] = []
    skipped: list[int] = []
    problems: list[str] = []
    total = lost = 0
    for index, record in enumerate(records):
        try:
            example = make_example(record, tokenizer, template, cutoff)
        except SanError as error:
            problems.append(f"{places[index] if places else f'record {index}'}: {error}")
            continue
        total += len(example.tokens) + example.lost_tokens
        lost += example.lost_tokens
        if example.lost_tokens:
            cut.append(index)
        if not any(example.learnt):
            skipped.append(index)
        if any(example.learnt) or loss_on == "full":
            examples.append(example.features(loss_on))
    if problems:
        more = f"\n  and {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
        raise SanError(
            f"{len(problems):,} of {len(records):,} records cannot be tokenized:\n  "
            + "\n  ".join(problems[:LISTED])
            + more
        )
    if len(skipped) == len(records):
        raise SanError(
            f"With a cutoff of {cutoff} tokens, none of the {len(records):,} records has any answer tokens left. "
            "Increase the cutoff."
        )
    return Tokenised(tuple(examples), tuple(cut), tuple(skipped) if loss_on == "answer" else (), total, lost)


@dataclass(frozen=True)
class Collator:
    """Pads examples to the longest one, with an attention mask and no loss on padding.

    Transformers' `DataCollatorForSeq2Seq` takes token and side from the tokenizer, which a run saves; this one leaves
    the tokenizer as it is.

    Args:
        pad: ID of the padding token.
        side: Side of the padding: `left` for generation, `right` for training.

    Example:
        >>> examples = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
        >>> {name: rows.tolist() for name, rows in Collator(pad=0, side="left")(examples).items()}
        {'input_ids': [[5, 6], [0, 7]], 'attention_mask': [[1, 1], [0, 1]], 'labels': [[5, 6], [-100, 7]]}
    """

    pad: int
    side: Literal["left", "right"]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Int64[Tensor, "batch length"]]:
        """Returns `input_ids` and `attention_mask`, and `labels` where the examples have them."""
        ids = [example["input_ids"] for example in examples]
        batch = {"input_ids": self._pad(ids, self.pad), "attention_mask": self._pad([[1] * len(i) for i in ids], 0)}
        if "labels" in examples[0]:
            batch["labels"] = self._pad([example["labels"] for example in examples], IGNORED)
        return batch

    def _pad(self, rows: Sequence[Any], value: int) -> Int64[Tensor, "batch length"]:
        tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=self.side)
