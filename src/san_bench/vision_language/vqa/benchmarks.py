"""The seven benchmarks of LLaVA-1.5 in the DoRA and SAN comparisons: what they are, and their scores.

A score is a pure function of the questions and of one answer for each; `san_bench.vision_language.vqa.files` reads the
former and `san_bench.vision_language.vqa.uploads` the latter.

Example:
    >>> asked = [Question(1, "a.jpg", "How many?", ("2",) * 9 + ("3",)), Question(2, "b.jpg", "Which?", ("red",) * 10)]
    >>> score_benchmark("vqav2", asked, ["three", None])
    Score(benchmark='vqav2', score=0.15, n=2, unanswered=1, details={})
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from san_bench.config.strict import san_error, suggest
from san_bench.run.folder import export_facts
from san_bench.vision_language.vqa.normalize import (
    choice_letter,
    normalise_answer,
    normalise_for_upload,
    normalise_gqa,
    says_no,
    science_letter,
)
from san_bench.vision_language.vqa.rows import read_json

CIRCLE = 1_000_000
"""MMBench numbers the rotations of a question by its index plus multiples of this."""

CATEGORIES = ("adversarial", "popular", "random")
"""The three sets of questions of POPE."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        id: Its id; TextVQA's questions about one image share theirs in LLaVA's file.
        image: File of the image, its bytes, or `None` without an image.
        text: What the model reads, without a marker of the image.
        answers: What is right: ten answers of people, one answer, or one letter; nothing where it is not public.
        category: Which of POPE's sets it belongs to, or MMBench's category.
        options: The options of a question of multiple choice.
    """

    id: str | int
    image: str | bytes | None
    text: str
    answers: tuple[str, ...] = ()
    category: str = "default"
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """A score with what it was computed from.

    Attributes:
        benchmark: Name of the benchmark.
        score: The score, between 0 and 1.
        n: What it is a mean over: questions, or circles of questions.
        unanswered: Questions with no answer, or none that the rule understands; they count as wrong.
        details: Further numbers by name.
    """

    benchmark: str
    score: float
    n: int
    unanswered: int
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark.

    Attributes:
        title: Its name in print.
        paper_split: What the papers report on.
        local_split: What can be scored without a server.
        same: Whether these two are one.
        rule: How it is scored.
        source: Where the rule comes from.
        note: What else to know before comparing with a published number.
        lmms: Its task in lmms-eval.
    """

    title: str
    paper_split: str
    local_split: str
    same: bool
    rule: str
    source: str
    note: str
    lmms: str


BENCHMARKS = {
    "vqav2": Benchmark(
        "VQAv2",
        "test-dev2015",
        "val2014",
        False,
        "VQA accuracy: min(1, n/3) of the other nine answers, averaged over leaving out each of the ten",
        "GT-Vision-Lab/VQA, vqaEval.py",
        "the server of test-dev (EvalAI 830) is unreliable, and val2014 is not the papers' split",
        "vqav2_val",
    ),
    "gqa": Benchmark(
        "GQA",
        "testdev_balanced",
        "testdev_balanced",
        True,
        "exact match, in small letters and without a period at the end",
        "LLaVA, convert_gqa_for_eval.py; GQA's eval.py",
        "",
        "gqa",
    ),
    "vizwiz": Benchmark(
        "VizWiz",
        "test (8,000 questions)",
        "val",
        False,
        "VQA accuracy, as VQAv2",
        "VizWiz-VQA challenge; GT-Vision-Lab/VQA, vqaEval.py",
        "the server of test is closed, and val is not the papers' split",
        "vizwiz_vqa_val",
    ),
    "sqa": Benchmark(
        "ScienceQA",
        "image subset of test",
        "image subset of test",
        True,
        "letter of the right option",
        "LLaVA, eval_science_qa.py",
        "",
        "scienceqa_img",
    ),
    "textvqa": Benchmark(
        "TextVQA",
        "val 0.5.1, with reference OCR tokens in the question",
        "val 0.5.1, with reference OCR tokens in the question",
        True,
        "VQA accuracy, with the answers normalised as in MMF",
        "LLaVA, eval_textvqa.py and m4c_evaluator.py",
        "lmms-eval asks without OCR tokens unless ocr: true stands under lmms_eval_specific_kwargs of the task",
        "textvqa_val",
    ),
    "pope": Benchmark(
        "POPE",
        "adversarial, popular and random questions on COCO val2014",
        "adversarial, popular and random questions on COCO val2014",
        True,
        "mean of the three F1; an answer is a no if its first sentence has the word no or not, otherwise a yes",
        "LLaVA, eval_pope.py",
        "lmms-eval takes nothing but the word yes or no; that the papers average the three F1 is not confirmed",
        "pope_full",
    ),
    "mmbench": Benchmark(
        "MMBench",
        "dev, version 20230712",
        "dev, version 20230712",
        True,
        "letter of the right option; with circles, right only if right under all rotations of the options",
        "LLaVA, eval_mmbench.py; MMBench's circular evaluation",
        "the papers' numbers come from a server that has a judge read other answers; lmms-eval's copy of dev may be "
        "of another version",
        "mmbench_en_dev_static",
    ),
}
"""The benchmarks by name, in the order of the papers' tables."""


def benchmark(name: str) -> Benchmark:
    """Returns what is known of a benchmark.

    Raises:
        SanError: If there is none of that name.
    """
    if name not in BENCHMARKS:
        raise san_error(f"There is no benchmark {name!r}.{suggest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def score_benchmark(name: str, questions: Sequence[Question], answers: Sequence[str | None]) -> Score:
    """Scores a benchmark by the papers' rule.

    Args:
        name: Name of the benchmark.
        questions: All its questions, with what is right.
        answers: The model's answer to each; `None` where it gave none.

    Raises:
        SanError: If there is no such benchmark, the numbers differ, there is no question, or one has no right answer.
    """
    benchmark(name)
    _check(questions, answers)
    if name == "pope":
        return score_pope(questions, answers)
    if name == "mmbench":
        return score_mmbench(questions, answers)
    points: dict[str, Callable[[str, Question], float | None]] = {
        "vqav2": lambda answer, question: vqa_accuracy(answer, question.answers),
        "vizwiz": lambda answer, question: vqa_accuracy(answer, question.answers),
        "textvqa": lambda answer, question: vqa_accuracy(answer, question.answers, normalise_for_upload),
        "gqa": lambda answer, question: float(normalise_gqa(answer) == question.answers[0]),
        "sqa": _science_point,
    }
    each = [_given(answer) and points[name](answer or "", q) for answer, q in zip(answers, questions, strict=True)]
    unanswered = sum(point is None for point in each)
    return Score(name, sum(point or 0.0 for point in each) / len(questions), len(questions), unanswered)


def vqa_accuracy(answer: str, references: Sequence[str], normalise: Callable[[str], str] = normalise_answer) -> float:
    """Returns the VQA accuracy of an answer, averaged over leaving out each of the references.

    Example:
        >>> vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7)  # seven times 3 are left, three times 2
        0.9
    """
    found = normalise(answer)
    hits = [normalise(reference) == found for reference in references]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def score_pope(questions: Sequence[Question], answers: Sequence[str | None]) -> Score:
    """Scores POPE: the mean of the F1 of its sets, and accuracy, precision, recall, F1 and share of yes of each.

    Args:
        questions: The questions, each of one of `CATEGORIES`, with `yes` or `no` as what is right.
        answers: The model's answers.

    Raises:
        SanError: If the numbers differ, there is no question, one has no right answer, or a category is another.
    """
    _check(questions, answers)
    if strange := sorted({question.category for question in questions} - set(CATEGORIES)):
        raise san_error(f"POPE has no category {', '.join(strange)}.{suggest(strange[0], CATEGORIES)}")
    said = [_yes_or_no(answer) for answer in answers]
    details: dict[str, float] = {}
    scores = []
    for category in CATEGORIES:
        pairs = [(s, q.answers[0]) for s, q in zip(said, questions, strict=True) if q.category == category]
        if pairs:
            numbers = _detection(pairs)
            details.update({f"{category}/{key}": number for key, number in numbers.items()})
            scores.append(numbers["f1"])
    return Score("pope", sum(scores) / len(scores), len(questions), said.count(None), details)


def score_mmbench(questions: Sequence[Question], answers: Sequence[str | None]) -> Score:
    """Scores MMBench: a question counts as right only if it is right under all its rotations.

    Args:
        questions: The questions, with the letter that is right; ids that differ by multiples of `CIRCLE` are rotations
            of one question.
        answers: The model's answers.

    Raises:
        SanError: If the numbers differ, there is no question, or one has no right answer or no whole number as id.
    """
    _check(questions, answers)
    circles: dict[int, list[bool]] = {}
    unanswered = 0
    for question, answer in zip(questions, answers, strict=True):
        if not isinstance(question.id, int):
            raise san_error(f"MMBench numbers its questions, but one has the id {question.id!r}.")
        letter = choice_letter(answer or "", question.options) if _given(answer) else None
        unanswered += letter is None
        circles.setdefault(question.id % CIRCLE, []).append(letter == question.answers[0])
    right = sum(all(circle) for circle in circles.values())
    return Score("mmbench", right / len(circles), len(circles), unanswered, {"rows": len(questions)})


def lmms_command(export: str | Path, output: str | Path, names: Sequence[str] = (), processes: int = 1) -> str:
    """Returns the command that scores a merged export with lmms-eval, with a line of comment for what differs.

    Args:
        export: Folder that `san export --merged` wrote. lmms-eval's `llava_hf` loads no adapter.
        output: Folder that lmms-eval writes to.
        names: Benchmarks; all by default.
        processes: Number of processes, one GPU each.

    Returns:
        Lines for a shell. Nothing is run.

    Raises:
        SanError: If there is no such benchmark, the folder is no export of LLaVA whose outputs were compared with its
            run's, or its name cannot be an argument.
    """
    folder = Path(export)
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        raise san_error(f"{folder} is no merged export: it needs a config.json and no adapter. `san export` makes one.")
    export_facts(folder)
    if (kind := read_json(folder / "config.json").get("model_type")) != "llava":
        raise san_error(f"{folder} holds a model of type {kind!r}; lmms-eval's llava_hf loads llava alone.")
    if set(str(folder)) & set(",="):
        raise san_error(f"lmms-eval splits its arguments at commas and equal signs, so {folder} needs another name.")
    chosen = {name: benchmark(name) for name in names or BENCHMARKS}
    remarks = [f"# {name}: {one.note}" for name, one in chosen.items() if one.note]
    tasks = ",".join(one.lmms for one in chosen.values())
    words = [f"accelerate launch --num_processes={processes} -m lmms_eval", "--model llava_hf"]
    words += [f"--model_args {shlex.quote(f'pretrained={folder}')}", f"--tasks {tasks}", "--batch_size 1"]
    words += ["--log_samples", f"--output_path {shlex.quote(str(output))}"]
    return "\n".join([*remarks, " \\\n  ".join(words)]) + "\n"


def _check(questions: Sequence[Question], answers: Sequence[str | None]) -> None:
    if len(questions) != len(answers) or not questions:
        raise san_error(f"There are {len(questions):,} questions and {len(answers):,} answers; give one for each.")
    if secret := [question.id for question in questions if not question.answers]:
        raise san_error(
            f"{len(secret):,} of {len(questions):,} questions have no public answer, such as {secret[0]!r}. "
            "Such a split is scored by a server; `san submission` writes what it takes."
        )


def _given(answer: str | None) -> bool | None:
    """Whether there is an answer; `None`, which counts as unanswered, where there is none."""
    return True if answer is not None and answer.strip() else None


def _science_point(answer: str, question: Question) -> float | None:
    letter = science_letter(answer, len(question.options))
    return None if letter is None else float(letter == question.answers[0])


def _yes_or_no(answer: str | None) -> str | None:
    if not _given(answer):
        return None
    return "no" if says_no(answer or "") else "yes"


def _detection(pairs: Sequence[tuple[str | None, str]]) -> dict[str, float]:
    """Numbers of a set of pairs of what was said and what is right; a ratio of nothing is 0."""
    hits = sum(said == right == "yes" for said, right in pairs)
    said_yes = sum(said == "yes" for said, _ in pairs)
    are_yes = sum(right == "yes" for _, right in pairs)
    precision, recall = hits / max(said_yes, 1), hits / max(are_yes, 1)
    return {
        "accuracy": sum(said == right for said, right in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * hits / max(said_yes + are_yes, 1),
        "yes_ratio": said_yes / len(pairs),
    }
