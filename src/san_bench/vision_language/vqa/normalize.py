"""Answer normalization for benchmark scoring.

The rules are those of the VQA evaluation (GT-Vision-Lab/VQA, vqaEval.py), of its variant in MMF and LLaVA
(m4c_evaluator.py, `EvalAIAnswerProcessor`), and of LLaVA's scorers of multiple choice, POPE and GQA.

Example:
    >>> normalise_answer("The two dogs' bowls, dont you see?")
    "2 dogs' bowls don't you see"
    >>> normalise_for_upload("A man's hat")
    "man 's hat"
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Punctuation: removed next to a space, otherwise replaced by a space."""

ARTICLES = frozenset(("a", "an", "the"))
"""Words that are removed."""

NUMBERS = {
    "none": "0",
    **{word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())},
}
"""Words replaced by digits."""

CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've 'ow's'at
""".split()
"""Contractions; each is restored from its spelling with one apostrophe missing."""

CONTRACTIONS = {
    **{word[:i] + word[i + 1 :]: word for word in CONTRACTED for i, sign in enumerate(word) if sign == "'"},
    "somebody'd": "somebodyd",  # as published: the only one in the other direction
}
"""Maps misspelled contractions to correct ones."""

LETTERS = "ABCDE"
"""Option letters."""

_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalise_answer(answer: str) -> str:
    """Normalizes an answer as in the VQA evaluation: punctuation, case, number words, articles, contractions."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    out, inside_number = answer, _BETWEEN_DIGITS.search(answer) is not None
    for sign in PUNCTUATION:
        beside = f"{sign} " in answer or f" {sign}" in answer
        out = out.replace(sign, "" if beside or inside_number else " ")
    words = (NUMBERS.get(word, word) for word in _PERIOD.sub("", out).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise_for_upload(answer: str) -> str:
    """Normalizes an answer as in TextVQA scoring and LLaVA's VQAv2 submission.

    First removes commas and question marks and splits off 's, then applies `normalise_answer`.
    """
    return normalise_answer(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def normalise_gqa(answer: str) -> str:
    """Normalizes an answer as in LLaVA's GQA evaluation: lower case, no final periods."""
    return answer.rstrip(".").lower()


def science_letter(answer: str, count: int) -> str | None:
    """Extracts the option letter from an answer by LLaVA's ScienceQA rule (eval_science_qa.py).

    Args:
        answer: A single letter; a letter, period and space at the start; or `The answer is` and a letter.
        count: Number of options.

    Returns:
        The letter, or `None` if the rule finds none among the options.
    """
    answer = answer.replace("\n", ". ")
    if answer.strip() in tuple(LETTERS):
        letter = answer.strip()
    else:
        patterns = (r"^([A-E])\. ", r"The answer is ([A-E])\.", r"The answer is ([A-E])")
        found = next(filter(None, (re.search(pattern, answer) for pattern in patterns)), None)
        letter = found[1] if found else ""
    return letter if letter and letter in LETTERS[:count] else None


def choice_letter(answer: str, options: Sequence[str]) -> str | None:
    """Extracts the option letter from an answer by LLaVA's MMBench rule, without a judge model (eval_mmbench.py).

    Args:
        answer: A single letter in either case, possibly with periods; `The answer is X.`; or text contained in exactly
            one option.
        options: Option texts, in the order of the letters.

    Returns:
        The letter, or `None` if the rule finds none.
    """
    letters = LETTERS[: len(options)]
    alone = answer.strip(".").strip().upper()
    if len(alone) == 1 and alone in letters:
        return alone
    small = answer.lower()
    for letter in letters:
        if f"the answer is {letter.lower()}." in small:
            return letter
    holding = [letter for letter, option in zip(letters, options, strict=True) if small in option.lower()]
    return holding[0] if len(holding) == 1 else None


def says_no(answer: str) -> bool:
    """Returns whether an answer means no by LLaVA's POPE rule (eval_pope.py).

    It does if its first sentence contains the word `No`, `no` or `not`.
    """
    return not {"No", "no", "not"}.isdisjoint(answer.split(".")[0].replace(",", "").split(" "))
