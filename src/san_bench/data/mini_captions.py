"""Pictures like those of mini-vl, and sentences about them: to pretrain a model that has never been asked.

No picture of a task is among them, and no sentence is a question of a task. What a task needs is: to see colours,
shapes, places and letters, to know a food by its colour, and to name a thing by the letter before it.

Example:
    >>> told = caption(seed=5, index=1)
    >>> [f"{figure.colour} {figure.shape}" for figure in told.scene.figures]
    ['purple bar', 'green ball']
    >>> print(told.text[:44])
    A. ball B. bar C. kite. What is purple: B. O
    >>> [told.text[start:end] for start, end in told.seen][:2]
    ['purple', 'B']
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from san_bench.data.mini_pictures import CELLS, COLOURS, SHAPES, Figure, Scene
from san_bench.data.mini_talk import LETTERS, WORDS, absent, scene_of
from san_bench.data.world_wordings import RELATIONS
from san_bench.data.world_words import Dice, an, listed, sentence


class Caption(NamedTuple):
    """A picture in words.

    Attributes:
        scene: What it shows.
        text: Sentences about it.
        seen: Where in the text the words are that nobody knows without the picture, as starts and ends.
    """

    scene: Scene
    text: str
    seen: tuple[tuple[int, int], ...]


def caption(seed: int, index: int) -> Caption:
    """Makes a scene and some sentences about it, for `draw(scene, seed, index)`.

    Args:
        seed: Names the sequence, one that no task has.
        index: Which one of the sequence; there is no end of them.
    """
    dice = Dice(seed, index)
    written = dice.chance(30)
    scene = scene_of(dice, 1 + dice.below(4))
    if written:
        scene = Scene(tuple(figure for figure in scene.figures if figure.cell < 2), dice.pick(WORDS))
    said = [say(dice, scene) for say in dice.sample(_SAID, 2 + dice.below(4))] if scene.figures else []
    if written:
        place = dice.below(len(said) + 1)
        said[place:place] = [say(dice, scene) for say in dice.sample(_READ, 1 + dice.below(3))]
    text, seen = "", []
    for plain, marked in re.findall(r"([^[]*)(?:\[([^]]*)\])?", dice.pick((" ", "\n")).join(said)):
        text += plain
        if marked:
            seen.append((len(text), len(text) + len(marked)))
            text += marked
    return Caption(scene, text, tuple(seen))


# Below, what the picture decides stands in square brackets.


def _name(figure: Figure) -> str:
    return f"{figure.colour} {figure.shape}"


def _a(name: str) -> str:
    return f"[{an(name)}]"


def _sentence(text: str) -> str:
    return f"[{sentence(text[1:])}" if text[0] == "[" else sentence(text)


def _named(dice: Dice, scene: Scene) -> str:
    return (
        f"The picture shows {listed([_a(_name(figure)) for figure in dice.sample(scene.figures, len(scene.figures))])}."
    )


def _placed(dice: Dice, scene: Scene) -> str:
    said = [f"{_a(_name(figure))} is at the [{CELLS[figure.cell]}]" for figure in scene.figures]
    return f"{_sentence(listed(dice.sample(said, len(said))))}."


def _cells(dice: Dice, scene: Scene) -> str:
    stands = {figure.cell: an(_name(figure)) for figure in scene.figures}
    places = dice.sample(range(len(CELLS)), 2)
    return " ".join(f"{sentence(CELLS[cell])}: [{stands.get(cell, 'nothing')}]." for cell in places)


def _coloured(dice: Dice, scene: Scene) -> str:
    said = [f"the [{figure.shape}] is [{figure.colour}]" for figure in dice.sample(scene.figures, len(scene.figures))]
    return f"{_sentence(listed(said))}."


def _shaped(dice: Dice, scene: Scene) -> str:
    figures = dice.sample(scene.figures, len(scene.figures))
    return f"{_sentence(listed([f'what is [{figure.colour}] is {_a(figure.shape)}' for figure in figures]))}."


def _counted(dice: Dice, scene: Scene) -> str:
    number = len(scene.figures)
    return f"One sees [{number}] {'thing' if number == 1 else 'things'}."


def _missing(dice: Dice, scene: Scene) -> str:
    what = dice.pick(("shape", "colour"))
    there, not_there = getattr(dice.pick(scene.figures), what), absent(dice, scene, what)
    return (
        f"Something is [{there}], but nothing is [{not_there}]."
        if what == "colour"
        else f"{_sentence(_a(there))} is there, but no [{not_there}]."
    )


def _beside(dice: Dice, scene: Scene) -> str:
    if len(scene.figures) == 1:
        return f"The [{_name(scene.figures[0])}] is alone."
    one, other = dice.sample(scene.figures, 2)
    ways = []
    if one.cell % 2 != other.cell % 2:
        ways.append("[left] of" if one.cell % 2 < other.cell % 2 else "[right] of")
    if one.cell // 2 != other.cell // 2:
        ways.append("[above]" if one.cell < other.cell else "[below]")
    return f"The [{_name(one)}] stands {dice.pick(ways)} the [{_name(other)}]."


def _like(dice: Dice, scene: Scene) -> str:
    figure = dice.pick(scene.figures)
    foods = [food for food, colour in RELATIONS["colour"].table.items() if colour == figure.colour]
    return f"The [{figure.shape}] is as [{figure.colour}] as {an(dice.pick(foods))}."


def _marked(dice: Dice, scene: Scene) -> str:
    """Two to four things with letters before them, and the letter of the one that fits."""
    figure = dice.pick(scene.figures)
    if dice.chance(50):
        known, right, what = COLOURS, figure.colour, f"the [{figure.shape}]"
    else:
        known, right, what = SHAPES, figure.shape, f"what is [{figure.colour}]"
    names = [right, *dice.sample([name for name in known if name != right], 1 + dice.below(3))]
    names = dice.sample(names, len(names))
    letter = f"[{LETTERS[names.index(right)]}]"
    lines = [f"{one}. {name}" for one, name in zip(LETTERS, names, strict=False)]
    end = dice.pick(("{what} is {letter}.", "so {what} is {letter}.", "{letter} is {what}.", "{what}: {letter}."))
    gap = dice.pick((" ", "\n"))
    return f"{gap.join(lines)}{dice.pick((';', '.'))}{gap}{_sentence(end.format(what=what, letter=letter))}"


def _word(dice: Dice, scene: Scene) -> str:
    return dice.pick(("The word [{}] is written.", "It says [{}].", "Below, one reads [{}].")).format(scene.word)


def _spelt(dice: Dice, scene: Scene) -> str:
    return f"The letters [{' '.join(scene.word)}] make {scene.word}."


def _letter(dice: Dice, scene: Scene) -> str:
    place = dice.below(len(scene.word))
    return f"Letter {place + 1} is [{scene.word[place]}]."


_SAID: tuple[Callable[[Dice, Scene], str], ...] = (
    _named, _placed, _cells, _coloured, _shaped, _counted, _missing, _beside, _like, _marked, _marked,
)  # fmt: skip
"""What may be said about figures."""

_READ: tuple[Callable[[Dice, Scene], str], ...] = (_word, _word, _spelt, _letter)
"""What may be said about a word."""
