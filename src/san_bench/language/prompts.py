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

from san_bench.language.instructions import Instruction
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


@dataclass(frozen=True)
class Tokenised(Dataset):
    """Tokenized records for the transformers `Trainer`.

    Attributes:
        examples: `input_ids`, `attention_mask` and `labels` of each training record.
        cut: Indices of truncated records.
    """

    examples: tuple[dict[str, list[int]], ...]
    cut: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def tokenise(
    records: Sequence[Instruction],
    tokenizer: PreparedTokenizer,
    template: Template,
    loss_on: LossOn,
    cutoff: int = CUTOFF,
) -> Tokenised:
    """Tokenizes records: BOS, prompt, output, and EOS unless truncated.

    Args:
        records: The records.
        tokenizer: A prepared tokenizer.
        template: Prompt template.
        loss_on: `full` for all tokens, as published; `answer` for output and EOS.
        cutoff: Maximum number of tokens; longer records are truncated on the right. With `loss_on` `answer`, records
            without any output token left are skipped.

    Returns:
        The examples, in the order of the records, and the truncated records.

    Raises:
        SanError: If truncation removes all answers.
    """
    examples: list[dict[str, list[int]]] = []
    cut: list[int] = []
    lost = 0
    for index, record in enumerate(records):
        tokens, start = tokenizer.encode_after(prompt(record, template, "training"), record.output)
        if len(tokens) > cutoff:
            cut.append(index)
            tokens = tokens[:cutoff]
        elif len(tokens) < cutoff and tokens[-1] != tokenizer.eos:
            tokens = [*tokens, tokenizer.eos]
        if start >= cutoff:
            lost += 1
            if loss_on == "answer":
                continue
        labels = tokens if loss_on == "full" else [IGNORED] * start + tokens[start:]
        examples.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": list(labels)})
    if lost == len(records):
        raise SanError(
            f"With a cutoff of {cutoff} tokens, none of the {len(records):,} records has any answer tokens left. "
            "Increase the cutoff."
        )
    return Tokenised(tuple(examples), tuple(cut))


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
