"""The seven benchmarks of LLaVA-1.5 in the DoRA and SAN comparisons, and their scoring rules.

A score is a pure function of questions and answers. `san_bench.vision_language.vqa.files` reads the questions,
`san_bench.vision_language.vqa.uploads` the answers.

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
"""Offset between the IDs of the rotations of a question in MMBench."""

CATEGORIES = ("adversarial", "popular", "random")
"""The three categories of POPE."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        id: Question ID; in LLaVA's file, questions of TextVQA about one image share it.
        image: Image file, its bytes, or `None`.
        text: Prompt, without an image marker.
        answers: Reference answers: ten human answers, one answer, or one letter; empty if not public.
        category: Category in POPE or MMBench.
        options: Options of a multiple-choice question.
    """

    id: str | int
    image: str | bytes | None
    text: str
    answers: tuple[str, ...] = ()
    category: str = "default"
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """Score of a benchmark.

    Attributes:
        benchmark: Name of the benchmark.
        score: The score, between 0 and 1.
        n: Number of questions, or of groups of rotated questions.
        unanswered: Questions without an answer that the rule accepts; they count as wrong.
        details: Further metrics by name.
    """

    benchmark: str
    score: float
    n: int
    unanswered: int
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """Description of a benchmark.

    Attributes:
        title: Display name.
        paper_split: Split that papers report.
        local_split: Split that can be scored without a server.
        same: Whether both splits are the same.
        rule: Scoring rule.
        source: Source of the rule.
        note: Caveats for comparisons with published numbers.
        lmms: Task name in lmms-eval.
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
    """Returns the description of a benchmark.

    Raises:
        SanError: If the benchmark is unknown.
    """
    if name not in BENCHMARKS:
        raise san_error(f"There is no benchmark {name!r}.{suggest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def score_benchmark(name: str, questions: Sequence[Question], answers: Sequence[str | None]) -> Score:
    """Scores a benchmark by its published rule.

    Args:
        name: Name of the benchmark.
        questions: All its questions, with reference answers.
        answers: The answer to each question, or `None`.

    Raises:
        SanError: If the benchmark is unknown, the numbers of questions and answers differ, there are no questions, or
            one has no reference answer.
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
    """Computes the VQA accuracy of an answer, averaged over leaving out each reference.

    Example:
        >>> vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7)  # seven times 3 are left, three times 2
        0.9
    """
    found = normalise(answer)
    hits = [normalise(reference) == found for reference in references]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def score_pope(questions: Sequence[Question], answers: Sequence[str | None]) -> Score:
    """Scores POPE: mean F1 over categories, with accuracy, precision, recall, F1 and yes ratio of each.

    Args:
        questions: Questions of `CATEGORIES`, with the reference `yes` or `no`.
        answers: The answers.

    Raises:
        SanError: If the numbers of questions and answers differ, there are no questions, one has no reference answer,
        or
            a category is unknown.
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
        questions: Questions with the correct letter; IDs that differ by multiples of `CIRCLE` are rotations of one
            question.
        answers: The answers.

    Raises:
        SanError: If the numbers of questions and answers differ, there are no questions, or one has no reference answer
            or no integer ID.
    """
    _check(questions, answers)
    circles: dict[int, list[bool]] = {}
    unanswered = 0
    for question, answer in zip(questions, answers, strict=True):
        if not isinstance(question.id, int):
            raise san_error(f"IDs of MMBench are integers, but one question has the ID {question.id!r}.")
        letter = choice_letter(answer or "", question.options) if _given(answer) else None
        unanswered += letter is None
        circles.setdefault(question.id % CIRCLE, []).append(letter == question.answers[0])
    right = sum(all(circle) for circle in circles.values())
    return Score("mmbench", right / len(circles), len(circles), unanswered, {"rows": len(questions)})


def lmms_command(export: str | Path, output: str | Path, names: Sequence[str] = (), processes: int = 1) -> str:
    """Returns the command that scores a merged export with lmms-eval, with comments on differences in scoring.

    Args:
        export: Folder written by `san export --merged`; `llava_hf` of lmms-eval does not load adapters.
        output: Output folder of lmms-eval.
        names: Benchmarks; all by default.
        processes: Number of processes, one GPU each.

    Returns:
        Shell lines; nothing is executed.

    Raises:
        SanError: If a benchmark is unknown, the folder is not a verified LLaVA export, or its name cannot be an
            argument of lmms-eval.
    """
    folder = Path(export)
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        raise san_error(f"{folder} is no merged export: it needs a config.json and no adapter. `san export` makes one.")
    export_facts(folder)
    if (kind := read_json(folder / "config.json").get("model_type")) != "llava":
        raise san_error(f"{folder} has a model of type {kind!r}; llava_hf of lmms-eval only loads llava.")
    if set(str(folder)) & set(",="):
        raise san_error(f"lmms-eval splits arguments at commas and equal signs; rename {folder}.")
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
    """Returns `True` for a non-empty answer, else `None`, which counts as unanswered."""
    return True if answer is not None and answer.strip() else None


def _science_point(answer: str, question: Question) -> float | None:
    letter = science_letter(answer, len(question.options))
    return None if letter is None else float(letter == question.answers[0])


def _yes_or_no(answer: str | None) -> str | None:
    if not _given(answer):
        return None
    return "no" if says_no(answer or "") else "yes"


def _detection(pairs: Sequence[tuple[str | None, str]]) -> dict[str, float]:
    """Computes detection metrics from pairs of answer and reference; 0/0 is 0."""
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
