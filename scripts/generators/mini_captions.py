"""Pictures like those of mini-vl, and what is to be seen there: to pretrain a model that has seen no task.

No picture of a task is among them, and no sentence or request is a question of a task. What a task needs is: to see
colours, shapes, places and letters, to know a food by its colour, and to name a thing by the letter before it.

Example:
    >>> scene, facts = caption(seed=5, index=1)
    >>> [f"{figure.colour} {figure.shape}" for figure in scene.figures]
    ['yellow ball', 'white kite', 'purple bar']
    >>> print(facts[0].said, "|", facts[0].seen)
    The white kite is at the | bottom left
    >>> print(facts[0].asked)
    Tell me where the white kite stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from san_bench.language.mini.wordings import RELATIONS
from san_bench.language.mini.words import RandomChoices, an, listed, sentence
from san_bench.vision_language.mini.pictures import CELLS, COLOURS, SHAPES, Figure, Scene
from san_bench.vision_language.mini.tasks import LETTERS, WORDS, absent, scene_of

FACTS = 8
"""How many facts a caption has."""


class Fact(NamedTuple):
    """A sentence about a picture, without its full stop.

    Attributes:
        said: How it begins.
        seen: How it goes on, which nobody knows without the picture.
        asked: What else to say, so that the answer is `seen`; no task asks in these words.
        manner: Lines on how to answer, which most requests of a caption end with; a model has to read past them.
    """

    said: str
    seen: str
    asked: str
    manner: str = ""

    @property
    def request(self) -> str:
        """What is asked, and how to answer."""
        return f"{self.asked}\n{self.manner}" if self.manner else self.asked


class Caption(NamedTuple):
    """A picture and what is to be seen there.

    Attributes:
        scene: What the picture shows.
        facts: Sentences about it, in no order.
    """

    scene: Scene
    facts: tuple[Fact, ...]


def caption(seed: int, index: int) -> Caption:
    """Makes a scene and some facts about it, for `draw(scene, seed, index)`.

    Args:
        seed: Names the sequence, one that no task has.
        index: Which one of the sequence; there is no end of them.
    """
    dice = RandomChoices(seed, index)
    written = dice.chance(30)
    scene = scene_of(dice, dice.pick((1, 2, 3, 3, 4)))
    if written:
        scene = Scene(tuple(figure for figure in scene.figures if figure.cell < 2), dice.pick(WORDS))
    kinds = (*(_FIGURES if scene.figures else ()), *(_LETTERS if written else ()))
    facts = [KINDS[kind](dice, scene) for kind in dice.sample(kinds, FACTS)]
    return Caption(scene, tuple(closed(dice, fact) for fact in facts))


def closed(dice: RandomChoices, fact: Fact) -> Fact:
    """Adds to four of five facts how to answer; no task says it in these words."""
    lines = [dice.pick(_DOUBTS)] if dice.chance(25) else []
    if dice.chance(80):
        lines.append(f"{dice.pick(_ANSWERS)} {dice.pick(_MANNERS)}{dice.pick(_ENDS)}.")
    return fact._replace(manner="\n".join(lines))


_DOUBTS = (
    "If the photograph does not show enough, mention it.", "Whenever you cannot decide, admit that.",
    "Should details be lacking, indicate so.", "Say so if this is impossible to know.",
)  # fmt: skip

_ANSWERS = ("Reply", "Respond", "Speak", "Write", "State this", "Give it", "Put it", "Finish", "Return that", "Explain")

_MANNERS = (
    "with one word", "with one or two words", "in a few words", "by a brief expression", "in the shortest form",
    "by the correct mark alone", "by naming the choice that fits", "by one of the marks above", "without explanation",
    "quickly and exactly",
)  # fmt: skip

_ENDS = ("", " only", ", please", ", not in a sentence", " and say nothing more", " from what the photograph shows")


def _name(figure: Figure) -> str:
    return f"{figure.colour} {figure.shape}"


def _colour(dice: RandomChoices, scene: Scene) -> Fact:
    """The colour of something; one in six is not there."""
    missing = dice.chance(16)
    shape = absent(dice, scene, "shape") if missing else dice.pick(scene.figures).shape
    said = dice.pick(("The {} is", "The colour of the {} is", "The {} looks")).format(shape)
    asked = dice.pick(("Name the colour of the {}.", "Tell me how the {} looks.")).format(shape)
    return Fact(said, "missing" if missing else scene.find(shape)[0].colour, asked)


def _shape(dice: RandomChoices, scene: Scene) -> Fact:
    figure = dice.pick(scene.figures)
    said = dice.pick(("What is {} is", "The {} thing is")).format(figure.colour)
    return Fact(said, an(figure.shape), dice.pick(("Name what is {}.", "Name the {} thing.")).format(figure.colour))


def _place(dice: RandomChoices, scene: Scene) -> Fact:
    figure = dice.pick(scene.figures)
    name = dice.pick((figure.shape, f"{figure.colour} thing", _name(figure)))
    said = dice.pick(("The {} is at the", "The {} stands at the")).format(name)
    asked = dice.pick(("Name the place of the {}.", "Tell me where the {} stands."))
    return Fact(said, CELLS[figure.cell], asked.format(name))


def _at(scene: Scene, cell: int) -> str:
    return next((an(_name(figure)) for figure in scene.figures if figure.cell == cell), "nothing")


def _cell(dice: RandomChoices, scene: Scene) -> Fact:
    cell = dice.pick(scene.figures).cell if dice.chance(60) else dice.below(len(CELLS))
    said = sentence(dice.pick(("{}:", "at the {} is")).format(CELLS[cell]))
    return Fact(said, _at(scene, cell), f"Name what is at the {CELLS[cell]}.")


def _count(dice: RandomChoices, scene: Scene) -> Fact:
    number = len(scene.figures)
    seen = f"{number} {'thing' if number == 1 else 'things'}"
    return Fact(dice.pick(("One sees", "The picture shows")), seen, dice.pick(("Count what you see.", "Count all.")))


def _there(dice: RandomChoices, scene: Scene) -> Fact:
    """Something that is there or not; what is not is made of parts that are, or not."""
    figure, there = dice.pick(scene.figures), dice.chance(50)
    shape = figure.shape if there or dice.chance(50) else absent(dice, scene, "shape")
    colour = dice.pick(scene.figures).colour if dice.chance(50) else absent(dice, scene, "colour")
    name = dice.pick((_name(figure), figure.shape, f"{figure.colour} thing")) if there else f"{colour} {shape}"
    seen = "there" if there or scene.find(shape, colour) else "missing"
    thing = sentence(an(name))
    return Fact(f"{thing} is", seen, f"{thing}: there or missing?")


def _beside(dice: RandomChoices, scene: Scene) -> Fact:
    figure = dice.pick(scene.figures)
    column, row = figure.cell % 2, figure.cell // 2
    sides = ("right of", "left of")[column], ("below", "above")[row]
    side = dice.below(2)
    where = f"{sides[side]} the {dice.pick((figure.shape, _name(figure)))}"
    return Fact(f"{sentence(where)} is", _at(scene, figure.cell ^ (1, 2)[side]), f"Name what is {where}.")


def _side(dice: RandomChoices, scene: Scene) -> Fact:
    pairs = [(one, other) for one in scene.figures for other in scene.figures if one.cell % 2 != other.cell % 2]
    if not pairs:
        return _beside(dice, scene)
    one, other = dice.pick(pairs)
    asked = f"From the {_name(other)}, the {_name(one)} is where: left or right?"
    said = f"From the {_name(other)}, the {_name(one)} is on the"
    return Fact(said, ("left", "right")[one.cell % 2], asked)


def _options(dice: RandomChoices, names: Sequence[str], right: str) -> list[str]:
    chosen = [right, *dice.sample([name for name in names if name != right], 1 + dice.below(3))]
    return dice.sample(chosen, len(chosen))


def _foods(dice: RandomChoices) -> dict[str, str]:
    """One food of each colour."""
    table = RELATIONS["colour"].table
    return {colour: dice.pick([food for food, has in table.items() if has == colour]) for colour in COLOURS}


def _like(dice: RandomChoices, scene: Scene) -> Fact:
    figure, foods = dice.pick(scene.figures), _foods(dice)
    options = listed([an(foods[colour]) for colour in _options(dice, list(COLOURS), figure.colour)], "or")
    offered = f"{sentence(options)}?"
    asked = f"{offered} Name what the {figure.shape} looks like."
    return Fact(f"{offered} The {figure.shape} looks like", an(foods[figure.colour]), asked)


def _marked(dice: RandomChoices, scene: Scene) -> Fact:
    """Two to four things with letters before them, and the letter of the one that fits."""
    figure, kind = dice.pick(scene.figures), dice.below(3)
    known, right = (SHAPES, figure.shape) if kind == 0 else (COLOURS, figure.colour)
    options, foods = _options(dice, list(known), right), _foods(dice)
    letter = LETTERS[options.index(right)]
    gap, stop = dice.pick((" ", "\n")), dice.pick((";", ".", ""))
    lines = [f"{one}. {an(foods[name]) if kind == 2 else name}" for one, name in zip(LETTERS, options, strict=False)]
    what = (f"what is {figure.colour} is", f"the {figure.shape} is", f"the {figure.shape} looks like")[kind]
    said = f"{gap.join(lines)}{stop}{gap}{sentence(what)}"
    wanted = (f"what is {figure.colour}", f"the colour of the {figure.shape}", f"what the {figure.shape} looks like")
    return Fact(said, letter, gap.join((f"Take {wanted[kind]}:", *lines)))


def _word(dice: RandomChoices, scene: Scene) -> Fact:
    said = dice.pick(("The written word is", "It says", "Below, one reads"))
    return Fact(said, scene.word, dice.pick(("Read the word.", "Tell me the word.")))


def _spelt(dice: RandomChoices, scene: Scene) -> Fact:
    return Fact(dice.pick(("The letters are", "It is spelt")), " ".join(scene.word), "Spell the word.")


def _letter(dice: RandomChoices, scene: Scene) -> Fact:
    place = dice.below(len(scene.word))
    return Fact(f"Letter {place + 1} is", scene.word[place], f"Read letter {place + 1}.")


_Tell = Callable[[RandomChoices, Scene], Fact]

ABOUT_FIGURES: dict[str, _Tell] = {
    "colour": _colour, "shape": _shape, "place": _place, "cell": _cell, "count": _count, "there": _there,
    "beside": _beside, "side": _side, "like": _like, "marked": _marked,
}  # fmt: skip
"""Facts about figures, where there are some."""

ABOUT_WORDS: dict[str, _Tell] = {"word": _word, "spelt": _spelt, "letter": _letter}
"""Facts about a word, where one is written."""

KINDS = {**ABOUT_FIGURES, **ABOUT_WORDS}
"""Every kind of fact."""

_FIGURES = (
    "colour", "colour", "colour", "shape", "shape", "shape", "place", "place", "cell", "count", "there", "there",
    "beside", "side", "like", "marked", "marked", "marked",
)  # fmt: skip
"""What may be said about figures, as often as it comes up."""

_LETTERS = ("word", "word", "word", "word", "spelt", "spelt", "spelt", "letter", "letter", "letter")
"""What may be said about a word, as often as it comes up."""
