"""Training data that is read while training, for what does not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, Dataset, SequentialSampler

from san_bench.language.formats import problems_of_row, read_record
from san_bench.language.own import Located, read_rows_of
from san_bench.language.recipe import OwnData
from san_bench.language.sources import source_rows
from san_peft.errors import SanError

SAMPLE = 1000
"""Records of each source that are checked before the training."""


@dataclass(frozen=True)
class RecordStream:
    """Training records that are read one after the other.

    Attributes:
        data: Sources and settings.
        forms: Format of each source.
        sample: The first `SAMPLE` records of each source.
    """

    data: OwnData
    forms: tuple[str, ...]
    sample: list[Located]

    def records(self, epoch: int = 0) -> Iterator[Located]:
        """Reads the records, mixed by weight and shuffled within a buffer, in an order that depends on the epoch.

        Raises:
            SanError: If a record is invalid.
        """
        import datasets

        parts: list[Any] = [
            datasets.IterableDataset.from_generator(
                _rows, gen_kwargs={"path": source.path, "split": source.split, "config": source.config, "part": part}
            )
            for part, source in enumerate(self.data.train)
        ]
        whole = parts[0]
        if len(parts) > 1:
            whole = datasets.interleave_datasets(parts, probabilities=self.data.weights, seed=self.data.seed)
        whole = whole.shuffle(seed=self.data.seed)
        whole.set_epoch(epoch)
        for one in whole:
            row, form = json.loads(one["row"]), self.forms[one["part"]]
            if wrong := problems_of_row(row, form):
                raise SanError(f"{one['place']}: {'; '.join(wrong)} (in the format {form}).")
            yield Located(one["place"], read_record(row, form), one["part"])


def open_stream(data: OwnData) -> RecordStream:
    """Opens a stream and checks its first records.

    Raises:
        SanError: If a source does not exist, or any of these records is invalid.
    """
    forms, sample = [], []
    for part, source in enumerate(data.train):
        rows = source_rows(source.path, source.split or "train", config=source.config, streaming=True)
        reading = read_rows_of(islice(rows, SAMPLE), source.path, data.format, part)
        sample += reading.check()
        forms.append(reading.form)
    return RecordStream(data, tuple(forms), sample)


class StreamedExamples(Dataset[dict[str, list[int]]]):
    """Examples of a stream by their position, which is fast in ascending order, as `sequential_batches` asks for them.

    Asking for an earlier position starts the stream again. A stream that ends is read again, shuffled anew.

    Args:
        stream: The records.
        encode: Returns the example of a record, or `None` to leave it out.
        length: Number of examples.
    """

    def __init__(
        self, stream: RecordStream, encode: Callable[[Located], dict[str, list[int]] | None], length: int
    ) -> None:
        self.stream, self.encode, self.length = stream, encode, length
        self._examples: Iterator[dict[str, list[int]]] = iter(())
        self._next: int | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Returns the example at a position.

        Raises:
            SanError: If a record is invalid, or no record has any token left to learn.
        """
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self._next is None or index < self._next:
            self._examples, self._next = self._read(), 0
        example = next(islice(self._examples, index - self._next, None))
        self._next = index + 1
        return example

    def _read(self) -> Iterator[dict[str, list[int]]]:
        epoch = 0
        while True:
            count = 0
            for record in self.stream.records(epoch):
                if (example := self.encode(record)) is not None:
                    count += 1
                    yield example
            if not count:
                raise SanError(f"{self.stream.data.train[0].path}: no record of the stream has any token to learn.")
            epoch += 1


def sequential_batches(examples: StreamedExamples) -> Callable[[int, int], BatchSampler]:
    """Returns a function from batch size and number of processes to batches of a stream in ascending order."""
    return lambda size, processes: BatchSampler(SequentialSampler(examples), size, drop_last=False)


def _rows(path: str, split: str | None, config: str | None, part: int) -> Iterator[dict[str, Any]]:
    """Yields rows as JSON, so that sources with other columns can be mixed."""
    for place, row in source_rows(path, split or "train", config=config, streaming=True):
        if isinstance(row, Exception):
            raise SanError(f"{path}, {place}: it cannot be parsed ({row}).")
        yield {"place": f"{path}, {place}", "row": json.dumps(row, default=str), "part": part}
