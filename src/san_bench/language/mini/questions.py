"""What the eight tasks of mini-language ask: questions whose wrong answers are right answers to other questions.

Every function draws one item from its dice. Where there are several options, they belong to as many subjects with
different values, any of which might have been asked for: so each option is as likely to be right as the others, and
neither its words, its length nor its place tells which is. Who knows the world can tell.

Example:
    >>> item = easy(RandomChoices(seed=4, index=0))
    >>> len(item.options), item.right < 4
    (4, True)
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from san_bench.language.mini.facts import CAUSES, DECIMALS, NAMES, SIZES
from san_bench.language.mini.people import MOODS, REASONS, SCRIPTS, TRAITS
from san_bench.language.mini.relations import DERIVED, FACTS, Fact
from san_bench.language.mini.stories import PLACES, made_up
from san_bench.language.mini.wordings import RELATIONS
from san_bench.language.mini.words import RandomChoices, Relation, an, distinct, of_many, plural, sentence

CLAIMS_OF_TEN = 7
"""Of ten items of `yes_no`, how many ask for a single fact; the splits ask for each fact once at most."""

NEWS = (
    "turns blue at noon", "is sold at the moon market", "must stay inside today", "costs one silver coin",
    "gets a golden stamp", "is painted by the king", "glows at midnight", "travels for free", "is loved by ghosts",
    "may not cross the bridge", "wins a ribbon", "smells of mint", "is shown on television", "becomes invisible",
)  # fmt: skip
"""What an open book may tell that nobody knows."""

_RULES: dict[str, str] = {
    "material": "built out of {y}", "room": "fetched from the {y}", "kind": "counted as {ay}", "taste": "{y} in taste",
    "colour": "{y} in colour", "origin": "given by {y}", "home": "at rest in {y}", "food": "fond of {y}",
    "fall by material": "sure to {y} on a hard floor", "heat by material": "sure to {y} in great heat",
    "cover by kind": "dressed in {y}", "moves by kind": "able to {y}", "legs by kind": "standing on {y}",
}  # fmt: skip
_DROPS = {
    "fall by material": "As {a} watches, {x} drops on the rocks.",
    "heat by material": "As {a} watches, {x} comes too close to the burning logs.",
}
_BLANKS: dict[str, str] = {
    "fall by material": "Both {x} and {z} slipped from the hands of {a}, and only the _ was sure to {y}.",
    "water by material": "Both {x} and {z} dropped over the side of {a}'s boat, and only the _ was sure to {y}.",
    "heat by material": "Both {x} and {z} lay in the oven that {a} forgot, and only the _ was sure to {y}.",
    "use": "{a} looked at {x} and {z}, had to {y}, and picked up the _.",
    "sound": "{a} kept {x} and {z}, and at night the _ would {y}.",
    "moves by kind": "{x} and {z} ran into {a}, and the _ began to {y}.",
    "food": "{a} gave {y} to {x} and {z}, but only the _ was pleased.",
    "job": "{a} met {x} and {z}, and the _ said it was time to {y}.",
    "taste": "{a} bit into {x} and {z}, and found the _ {y}.",
    "material": "{a} weighed {x} and {z}, and saw that the _ had {y} in it.",
}
_ROLES = (
    ("{a} begged {b} for some coins, since _ was {}.", "poor", "rich"),
    ("{a} let {b} carry the chest, since _ was {}.", "weak", "strong"),
    ("{a} handed a glass of water to {b}, since _ was {}.", "at the well", "thirsty"),
    ("{a} fetched a doctor for {b}, since _ was {}.", "healthy", "sick"),
    ("{a} could not hear {b}, since _ was {}.", "deaf", "too quiet"),
    ("{a} overtook {b} on the road, since _ was {}.", "fast", "slow"),
)
"""A person first, another second: what fits the first, and what the second."""


class Item(NamedTuple):
    """A question with its options.

    Attributes:
        question: What is asked.
        options: What may be chosen.
        right: Place of the right option.
    """

    question: str
    options: list[str]
    right: int


def yes_no(dice: RandomChoices, seed: int, index: int) -> str:
    """Returns a question whose answer is yes for even indices, and no for odd ones."""
    lie, place = index % 2, index % 10
    if place < CLAIMS_OF_TEN:
        deck = _deck(seed)
        name, subject = deck[(index // 10 * CLAIMS_OF_TEN + place) % len(deck)]
        relation = {**RELATIONS, **DERIVED}[name]
        value = relation.table[subject]
        others = [x for x, y in relation.table.items() if y != value]
        return relation.word(dice.pick(relation.claim), subject, relation.table[dice.pick(others)] if lie else value)
    a, b = dice.sample(NAMES, 2)
    form = dice.below(3)
    if form == 0:
        (x, z), (p, q, r) = dice.sample(list(RELATIONS["material"].table), 2), dice.sample(PLACES, 3)
        told = f"{a} lays {an(x)} into a {p} and {an(z)} into a {q}"
        if dice.chance(50):
            told, p = f"{told}, and {b} takes the {x} over into a {r}", r
        x, p, q = dice.pick(((x, p, q), (z, q, p)))
        return f"if {told}, would {b} look into the {q if lie else p} for the {x}"
    if form == 1:
        small, big = sorted(dice.sample(range(len(SIZES)), 2))
        more, pair = dice.pick((("taller", (big, small)), ("shorter", (small, big))))
        x, z = reversed(pair) if lie else pair
        return f"standing beside {a}, does {an(SIZES[x])} look {more} than {an(SIZES[z])}"
    noun, first, second = plural(dice.pick(list(RELATIONS["material"].table))), 2 + dice.below(5), 1 + dice.below(4)
    wrong = first + second + dice.pick((-1, 1))
    said = DECIMALS[wrong if lie else first + second]
    return f"{a} owns {DECIMALS[first]} {noun} and {b} owns {DECIMALS[second]}, so do both own {said} together"


@cache
def _deck(seed: int) -> list[tuple[str, str]]:
    """Every fact that can be doubted, in the order of `yes_no`."""
    facts = [(fact.relation, fact.subject) for fact in FACTS]
    facts += [(name, subject) for name, relation in DERIVED.items() for subject in relation.table]
    return RandomChoices(seed, 2**40).sample(facts, len(facts))


def solution(dice: RandomChoices) -> Item:
    """Returns a goal and two ways, one of which leads there."""
    a = dice.pick(NAMES)
    right, form = dice.below(2), dice.below(4)
    if form < 2:
        uses, rooms = RELATIONS["use"], RELATIONS["room"]
        things = distinct(dice, uses, 2)
        lead = dice.pick(("{a} would like to {y}.", "Goal of {a}: {y}.", "How can {a} manage to {y}?"))
        ways = [f"Go to the {rooms.table[x]} and fetch {an(x)}." for x in things]
        return Item(lead.format(a=a, y=uses.table[things[right]]), ways, right)
    if form == 2:
        pairs = [CAUSES[name] for name in dice.sample(list(CAUSES), 2)]
        lead = dice.pick(
            ("{a} hopes to report: {y}.", "How can {a} make sure that {y}?", "{a} was glad to see that {y}.")
        )
        return Item(lead.format(a=a, y=pairs[right][1]), [f"{sentence(do)}." for do, _ in pairs], right)
    relation = RELATIONS[dice.pick(("water", "heat", "fall"))]
    stuffs, toy = distinct(dice, relation, 2), dice.pick(("toy", "block", "figure", "ring", "bowl"))
    where = {"water": "in a lake", "heat": "in an oven", "fall": "on the ground"}
    place = next(where[name] for name in where if RELATIONS[name] is relation)
    lead = f"{a} needs a {toy} that will {relation.table[stuffs[right]]} {place}."
    return Item(lead, [f"Form the {toy} out of {x}." for x in stuffs], right)


def social(dice: RandomChoices) -> Item:
    """Returns a situation, a question about a person, and three answers."""
    a, b = dice.sample(NAMES, 2)
    right, form = dice.below(3), dice.below(5)
    if form < 3:
        moods = [MOODS[name] for name in dice.sample(list(MOODS), 3)]
        told = sentence(moods[right].asked.format(a=a, b=b))
        if form == 0:
            return Item(f"{told} What will {a} do next?", [one.wish.format(a=a, b=b) for one in moods], right)
        ask = dice.pick((f"In what mood is {a}?", f"Which word describes the mood of {a}?"))
        return Item(f"{told} {ask}", [one.feeling for one in moods], right)
    if form == 3:
        words = dice.sample(list(TRAITS), 3)
        told = sentence(TRAITS[words[right]][1].format(a=a, b=b))
        return Item(f"{told} {dice.pick(('Which word suits', 'How would you describe'))} {a}?", words, right)
    pairs = [REASONS[name] for name in dice.sample(list(REASONS), 3)]
    ask = dice.pick((f"What made {a} do so?", f"What did {a} notice before?"))
    return Item(f"In front of {b}, {a} {pairs[right][0]}. {ask}", [why for _, why in pairs], right)


def ending(dice: RandomChoices) -> Item:
    """Returns the beginning of a story and four endings."""
    a, b = dice.sample(NAMES, 2)
    right, form = dice.below(4), dice.below(5)
    if form == 0:
        pairs = [CAUSES[name] for name in dice.sample(list(CAUSES), 4)]
        start = f"{a} decided to {pairs[right][0]}. When {b} came back in the evening,"
        return Item(start, [came for _, came in pairs], right)
    if form < 3:
        scripts, step = [SCRIPTS[name] for name in dice.sample(list(SCRIPTS), 4)], 1 + dice.below(3)
        done = " and ".join(scripts[right][max(0, step - 2) : step])
        return Item(f"With the help of {b}, {a} {done}. Next, {a}", [steps[step] for steps in scripts], right)
    if form == 3:
        moods = [MOODS[name] for name in dice.sample(list(MOODS), 4)]
        start = sentence(moods[right].asked.format(a=a, b=b))
        return Item(f"{start} For this reason {a} will", [one.wish.format(a=a, b=b) for one in moods], right)
    name = dice.pick(list(_DROPS))
    subjects = distinct(dice, DERIVED[name], 4)
    options = [DERIVED[name].fill(DERIVED[name].value, subject) for subject in subjects]
    return Item(f"{sentence(_DROPS[name].format(a=a, x=subjects[right]))} The next moment,", options, right)


def blank(dice: RandomChoices) -> Item:
    """Returns a sentence with a blank, which one of two fills."""
    a, b = dice.sample(NAMES, 2)
    right, form = dice.below(2), dice.below(5)
    if form == 0:
        told, *words = dice.pick(_ROLES)
        return Item(told.format(words[right], a=a, b=b), [a, b], right)
    if form == 1:
        small, big = (SIZES[n] for n in sorted(dice.sample(range(len(SIZES)), 2)))
        x, z = dice.sample((small, big), 2)
        hides = dice.pick(
            ("can hide behind the other because it is the smaller", "hides the other as it is the bigger")
        )
        told = f"{a} sees that of {an(x)} and {an(z)}, the _ {hides} animal."
        return Item(told, [small, big], int("bigger" in hides))
    name = dice.pick(list(_BLANKS))
    relation = {**RELATIONS, **DERIVED}[name]
    pair = distinct(dice, relation, 2)
    x, z = (an(subject) for subject in dice.sample(pair, 2))
    told = _BLANKS[name].format(a=a, x=x, z=z, y=relation.table[pair[right]])
    return Item(sentence(told), [subject.split(" ", 1)[-1] for subject in pair], right)


def easy(dice: RandomChoices) -> Item:
    """Returns a question for one fact, and four answers."""
    relation = RELATIONS[dice.pick(_askable()).relation]  # a relation of many facts comes more often
    subjects, right = distinct(dice, relation, 4), dice.below(4)
    wordings, form = dice.pick(((relation.quiz, relation.value), (relation.which, relation.subject)))
    return Item(relation.fill(dice.pick(wordings), subjects[right]), [relation.fill(form, x) for x in subjects], right)


@cache
def _askable() -> list[Fact]:
    """The facts of relations with at least 4 values."""
    return [fact for fact in FACTS if RELATIONS[fact.relation] in of_many(4, RELATIONS)]


def hard(dice: RandomChoices) -> Item:
    """Returns a question that two facts together answer, and four answers."""
    right = dice.below(4)
    if dice.chance(50):
        relation = dice.pick(of_many(4, DERIVED))
        subjects = distinct(dice, relation, 4)
        values = dice.chance(25)
        wordings, form = (relation.quiz, relation.value) if values else (relation.which, relation.subject)
        return Item(
            relation.fill(dice.pick(wordings), subjects[right]), [relation.fill(form, x) for x in subjects], right
        )
    known, relation = dice.pick(_pairs())
    shared = {x: y for x, y in relation.table.items() if x in known.table}
    subjects = distinct(dice, Relation(shared, (), (), (), (), (), ()), 4)
    asked = known.fill(known.known or "", subjects[right])
    question = relation.quiz[0].format(x=asked, ax=asked)
    return Item(question, [relation.fill(relation.value, x) for x in subjects], right)


@cache
def _pairs() -> list[tuple[Relation, Relation]]:
    """A relation that names a subject by its value, and another one that has at least 4 values for such subjects."""
    return [
        (known, relation)
        for known in RELATIONS.values()
        for relation in RELATIONS.values()
        if known.known and known is not relation
        if len({y for x, y in relation.table.items() if x in known.table}) >= 4
    ]


def book(dice: RandomChoices) -> Item:
    """Returns a piece of news from an open book, a question that it answers with a known fact, and four answers."""
    right = dice.below(4)
    if dice.chance(40):
        relation = RELATIONS[dice.pick(("cover", "legs", "moves", "young"))]
        kinds, name = distinct(dice, relation, 4), made_up(dice)
        asked = sentence(relation.word(dice.pick(relation.quiz), name, relation.table[kinds[right]]))
        return Item(
            f"The {name} is a new {kinds[right]}. {asked}", [relation.fill(relation.value, x) for x in kinds], right
        )
    name, news = dice.pick(list(_RULES)), dice.pick(NEWS)
    relation = {**RELATIONS, **DERIVED}[name]
    subjects = distinct(dice, relation, 4)
    rule = relation.fill(_RULES[name], subjects[right])
    ask = dice.pick(("Which of these {}?", "What {}?", "Tell what {}."))
    question = f"All that is {rule} {news}. {ask.format(news)}"
    return Item(question, [relation.fill(relation.subject, x) for x in subjects], right)
