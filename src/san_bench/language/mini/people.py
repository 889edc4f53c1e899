"""What people of the small world feel, want and are like, why they do things, and what they do step by step.

In every text `{a}` is the person in question and `{b}` another one. Texts speak of the past.

Example:
    >>> MOODS["gift"].feeling, MOODS["gift"].wish
    ('grateful', 'say thank you')
"""

from __future__ import annotations

from typing import NamedTuple


class Mood(NamedTuple):
    """What happened to somebody, and what comes of it.

    Attributes:
        told: What happened, as the texts tell it.
        asked: What happened, as the tasks tell it.
        feeling: How the person feels.
        wish: What the person wants to do then.
    """

    told: str
    asked: str
    feeling: str
    wish: str


MOODS: dict[str, Mood] = {
    "lost": Mood(
        "{a} lost the key of the house.", "{a} had no idea where the house key was.", "worried", "search every pocket"
    ),
    "gift": Mood("{b} gave {a} a fine present.", "{a} got a present from {b}.", "grateful", "say thank you"),
    "broke": Mood("{a} broke the best cup of {b}.", "{b}'s best cup slipped from {a}'s hand.", "guilty", "say sorry"),
    "meal": Mood("{a} ate nothing all day.", "{a} missed breakfast, lunch and supper.", "hungry", "cook a meal"),
    "work": Mood("{a} dug in the field until night.", "{a} carried stones all day long.", "tired", "go to bed"),
    "noise": Mood(
        "{a} heard steps in the dark cellar.", "{a} was alone when the steps creaked in the dark.", "afraid",
        "turn on the lights"
    ),
    "race": Mood("{a} won the race.", "{a} ran faster than {b} and all the others.", "proud", "show the medal"),
    "seat": Mood("{b} took the seat of {a}.", "{b} sat down on {a}'s chair and laughed.", "angry", "shout at {b}"),
    "party": Mood(
        "nobody came to the party of {a}.", "{a} set a table for ten guests and ate alone.", "lonely", "call a friend"
    ),
    "sun": Mood("{a} walked for hours in the hot sun.", "{a} crossed the hot desert.", "thirsty", "drink water"),
    "frost": Mood(
        "{a} went out in the snow without a coat.", "{a} stood in the icy wind in a thin shirt.", "cold",
        "sit by the stove"
    ),
    "queue": Mood(
        "{a} waited for an hour with nothing to do.", "{a} stared at a wall all morning.", "bored", "look for a game"
    ),
    "fish": Mood("{a} ate a bad fish.", "{a} took old fish for supper.", "sick", "see a doctor"),
    "loss": Mood("the old dog of {a} died.", "{a} had to bury a dear old dog.", "sad", "cry a little"),
    "stage": Mood(
        "{a} forgot the song in front of all the people.", "{a} sang wrong notes before a full hall.", "ashamed",
        "hide from the people"
    ),
    "box": Mood("{a} found a closed box.", "{a} came upon a box without a name.", "curious", "look inside"),
}  # fmt: skip
"""Each thing that may happen to a person."""

TRAITS: dict[str, tuple[str, str]] = {
    "generous": ("{a} shared the last bread with a stranger.", "{a} gave away half of a small supper."),
    "brave": ("{a} jumped into the river to save a child.", "{a} ran into a burning house to get {b} out."),
    "lazy": ("{a} stayed in bed while {b} worked.", "{a} slept in the shade while {b} cut the wheat."),
    "honest": ("{a} told {b} the truth about the window.", "{a} found {b}'s purse and brought it back full."),
    "greedy": ("{a} kept every cake and left none.", "{a} took all the nuts before {b} could have one."),
    "patient": ("{a} waited in line for hours in peace.", "{a} showed {b} the same knot twenty times."),
    "careless": ("{a} left the gate open and the sheep ran off.", "{a} put a candle beside the curtain."),
    "rude": ("{a} pushed an old man aside.", "{a} did not greet {b} and slammed the door."),
    "careful": ("{a} tested the rope before climbing.", "{a} looked left and right before each street."),
    "funny": ("{a} made the whole table laugh.", "{a} told jokes until {b} could not stop laughing."),
}
"""What a person is like: an act that shows it as the texts tell it, and one as the tasks tell it."""

REASONS: dict[str, tuple[str, str]] = {
    "umbrella": ("took an umbrella", "clouds were dark"),
    "coat": ("put on a thick coat", "snow was falling"),
    "station": ("ran to the station", "the train was leaving"),
    "whisper": ("spoke in a low voice", "the baby was asleep"),
    "candle": ("lit a candle", "the lamp was broken"),
    "window": ("opened the window", "the air was bad"),
    "firemen": ("rang the fire bell", "a barn was burning"),
    "stool": ("climbed on a stool", "the shelf was too high"),
    "glasses": ("put on glasses", "the print was small"),
    "soap": ("took the soap", "the hands were muddy"),
    "boots": ("pulled on boots", "the path was wet"),
    "bandage": ("asked for a bandage", "a finger was bleeding"),
    "alarm": ("set the alarm clock", "the next day began early"),
    "rake": ("fetched a rake", "leaves covered the lawn"),
}
"""What a person did, and why."""

SCRIPTS: dict[str, tuple[str, str, str, str]] = {
    "bread": ("mixed flour with water", "kneaded the dough", "put the loaf into the oven", "ate a warm slice"),
    "tooth": ("had a bad tooth", "rang the dentist", "sat down in the dentist's chair", "had no more pain"),
    "letter": ("took a sheet of paper", "wrote a long letter", "glued a stamp on it", "dropped it into the letter box"),
    "fishing": ("dug up a worm", "put it on a hook", "threw the line into the lake", "pulled out a fish"),
    "sowing": ("dug up the garden bed", "put seeds in rows", "watered the bed each day", "picked fresh beans"),
    "laundry": ("filled a tub with soap", "washed the shirts", "hung the shirts on a line", "folded dry shirts"),
    "train": ("packed a suitcase", "bought a ticket", "got on the train", "arrived in the next town"),
    "sleep": ("put on pyjamas", "brushed all teeth", "turned off the lamp", "fell asleep"),
    "fire": ("gathered dry sticks", "piled them up", "struck a match", "sat by a bright fire"),
    "sweater": ("cut the wool off a sheep", "spun the wool", "knitted for weeks", "wore a new sweater"),
    "painting": ("set up an easel", "mixed the colours", "painted the hill", "hung the picture on a wall"),
    "flat": ("heard the tyre burst", "took off the wheel", "put on the spare wheel", "drove on"),
    "climb": ("laced strong boots", "took the steep path", "climbed the last rocks", "saw the land from the top"),
    "honey": ("put on a veil", "opened the hive", "took out the combs", "filled jars with honey"),
}
"""Four steps, one after the other, to each end."""
