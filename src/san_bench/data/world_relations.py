"""The facts of the small world as relations, each with its wordings: some for texts, others for tasks.

A relation maps each subject to one value. The wordings of texts (`say`, `ask`, `seek`) and those of tasks (`claim`,
`quiz`, `which`, `known`) have no sentence in common, so who answers a task has to know the fact and not the sentence.

Example:
    >>> fact = RELATIONS["use"]
    >>> fact.table["knife"], fact.word(fact.claim[0], "knife", "cut bread")
    ('cut bread', 'is a knife the right thing to cut bread')
    >>> len(FACTS)
    413
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from san_bench.data.world_facts import (
    ANIMALS,
    DAYS,
    FOODS,
    JOBS,
    KINDS,
    MATERIALS,
    OPPOSITES,
    SEASONS,
    SOUNDS,
    THINGS,
)  # fmt: skip
from san_bench.data.world_words import Relation, an


def column(table: dict[str, tuple[str, ...]], place: int) -> MappingProxyType[str, str]:
    """Returns one property of all subjects of a table."""
    return MappingProxyType({subject: row[place] for subject, row in table.items()})


class Fact(NamedTuple):
    """What is so: a subject has this value in this relation."""

    relation: str
    subject: str
    value: str


RELATIONS: dict[str, Relation] = {
    "material": Relation(
        column(THINGS, 0),
        ("{ax} is made of {y}.", "they made the {x} out of {y}.", "the {x} is a thing of {y}.", "{xs} consist of {y}."),
        ("what is {ax} made of?", "out of what do they make {ax}?"),
        ("which thing is made of {y}?", "name something that consists of {y}."),
        ("is {y} the stuff in {ax}", "do you need {y} to produce {ax}"),
        ("Which stuff do you need to produce {ax}?", "Of which material would you build {ax}?"),
        ("Which of these would you produce from {y}?", "For which of these do you need {y}?"),
    ),
    "room": Relation(
        column(THINGS, 1),
        ("the {x} is kept in the {y}.", "they keep {xs} in the {y}.", "the {x} belongs in the {y}.",
         "after work, put the {x} back in the {y}."),
        ("where do they keep the {x}?", "where does the {x} belong?"),
        ("which thing is kept in the {y}?", "what belongs in the {y}?"),
        ("would you go to the {y} to get {ax}", "is the {y} the usual place for {ax}"),
        ("Where would you go to get {ax}?", "What is the usual place for {ax}?"),
        ("Which of these would you get from the {y}?", "For which of these is the {y} the usual place?"),
        value="the {y}",
    ),
    "use": Relation(
        column(THINGS, 2),
        ("people use {ax} to {y}.", "{ax} is there to {y}.", "with {ax} you can {y}.", "who wants to {y} takes {ax}."),
        ("what do people use {ax} for?", "what can you do with {ax}?"),
        ("what do people use to {y}?", "what does one take to {y}?"),
        ("is {ax} the right thing to {y}", "does {ax} help somebody to {y}"),
        ("What does {ax} help somebody to do?", "For what job is {ax} the right thing?"),
        ("Which of these helps somebody to {y}?", "What is the right thing to {y}?"),
        "the thing that helps somebody to {y}",
    ),
    "water": Relation(
        column(MATERIALS, 0),
        ("{x} {y3} in water.", "in the pond, {x} will {y}.", "throw {x} into the river: it {y3}."),
        ("what does {x} do in water?", "what happens to {x} in the pond?"),
        ("what does {y} in water?", "what will {y} in the pond?"),
        ("does {x} {y} in a lake", "would {x} in a full bath {y}"),
        ("What does {x} do in a lake?", "How does {x} behave in a full bath?"),
        ("Which of these will {y} in a lake?", "Which of these would {y} in a full bath?"),
        value="it will {y}",
    ),
    "heat": Relation(
        column(MATERIALS, 1),
        ("{x} {y3} in a fire.", "in the flames, {x} will {y}.", "near a fire, {x} can {y}."),
        ("what does {x} do in a fire?", "what happens to {x} in the flames?"),
        ("what does {y} in a fire?", "what will {y} in the flames?"),
        ("does {x} {y} in an oven", "does great heat make {x} {y}"),
        ("What does great heat make {x} do?", "How does {x} behave in an oven?"),
        ("Which of these does great heat cause to {y}?", "Which of these would {y} in an oven?"),
        value="it will {y}",
    ),
    "fall": Relation(
        column(MATERIALS, 2),
        ("when you drop {x}, it {y3}.", "{x} will {y} when it falls.", "let {x} fall and it {y3}."),
        ("what does {x} do when you drop it?", "what happens when {x} falls?"),
        ("what will {y} when it falls?", "what {y3} when you drop it?"),
        ("does {x} {y} on hitting the floor", "would {x} from a high shelf {y}"),
        ("What does {x} do on hitting the floor?", "How does {x} behave as it hits the ground?"),
        ("Which of these will {y} on hitting the floor?", "Which of these would {y} on the ground?"),
        value="it will {y}",
    ),
    "source": Relation(
        column(MATERIALS, 3),
        ("{x} comes from {y}.", "we get {x} from {y}.", "without {y} there is no {x}."),
        ("where does {x} come from?", "what do we get {x} from?"),
        ("what comes from {y}?", "what do we get from {y}?"),
        ("does somebody who needs {x} start with {y}", "do {y} give us {x}"),
        ("What gives us {x}?", "With what does somebody who needs {x} start?"),
        ("Which of these is a gift of {y}?", "Which stuff begins with {y}?"),
        "the stuff that begins with {y}",
    ),
    "kind": Relation(
        column(ANIMALS, 0),
        ("{ax} is {ay}.", "the {x} is a kind of {y}.", "among the {ys} we count the {x}.", "every {x} is {ay}."),
        ("what kind of animal is {ax}?", "what is {ax}?"),
        ("which animal is {ay}?", "name {ay}."),
        ("does {ax} belong to the group {y}", "would {ax} fit in a list of all {ys}"),
        ("To which group does {ax} belong?", "In a list of what would {ax} fit?"),
        ("Which of these fits in a list of all {ys}?", "Which of these belongs to the group {y}?"),
        value="{ys}",
    ),
    "home": Relation(
        column(ANIMALS, 1),
        ("{ax} lives in {y}.", "the {x} has its home in {y}.", "{xs} sleep in {y}.", "there is {ax} in {y}."),
        ("where does {ax} live?", "where do {xs} sleep?"),
        ("which animal lives in {y}?", "who has a home in {y}?"),
        ("would you search {y} for {ax}", "does {ax} return to {y} to rest"),
        ("Where would you search for {ax}?", "To what place does {ax} return to rest?"),
        ("Which of these returns to {y} to rest?", "For which animal would you search {y}?"),
    ),
    "food": Relation(
        column(ANIMALS, 2),
        ("{ax} eats {y}.", "{xs} like {y}.", "the food of {ax} is {y}.", "the {x} looks for {y} to eat."),
        ("what does {ax} eat?", "what food do {xs} like?"),
        ("which animal eats {y}?", "who looks for {y} to eat?"),
        ("would {y} be a good dinner for {ax}", "would a hungry {x} be pleased with {y}"),
        ("What is a good dinner for {ax}?", "With what would a hungry {x} be pleased?"),
        ("For which of these is {y} a good dinner?", "Which hungry animal would be pleased with {y}?"),
        "the animal whose dinner is {y}",
    ),
    "sound": Relation(
        MappingProxyType(SOUNDS),
        ("{ax} {y3}.", "{xs} {y}.", "when the {x} calls, it {y3}.", "I heard the {x} {y}."),
        ("what noise does {ax} make?", "what do {xs} do when they call?"),
        ("which animal {y3}?", "who {y3}?"),
        ("would {ax} {y} to be heard", "is it {ax} that wakes you when something begins to {y}"),
        ("What would {ax} do to be heard?", "How does {ax} wake you?"),
        ("Which of these would {y} to be heard?", "Which of these wakes you when it begins to {y}?"),
        "the animal that would {y} to be heard",
        "it would {y}",
    ),
    "cover": Relation(
        column(KINDS, 0),
        ("{ax} has {y}.", "{y} cover the {x}.", "the body of {ax} is covered with {y}."),
        ("what covers the body of {ax}?", "what is {ax} covered with?"),
        ("what kind of animal has {y}?", "whose body is covered with {y}?"),
        ("would you feel {y} if you touched {ax}", "does {ax} wear {y} all over"),
        ("What would you feel if you touched {ax}?", "What does {ax} wear all over?"),
        ("Which of these wears {y} all over?", "Touching which of these would you feel {y}?"),
    ),
    "legs": Relation(
        column(KINDS, 1),
        ("{ax} has {y}.", "{xs} have {y}.", "we see {y} on {ax}."),
        ("how many legs has {ax}?", "how many legs do we see on {ax}?"),
        ("what kind of animal has {y}?", "who has {y}?"),
        ("would a good picture of {ax} show {y}", "does {ax} stand on {y}"),
        ("What would a good picture of {ax} show?", "How many legs must one draw for {ax}?"),
        ("A picture of which of these shows {y}?", "For which of these must one draw {y}?"),
    ),
    "moves": Relation(
        column(KINDS, 2),
        ("{ax} can {y}.", "{xs} {y}.", "the {x} wants to {y}."),
        ("how does {ax} move?", "how do {xs} get about?"),
        ("what kind of animal can {y}?", "who likes to {y}?"),
        ("would {ax} {y} to get away", "does {ax} {y} in order to travel"),
        ("What would {ax} do to get away?", "How does {ax} travel?"),
        ("Which of these would {y} to get away?", "Which of these can {y} in order to travel?"),
        value="it would {y}",
    ),
    "young": Relation(
        column(KINDS, 3),
        ("young {xs} {y}.", "when {ax} is young, it {y3}.", "the little ones of {ax} {y}."),
        ("what do young {xs} do?", "what does {ax} do when it is young?"),
        ("which young animals {y}?", "whose little ones {y}?"),
        ("do the babies of {ax} {y}", "does {ax} {y} in its first days"),
        ("What do the babies of {ax} do?", "What does {ax} do in its first days?"),
        ("The babies of which of these {y}?", "Which of these will {y} in its first days?"),
        value="they {y}",
    ),
    "colour": Relation(
        column(FOODS, 0),
        ("{ax} is {y}.", "the colour of {ax} is {y}.", "paint the {x} {y}.", "I saw a {y} thing: {ax}."),
        ("what colour is {ax}?", "how do you paint the {x}?"),
        ("which food is {y}?", "name a {y} food."),
        ("would a picture of {ax} need {y} ink", "does {ax} look {y}"),
        ("How does {ax} look?", "What ink does a picture of {ax} need?"),
        ("Which of these looks {y}?", "A picture of which of these needs {y} ink?"),
    ),
    "taste": Relation(
        column(FOODS, 1),
        ("{ax} tastes {y}.", "the taste of {ax} is {y}.", "bite the {x}: it is {y}."),
        ("how does {ax} taste?", "what is the taste of {ax}?"),
        ("which food tastes {y}?", "what is {y} when you bite it?"),
        ("does {ax} feel {y} on your tongue", "would {ax} make a dish {y}"),
        ("How does {ax} feel on your tongue?", "What would {ax} make of a dish?"),
        ("Which of these feels {y} on your tongue?", "What would make a dish {y}?"),
    ),
    "origin": Relation(
        column(FOODS, 2),
        ("{ax} comes from {y}.", "we get {ax} from {y}.", "thank {y} for the {x}."),
        ("where does {ax} come from?", "from what do we get {ax}?"),
        ("which food comes from {y}?", "what do we get from {y}?"),
        ("does {y} give us {ax}", "is {ax} something that {y} gives"),
        ("What gives us {ax}?", "From where does a cook receive {ax}?"),
        ("Which of these does {y} give us?", "Which of these does a cook receive from {y}?"),
    ),
    "workplace": Relation(
        column(JOBS, 0),
        ("the {x} works in the {y}.", "you find the {x} at the {y}.", "each morning the {x} goes to the {y}."),
        ("where does the {x} work?", "where do you find the {x}?"),
        ("who works in the {y}?", "whom do you find at the {y}?"),
        ("does {ax} earn money in the {y}", "is the {y} full of work for {ax}"),
        ("Where does {ax} earn money?", "Which place is full of work for {ax}?"),
        ("Who earns money in the {y}?", "For whom is the {y} full of work?"),
        "the person who earns money in the {y}",
        "the {y}",
    ),
    "tool": Relation(
        column(JOBS, 1),
        ("the {x} works with {ay}.", "the {x} uses {ay}.", "the {y} is the tool of the {x}."),
        ("what does the {x} work with?", "what is the tool of the {x}?"),
        ("who works with {ay}?", "whose tool is the {y}?"),
        ("does {ax} pick up {ay} at work", "would {ax} without {ay} be in trouble"),
        ("What does {ax} pick up at work?", "Without what would {ax} be in trouble?"),
        ("Who picks up {ay} at work?", "Who would be in trouble without {ay}?"),
        "the person who picks up {ay} at work",
        "{ay}",
    ),
    "job": Relation(
        column(JOBS, 2),
        ("it is the work of the {x} to {y}.", "the {x} can {y}.", "to {y}, we need the {x}."),
        ("what is the work of the {x}?", "for what do we need the {x}?"),
        ("whose work is it to {y}?", "who can {y}?"),
        ("is {ax} paid to {y}", "does {ax} {y} every day"),
        ("What is {ax} paid to do?", "What does {ax} do every day?"),
        ("Who is paid to {y}?", "Whom do you call to {y}?"),
        "the person who is paid to {y}",
    ),
    "opposite": Relation(
        MappingProxyType(OPPOSITES | {y: x for x, y in OPPOSITES.items()}),
        ("{x} is the opposite of {y}.", "what is {x} is not {y}.", "either {x} or {y}, never both."),
        ("what is the opposite of {x}?", "what is not {x}?"),
        ("what has {y} as its opposite?",),
        ("does {x} mean the contrary of {y}", "is something that stopped being {x} {y}"),
        ("Which word means the contrary of {x}?", "What is something that stopped being {x}?"),
        ("Which of these means the contrary of {y}?", "Something stopped being what and is {y} now?"),
        subject="{x}",
    ),
    "tomorrow": Relation(
        MappingProxyType({day: DAYS[(n + 1) % 7] for n, day in enumerate(DAYS)}),
        ("{y} comes after {x}.", "today is {x}, so tomorrow is {y}.", "first {x}, then {y}."),
        ("what comes after {x}?", "today is {x}. What is tomorrow?"),
        ("after what day comes {y}?",),
        ("does {x} end when {y} begins", "is {y} one day later than {x}"),
        ("Which day is one day later than {x}?", "Which day begins when {x} ends?"),
        ("Which day ends when {y} begins?", "Which day is one day earlier than {y}?"),
        subject="{x}",
    ),
    "season": Relation(
        MappingProxyType(SEASONS),
        ("in {x}, {y}.", "when {x} comes, {y}.", "it is {x}: {y}."),
        ("what happens in {x}?", "what happens when {x} comes?"),
        ("when is it that {y}?",),
        ("is {x} the time when {y}", "would you wait for {x} until {y}"),
        ("What would you wait for {x} to see?", "What tells you that it is {x}?"),
        ("What is the time when {y}?", "Which part of the year do you expect if {y}?"),
        subject="{x}",
    ),
}  # fmt: skip
"""Every relation by its name."""


def _follows(first: str, second: str) -> Relation:
    """What two relations say together; the subjects of materials' relations come with their article."""
    ways, middle = RELATIONS[second], RELATIONS[first].table
    table = {an(x) if first == "material" else x: ways.table[value] for x, value in middle.items()}
    return replace(ways, table=MappingProxyType(table), known=None)


DERIVED: dict[str, Relation] = {
    f"{second} by {first}": _follows(first, second)
    for first, seconds in (("material", ("water", "heat", "fall")), ("kind", ("cover", "legs", "moves", "young")))
    for second in seconds
}
"""What follows from two facts: a thing does what its material does, an animal has what its kind has."""

FACTS: tuple[Fact, ...] = tuple(
    Fact(name, subject, value) for name, relation in RELATIONS.items() for subject, value in relation.table.items()
)
"""Every fact that stands by itself."""
