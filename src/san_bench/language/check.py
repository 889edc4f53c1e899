"""Validates the data of language tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from san_bench.config.recipe import load_recipe
from san_bench.datacheck.found import CheckOptions, Found
from san_bench.language import commonsense
from san_bench.language.chat import check_chat_template
from san_bench.language.formats import Chat
from san_bench.language.own import Reading, read_splits
from san_bench.language.prompts import Tokenised, tokenise
from san_bench.language.recipe import OwnData, Source, TextRecipe
from san_bench.language.survey import findings_in
from san_peft.errors import SanError

if TYPE_CHECKING:
    from san_bench.language.formats import Item


def examine(suite: str, folder: Path, options: CheckOptions) -> list[Found]:
    """Validates the commonsense reasoning tasks, or your own records.

    Args:
        suite: `commonsense`, or one of its tasks, such as `commonsense/boolq`; or `instructions`.
        folder: Folder with one folder per task; for `instructions` a source of records, see
            `san_bench.language.sources.source_rows`.
        options: Of these, `manifest`, or for `instructions` `recipe`.

    Raises:
        SanError: If the folder or task does not exist, or checksums are requested.
    """
    if options.write_checksums or options.checksums:
        raise SanError(f"Checksums are for images, and {suite} has text files. Use sha256sum.")
    if suite.partition("/")[0] == "instructions":
        if suite != "instructions":
            raise SanError(f"Unknown data {suite!r}; use instructions, which checks all splits.")
        return _own(folder, options.recipe)
    return commonsense.examine(folder, suite.partition("/")[2], options.manifest)


def _own(folder: Path, name: str | None) -> list[Found]:
    """Reports on every split of a source, with the format and other settings of a recipe if there is one."""
    recipe = None if name is None else load_recipe(name)
    if recipe is not None and not (isinstance(recipe, TextRecipe) and recipe.task == "instructions"):
        raise SanError(f"{name} is a recipe of the task {recipe.task}; --recipe takes one of the task instructions.")
    train = (Source(path=str(folder)),)
    own = recipe.data if recipe is not None and isinstance(recipe.data, OwnData) else OwnData(train=train)
    splits = read_splits(own.model_copy(update={"train": train}))
    known = [record.item for one in splits["train"] for record in one.records]
    return [
        _report(f"instructions/{split}", one, recipe, known if split != "train" else [])
        for split, readings in splits.items()
        for one in readings
    ]


def _report(name: str, reading: Reading, recipe: TextRecipe | None, against: list[Item]) -> Found:
    found = Found(name)
    records = [record.item for record in reading.records]
    places = [record.place for record in reading.records]
    count = len(records) + len(reading.problems)
    if reading.problems:
        found.add(f"{len(reading.problems):,} of {count:,} records are invalid", reading.problems)
    if not count:
        found.add(f"{reading.source} contains no records")
    tokens = _tokens(found, records, places, recipe) if recipe is not None and records else None
    turns = sum(one["role"] == "assistant" for item in records if isinstance(item, Chat) for one in item.messages)
    parts = [f"{count:,} records in the format {reading.form}"]
    parts += [f"{turns:,} turns of the assistant"] if turns else []
    parts += [f"{tokens.total_tokens:,} tokens"] if tokens is not None else []
    found.layout = ", ".join(parts)
    for what, where in findings_in(records, places, tokens, against):
        if where:
            found.add(f"{len(where):,} of {count:,} records {what}", where, level="warning")
    return found


def _tokens(found: Found, records: list[Item], places: list[str], recipe: TextRecipe) -> Tokenised | None:
    """Tokenizes records as a run of the recipe does, and adds what prevents it."""
    from san_bench.language.domain import Texts

    text = recipe.text
    try:
        tokenizer = Texts.companions(recipe)
        if any(isinstance(record, Chat) for record in records):
            check_chat_template(tokenizer.tokenizer)
        return tokenise(records, tokenizer, text.template, text.loss_on, text.cutoff, places)
    except SanError as error:
        found.add(str(error))
        return None
