"""Files for benchmark servers: the answers of a run to questions without public answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from san_bench.config.strict import did_you_mean
from san_bench.vision_language.recipe import ConversationRecipe
from san_bench.vision_language.vqa import files as vqa_files
from san_bench.vision_language.vqa import uploads as vqa_uploads
from san_bench.vision_language.vqa.benchmarks import Question
from san_peft.errors import SanError


@dataclass(frozen=True)
class Server:
    """Server of a benchmark.

    Attributes:
        load: Loads its questions.
        images: Image folder next to the questions.
        ending: Suffix of the submission file.
    """

    load: Callable[[Path], list[Question]]
    images: str
    ending: str


SERVERS = {
    "vqav2": Server(vqa_files.load_vqav2, "test2015", ".json"),
    "mmbench": Server(vqa_files.load_mmbench, "", ".xlsx"),
}
"""Servers by benchmark."""


def submission(
    source: str | Path, name: str, questions: str | Path, out: str | Path, images: str | Path | None = None
) -> Path:
    """Writes the submission file of a benchmark server from a run or a file of answers.

    Args:
        source: Run folder, whose model generates the answers; or answers in LLaVA's format (`.jsonl`).
        name: One of `SERVERS`.
        questions: For `vqav2`, LLaVA's JSON lines or the official file; for `mmbench`, its table.
        out: File to write.
        images: Image folder; by default next to the questions. MMBench has its images in the table.

    Returns:
        Path of the written file; for `mmbench` without openpyxl, a `.tsv` table.

    Raises:
        SanError: If the benchmark has no server, the file exists or has another suffix, questions, images or answers
        are
            invalid, or the run is unfinished or not a vision-language run.
    """
    if name not in SERVERS:
        known = ", ".join(SERVERS)
        raise SanError(f"There is no server of {name!r} to write for, only of {known}.{did_you_mean(name, SERVERS)}")
    server, path = SERVERS[name], Path(out)
    if path.suffix != server.ending:
        raise SanError(f"The server of {name} takes a {server.ending} file, not {path.name}. Change --out.")
    if there := [file for file in (path, path.with_suffix(".tsv")) if file.exists()]:
        raise SanError(f"{there[0]} already exists. Choose another file with --out.")
    asked = server.load(Path(questions))
    if Path(source).suffix == ".jsonl":
        answers = vqa_uploads.read_answers(source, asked)
    else:
        answers = _ask(Path(source), name, asked, Path(images or Path(questions).parent / server.images))
    if name == "mmbench":
        return vqa_uploads.write_mmbench(path, questions, asked, answers)
    vqa_uploads.write_vqav2(path, asked, answers)
    return path


def _ask(run: Path, name: str, questions: Sequence[Question], images: Path) -> list[str | None]:
    from san_bench.models.weights import move_to_gpu
    from san_bench.run.evaluate import run_recipe, trained_model
    from san_bench.vision_language.domain import Conversations
    from san_bench.vision_language.tasks import BenchmarkQuestions, ConversationTask

    recipe = run_recipe(run)
    if not isinstance(recipe, ConversationRecipe):
        raise SanError(f"{run} is a run of {recipe.task}, not of a vision-language model.")
    asked = BenchmarkQuestions(name, tuple(questions), images)
    if problems := asked.problems_of_images(name):
        raise SanError("\n".join([*map(str, problems), "Set the image folder with --images."]))
    task = ConversationTask(recipe.task, images, {recipe.eval_split: {name: asked}}, lambda: ({}, None))
    domain = Conversations(recipe, task)
    model = trained_model(domain, run / "adapter")
    move_to_gpu(model)
    return [*domain.answers(model, asked)]
