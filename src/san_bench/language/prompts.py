"""From a record to what a language model reads: the prompt, its tokens, and what of them the loss is on.

Both templates are Alpaca's. `clean` is the usual one. `legacy` is what the published code of commonsense reasoning
makes of it, to the last blank: all lines of the template but the first are indented by 16, and training differs from
evaluation in blanks at the end of the first line and on the empty ones.

Example:
    >>> from san_bench.language.instructions import Record
    >>> record = Record("Is water wet?", "", "the correct answer is true", "true")
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

from san_bench.language.instructions import Record
from san_bench.language.tokenizer import PreparedTokenizer
from san_peft.errors import SanError

Template = Literal["legacy", "clean"]
Phase = Literal["training", "evaluation"]
LossOn = Literal["full", "answer"]

PREAMBLE = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
RESPONSE = "### Response:"
"""Header after which a model writes."""

INDENT = " " * 16
"""What stands before all lines of the legacy template but the first, the response included."""

CUTOFF = 256
"""Tokens of a record in the published training, beginning and end included."""

IGNORED = -100
"""Label of a token that the loss is not on."""


def prompt(record: Record, template: Template, phase: Phase) -> str:
    """Returns the text that a model goes on from. In training, the record's output follows it without a gap.

    Args:
        record: The instruction.
        template: `legacy` as published, or `clean`.
        phase: Matters to `legacy` alone.
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
    """Records as tokens, for transformers' Trainer.

    Attributes:
        examples: `input_ids`, `attention_mask` and `labels` of each record that is trained on.
        cut: Places of the records, in the order given, of which the length limit left something out.
    """

    examples: tuple[dict[str, list[int]], ...]
    cut: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def tokenise(
    records: Sequence[Record],
    tokenizer: PreparedTokenizer,
    template: Template,
    loss_on: LossOn,
    cutoff: int = CUTOFF,
) -> Tokenised:
    """Makes training examples of records: the beginning, the prompt, the output, and the end if nothing was cut off.

    Args:
        records: The records.
        tokenizer: A tokenizer made ready.
        template: How a prompt looks.
        loss_on: `full` for all tokens, as published; `answer` for the output and the end.
        cutoff: The most tokens of an example; what is beyond is cut off at the right.

    Returns:
        The examples, in the order of the records, and which records were cut off.

    Raises:
        SanError: If nothing of any answer is left within the cutoff.
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
            f"With at most {cutoff} tokens, nothing is left of the answer of any of the {len(records):,} records. "
            "Raise the cutoff."
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
