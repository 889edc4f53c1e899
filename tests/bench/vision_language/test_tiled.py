"""Runs of LLaVA-NeXT and LLaVA-OneVision, whose images have tiles: as those of LLaVA-1.5 are tested."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from tests.bench.tiled import KINDS, TOKENS, place, processor
from tests.bench.vision_language.test_domain import LANGUAGE, METHODS, recipe_of, trained_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from san_bench.models.adapt import with_method
from san_bench.run.domain import domain_of
from san_bench.run.evaluate import evaluate, export, export_lora, load_model
from san_bench.run.train import train
from san_bench.run.trainer import make_trainer
from san_peft.errors import SanError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CASES = [(kind, method) for kind in KINDS for method in ("san", "lora", "san-lora")]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {kind: place(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def recipe(where, output, method="san-lora", **changes):
    return recipe_of(where, output, method, **({"conversation__pad_to_square": False} | changes))


@pytest.fixture(scope="module")
def runs(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = {case: folder / "-".join(case) for case in CASES}
    return {case: (train(recipe(places[case[0]], out, case[1])), out) for case, out in made.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_tower_stays_frozen_and_the_projector_is_trained_or_not(places, tmp_path, kind, method):
    for rate in (2e-5, None):
        domain = domain_of(recipe(places[kind], tmp_path, method, projector_lr=rate))
        trained = trained_of(with_method(domain.base_model(), domain.recipe))
        assert not [name for name in trained if "vision_tower" in name]
        assert any("multi_modal_projector" in name for name in trained) == (rate is not None)
        assert any("image_newline" in name for name in trained) == (method == "full")
        rest = {name for name in trained if "multi_modal_projector" not in name and "image_newline" not in name}
        assert all("language_model" in name or "lm_head" in name for name in rest)
        if method != "full":
            assert {part for name in rest for part in name.split(".") if part.endswith("_proj")} == LANGUAGE


@pytest.mark.parametrize(("kind", "method"), [case for case in CASES if case[1] != "lora"])
def test_scales_are_propagated_within_the_language_model(runs, kind, method):
    model, _ = load_model(runs[kind, method][1])
    edges = [(edge.anterior, edge.posterior) for edge in model.base_model.propagation_graph.edges]
    assert len(edges) == 11
    assert all("language_model" in name for edge in edges for name in edge)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_images_of_different_tiles(places, tmp_path, kind):
    domain = domain_of(recipe(places[kind], tmp_path / "run", "lora"))
    model = with_method(domain.base_model(), domain.recipe)
    trainer, _ = make_trainer(model, domain, tmp_path / "run")
    shapes = []
    for batch in trainer.get_train_dataloader():
        if "pixel_values" not in batch:
            assert "image_sizes" not in batch
            continue
        shapes.append(batch["pixel_values"].shape[1])
        assert len(batch["pixel_values"]) == len(batch["image_sizes"]) == len(batch["input_ids"])
        taken = (batch["input_ids"] == processor(kind).image_token_id).sum(1).tolist()
        assert taken == [TOKENS[width, height] for height, width in batch["image_sizes"].tolist()]
    assert max(shapes) == 5


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_run_is_scored_and_can_be_scored_again(runs, kind, method):
    result, folder = runs[kind, method]
    assert (result["n_train"], result["n_test"], result["steps"]) == (9, 6, 6)
    assert (result["tower"], result["projector_lr"], result["cut_records"]) == ("frozen", 2e-5, 0)
    rows = [json.loads(line) for line in (folder / "answers-conversations.jsonl").read_text().splitlines()]
    assert [row["right"] for row in rows] == [["blue"], ["red"], ["blue"], ["red"], ["me"], ["me"]]
    assert evaluate(folder)["tasks"] == result["tasks"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_the_answers(places, tmp_path, kind):
    result = train(recipe(places[kind], tmp_path / "run", "full", optimizer__epochs=40, answering__max_new_tokens=8))
    assert result["final_loss"] < 0.2
    assert result["accuracy"] == 1.0


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_answers_do_not_depend_on_the_size_of_batches(runs, kind, method):
    model, domain = load_model(runs[kind, method][1])
    (asked,) = domain.task.asked("test").values()
    texts = []
    for size in (1, 2, 6):
        answering = domain.recipe.answering.model_copy(update={"batch_size": size})
        domain.recipe = domain.recipe.model_copy(update={"answering": answering})
        texts.append(domain.answers(model, asked))
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_an_export_needs_nothing_of_ours(runs, tmp_path, kind, method):
    model, domain = load_model(runs[kind, method][1])
    assert isinstance(model, PeftModel)
    batch = domain.probe(4)
    assert batch["pixel_values"].shape == (4, 5, 3, 8, 8)
    export(runs[kind, method][1], tmp_path / "plain")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, atol=1e-3, rtol=1e-3)
    assert AutoProcessor.from_pretrained(tmp_path / "plain").chat_template == processor(kind).chat_template


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_as_lora_says_what_it_loses(runs, tmp_path, kind):
    report = export_lora(runs[kind, "san-lora"][1], tmp_path / "lora", 4)
    assert (tmp_path / "lora" / "adapter_config.json").is_file()
    assert report


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_trained_is_said_before_the_weights_are_loaded(places, tmp_path, kind):
    with pytest.raises(SanError, match=r"tiles.*Set conversation\.pad_to_square to false"):
        train(recipe(places[kind], tmp_path / "a", conversation__pad_to_square=True))
    with pytest.raises(SanError, match=r"conversation\.max_length 20 cuts through an image"):
        train(recipe(places[kind], tmp_path / "b", conversation__max_length=20))
    bare = tmp_path / "bare"
    processor(kind, None).save_pretrained(bare)
    with pytest.raises(SanError, match="has no chat template"):
        domain_of(recipe(places[kind], tmp_path, model=str(bare))).base_model()
