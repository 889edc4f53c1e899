"""The decoder and the LLaVA that ship: small, true to their papers, put together as said, and of use."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import PeftConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    ViTModel,
)

from generators.mini_captions import KINDS, caption
from generators.world_text import choice, text
from san_bench.language.mini.words import RandomChoices
from san_bench.models import embedded
from san_bench.models.architectures import empty_model
from san_bench.models.embedded import asset, embedded_path
from san_bench.vision_language.encoding import encode_question
from san_bench.vision_language.mini.pictures import draw_scene
from san_peft import SanConfig, merge_and_verify, trace
from san_peft.errors import SanError

MIB = 2**20
OTHER_SEED = 77

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    return LlamaForCausalLM.from_pretrained(asset("decoder")).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the LLaVA, put together in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield embedded_path("llava")


@pytest.fixture(scope="module")
def llava(place):
    return AutoModelForImageTextToText.from_pretrained(place).eval()


def stages(papers):
    """The papers of a model and of those that it was continued from."""
    return [papers, *stages(papers["continued_from"])] if papers.get("continued_from") else [papers]


@pytest.mark.parametrize(("name", "weights", "limit"), [("decoder", "model", 4), ("llava", "adapter_model", 2)])
def test_the_papers_are_true_and_the_folder_is_small(name, weights, limit):
    folder = asset(name)
    papers = json.loads((folder / "PROVENANCE.json").read_text(encoding="utf-8"))
    assert papers["sha256"] == hashlib.sha256((folder / f"{weights}.safetensors").read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1] == papers["final"]
    assert rows[-1]["step"] == sum(one["settings"]["steps"] for one in stages(papers))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert sum(f.stat().st_size for f in folder.iterdir()) < limit * MIB


# ---------------------------------------------------------------------------------------------- the decoder


def test_the_decoder_loads_whole_and_has_grouped_queries(decoder):
    papers = json.loads((asset("decoder") / "PROVENANCE.json").read_text(encoding="utf-8"))
    _, report = AutoModelForCausalLM.from_pretrained(asset("decoder"), output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert papers["parameters"] == sum(p.numel() for p in decoder.parameters())
    assert decoder.config.num_attention_heads == 2 * decoder.config.num_key_value_heads
    assert decoder.dtype == torch.float32


def test_its_tokenizer_writes_any_text(decoder):
    tokenizer = AutoTokenizer.from_pretrained(asset("decoder"))
    for words in (text(OTHER_SEED, 0), "ünïcode 漢字 1,234\n\ttabs", "Question: is 12 + 3 = 15?"):
        ids = tokenizer(words)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == words
    assert len(tokenizer) == decoder.config.vocab_size
    assert decoder.config.pad_token_id == tokenizer.pad_token_id


def loss_of(model, texts):
    tokenizer = AutoTokenizer.from_pretrained(asset("decoder"))
    losses = []
    for words in texts:
        ids = torch.tensor([tokenizer(words)["input_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def test_it_knows_the_words_and_the_facts_of_its_world(decoder):
    texts = [text(OTHER_SEED, index) for index in range(40)]
    assert loss_of(decoder, texts) < 1.5
    torch.manual_seed(0)
    assert loss_of(LlamaForCausalLM(decoder.config), texts) > 6
    right = loss_of(decoder, ["A duck quacks.", "A spoon is in the kitchen."])
    assert right < loss_of(decoder, ["A duck barks.", "A spoon is in the stable."])


def test_it_finds_the_number_of_what_is_asked_for(decoder):
    """Else nobody can teach it to choose an answer by its number."""
    tokenizer = AutoTokenizer.from_pretrained(asset("decoder"))
    asked = [told for index in range(200) if re.search(r"[1-4]\.$", told := choice(RandomChoices(OTHER_SEED, index)))]
    right = 0
    for told in asked:
        *before, number, _ = tokenizer(told)["input_ids"]
        with torch.no_grad():
            right += decoder(input_ids=torch.tensor([before])).logits[0, -1].argmax().item() == number
    assert len(asked) > 80
    assert right / len(asked) > 0.85  # guessing gives 0.36


def test_its_graph_crosses_the_groups_and_merging_changes_nothing(decoder):
    model = LlamaForCausalLM.from_pretrained(asset("decoder"))
    graph = trace(model)
    edges = {str(edge) for edge in graph.edges}
    layer = "model.layers.0"
    assert not graph.barriers
    assert any(edge.startswith(f"{layer}.self_attn.v_proj -> {layer}.self_attn.o_proj [repeat") for edge in edges)
    assert any(edge.startswith(f"{layer}.mlp.up_proj -> {layer}.mlp.down_proj [identity]") for edge in edges)
    adapted = get_peft_model(model, SanConfig(task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "san_scale" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    report = merge_and_verify(adapted, {"input_ids": torch.tensor([[1, 40, 50, 60]])})
    assert report.max_abs_difference < 1e-3
    assert not any("san_" in key for key in report.model.state_dict())


# ---------------------------------------------------------------------------------------------- the LLaVA


def test_it_is_put_together_of_what_ships(place, llava, decoder):
    tower = ViTModel.from_pretrained(asset("vit"), add_pooling_layer=False)
    tensors = load_file(asset("llava") / "adapter_model.safetensors")
    config = PeftConfig.from_pretrained(asset("llava"))
    pairs = {key.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight") for key in tensors}
    adapted = 0
    for part, whole in (("vision_tower", tower), ("language_model", decoder.model)):
        own = llava.model.get_submodule(part).state_dict()
        for name, tensor in whole.state_dict().items():
            layer, expected = f"{part}.{name.removesuffix('.weight')}", tensor.double()
            if name.endswith(".weight") and layer in pairs:
                a, b = (tensors[f"base_model.model.model.{layer}.lora_{which}.weight"].double() for which in "AB")
                assert b.any(), layer
                expected, adapted = expected + config.lora_alpha / config.r * b @ a, adapted + 1
            if name == "embed_tokens.weight":
                continue
            assert torch.equal(own[name], expected.half().float()), layer
    assert adapted == 3 * 6 + 9 * 7 == sum("lora_A" in key for key in tensors)
    pooler = [tensor for name, tensor in llava.model.vision_tower.state_dict().items() if name.startswith("pooler.")]
    assert pooler
    assert not any(tensor.any() for tensor in pooler)
    for name, tensor in llava.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, tensors[f"base_model.model.model.multi_modal_projector.{name}"].float())
    assert llava.dtype == torch.float32
    assert {path.name for path in place.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_the_token_of_an_image_is_never_written(llava, decoder):
    rows = llava.get_input_embeddings().weight
    assert torch.equal(llava.lm_head.weight, rows)
    assert torch.equal(rows[:-1], decoder.get_input_embeddings().weight)
    torch.testing.assert_close(rows[-1], rows[:-1].mean(0), atol=1e-3, rtol=0)
    assert llava.config.image_token_id == len(rows) - 1


def test_the_processor_fills_in_the_place_of_an_image(place, llava):
    processor = AutoProcessor.from_pretrained(place)
    read = processor(
        images=draw_scene(caption(OTHER_SEED, 0).scene, OTHER_SEED, 0), text="<image>What is it?", return_tensors="pt"
    )
    assert int((read["input_ids"] == llava.config.image_token_id).sum()) == 64
    assert read["pixel_values"].shape == (1, 3, 32, 32)
    assert torch.isfinite(llava(**read).logits).all()


def test_it_sees(place, llava):
    """Captions are likelier after their own pictures than after those of others."""
    processor = AutoProcessor.from_pretrained(place)
    drawn = [caption(OTHER_SEED, index) for index in range(32)]
    images = [draw_scene(one.scene, OTHER_SEED, index) for index, one in enumerate(drawn)]
    told = [one.facts[0][:2] for one in drawn]
    losses = []
    for shown in (images, images[1:] + images[:1]):
        read = processor(
            images=shown, text=[f"<image>{said} {seen}." for said, seen in told], padding=True, return_tensors="pt",
            padding_side="right",
        )  # fmt: skip
        read["labels"] = read["input_ids"].masked_fill(
            (read["attention_mask"] == 0) | (read["input_ids"] == llava.config.image_token_id), -100
        )
        with torch.no_grad():
            losses.append(llava(**read).loss.item())
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("asked", [False, True], ids=["told", "asked"])
@pytest.mark.parametrize("kind", ["shape", "cell", "count", "word"])
def test_it_tells_what_it_sees(place, llava, kind, asked):
    """Of pictures that it was not trained on, in words that it writes itself; asked, in the template of the tasks."""
    processor = AutoProcessor.from_pretrained(place)
    right = count = index = 0
    while count < 16:
        dice, scene, index = RandomChoices(OTHER_SEED, index), caption(OTHER_SEED, index).scene, index + 1
        if len(scene.figures) < 3 if kind != "word" else not scene.word:
            continue
        fact = KINDS[kind](dice, scene)
        image = Image.fromarray(draw_scene(scene, OTHER_SEED, index - 1))
        if asked:
            read = {key: one[None] for key, one in encode_question(fact.asked, image, processor, pad=False).items()}
        else:
            read = processor(images=image, text=f"<image>{fact.said}", return_tensors="pt")
        written = llava.generate(**read, max_new_tokens=10, do_sample=False)[0, read["input_ids"].shape[1] :]
        wanted = fact.seen if asked else f"{fact.seen}."
        count, right = count + 1, right + (processor.decode(written, skip_special_tokens=True).strip() == wanted)
    assert right >= 12  # guessing a shape among three is right in one of three, a word in one of seventy


def test_it_is_assembled_once_whoever_asks_first(place, tmp_path, monkeypatch):
    before = (place / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(place.parents[3]))
    assert embedded_path("llava") == place
    assert (place / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    assemble, calls = embedded._assemble, list[Path]()

    def counted(folder: Path) -> None:
        calls.append(folder)
        assemble(folder)

    monkeypatch.setattr(embedded, "_assemble", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(embedded_path("llava"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(calls) == 1
    assert found[0] == found[1]
    assert (found[0] / "model.safetensors").read_bytes() == (place / "model.safetensors").read_bytes()


def test_a_process_that_is_later_takes_what_is_there(place, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    target = tmp_path / "san-peft" / "embedded" / "llava" / place.name

    def overtaken(folder: Path) -> None:
        (folder / "config.json").write_text("of the later one")
        shutil.copytree(place, target)

    monkeypatch.setattr(embedded, "_assemble", overtaken)
    assert embedded_path("llava") == target
    assert (target / "config.json").read_bytes() == (place / "config.json").read_bytes()
    assert list(target.parent.iterdir()) == [target], "nothing half-written is left"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SanError, match="HF_ASSETS_CACHE"):
        embedded_path("llava")


def test_names(place, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(place.parents[3]))
    assert type(empty_model("embedded/decoder")).__name__ == "LlamaForCausalLM"
    assert type(empty_model("embedded/llava")).__name__ == "LlavaForConditionalGeneration"
    with pytest.raises(SanError, match=r"No model 'lava' ships with the package\. Did you mean 'llava'"):
        embedded_path("lava")
