"""Stories of the small world for its texts: things change, move and are given; people feel, want and act.

Every function tells one story from its dice. The tasks of `world` tell such stories in other words.

Example:
    >>> parts = choice(RandomChoices(seed=0, index=1), 3)
    >>> len(parts[1]), parts[2] < 3
    (3, True)
"""

from __future__ import annotations

from collections.abc import Callable

from san_bench.language.mini.facts import CAUSES, NAMES, SIZES
from san_bench.language.mini.people import MOODS, REASONS, SCRIPTS, TRAITS
from san_bench.language.mini.relations import DERIVED
from san_bench.language.mini.wordings import RELATIONS
from san_bench.language.mini.words import RandomChoices, an, distinct, sentence, third

PLACES = ("box", "basket", "drawer", "bag", "chest", "bucket")
_THEN = ("Then", "After that", "Soon", "Later", "A little later", "In the end")
_OUTCOMES = (
    ("{a} lets {x} fall from the table.", "fall by material", "It {y3}."),
    ("{x} slips from the hand of {a}.", "fall by material", "It has to {y}."),
    ("{a} throws {x} into the pond.", "water by material", "It {y3}."),
    ("the wind blows {x} into the river. {a} sees it.", "water by material", "It will {y}."),
    ("{a} left {x} near the fire.", "heat by material", "It begins to {y}."),
    ("{x} is in the flames, cries {a}.", "heat by material", "It {y3}."),
)


def outcome(dice: RandomChoices) -> str:
    """What becomes of a thing, and why."""
    told, name, end = dice.pick(_OUTCOMES)
    relation = DERIVED[name]
    subject = dice.pick(list(relation.table))
    value, noun = relation.table[subject], subject.split(" ", 1)[-1]
    because = f" The {noun} is made of {RELATIONS['material'].table[noun]}." if dice.chance(50) else ""
    return f"{sentence(told.format(a=dice.pick(NAMES), x=subject))}{because} {end.format(y=value, y3=third(value))}"


def cause(dice: RandomChoices) -> str:
    """Somebody does something, and it has a consequence."""
    do, came = CAUSES[dice.pick(list(CAUSES))]
    a, b = dice.sample(NAMES, 2)
    return dice.pick(
        (
            f"{a} likes to {do}. {dice.pick(_THEN)} {came}.",
            f"{sentence(came)}. Why? It is because {a} chose to {do}.",
            f'"Do not {do}," said {a}. {b} did it. {dice.pick(_THEN)} {came}.',
            f"If you {do}, you will soon say: {came}.",
            f"{a} asked {b} to {do}. {dice.pick(_THEN)} {came}.",
        )
    )


def moving(dice: RandomChoices) -> str:
    """Where a thing is after it was moved."""
    thing, other = dice.sample(list(RELATIONS["material"].table), 2)
    first, second, third_place = dice.sample(PLACES, 3)
    a, b = dice.sample(NAMES, 2)
    lines = [f"{a} put the {thing} in the {first}.", f"{b} put the {other} in the {third_place}."]
    lines = dice.sample(lines, 2)
    where = first
    if dice.chance(60):
        lines.append(f"{dice.pick(_THEN)} {dice.pick((a, b))} moved the {thing} to the {second}.")
        where = second
    asked, place = dice.pick(((thing, where), (other, third_place)))
    end = dice.pick(
        (
            f"Where is the {asked}? In the {place}.",
            f"So the {asked} is in the {place} now.",
            f"The {asked} is not in the {dice.pick([p for p in PLACES if p != place])}, it is in the {place}.",
        )
    )
    return f"{' '.join(lines)} {end}"


def giving(dice: RandomChoices) -> str:
    """Who has a thing after it was given."""
    a, b, c = dice.sample(NAMES, 3)
    thing = dice.pick(list(RELATIONS["material"].table))
    lines, owner = [f"{a} has {an(thing)}.", f"{a} gives the {thing} to {b}."], b
    if dice.chance(50):
        lines.append(f"{b} hands it on to {c}.")
        owner = c
    end = dice.pick((f"Now {owner} has the {thing}.", f"Who has the {thing}? {owner} has it.", f"It is with {owner}."))
    return f"{' '.join(lines)} {end}"


def mood(dice: RandomChoices) -> str:
    """What happens to somebody, how it feels, and what it makes them want."""
    a, b = dice.sample(NAMES, 2)
    told, _, feeling, wish = MOODS[dice.pick(list(MOODS))]
    told, wish = sentence(told.format(a=a, b=b)), wish.format(a=a, b=b)
    return dice.pick(
        (
            f"{told} {a} was {feeling}.",
            f"{told} The mood of {a} was {feeling}.",
            f"{told} {a} was {feeling} and wanted to {wish}.",
            f"{a} was {feeling}. Why? {told}",
            f'{told} "I am {feeling}," said {a}. "I will {wish}."',
            f"People who are {feeling} often want to {wish}. So did {a}.",
            f"{told} So {a} wanted to {wish}.",
            f"{told} Was {a} {feeling}? Yes, and {b} saw it.",
        )
    )


def trait(dice: RandomChoices) -> str:
    """What somebody did, and what that says of them."""
    a, b = dice.sample(NAMES, 2)
    word = dice.pick(list(TRAITS))
    told = sentence(TRAITS[word][0].format(a=a, b=b))
    meaning = _MEANINGS[word]
    return dice.pick(
        (
            f"{told} {a} is {word}.",
            f"{told} {b} thinks that {a} is {word}.",
            f"{a} is {word}: {a} {meaning}.",
            f"Who is {word}? Somebody who {meaning}.",
            f"{a} {meaning}, so we call {a} {word}.",
        )
    )


_MEANINGS = {
    "generous": "likes to give things away", "brave": "goes into danger to help", "lazy": "rests while others work",
    "honest": "does not lie or steal", "greedy": "wants everything and leaves nothing to others",
    "patient": "can wait and does a thing again and again", "careless": "does not think of what may go wrong",
    "rude": "has no good manners", "careful": "looks before each step", "funny": "makes others laugh",
}  # fmt: skip


def reason(dice: RandomChoices) -> str:
    """What somebody did, and why."""
    a, b = dice.sample(NAMES, 2)
    did, why = REASONS[dice.pick(list(REASONS))]
    return dice.pick(
        (
            f"{sentence(why)}, so {a} {did}.",
            f"{a} {did} because {why}.",
            f'"Why is it that {a} {did}?" asked {b}. It was because {why}.',
            f"{sentence(why)}. {b} saw it and {did}.",
        )
    )


def script(dice: RandomChoices) -> str:
    """Something done step by step."""
    a = dice.pick(NAMES)
    steps = SCRIPTS[dice.pick(list(SCRIPTS))]
    return dice.pick(
        (
            f"{a} {steps[0]}. {a} {steps[1]}. {dice.pick(_THEN)} {a} {steps[2]} and {steps[3]}.",
            f"First {a} {steps[0]} and {steps[1]}. {dice.pick(_THEN)} {a} {steps[2]}. At last {a} {steps[3]}.",
            f"Before {a} {steps[3]}, {a} {steps[2]}. Before that, {a} {steps[1]}.",
            f"{a} {steps[1]} and {steps[2]}. {dice.pick(_THEN)} {a} {steps[3]}.",
        )
    )


def fitting(dice: RandomChoices) -> str:
    """Who of two it is, because of what they are."""
    a, b = dice.sample(NAMES, 2)
    form = dice.below(4)
    if form == 0:
        relation = RELATIONS["job"]
        one, other = distinct(dice, relation, 2)
        return f"{a} is {an(one)} and {b} is {an(other)}. So {a} can {relation.table[one]}, and {b} can {relation.table[other]}."  # noqa: E501
    if form == 1:
        small, big = sorted(dice.sample(range(len(SIZES)), 2))
        return (
            f"The {SIZES[big]} cannot get into the hole of the {SIZES[small]}: it is too big, and the hole too small."
        )
    if form == 2:
        return f"{a} could not lift the chest alone. {b} is strong and {a} is weak, so {b} lifted it."
    return f"{a} lent money to {b}, for {a} is rich and {b} is poor. Now {b} owes {a} money."


def beings(dice: RandomChoices) -> str:
    """A new name of the kind of something known, and what follows."""
    kind = dice.pick(list(RELATIONS["cover"].table))
    name = made_up(dice)
    relation = RELATIONS[dice.pick(("cover", "legs", "moves", "young"))]
    said = relation.word(dice.pick(relation.say[:2]), name, relation.table[kind])
    return f"Far away there is an animal called {name}. {sentence(an(name))} is {an(kind)}. So {said}"


def made_up(dice: RandomChoices) -> str:
    """Returns a name that means nothing."""
    return dice.pick(("bl", "dr", "fl", "gr", "kr", "pl", "sn", "tr", "v", "z")) + "".join(
        (
            dice.pick("aeiou"),
            dice.pick(("b", "ck", "g", "m", "n", "p", "x")),
            dice.pick(("", "o", "i", "u", "en", "el")),
        )
    )


def choice(dice: RandomChoices, count: int) -> tuple[str, list[str], int]:
    """Draws a question about people, what may be chosen, and the place of the right one."""
    a, b = dice.sample(NAMES, 2)
    right, form = dice.below(count), dice.below(5)
    if form < 2:
        moods = [MOODS[name] for name in dice.sample(list(MOODS), count)]
        told = sentence(moods[right].told.format(a=a, b=b))
        if form == 0:
            return f"{told} How was {a}?", [one.feeling for one in moods], right
        return f"{told} What did {a} want then?", [f"to {one.wish.format(a=a, b=b)}" for one in moods], right
    if form == 2:
        words = dice.sample(list(TRAITS), count)
        return f"{TRAITS[words[right]][0]} What is {{a}} like?".format(a=a, b=b), words, right
    if form == 3:
        pairs = [REASONS[name] for name in dice.sample(list(REASONS), count)]
        return f"{a} {pairs[right][0]}. Why?", [why for _, why in pairs], right
    pairs = [CAUSES[name] for name in dice.sample(list(CAUSES), count)]
    return f"what comes of it when people {pairs[right][0]}?", [came for _, came in pairs], right


KINDS: tuple[Callable[[RandomChoices], str], ...] = (
    outcome, outcome, cause, cause, moving, moving, giving, mood, mood, mood, trait, reason, script, script, fitting,
    beings,
)  # fmt: skip
"""The stories, each as often as it stands here."""
