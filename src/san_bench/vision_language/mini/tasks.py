"""The tasks of mini-vl: seven forms of question about small pictures, one for each benchmark of LLaVA-1.5.

The forms, the last lines of questions and the rules of scoring are the benchmarks' own. Item `i` of a task is a
function of the task's seed and `i` alone, the same on every platform; splits are ranges of `i`. Right letters take
turns. Science asks for facts of the small world of `world_facts`.

Example:
    >>> print(item("presence", 1).text.splitlines()[0], item("presence", 1).answer)
    Is there a yellow ball in the image? no
    >>> picture("presence", 1).size, conversation(7).image is None
    ((32, 32), True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from san_bench.language.mini.wordings import RELATIONS
from san_bench.language.mini.words import RandomChoices, an, sentence
from san_bench.vision_language.mini.pictures import CELLS, COLOURS, SHAPES, Figure, Scene, draw_scene
from san_bench.vision_language.records import MARKER, Conversation, Turn
from san_bench.vision_language.vqa.formats import LETTER, SHORT, UNANSWERABLE

SPLITS = {"train": range(0, 400), "val": range(400, 500), "test": range(500, 800)}
"""Which items of a task are in which split."""

LETTERS = "ABCD"

WORDS = tuple(
    "ant bag barn bear bed bee beet belt bird book cake car card cat clay coat corn cow crab crow cup dog door duck "
    "egg fish ham hand hat hen hole home hose iron jar key lake lamp lens map milk moth nest owl page pig pike pin "
    "pond rake salt sand saw sea seed sink skin snow song sun tail tea tree wax wolf wood wool".split()
)
"""What may be written in a picture."""

CATEGORIES = ("adversarial", "popular", "random")
"""Kinds of what is not there, as POPE names them."""

KINDS = 8
"""Records of the training mix take turns: one of each task, and one without a picture."""


class SceneQuestion(NamedTuple):
    """A question about a scene.

    Attributes:
        scene: What the picture shows.
        text: The question with its last line.
        answer: What is right.
        options: What may be chosen, where there are options.
        category: Of the question, where its benchmark has some.
    """

    scene: Scene
    text: str
    answer: str
    options: tuple[str, ...] = ()
    category: str = "default"


def scene_of(dice: RandomChoices, count: int) -> Scene:
    """Figures in different cells, with different shapes and different colours."""
    cells, shapes = dice.sample(range(len(CELLS)), count), dice.sample(list(SHAPES), count)
    colours = dice.sample(list(COLOURS), count)
    return Scene(tuple(Figure(*parts) for parts in sorted(zip(cells, shapes, colours, strict=True))))


def absent(dice: RandomChoices, scene: Scene, what: str) -> str:
    """Returns a shape or a colour that no figure of a scene has."""
    known = {getattr(figure, what) for figure in scene.figures}
    return dice.pick([name for name in (SHAPES if what == "shape" else COLOURS) if name not in known])


def _chosen(stem: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([stem, *lines, LETTER])


def open_question(dice: RandomChoices, index: int) -> SceneQuestion:
    """Colour, shape, number or place of what is there."""
    scene = scene_of(dice, 1 + index % 4)
    figure, kind = dice.pick(scene.figures), index // 4 % 4
    text, answer = (
        (f"What colour is the {figure.shape}?", figure.colour),
        (f"Which thing is {figure.colour}?", figure.shape),
        ("How many things are there?", str(len(scene.figures))),
        (f"Where is the {figure.shape}?", CELLS[figure.cell]),
    )[kind]
    return SceneQuestion(scene, f"{text}\n{SHORT}", answer)


def composed(dice: RandomChoices, index: int) -> SceneQuestion:
    """Two figures and how they stand to each other."""
    while True:
        scene = scene_of(dice, 3)
        pairs = [(a, b) for a in scene.figures for b in scene.figures if a.cell // 2 == b.cell // 2 and a.cell < b.cell]
        if pairs:
            break
    left, right = dice.pick(pairs)
    kind = index % 3
    if kind == 0:
        return SceneQuestion(scene, f"What colour is the thing to the left of the {right.shape}?\n{SHORT}", left.colour)
    if kind == 1:
        return SceneQuestion(
            scene, f"Which thing is to the right of the {left.colour} {left.shape}?\n{SHORT}", right.shape
        )
    yes = index // 3 % 2 == 0
    one, other = (left, right) if yes else (right, left)
    text = f"Is the {one.colour} {one.shape} to the left of the {other.colour} {other.shape}?"
    return SceneQuestion(scene, f"{text}\n{SHORT}", "yes" if yes else "no")


def unanswerable(dice: RandomChoices, index: int) -> SceneQuestion:
    """A question that the picture answers in every second case."""
    scene = scene_of(dice, 2 + index // 2 % 2)
    shape = dice.pick(scene.figures).shape if index % 2 else absent(dice, scene, "shape")
    answer = scene.find(shape)[0].colour if index % 2 else "unanswerable"
    return SceneQuestion(scene, f"What colour is the {shape}?\n{UNANSWERABLE}\n{SHORT}", answer)


def science(dice: RandomChoices, index: int) -> SceneQuestion:
    """Which food has the colour of a figure: the picture tells the colour, and the world tells the food."""
    scene, foods = scene_of(dice, 2), RELATIONS["colour"].table
    figure, right = dice.pick(scene.figures), index % 4
    others = dice.sample([colour for colour in COLOURS if colour != figure.colour], 3)
    colours = [*others[:right], figure.colour, *others[right:]]
    options = tuple(an(dice.pick([food for food, has in foods.items() if has == colour])) for colour in colours)
    return SceneQuestion(
        scene, _chosen(f"Which food has the colour of the {figure.shape}?", options), LETTERS[right], options
    )


def written(dice: RandomChoices, index: int) -> SceneQuestion:
    """A word in the picture."""
    word = dice.pick(WORDS)
    figures = tuple(figure for figure in scene_of(dice, 2).figures if figure.cell < 2)
    return SceneQuestion(Scene(figures, word), f"What is written?\n{SHORT}", word)


def presence(dice: RandomChoices, index: int) -> SceneQuestion:
    """Whether something is there; what is not is made of parts that are, common, or any."""
    scene = scene_of(dice, 3)
    category, there = CATEGORIES[index // 2 % 3], index % 2 == 0
    figure = dice.pick(scene.figures)
    if there:
        shape, colour = figure.shape, figure.colour
    elif category == "adversarial":  # a shape and a colour that are there, but not together
        shape = figure.shape
        colour = dice.pick([other.colour for other in scene.figures if other != figure])
    elif category == "popular":
        shape, colour = absent(dice, scene, "shape"), figure.colour
    else:
        shape, colour = absent(dice, scene, "shape"), absent(dice, scene, "colour")
    text = f"Is there {an(f'{colour} {shape}')} in the image?\n{SHORT}"
    return SceneQuestion(scene, text, "yes" if there else "no", (), category)


def circular(dice: RandomChoices, index: int) -> SceneQuestion:
    """Multiple choice, which is asked with its options in every rotation."""
    scene, right = scene_of(dice, 3), index % 4
    figure, kind = dice.pick(scene.figures), index // 4 % 2
    known, wanted = (SHAPES, figure.shape) if kind else (COLOURS, figure.colour)
    others = dice.sample([name for name in known if name != wanted], 3)
    options = (*others[:right], wanted, *others[right:])
    stem = f"Which thing is {figure.colour}?" if kind else f"What colour is the {figure.shape}?"
    return SceneQuestion(scene, _chosen(stem, options), LETTERS[right], options)


@dataclass(frozen=True)
class TalkTask:
    """One task of mini-vl.

    Attributes:
        like: The benchmark whose form and rule it has, as in `san_bench.vision_language.vqa.benchmarks.BENCHMARKS`.
        seed: Names the sequence of items.
        draw: Draws an item from its dice and its index.
    """

    like: str
    seed: int
    draw: Callable[[RandomChoices, int], SceneQuestion]


TASKS: dict[str, TalkTask] = {
    "open": TalkTask("vqav2", 301, open_question),
    "composed": TalkTask("gqa", 302, composed),
    "unanswerable": TalkTask("vizwiz", 303, unanswerable),
    "science": TalkTask("sqa", 304, science),
    "written": TalkTask("textvqa", 305, written),
    "presence": TalkTask("pope", 306, presence),
    "circular": TalkTask("mmbench", 307, circular),
}
"""Every task by its name, without the `mini-vl/` before it."""


def item(name: str, index: int) -> SceneQuestion:
    """Makes one item of a task.

    Args:
        name: A name in `TASKS`.
        index: Which item of the task's sequence.
    """
    task = TASKS[name]
    return task.draw(RandomChoices(task.seed, index), index)


def picture(name: str, index: int) -> Image.Image:
    """Draws the picture of an item."""
    return Image.fromarray(draw_scene(item(name, index).scene, TASKS[name].seed, index))


def conversation(index: int) -> Conversation:
    """Makes one record of the training mix.

    Args:
        index: Which record; those of the training split are below `KINDS` times its length. The last of each `KINDS`
            has no picture and asks for a fact of the small world; every second one with a picture goes on with another
            question.

    Returns:
        The record. Its image is a name that `image_of` draws.
    """
    place, kind = divmod(index, KINDS)
    if kind == len(TASKS):
        dice = RandomChoices(308, place)
        relation = dice.pick(list(RELATIONS.values()))
        subject = dice.pick(list(relation.table))
        asked = f"{sentence(relation.fill(dice.pick(relation.ask), subject))}\n{SHORT}"
        return Conversation(index, (Turn("human", asked), Turn("gpt", relation.fill(relation.value, subject))))
    name = list(TASKS)[kind]
    one = item(name, place)
    turns = [Turn("human", f"{MARKER}\n{one.text}"), Turn("gpt", one.answer)]
    if place % 2:
        turns += [Turn("human", f"How many things are there?\n{SHORT}"), Turn("gpt", str(len(one.scene.figures)))]
    return Conversation(index, tuple(turns), f"{name}/{place}.png")


def image_of(name: str) -> Image.Image:
    """Draws the picture of a record, by the name that it has there."""
    task, _, index = name.removesuffix(".png").partition("/")
    return picture(task, int(index))
