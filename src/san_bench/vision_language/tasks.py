"""Vision-language tasks: training conversations and evaluation questions.

`llava` has the layout of LLaVA-1.5: `llava_v1_5_mix665k.json` with images in the same folder, and the benchmarks in
`eval/` as in LLaVA's docs/Evaluation.md (haotian-liu/LLaVA), with annotations for splits that need no server.
`conversations` is for your own records: `train.json` and `test.json` in the same format, with images in the same
folder. For a test record, the first question is asked and the first answer is the reference. `mini-vl` is synthetic;
see `san_bench.vision_language.mini.tasks`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from san_bench.config.strict import suggest
from san_bench.datacheck.found import Problem
from san_bench.language.tasks import questions_of
from san_bench.vision_language.encoding import Images
from san_bench.vision_language.images import Preflight, preflight, problems_of_images, survey
from san_bench.vision_language.mini import tasks as mini_talk
from san_bench.vision_language.records import MARKER, Conversation, conversation_fingerprint, load_conversations
from san_bench.vision_language.vqa import files as vqa_files
from san_bench.vision_language.vqa.benchmarks import Question
from san_peft.errors import SanError

MIX = "llava_v1_5_mix665k.json"
"""File of the training mix."""

TRAIN, TEST = "train.json", "test.json"
"""Files of your own records."""

ASKED = ("val", "test")
"""Evaluation splits of mini-vl."""


@dataclass(frozen=True)
class BenchmarkQuestions:
    """The questions of a benchmark.

    Attributes:
        rule: Benchmark whose scoring rule applies, or `exact`: equal up to case and a final period.
        questions: The questions with reference answers.
        images: Image folder, or a function from name to image.
    """

    rule: str
    questions: tuple[Question, ...]
    images: Images

    def problems(self, name: str, decode: bool = False, workers: int | None = None) -> list[Problem]:
        """Returns problems that prevent asking or scoring the questions.

        Args:
            name: Task name of the problems.
            decode: Decodes the images; otherwise only finds missing ones.
            workers: Reader threads.
        """
        found = self.problems_of_images(name, decode, workers)
        if secret := [str(question.id) for question in self.questions if not question.answers]:
            found.append(Problem(name, f"{len(secret):,} questions have no public answer", tuple(secret)))
        return found

    def problems_of_images(self, name: str, decode: bool = False, workers: int | None = None) -> list[Problem]:
        """Returns problems that prevent asking the questions."""
        if callable(self.images):
            return []
        uses = Counter(q.image for q in self.questions if isinstance(q.image, str))
        looks = survey(uses, Path(self.images), workers, decode)
        return problems_of_images(name, looks, uses, f"questions are about, below {self.images}")


@dataclass(frozen=True)
class ConversationTask:
    """A vision-language task.

    Attributes:
        name: Its name.
        images: Image folder of the records, or a function from name to image.
        questions: Questions by split and task name in tables.
        load: Loads the training conversations by split, with the image report for images in a folder. Called on first
            use, since it decodes every image, which evaluation does not need.
    """

    name: str
    images: Images
    questions: dict[str, dict[str, BenchmarkQuestions]]
    load: Callable[[], tuple[dict[str, tuple[Conversation, ...]], Preflight | None]]

    @cached_property
    def _looked(self) -> tuple[dict[str, tuple[Conversation, ...]], Preflight | None]:
        return self.load()

    @property
    def _loaded(self) -> dict[str, tuple[Conversation, ...]]:
        splits, found = self._looked
        if found is not None:
            found.require()
        return splits

    @property
    def preflight(self) -> Preflight | None:
        """The image report of the conversations; `None` for synthetic images."""
        return self._looked[1]

    @property
    def dropped(self) -> int:
        """Number of conversations dropped because of their images."""
        return 0 if self.preflight is None else len(self.preflight.dropped)

    def records(self, split: str) -> tuple[Conversation, ...]:
        """Returns the conversations of a split.

        Raises:
            SanError: If the split does not exist, a file is invalid, or images cannot be read.
        """
        splits = self._loaded
        if split not in splits:
            raise SanError(f"{self.name} has no training split {split!r}; it has {', '.join(splits)}.")
        return splits[split]

    def asked(self, split: str) -> dict[str, BenchmarkQuestions]:
        """Returns the questions of a split by task.

        Raises:
            SanError: If the task has no questions for that split.
        """
        return questions_of(self.name, self.questions, split)

    def require_questions(self, split: str) -> None:
        """Checks that all images and reference answers of a split exist, without opening images.

        Raises:
            SanError: If not, or the task has no questions for that split; the message counts the problems and lists the
                first files of each kind.
        """
        problems = [problem for name, asked in self.asked(split).items() for problem in asked.problems(name)]
        if problems:
            leave = ", or remove a benchmark from answering.benchmarks" if self.name == "llava" else ""
            raise SanError(
                "Evaluation questions are invalid:\n  " + "\n  ".join(map(str, problems)) + f"\nFix them{leave}."
            )

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over records, image sizes and questions of every split."""
        folder, digest = None if callable(self.images) else self.images, hashlib.sha256()
        for split, records in self._loaded.items():
            digest.update(f"{split} {conversation_fingerprint(records, folder)}\n".encode())
        for split, tasks in self.questions.items():
            for name, asked in tasks.items():
                for question in asked.questions:
                    facts = asdict(question)
                    if isinstance(question.image, bytes):
                        facts["image"] = hashlib.sha256(question.image).hexdigest()
                    digest.update(f"{split} {name} {json.dumps(facts)}\n".encode())
        return digest.hexdigest()


def load_conversation_task(
    name: str, data: str | Path | None, benchmarks: Sequence[str] = (), drop: bool = False
) -> ConversationTask:
    """Loads a vision-language task. Training records are loaded on first use, which decodes every image once.

    Args:
        name: `llava`, `conversations` or `mini-vl`.
        data: Data folder; none for `mini-vl`.
        benchmarks: Benchmarks to evaluate, for `llava`.
        drop: Drops conversations whose image is missing or unreadable.

    Raises:
        SanError: If the task is unknown, or a file is missing or invalid.
    """
    if name == "mini-vl":
        return _mini()
    folder = Path(data or "")
    if data is None or not folder.is_dir():
        raise SanError(f"There is no folder {folder}.")
    if name == "llava":
        path = folder / MIX
        asked = {f"llava/{benchmark}": load_benchmark(benchmark, folder) for benchmark in benchmarks}
    elif name == "conversations":
        path = folder / TRAIN
        questions = tuple(map(_question, load_conversations(folder / TEST)))
        asked = {name: BenchmarkQuestions("exact", questions, folder)}
    else:
        raise SanError(f"There is no task {name!r}.{suggest(name, ('llava', 'conversations', 'mini-vl'))}")

    def load() -> tuple[dict[str, tuple[Conversation, ...]], Preflight]:
        found = preflight(load_conversations(path), folder, drop)
        return {"train": found.kept}, found

    return ConversationTask(name, folder, {"test": asked}, load)


def _question(record: Conversation) -> Question:
    asked, answered = record.turns[0].text, record.turns[1].text
    return Question(record.id, record.image, asked.replace(MARKER, "").strip(), (answered,))


def benchmark_folder(name: str, data: Path) -> Path:
    """Returns the folder of a benchmark inside the folder of `llava`."""
    return data / "eval" / ("scienceqa" if name == "sqa" else name)


def load_benchmark(name: str, data: Path) -> BenchmarkQuestions:
    """Loads a benchmark from the folder of `llava`.

    Args:
        name: One of `san_bench.vision_language.recipe.BENCHMARKS`.
        data: The folder of `llava`.

    Raises:
        SanError: If a file is missing or invalid.
    """
    folder = benchmark_folder(name, data)
    load, images = _LOADERS[name]
    return BenchmarkQuestions(name, tuple(load(folder)), folder / images)


_LOADERS: dict[str, tuple[Callable[[Path], list[Question]], str]] = {
    "vqav2": (
        lambda folder: vqa_files.load_vqav2(
            folder / "v2_OpenEnded_mscoco_val2014_questions.json", folder / "v2_mscoco_val2014_annotations.json"
        ),
        "val2014",
    ),
    "gqa": (
        lambda folder: vqa_files.load_gqa(
            folder / "data" / "testdev_balanced_questions.json", folder / "llava_gqa_testdev_balanced.jsonl"
        ),
        "data/images",
    ),
    "vizwiz": (lambda folder: vqa_files.load_vizwiz(folder / "val.json"), "val"),
    "sqa": (lambda folder: vqa_files.load_sqa(folder, folder / "llava_test_CQM-A.json"), "images/test"),
    "textvqa": (
        lambda folder: vqa_files.load_textvqa(
            folder / "llava_textvqa_val_v051_ocr.jsonl", folder / "TextVQA_0.5.1_val.json"
        ),
        "train_images",
    ),
    "pope": (lambda folder: vqa_files.load_pope(folder / "llava_pope_test.jsonl", folder / "coco"), "val2014"),
    "mmbench": (
        lambda folder: vqa_files.with_rotations(vqa_files.load_mmbench(folder / "mmbench_dev_20230712.tsv")),
        "",
    ),
}
"""Loader and image folder of each benchmark."""


def _mini() -> ConversationTask:
    stops = {"train": mini_talk.SPLITS["train"].stop, "trainval": mini_talk.SPLITS["val"].stop}
    splits = {split: tuple(map(mini_talk.conversation, range(mini_talk.KINDS * stop))) for split, stop in stops.items()}
    questions = {split: {f"mini-vl/{name}": _mini_asked(name, split) for name in mini_talk.TASKS} for split in ASKED}
    return ConversationTask("mini-vl", mini_talk.image_of, questions, lambda: (splits, None))


def _mini_asked(name: str, split: str) -> BenchmarkQuestions:
    task = mini_talk.TASKS[name]
    times = 10 if task.like in ("vqav2", "vizwiz", "textvqa") else 1  # these benchmarks have ten human answers
    questions = []
    for index in mini_talk.SPLITS[split]:
        one = mini_talk.item(name, index)
        image = f"{name}/{index}.png"
        questions.append(Question(index, image, one.text, (one.answer,) * times, one.category, one.options))
    chosen = vqa_files.with_rotations(questions) if task.like == "mmbench" else questions
    return BenchmarkQuestions(task.like, tuple(chosen), mini_talk.image_of)
