"""Vision-language models: a pretrained LLaVA, conversations in batches of one modality, and benchmark evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from san_bench.config.errors import cause_of
from san_bench.image.decode import read_rgb
from san_bench.language.generation import batches, decoding, scoring
from san_bench.language.prompts import Collator
from san_bench.models.adapt import PROJECTOR, TOWER
from san_bench.models.checkpoint import Checkpoint, checkpoint_of
from san_bench.models.weights import load_pretrained, move_to_gpu
from san_bench.run.domain import Batch, Domain, Findings, Scores, Training
from san_bench.run.processes import gather_results, rank_indices
from san_bench.vision_language.batches import ModalityBatches
from san_bench.vision_language.encoding import (
    ConversationCollator,
    ConversationDataset,
    Images,
    check_processor,
    encode_question,
    measure,
    opened,
    stack_images,
)
from san_bench.vision_language.recipe import ConversationRecipe
from san_bench.vision_language.records import Conversation
from san_bench.vision_language.tasks import BenchmarkQuestions, ConversationTask, load_conversation_task
from san_bench.vision_language.template import form_of
from san_bench.vision_language.vqa.benchmarks import Question, Score, score_benchmark
from san_bench.vision_language.vqa.normalize import normalise_gqa
from san_peft.errors import SanError

IMAGES = "images.json"
"""File in the run folder with the image report."""


class Conversations(Domain):
    """Vision-language domain of a recipe.

    Args:
        recipe: The recipe.
        task: Its task; loaded by default.
    """

    items = "conversations"

    def __init__(self, recipe: ConversationRecipe, task: ConversationTask | None = None) -> None:
        self.recipe: ConversationRecipe = recipe
        self.task = task or load_conversation_task(
            recipe.task, recipe.data, recipe.answering.benchmarks, recipe.conversation.drop_bad_images
        )
        self.task.asked(recipe.eval_split)  # fail before training, not after

    @property
    def n_train(self) -> int:
        """Number of training conversations."""
        return len(self.records)

    @property
    def records(self) -> tuple[Conversation, ...]:
        """The training conversations."""
        return self.task.records(self.recipe.train_split)

    def inspect(self) -> Findings:
        """Validates images, processor and questions, and collects all problems."""
        errors: list[str] = []

        def tried(look: Callable[[], Any]) -> Any:
            try:
                return look()
            except SanError as error:
                errors.append(str(error))

        found, file = tried(lambda: self.task.preflight), Path(self.recipe.output) / IMAGES
        if found is not None:
            tried(found.require)
            errors[:] = [f"{error} {file} lists them all." for error in errors]
        tried(lambda: self.processor)
        tried(lambda: self.task.require_questions(self.recipe.eval_split))
        if found is None:
            return Findings((), tuple(errors))
        remarks = [f"warning: {problem}" for problem in found.problems if problem.level == "warning"]
        if found.dropped:
            every = len(found.kept) + len(found.dropped)
            remarks.append(
                f"warning: {len(found.dropped):,} of {every:,} conversations are dropped because of their images; "
                f"{file} lists them."
            )
        content = json.dumps(found.report(), indent=2, ensure_ascii=False) + "\n"
        return Findings(tuple(remarks), tuple(errors), {IMAGES: content.encode()})

    def facts(self) -> dict[str, Any]:
        """Returns settings that affect scores, and how much data was dropped or truncated."""
        recipe = self.recipe
        return {
            "trained_on": recipe.task,
            "weights": recipe.weights,
            "tower": recipe.tower,
            "projector_lr": recipe.projector_lr,
            "dropped_records": self.task.dropped,
            "cut_records": len(self.lengths.cut),
            "train_tokens": sum(min(n, recipe.conversation.max_length) for n in self.lengths.tokens)
            * recipe.optimizer.epochs,
        }

    @cached_property
    def processor(self) -> Any:
        """The processor; see `companions`."""
        return self.companions(self.recipe)

    @classmethod
    def companions(cls, recipe: ConversationRecipe) -> Any:
        """Loads the processor of the model.

        Raises:
            SanError: If the checkpoint has no processor, it is not a LLaVA processor, or the recipe pads images that
                it splits into tiles.
        """
        checkpoint = checkpoint_of(recipe)
        try:
            processor = AutoProcessor.from_pretrained(checkpoint.path, **checkpoint.options)
        except Exception as error:  # of many types, for damaged files
            raise SanError(
                f"{checkpoint.path} has no processor that transformers can load: {cause_of(error)} Add the model's "
                "processor_config.json, preprocessor_config.json and tokenizer files."
            ) from error
        try:
            check_processor(processor, recipe.conversation.pad_to_square)
        except SanError as error:
            raise SanError(f"The processor of {checkpoint.path} cannot be used. {error}") from error
        return processor

    @cached_property
    def lengths(self) -> Any:
        """Lengths of the conversations; see `san_bench.vision_language.encoding.measure`.

        Raises:
            SanError: If truncation would cut through an image.
        """
        most = self.recipe.conversation.max_length
        lengths = measure(self.records, self.processor, most, self.task.images)
        if lengths.image_end > most:
            raise SanError(
                f"conversation.max_length {most} cuts through an image, whose tokens end at {lengths.image_end}. "
                "Increase it."
            )
        return lengths

    def base_model(self) -> nn.Module:
        """Loads the pretrained model in the dtype or quantization of the recipe.

        Raises:
            SanError: If weights are missing or mismatched, it has no vision tower or projector, the processor is
                unsupported, or bitsandbytes is required and not installed.
        """
        _ = self.processor  # fail before loading weights
        set_seed(self.recipe.seed)
        whole = (PROJECTOR, TOWER)
        model = load_pretrained(AutoModelForImageTextToText, checkpoint_of(self.recipe), self.recipe, whole)
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        if missing := [name for name in (TOWER, PROJECTOR) if name not in names]:
            raise SanError(
                f"{self.recipe.model} is a {type(model).__name__}, not a LLaVA model: it has no {', '.join(missing)}."
            )
        return model

    def trained_model(self, folder: Path) -> nn.Module:
        """Loads a fully trained model."""
        return load_pretrained(AutoModelForImageTextToText, Checkpoint(folder), self.recipe, (PROJECTOR, TOWER))

    def training(self, model: Any) -> Training:
        """Returns the training setup, with batches of one modality and similar length."""
        recipe, talk = self.recipe, self.recipe.conversation
        if recipe.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        pictured = [record.image is not None for record in self.records]
        collate = ConversationCollator(self._pad)
        return Training(
            dataset=ConversationDataset(
                self.records, self.task.images, self.processor, talk.max_length, talk.pad_to_square
            ),
            collate=collate,
            plain=collate,
            chosen_by=None,
            metric="loss",
            loss=None,
            mean_of_parts=False,
            gradient_checkpointing=recipe.gradient_checkpointing,
            rates={} if recipe.projector_lr is None else {f"{PROJECTOR}.": recipe.projector_lr},
            batches=lambda size, processes: ModalityBatches(
                pictured, self.lengths.tokens, size, recipe.seed, processes
            ),
        )

    def probe(self, size: int) -> Batch:
        """Returns the first evaluation questions with an image, equally many per benchmark."""
        tasks, examples = self.task.asked(self.recipe.eval_split), []
        each = -(-size // len(tasks))
        for asked in tasks.values():
            chosen = [question for question in asked.questions if question.image is not None][:each]
            examples += [self._encoded(question, asked.images) for question in chosen]
        return self._left(examples[:size])

    def score(self, model: Any, split: str) -> Scores:
        """Evaluates all questions with the published scoring rules.

        Returns:
            The unweighted mean over benchmarks as `accuracy`; under `tasks` the score of each, `n_test`, the number of
            unanswered questions, and details of its rule. The files contain every question and answer.

        Raises:
            SanError: If there are no questions for the split, or images or reference answers are missing.
        """
        self.task.require_questions(split)
        chosen = self.task.asked(split)
        move_to_gpu(model)
        tasks, files = {}, {}
        for name, asked in chosen.items():
            texts = self.answers(model, asked)
            found = _score(asked.rule, asked.questions, texts)
            tasks[name] = {
                "accuracy": found.score,
                "n_test": found.n,
                "unanswered": found.unanswered,
                "details": dict(found.details),
            }
            rows = [
                {"id": question.id, "question": question.text, "right": list(question.answers), "answer": text}
                for question, text in zip(asked.questions, texts, strict=True)
            ]
            files[f"answers-{name.rpartition('/')[2]}.jsonl"] = "".join(
                json.dumps(row, ensure_ascii=False) + "\n" for row in rows
            ).encode()
        numbers = {
            "accuracy": fmean(one["accuracy"] for one in tasks.values()),
            "n_test": sum(one["n_test"] for one in tasks.values()),
            "way": "generation",
            "tasks": tasks,
            "ways": {},
        }
        return Scores(numbers, files)

    def answers(self, model: Any, asked: BenchmarkQuestions) -> list[str]:
        """Generates answers with greedy decoding, sharded across ranks."""
        tokenizer, most = self.processor.tokenizer, self.recipe.answering.max_new_tokens
        ends = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(form_of(self.processor).end)})
        settings = decoding(self._pad, tokenizer.bos_token_id, ends, 1, most)
        device = next(model.parameters()).device
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        own, texts = rank_indices(len(asked.questions)), {}
        # Sorted by the length of the text alone: no image is opened before its batch comes.
        lengths = [tokenizer(asked.questions[part].text)["input_ids"] for part in own]
        with scoring(model):
            for places, _ in batches(lengths, self.recipe.answering.batch_size):
                for group in _by_modality([own[part] for part in places], asked.questions):
                    batch = self._left([self._encoded(asked.questions[part], asked.images) for part in group])
                    ready = {
                        key: value.to(device, kind) if value.is_floating_point() else value.to(device)
                        for key, value in batch.items()
                    }
                    written = model.generate(**ready, generation_config=settings)
                    start = ready["input_ids"].shape[1]
                    for part, row in zip(group, written[:, start:].tolist(), strict=True):
                        texts[part] = tokenizer.decode(row, skip_special_tokens=True).strip()
        return gather_results(texts, len(asked.questions))

    def save_companions(self, folder: Path) -> None:
        """Saves the processor."""
        self.processor.save_pretrained(folder)

    @property
    def _pad(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _encoded(self, question: Question, images: Images) -> dict[str, Tensor]:
        return encode_question(
            question.text, _opened(question, images), self.processor, self.recipe.conversation.pad_to_square
        )

    def _left(self, examples: Sequence[dict[str, Tensor]]) -> Batch:
        """Returns a left-padded batch of prompts."""
        batch = Collator(self._pad, "left")(examples)
        return {**batch, **stack_images(examples)}


def _score(rule: str, questions: Sequence[Question], texts: Sequence[str]) -> Score:
    if rule != "exact":
        return score_benchmark(rule, questions, texts)
    right = [normalise_gqa(text) == normalise_gqa(q.answers[0]) for text, q in zip(texts, questions, strict=True)]
    return Score(rule, fmean(right), len(questions), sum(not text.strip() for text in texts))


def _opened(question: Question, images: Images) -> Image.Image | None:
    if question.image is None:
        return None
    if isinstance(question.image, bytes):
        return read_rgb(question.image)
    return opened(images, question.image)


def _by_modality(places: Sequence[int], questions: Sequence[Question]) -> list[list[int]]:
    """Groups question indices by whether they have an image; empty groups are omitted."""
    groups = [[p for p in places if (questions[p].image is None) == bare] for bare in (False, True)]
    return [group for group in groups if group]
