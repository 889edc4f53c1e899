"""What stands out in your own records: empty parts, roles out of order, truncated records, duplicates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from san_bench.language.formats import Item, content_key, empty_parts, misplaced_roles
from san_bench.language.prompts import Tokenised

NAMED = 5
"""Maximum number of records that a remark names."""


def remarks_on(
    split: str,
    records: Sequence[Item],
    places: Sequence[str] = (),
    tokens: Tokenised | None = None,
    against: Sequence[Item] = (),
) -> list[str]:
    """Returns remarks on the records of a split, each with the number of records and the first of them.

    Args:
        split: Name of the split.
        records: Its records.
        places: Where each is from.
        tokens: The tokenized records; without them, lengths are not checked.
        against: Training records, to find duplicates of them.
    """
    places = places or [f"record {index}" for index in range(len(records))]
    return [
        f"{split}: {len(found):,} of {len(records):,} records {what}: {_named(found)}"
        for what, found in findings_in(records, places, tokens, against)
        if found
    ]


def findings_in(
    records: Sequence[Item],
    places: Sequence[str],
    tokens: Tokenised | None = None,
    against: Sequence[Item] = (),
) -> Iterator[tuple[str, list[str]]]:
    """Yields what stands out in records, with the places of those that it applies to; see `remarks_on`."""
    for what, look in (("have empty parts", empty_parts), ("have roles out of order", misplaced_roles)):
        looked = ((place, look(record)) for place, record in zip(places, records, strict=True))
        yield what, [f"{place} {', '.join(parts)}" for place, parts in looked if parts]
    if tokens is not None:
        lost = f"are longer than the cutoff and lose {tokens.lost_tokens:,} of {tokens.total_tokens:,} tokens"
        yield lost, [places[index] for index in tokens.cut]
        yield "have no token with loss left and are skipped", [places[index] for index in tokens.skipped]
    keys = list(map(content_key, records))
    seen: set[str] = set()
    again = [key in seen or seen.add(key) is not None for key in keys]
    yield "repeat an earlier one", [place for place, twice in zip(places, again, strict=True) if twice]
    known = set(map(content_key, against))
    yield "are also training records", [place for place, key in zip(places, keys, strict=True) if key in known]


def _named(found: Sequence[str]) -> str:
    more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return "; ".join(found[:NAMED]) + more
