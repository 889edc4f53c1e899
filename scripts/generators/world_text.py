"""Texts about the small world to pretrain a language model on: statements, talk, questions, lists to choose from.

Text `i` of seed `s` is a function of (s, i) alone. Facts come in the wordings for texts of `world_wordings`; stories
stand in `world_stories`. The tasks of `world` word the same facts otherwise.

Example:
    >>> text(seed=0, index=8)
    'The book belongs in the library. That is true.'
"""

from __future__ import annotations

from collections.abc import Callable

from san_bench.language.mini import stories as world_stories
from san_bench.language.mini.facts import DECIMALS, NAMES, SIZES
from san_bench.language.mini.relations import DERIVED
from san_bench.language.mini.wordings import RELATIONS
from san_bench.language.mini.words import RandomChoices, Relation, an, distinct, listed, of_many, plural, sentence

ALL = {**RELATIONS, **DERIVED}
_SPEAKERS = ("asked", "wanted to know", "said")
_MARKS = (
    "card",
    "box",
    "line",
    "door",
    "page",
    "picture",
    "number",
    "choice",
    "answer",
    "option",
    "solution",
    "ending",
)
_LEADS = ("Look at the list and find what fits.", "Here is a riddle.", "Please pick one.", "Find out which is meant.")
_ENDS = (
    "So take {}.", "Take {}.", "It is {}.", "They chose {}.", "The right one is {}.", "what fits is {}.", "right: {}.",
    "the best one of these is {}.", "I think that it must be {}.", "this is true of {}.", "the one to say is {}.",
)  # fmt: skip


def text(seed: int, index: int) -> str:
    """Returns a short text, or some on one line each.

    Args:
        seed: Names the sequence of texts, 0 or more.
        index: Which text of the sequence, 0 or more; there is no end of them.
    """
    dice = RandomChoices(seed, index)
    return dice.pick(KINDS)(dice)


def statement(dice: RandomChoices, relation: Relation, subject: str) -> str:
    """Returns a fact as a sentence."""
    return sentence(relation.fill(dice.pick(relation.say), subject))


def profile(dice: RandomChoices) -> str:
    """All that one subject is known for."""
    first = dice.pick(list(RELATIONS.values()))
    subject = dice.pick(list(first.table))
    about = [r for r in ALL.values() if subject in r.table or an(subject) in r.table]
    said = [statement(dice, r, subject if subject in r.table else an(subject)) for r in about]
    return " ".join(dice.sample(said, min(len(said), 3 + dice.below(4))))


def together(dice: RandomChoices) -> str:
    """Subjects that share a value."""
    relation = dice.pick([RELATIONS[name] for name in ("material", "room", "kind", "taste", "colour", "origin")])
    value = relation.table[dice.pick(list(relation.table))]
    same = [relation.word(relation.subject, x, value) for x, y in relation.table.items() if y == value]
    chosen = dice.sample(same, min(len(same), 2 + dice.below(4)))
    lead = dice.pick(("What is alike here?", "Look at these:", "We know some of them well:", "A short list:"))
    question = relation.word(dice.pick(relation.seek), next(iter(relation.table)), value)
    if dice.chance(50):
        return f"{sentence(question)} {sentence(listed(chosen))}."
    said = [relation.fill(relation.say[0], x) for x, y in relation.table.items() if y == value]
    return f"{lead} {sentence(listed(dice.sample(said, min(len(said), 3))).replace('.', ''))}."


def chain(dice: RandomChoices) -> str:
    """Two facts and what follows."""
    name = dice.pick(list(DERIVED))
    derived, (second, first) = DERIVED[name], name.split(" by ")
    subject = dice.pick(list(RELATIONS[first].table))
    end = subject if subject in derived.table else an(subject)
    middle = RELATIONS[first].table[subject]
    steps = [statement(dice, RELATIONS[first], subject), statement(dice, RELATIONS[second], middle)]
    so = dice.pick(("So", "This is why", "It follows that", "And so", "Therefore"))
    return f"{' '.join(steps)} {so} {derived.fill(dice.pick(derived.say[:2]), end)}"


def contrast(dice: RandomChoices) -> str:
    """Two subjects, and what one is not."""
    relation = dice.pick(of_many(2, ALL))
    one, other = distinct(dice, relation, 2)
    not_so = relation.word(dice.pick(relation.say), one, relation.table[other])
    start = dice.pick(("It is false that", "It is not true that", "Nobody says that", "It is wrong that", "Never say:"))
    but = dice.pick(("But", "And", "However,", "Instead,"))
    return f"{start} {not_so} {statement(dice, relation, one)} {but} {relation.fill(dice.pick(relation.say), other)}"


def question(dice: RandomChoices) -> str:
    """A question and its answer."""
    relation = dice.pick(list(ALL.values()))
    subject = dice.pick(list(relation.table))
    asked = sentence(relation.fill(dice.pick(relation.ask), subject))
    reply = dice.pick((relation.fill(relation.value, subject), relation.fill(dice.pick(relation.say), subject)))
    return f"{asked} {sentence(reply.rstrip('.'))}."


def talk(dice: RandomChoices) -> str:
    """Two people talk about facts, and one may be wrong."""
    one, other = dice.sample(NAMES, 2)
    relation = dice.pick(of_many(2, ALL))
    subject, beside = distinct(dice, relation, 2)
    said = relation.fill(dice.pick(relation.say), subject)
    wrong = relation.word(dice.pick(relation.say), subject, relation.table[beside])
    ask = relation.fill(dice.pick(relation.ask), subject)
    form = dice.below(4)
    if form == 0:
        return f'"{sentence(ask)}" {dice.pick(_SPEAKERS)} {one}. "{sentence(said)}" said {other}.'
    if form == 1:
        return f'"{sentence(wrong)}" said {one}. "No," said {other}, "{said}"'
    if form == 2:
        return (
            f'"{sentence(said)}" said {one}. "Yes," said {other}, "{relation.fill(dice.pick(relation.say), subject)}"'
        )
    return f'{one} says: "{sentence(wrong)}" {other} says: "{sentence(said)}" {other} is right and {one} is wrong.'


def verdict(dice: RandomChoices) -> str:
    """Statements, each called right or wrong."""
    lines, words = [], dice.pick((("right", "wrong"), ("true", "false"), ("yes", "no"), ("so it is", "not so")))
    ask = dice.pick(("{} This is {}.", "{} That is {}.", "{} - {}.", "Is it so? {} {}!", "{} Say {}."))
    for _ in range(1 + dice.below(3)):
        relation = dice.pick(of_many(2, ALL))
        subject, beside = distinct(dice, relation, 2)
        lie = dice.below(2)
        stated = relation.word(dice.pick(relation.say), subject, relation.table[(subject, beside)[lie]])
        lines.append(ask.format(sentence(stated), words[lie]))
    return " ".join(lines)


def choice(dice: RandomChoices) -> str:
    """A question with marked things to choose from, and the mark of the right one."""
    count = 2 + dice.below(3)
    if dice.chance(20):
        asked, offered, right = world_stories.choice(dice, count)
    else:
        relation = dice.pick(of_many(count, ALL))
        subjects = distinct(dice, relation, count)
        right = dice.below(count)
        wordings, form = (relation.ask, relation.value) if dice.chance(60) else (relation.seek, relation.subject)
        asked = relation.fill(dice.pick(wordings), subjects[right])
        offered = [relation.fill(form, subject) for subject in subjects]
    return marked(dice, sentence(asked), offered, right)


def marked(dice: RandomChoices, asked: str, offered: list[str], right: int) -> str:
    """Words a choice."""
    form = dice.below(6)
    if form == 0:
        return f"{asked} {sentence(listed(offered, 'or'))}? {sentence(offered[right])}."
    if form == 1:
        order = ("first", "second", "third", "fourth")
        marks = " ".join(f"{sentence(order[n])}: {words}." for n, words in enumerate(offered))
        return f"{asked} {marks} The {order[right]} is right."
    if form == 2:
        marks = "\n".join(f"{n + 1}. {words}" for n, words in enumerate(offered))
        return f"{asked}\n{marks}\nRight: {right + 1}. {offered[right]}"
    marks, lines = marks_of(dice, offered)
    parts = [f"{dice.pick(_LEADS)}\n{asked}" if dice.chance(40) else asked, lines.removesuffix(".")]
    if dice.chance(50):
        parts.append(
            dice.pick(("{}", "Say {}", "There are {}", "Choose: {}")).format(dice.pick(("/", ", ")).join(marks))
        )
    parts.append(dice.pick(_ENDS).format(marks[right]))
    return dice.pick((" ", "\n", "\n\n")).join(parts[:-1]) + dice.pick(("\n", "\n\n")) + parts[-1]


def marks_of(dice: RandomChoices, names: list[str]) -> tuple[list[str], str]:
    """Marks for some things, and the list of them."""
    mark, gap = dice.pick(_MARKS), dice.pick(("", " "))
    marks = [f"{mark}{gap}{n + 1}" for n in range(len(names))]
    lines = dice.pick((" ", "\n")).join(f"{one}: {name}" for one, name in zip(marks, names, strict=True))
    return marks, f"{lines}."


def recall(dice: RandomChoices) -> str:
    """Short lists of marked things, and the mark of one of each."""
    subjects = [*RELATIONS["material"].table, *RELATIONS["kind"].table, *RELATIONS["taste"].table, *NAMES]
    form = dice.pick(("{name}: {mark}.", "find {name} on {mark}.", "{name} is {mark}.", "where is {name}? {mark}."))
    told = []
    for _ in range(3 + dice.below(3)):
        names = dice.sample(subjects, 2 + dice.below(3))
        marks, lines = marks_of(dice, names)
        place = dice.below(len(names))
        told.append(f"{lines} {form.format(name=names[place], mark=marks[place])}")
    return " ".join(told)


def catalogue(dice: RandomChoices) -> str:
    """Lists of marked things, and the mark of the one that is so, or what has a mark."""
    told = []
    for _ in range(2 + dice.below(2)):
        count = 2 + dice.below(3)
        relation = dice.pick(of_many(count, ALL))
        subjects, place = distinct(dice, relation, count), dice.below(count)
        names = [relation.fill(relation.subject, subject) for subject in subjects]
        marks, lines = marks_of(dice, names)
        if dice.chance(10):
            told.append(f"{lines} What is {marks[place]}? {sentence(names[place])}.")
        else:
            told.append(f"{lines} {sentence(relation.fill(dice.pick(relation.seek), subjects[place]))} {marks[place]}.")
    return " ".join(told)


def sizes(dice: RandomChoices) -> str:
    """Which animal is bigger."""
    places = sorted(dice.sample(range(len(SIZES)), 3))
    small, middle, big = (SIZES[place] for place in places)
    form = dice.below(5)
    if form == 4:
        return f"The {big} is taller than {an(small)}. The {small} is shorter and may hide behind {an(big)}."
    if form == 0:
        return f"{sentence(an(big))} is bigger than {an(middle)}, and {an(middle)} is bigger than {an(small)}."
    if form == 1:
        return f"{sentence(an(small))} is small beside {an(big)}. {sentence(an(middle))} is in between."
    if form == 2:
        offered = dice.sample((small, middle, big), 3)
        which, wanted = dice.pick((("biggest", big), ("smallest", small)))
        return marked(dice, f"Which animal is the {which}?", offered, offered.index(wanted))
    return f"No {small} is as big as {an(big)}. Sort them by size: {small}, {middle}, {big}."


def counting(dice: RandomChoices) -> str:
    """How many there are then."""
    noun = plural(dice.pick(list(RELATIONS["material"].table)))
    one, other = dice.sample(NAMES, 2)
    first, second = 2 + dice.below(5), 1 + dice.below(4)
    form = dice.below(5)
    if form == 4:
        own = f"{one} owns {DECIMALS[first]} {noun}, and {other} owns {DECIMALS[second]}."
        return f"{own} Together they own {DECIMALS[first + second]}."
    if form == 0:
        return (
            f"{one} had {DECIMALS[first]} {noun}. {other} brought {DECIMALS[second]} more. "
            f"Now {one} had {DECIMALS[first + second]} {noun}."
        )
    if form == 1:
        lost = 1 + dice.below(first - 1)
        return (
            f"There were {DECIMALS[first]} {noun} on the table. {one} took {DECIMALS[lost]} away. "
            f"{sentence(DECIMALS[first - lost])} stayed."
        )
    if form == 2:
        start = dice.below(8)
        return f"{one} counts the {noun}: {', '.join(DECIMALS[start + n] for n in range(5))}."
    return f"{sentence(DECIMALS[first])} and {DECIMALS[second]} make {DECIMALS[first + second]}: {first} + {second} = {first + second}."  # noqa: E501


def lesson(dice: RandomChoices) -> str:
    """What goes on in a class, in the words that tasks are set with."""
    one = dice.pick(NAMES)
    relation = dice.pick(list(RELATIONS.values()))
    subject = dice.pick(list(relation.table))
    ask, say = relation.fill(dice.pick(relation.ask), subject), relation.fill(dice.pick(relation.say), subject)
    lead = dice.pick(
        (
            "The teacher wrote an instruction that describes a task.",
            "Below the instruction was a question with a blank to fill in.",
            "{one} chose a solution to the task and an ending for the story.",
            "The teacher gave one of the options as the answer, in the correct format.",
            "The teacher made a request: complete the sentence, and use one of the allowed words.",
        )
    ).format(one=one)
    reply = dice.pick(
        (
            "{one} had to write a response: {say}",
            "The response of {one} was appropriate: {say}",
            "{one} knew the correct answer: {say}",
            "The teacher asked: {ask} {one} completes the task: {say}",
        )
    )
    return f"{lead} {reply.format(one=one, say=say, ask=ask)}"


KINDS: tuple[Callable[[RandomChoices], str], ...] = (
    profile, profile, together, chain, chain, contrast, question, question, talk, talk, verdict, verdict, verdict,
    verdict, *[choice] * 16, *[catalogue] * 6, *[recall] * 4, sizes, counting, lesson, *world_stories.KINDS,
)  # fmt: skip
"""What a text may be, each as often as it stands here."""
