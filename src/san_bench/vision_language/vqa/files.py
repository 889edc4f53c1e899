"""Loaders for benchmark files: questions and reference answers.

Layouts follow LLaVA's evaluation (haotian-liu/LLaVA, docs/Evaluation.md, scripts/v1_5/eval) and the datasets. Loaders
return all questions in the order of the file.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from san_bench.config.strict import san_error
from san_bench.vision_language.vqa.benchmarks import CATEGORIES, CIRCLE, Question
from san_bench.vision_language.vqa.formats import LETTER, SHORT, UNANSWERABLE
from san_bench.vision_language.vqa.normalize import LETTERS
from san_bench.vision_language.vqa.rows import (
    read_json,
    read_json_list,
    read_lines,
    read_part,
    read_table,
    require_keys,
)

OCR = "Reference OCR token: "
"""Prefix of the OCR tokens in LLaVA's questions of TextVQA."""


def read_questions(path: str | Path) -> list[Question]:
    """Reads LLaVA's questions: JSON lines with `question_id`, `image`, `text` and `category`.

    Raises:
        SanError: If the file cannot be read, or keys are missing.
    """
    rows = read_lines(Path(path))
    require_keys(path, rows, ("question_id", "text"))
    return [Question(r["question_id"], r.get("image"), r["text"], category=r.get("category", "default")) for r in rows]


def load_vqav2(questions: str | Path, annotations: str | Path | None = None) -> list[Question]:
    """Reads VQAv2.

    Args:
        questions: LLaVA's JSON lines, or a `v2_OpenEnded_mscoco_*_questions.json`.
        annotations: A `v2_mscoco_*_annotations.json`; the test splits have none.

    Raises:
        SanError: If a file cannot be read, or lacks something.
    """
    asked = read_questions(questions) if Path(questions).suffix == ".jsonl" else _official_vqav2(Path(questions))
    if annotations is None:
        return asked
    rows = read_part(Path(annotations), "annotations")
    require_keys(annotations, rows, ("question_id", "answers"))
    right = {row["question_id"]: _people(annotations, row) for row in rows}
    return _answered(asked, right, lambda question: question.id, annotations)


def load_vizwiz(annotations: str | Path) -> list[Question]:
    """Reads VizWiz and writes its questions as LLaVA asks them.

    Args:
        annotations: `val.json`.

    Raises:
        SanError: If a file cannot be read, or lacks something.
    """
    rows = read_json_list(Path(annotations))
    require_keys(annotations, rows, ("image", "question"))
    return [
        Question(n, row["image"], f"{row['question']}\n{UNANSWERABLE}\n{SHORT}", _people(annotations, row))
        for n, row in enumerate(rows)
    ]


def load_textvqa(questions: str | Path, annotations: str | Path) -> list[Question]:
    """Reads TextVQA.

    Args:
        questions: LLaVA's JSON lines with reference OCR tokens, whose ids are those of the images.
        annotations: `TextVQA_0.5.1_val.json`.

    Raises:
        SanError: If a file cannot be read or lacks something, or no question has OCR tokens.
    """
    asked = read_questions(questions)
    if not any(OCR in question.text for question in asked):
        raise san_error(
            f"{questions}: no question has a line {OCR!r}, which the published setting has. "
            "Use llava_textvqa_val_v051_ocr.jsonl."
        )
    rows = read_part(Path(annotations), "data")
    require_keys(annotations, rows, ("image_id", "question", "answers"))
    right = {(row["image_id"], row["question"].lower()): _people(annotations, row) for row in rows}
    return _answered(asked, right, lambda question: (question.id, _textvqa_question(question.text)), annotations)


def load_gqa(annotations: str | Path, questions: str | Path) -> list[Question]:
    """Reads GQA.

    Args:
        annotations: `testdev_balanced_questions.json`, which holds the answers.
        questions: LLaVA's JSON lines.

    Raises:
        SanError: If a file cannot be read, or lacks something.
    """
    found = read_json(Path(annotations))
    if not isinstance(found, dict):
        raise san_error(f"{annotations} is not a GQA file: it does not map IDs to questions.")
    require_keys(annotations, list(found.values()), ("answer",))
    right = {key: (row["answer"],) for key, row in found.items()}
    return _answered(read_questions(questions), right, lambda question: str(question.id), annotations)


def load_pope(questions: str | Path, labels: str | Path) -> list[Question]:
    """Reads POPE.

    Args:
        questions: LLaVA's JSON lines, with the categories.
        labels: Folder of `coco_pope_adversarial.json`, `coco_pope_popular.json` and `coco_pope_random.json`: JSON lines
            in the order of LLaVA's questions of that category.

    Raises:
        SanError: If a file cannot be read, lacks something, has other questions, or a label is not yes or no.
    """
    asked = read_questions(questions)
    out: dict[int, Question] = {}
    for category in CATEGORIES:
        path = Path(labels) / f"coco_pope_{category}.json"
        rows = read_lines(path)
        require_keys(path, rows, ("image", "text", "label"))
        mine = [(index, question) for index, question in enumerate(asked) if question.category == category]
        if len(mine) != len(rows):
            raise san_error(f"{path} has {len(rows):,} labels, but {questions} {len(mine):,} {category} questions.")
        for (index, question), row in zip(mine, rows, strict=True):
            if question.image != row["image"] or not question.text.startswith(row["text"]):
                raise san_error(f"{path} is about {row['text']!r} where {questions} asks {question.text!r}.")
            _require_option(path, question.id, row["label"], {"yes": "", "no": ""})
            out[index] = replace(question, answers=(row["label"],))
    return [out[index] for index in sorted(out)]


def load_sqa(folder: str | Path, questions: str | Path, split: str = "test") -> list[Question]:
    """Reads the ScienceQA questions with an image.

    Args:
        folder: Folder with `problems.json` and `pid_splits.json`.
        questions: LLaVA's `llava_test_CQM-A.json`.
        split: One of the splits in `pid_splits.json`.

    Returns:
        The questions; images are in `images/SPLIT`.

    Raises:
        SanError: If a file cannot be read or lacks something, or an answer is not one of the options.
    """
    folder = Path(folder)
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if split not in splits:
        raise san_error(f"{folder / 'pid_splits.json'} has no split {split!r}, only {', '.join(splits)}.")
    texts = {
        row["id"]: row["conversations"][0]["value"].replace("<image>", "").strip() + f"\n{LETTER}"
        for row in read_json_list(Path(questions))
    }
    require_keys(folder / "problems.json", [problems.get(key) for key in splits[split]], ("choices", "answer", "image"))
    out = []
    for key in splits[split]:
        problem = problems[key]
        if problem["image"] is None:
            continue
        if key not in texts:
            raise san_error(f"{questions} does not ask the question {key}, which {split} has.")
        options = tuple(problem["choices"])
        _require_option(
            folder / "problems.json", key, problem["answer"], dict(zip(range(len(LETTERS)), options, strict=False))
        )
        out.append(
            Question(key, f"{key}/{problem['image']}", texts[key], (LETTERS[problem["answer"]],), "default", options)
        )
    return out


def load_mmbench(table: str | Path) -> list[Question]:
    """Reads the table of MMBench with base64 images; an image cell may instead contain the index of another row.

    Raises:
        SanError: If it cannot be read, lacks a column, an answer is not one of the options, or an image is not base64.
    """
    header, rows = read_table(Path(table))
    if missing := [name for name in ("index", "question", "A", "B", "image") if name not in header]:
        raise san_error(f"{table} has no column {', '.join(missing)}; MMBench's tables do.")
    images = {row["index"]: row["image"] for row in rows}
    out = []
    for row in rows:
        options = []
        for letter in LETTERS[:4]:
            if _empty(row.get(letter)):
                break
            options.append(row[letter])
        stem = row["question"] if _empty(row.get("hint")) else f"{row['hint']}\n{row['question']}"
        answers = () if _empty(row.get("answer")) else (row["answer"],)
        if answers:
            _require_option(table, row["index"], row["answer"], dict(zip(LETTERS, options, strict=False)))
        try:
            image = base64.b64decode(images.get(row["image"], row["image"]), validate=True)
        except binascii.Error as error:
            raise san_error(f"{table}, index {row['index']}: the image is not base64: {error}.") from error
        category = row.get("category") or "default"
        text = stem + _choices(options)
        out.append(Question(int(row["index"]), image, text, answers, category, tuple(options)))
    return out


def with_rotations(questions: Sequence[Question]) -> list[Question]:
    """Adds missing rotations of MMBench questions, for circular evaluation.

    Each rotation moves one more option to the end and adds `CIRCLE` to the ID.
    """
    turned = {int(question.id) % CIRCLE for question in questions if int(question.id) >= CIRCLE}
    out = []
    for question in questions:
        out.append(question)
        if int(question.id) in turned or int(question.id) >= CIRCLE:
            continue
        stem = question.text.removesuffix(_choices(question.options))
        for by in range(1, len(question.options)):
            options = question.options[by:] + question.options[:by]
            right = tuple(LETTERS[(LETTERS.index(letter) - by) % len(options)] for letter in question.answers)
            text = stem + _choices(options)
            out.append(replace(question, id=int(question.id) + by * CIRCLE, text=text, answers=right, options=options))
    return out


def _official_vqav2(path: Path) -> list[Question]:
    rows = read_part(path, "questions")
    require_keys(path, rows, ("question_id", "image_id", "question"))
    name = str(read_json(path).get("data_subtype", ""))
    return [
        Question(r["question_id"], f"COCO_{name}_{r['image_id']:012d}.jpg", f"{r['question']}\n{SHORT}") for r in rows
    ]


def _textvqa_question(text: str) -> str:
    lines = text.split("\n")
    return lines[1 if lines[0].startswith(OCR.strip()) else 0].lower()


def _choices(options: Iterable[str]) -> str:
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)) + f"\n{LETTER}"


def _answered(
    questions: Sequence[Question],
    right: Mapping[Any, tuple[str, ...]],
    key: Callable[[Question], Any],
    path: str | Path,
) -> list[Question]:
    """Adds reference answers to questions."""
    missing = [key(question) for question in questions if key(question) not in right]
    if missing:
        raise san_error(f"{path} lacks {len(missing):,} of {len(questions):,} questions, such as {missing[0]!r}.")
    return [replace(question, answers=right[key(question)]) for question in questions]


def _people(path: str | Path, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the human answers: strings, or mappings with an `answer`; empty if answers are not public.

    Raises:
        SanError: If the format is invalid.
    """
    given: Any = row.get("answers", [])
    texts: list[Any] = (
        [a.get("answer") if isinstance(a, dict) else a for a in given] if isinstance(given, list) else [None]
    )
    if not all(isinstance(text, str) for text in texts):
        name = row.get("question_id", row.get("image", row.get("image_id")))
        raise san_error(
            f"{path}: the answers to {name!r} are {str(given)[:60]}; expected a list of strings, or of mappings "
            "with an answer."
        )
    return tuple(texts)


def _require_option(path: str | Path, key: str | int, answer: Any, options: Mapping[Any, str]) -> None:
    """Raises if an answer is not one of the options.

    Raises:
        SanError: If it is not; the message lists the options.
    """
    if answer not in list(options):
        known = ", ".join(f"{name} ({text})" if text else str(name) for name, text in options.items()) or "no option"
        raise san_error(f"{path}: the answer to the question {key!r} is {answer!r}; expected one of {known}.")


def _empty(cell: str | None) -> bool:
    return cell is None or cell.strip().lower() in ("", "nan", "none")
