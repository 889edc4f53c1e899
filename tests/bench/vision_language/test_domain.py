"""Runs of models that see and speak: what is trained, with which rates and batches, and what is asked afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.bench.copies import write_picture
from tests.bench.vision_language.test_encoding import VOCABULARY, processor
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from san_bench.config.recipe import load_recipe
from san_bench.models.adapt import with_method
from san_bench.run.domain import domain_of
from san_bench.run.evaluate import evaluate, export, load_model
from san_bench.run.folder import export_facts
from san_bench.run.results import read_rows
from san_bench.run.train import train
from san_bench.run.trainer import make_trainer
from san_bench.vision_language.encoding import encode, encode_question
from san_bench.vision_language.recipe import ConversationRecipe
from san_bench.vision_language.records import Conversation, Turn
from san_bench.vision_language.submission import submission
from san_bench.vision_language.tasks import BenchmarkQuestions, ConversationTask, load_conversation_task
from san_bench.vision_language.template import write
from san_bench.vision_language.vqa.benchmarks import Question, lmms_command
from san_peft.errors import SanError

LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "all-linear"}
OVER = {**LORA, "propagation": "all", "decomposition": "norm", "exponent": 1.0, "bound": None, "detach": False}
OWN = {"propagation": "all", "exponent": 1.0, "shift": False, "train_norms": True, "detach": False, "gate": False}
METHODS = {
    "san": {"kind": "san", **OWN},
    "lora": {"kind": "lora", **LORA},
    "san-lora": {"kind": "san-lora", **OVER},
    "dora": {"kind": "dora", **LORA},
    "san-dora": {"kind": "san-dora", **OVER},
    "full": {"kind": "full"},
}
LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def talk(number: int, picture: bool) -> dict:
    question = "what now" if number % 2 else "what"
    asked = f"{question}\n<image>" if picture else question
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "a cat" if picture else "dog"}]
    record = {"id": number, "conversations": turns}
    return {**record, "image": f"images/{number}.png"} if picture else record


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small LLaVA with its processor, seven conversations about images and five without, and six questions."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY["<image>"])
    LlavaForConditionalGeneration(config).save_pretrained(folder / "model")
    processor().save_pretrained(folder / "model")
    records = [talk(n, n < 7) for n in range(12)]
    questions = [talk(n, n < 16) for n in range(12, 18)]
    for number in [*range(7), *range(12, 16)]:
        write_picture(folder / "data" / "images" / f"{number}.png", number)
    (folder / "data" / "train.json").write_text(json.dumps(records))
    (folder / "data" / "test.json").write_text(json.dumps(questions))
    return folder


def recipe_of(place: Path, output: Path, kind: str = "san-lora", **changes: object) -> ConversationRecipe:
    values = {
        "task": "conversations", "data": str(place / "data"), "model": str(place / "model"), "method": METHODS[kind],
        "optimizer.epochs": 2, "optimizer.batch_size": 4, "optimizer.accumulation": 1, "optimizer.lr": 0.01,
        "weights": "fp32", "precision": "fp32", "data_workers": 0, "checkpoint_steps": 0, "output": str(output),
        "gradient_checkpointing": False, "answering.benchmarks": [], "answering.batch_size": 4,
        "answering.max_new_tokens": 4,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe("vision-language/llava-1.5-7b-san-lora", values)


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: (train(recipe_of(place, folder / kind, kind)), folder / kind) for kind in METHODS}


def trained_of(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", METHODS)
def test_the_tower_stays_frozen_and_the_projector_is_trained_or_not(place, tmp_path, kind):
    for rate in (2e-5, None):
        domain = domain_of(recipe_of(place, tmp_path, kind, projector_lr=rate))
        trained = trained_of(with_method(domain.base_model(), domain.recipe))
        assert not [name for name in trained if "vision_tower" in name]
        assert any("multi_modal_projector" in name for name in trained) == (rate is not None)
        rest = {name for name in trained if "multi_modal_projector" not in name}
        assert rest
        assert all("language_model" in name or "lm_head" in name for name in rest)
        if kind != "full":
            assert not any("lm_head" in name for name in rest)
            adapted = {part for name in rest for part in name.split(".") if part.endswith("_proj")}
            assert adapted == LANGUAGE
        assert any("layernorm" in name for name in rest) == (kind in ("san", "full"))


def test_edges_of_a_frozen_tower_go_without_a_word(place, tmp_path, recwarn):
    domain = domain_of(recipe_of(place, tmp_path, "san-lora"))
    edges = with_method(domain.base_model(), domain.recipe).base_model.propagation_graph.edges
    assert edges
    assert not [edge for edge in edges if "vision_tower" in edge.anterior]
    assert not [one for one in recwarn if "are dropped" in str(one.message)]


def test_the_tower_can_be_adapted_too(place, tmp_path):
    for kind in ("san", "lora", "full"):
        domain = domain_of(recipe_of(place, tmp_path, kind, tower="adapted", projector_lr=None))
        trained = trained_of(with_method(domain.base_model(), domain.recipe))
        assert any("vision_tower" in name for name in trained)
        assert not any("multi_modal_projector" in name for name in trained)


def test_the_projector_has_its_own_rate_from_the_first_step_to_the_last(place, tmp_path):
    recipe = recipe_of(place, tmp_path / "run", "lora", projector_lr=0.5, optimizer__warmup=0.0)
    domain = domain_of(recipe)
    model = with_method(domain.base_model(), recipe)
    trainer, _ = make_trainer(model, domain, tmp_path / "run")
    trainer.create_optimizer_and_scheduler(10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert set(rates) == trained_of(model)
    assert {rate for name, rate in rates.items() if "multi_modal_projector" in name} == {0.5}
    assert {rate for name, rate in rates.items() if "multi_modal_projector" not in name} == {0.01}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}


def test_batches_are_of_one_modality_and_hold_every_conversation_once(place, tmp_path):
    domain = domain_of(recipe_of(place, tmp_path / "run", "lora"))
    model = with_method(domain.base_model(), domain.recipe)
    trainer, _ = make_trainer(model, domain, tmp_path / "run")
    sizes = []
    for batch in trainer.get_train_dataloader():
        pictures = len(batch["pixel_values"]) if "pixel_values" in batch else 0
        assert pictures in (0, len(batch["input_ids"]))
        sizes.append((len(batch["input_ids"]), pictures > 0))
    assert sum(size for size, pictured in sizes if pictured) == 7
    assert sum(size for size, pictured in sizes if not pictured) == 5
    assert max(size for size, _ in sizes) == 4


@pytest.mark.parametrize("kind", METHODS)
def test_a_result_says_what_was_trained_and_what_was_answered(runs, kind):
    result, folder = runs[kind]
    assert (result["n_train"], result["n_test"], result["steps"]) == (12, 6, 8)  # two and two batches an epoch
    assert (result["tower"], result["projector_lr"], result["dropped_records"]) == ("frozen", 2e-5, 0)
    rows = [json.loads(line) for line in (folder / "answers-conversations.jsonl").read_text().splitlines()]
    assert [row["right"] for row in rows] == [["a cat"]] * 4 + [["dog"]] * 2
    right = sum(row["answer"].strip().lower().rstrip(".") == row["right"][0] for row in rows)
    assert result["accuracy"] == pytest.approx(right / 6)
    (row,) = read_rows([folder])
    assert (row["task"], row["way"], row["n_test"]) == ("conversations", "generation", 6)
    again = evaluate(folder)
    assert again["tasks"] == result["tasks"]


def test_training_learns_the_answers(place, tmp_path):
    result = train(recipe_of(place, tmp_path / "run", "full", optimizer__epochs=25, optimizer__lr=0.01))
    assert result["final_loss"] < 0.2
    assert result["accuracy"] == 1.0


def test_answers_do_not_depend_on_the_size_of_batches(runs):
    model, domain = load_model(runs["san-lora"][1])
    (asked,) = domain.task.asked("test").values()
    texts = []
    for size in (1, 2, 6):
        domain.recipe = domain.recipe.model_copy(
            update={"answering": domain.recipe.answering.model_copy(update={"batch_size": size})}
        )
        texts.append(domain.answers(model, asked))
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1


def test_a_question_reads_as_the_beginning_of_its_conversation():
    record = Conversation(1, (Turn("human", "what\n<image>"), Turn("gpt", "a cat")), "x.png")
    image, ours = Image.new("RGB", (8, 4), "red"), processor()
    whole, asked = encode(record, image, ours, 100), encode_question("what", image, ours)
    n = len(asked["input_ids"])
    assert whole["input_ids"][:n].tolist() == asked["input_ids"].tolist()
    assert (whole["labels"][:n] == -100).all()
    assert whole["labels"][n] != -100
    torch.testing.assert_close(whole["pixel_values"], asked["pixel_values"])
    assert write(record, ours, ask=True).text.endswith("ASSISTANT:")


@pytest.mark.parametrize("kind", ["san", "lora", "san-lora"])
def test_an_export_needs_nothing_of_ours(runs, tmp_path, kind):
    export(runs[kind][1], tmp_path / "plain")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain").eval()
    model, domain = load_model(runs[kind][1])
    batch = domain.probe(4)
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, atol=1e-3, rtol=1e-3)
    assert AutoProcessor.from_pretrained(tmp_path / "plain").patch_size == 4
    facts = export_facts(tmp_path / "plain")
    assert (facts["run"], facts["recipe_fingerprint"]) == (kind, domain.recipe.fingerprint)
    assert 0 <= facts["max_abs_difference"] < 1e-3
    assert f"pretrained={tmp_path / 'plain'}" in lmms_command(tmp_path / "plain", "out", ["gqa"])


def test_a_run_answers_the_questions_of_a_server(place, runs, tmp_path):
    rows = [{"question_id": n, "image": f"{n}.png", "text": "what"} for n in (12, 13)]
    questions = tmp_path / "test.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, out, images = runs["lora"][1], tmp_path / "up.json", place / "data" / "images"
    with pytest.raises(SanError, match=r"2 images are missing, .*test2015: 12.png, 13.png\n.* --images"):
        submission(run, "vqav2", questions, out)
    assert submission(run, "vqav2", questions, out, images) == out
    model, domain = load_model(run)
    asked = tuple(Question(row["question_id"], row["image"], row["text"]) for row in rows)
    texts = domain.answers(model, BenchmarkQuestions("vqav2", asked, images))
    said = [{"question_id": row["question_id"], "text": text} for row, text in zip(rows, texts, strict=True)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    again = submission(tmp_path / "answers.jsonl", "vqav2", questions, tmp_path / "again.json")
    assert json.loads(out.read_text()) == json.loads(again.read_text())
    assert [row["question_id"] for row in json.loads(out.read_text())] == [12, 13]
    with pytest.raises(SanError, match=r"up.json already exists"):
        submission(run, "vqav2", questions, out, images)
    with pytest.raises(SanError, match=r"recipe\.yaml"):
        submission(tmp_path, "vqav2", questions, tmp_path / "other.json", images)


def test_bad_images_stop_a_run_or_are_left_out_on_request(place, tmp_path):
    data = tmp_path / "data"
    for number in (0, 1):
        write_picture(data / "images" / f"{number}.png", number)
    (data / "images" / "1.png").write_text("no image")
    (data / "train.json").write_text(json.dumps([talk(n, n < 3) for n in range(5)]))
    (data / "test.json").write_text(json.dumps([talk(0, True)]))
    domain = domain_of(recipe_of(place, tmp_path / "run", data=str(data)))  # who only asks needs no image of a record
    assert list(domain.task.asked("test")) == ["conversations"]
    with pytest.raises(SanError) as error:
        train(domain.recipe)
    assert "1 images are missing" in str(error.value)
    assert "1 images cannot be read" in str(error.value)
    assert "conversation.drop_bad_images=true" in str(error.value)
    assert f"{tmp_path / 'run' / 'images.json'} lists them all." in str(error.value)
    found = json.loads((tmp_path / "run" / "images.json").read_text())
    assert [(one["records"], one["dropped"]) for one in found["bad"]] == [([1], False), ([2], False)]
    assert not (tmp_path / "run" / "adapter").exists()
    domain = domain_of(recipe_of(place, tmp_path / "run", data=str(data), conversation__drop_bad_images=True))
    assert (domain.n_train, domain.facts()["dropped_records"]) == (3, 2)


def test_what_is_dropped_and_what_is_mislabelled_is_told_and_written(place, tmp_path, capsys):
    data, folder = tmp_path / "data", tmp_path / "run"
    for number in (0, 1):
        write_picture(data / "images" / f"{number}.png", number)
    Image.new("RGB", (8, 8)).save(data / "images" / "1.png", format="JPEG")
    (data / "train.json").write_text(json.dumps([talk(n, n < 3) for n in range(5)]))
    (data / "test.json").write_text(json.dumps([talk(0, True)]))
    changes = {"conversation__drop_bad_images": True, "optimizer__epochs": 1}
    result = train(recipe_of(place, folder, data=str(data), **changes))
    said = capsys.readouterr().out
    assert "warning: images: 1 images do not have the format of their suffix" in said
    assert f"1 of 5 conversations are dropped because of their images; {folder / 'images.json'} lists them." in said
    assert (result["n_train"], result["dropped_records"]) == (4, 1)
    bad = json.loads((folder / "images.json").read_text())["bad"]
    assert [(one["image"], one["reason"], one["dropped"], one["records"]) for one in bad] == [
        ("images/1.png", "mislabelled (JPEG)", False, [1]),
        ("images/2.png", "missing", True, [2]),
    ]


def test_images_of_questions_are_missed_before_the_training(place, tmp_path):
    data = tmp_path / "data"
    write_picture(data / "images" / "0.png", 0)
    (data / "train.json").write_text(json.dumps([talk(0, True)]))
    (data / "test.json").write_text(json.dumps([talk(n, n != 8) for n in range(9)]))
    recipe = recipe_of(place, tmp_path / "run", data=str(data))
    with pytest.raises(
        SanError, match=r"7 images are missing, which 7 questions are about, below .*data: images/1.png"
    ):
        train(recipe)
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(SanError, match="7 images are missing"):
        domain_of(recipe).score(None, "test")


def test_questions_without_an_answer_are_found_before_the_training():
    asked = BenchmarkQuestions(
        "vizwiz", (Question(1, "a.png", "what"), Question(2, "b.png", "what", ("a cat",))), lambda name: None
    )
    task = ConversationTask("llava", "nowhere", {"test": {"llava/vizwiz": asked}}, lambda: ({}, None))
    with pytest.raises(SanError, match="vizwiz: 1 questions have no public answer: 1\n"):
        task.require_questions("test")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda ours: ours.tokenizer.__setattr__("eos_token", None), "has no end token"),
        (lambda ours: ours.__setattr__("tokenizer", bare()), "token '<image>'"),
    ],
)
def test_a_processor_that_lacks_a_token_is_named_before_the_training(place, tmp_path, spoil, said):
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    ours = processor()
    spoil(ours)
    ours.save_pretrained(model)
    with pytest.raises(SanError, match=f"The processor of .*model cannot be used. .*{said}"):
        train(recipe_of(place, tmp_path / "run", model=str(model)))


def bare():
    """A tokenizer that knows no image."""
    known = {word: number for word, number in VOCABULARY.items() if word != "<image>"}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_mistakes_are_named(place, tmp_path):
    with pytest.raises(SanError, match=r"there is no benchmark 'vqa2'\. Did you mean 'vqav2'"):
        recipe_of(place, tmp_path, task="llava", answering__benchmarks=["vqa2"])
    with pytest.raises(SanError, match="answering: conversations"):
        recipe_of(place, tmp_path, answering__benchmarks=["gqa"])
    with pytest.raises(SanError, match="data: "):
        recipe_of(place, tmp_path, data=None)
    with pytest.raises(SanError, match="There is no folder"):
        load_conversation_task("llava", tmp_path / "none")
    domain = domain_of(recipe_of(place, tmp_path))
    with pytest.raises(SanError, match=r"no questions .* 'val'"):
        domain.score(None, "val")
    with pytest.raises(SanError, match=r"train_split: .*trainval"):
        recipe_of(place, tmp_path, train_split="trainval")
    with pytest.raises(SanError, match="val is part of trainval"):
        recipe_of(place, tmp_path, task="mini-vl", data=None, train_split="trainval", eval_split="val")
