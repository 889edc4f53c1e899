"""The decoder that ships: small, true to its papers, and of use."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    ViTModel,
)

from san_bench.data.conversation_prompts import image_tokens
from san_bench.data.embedded import embedded_path, joined, processor_of
from san_bench.data.mini_pictures import draw
from san_bench.data.mini_talk import caption
from san_bench.data.world_text import text
from san_bench.run.models import empty_model
from san_peft import SanConfig, merge_and_verify, trace
from san_peft.errors import SanError

MIB = 2**20
OTHER_SEED = 77

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    return LlamaForCausalLM.from_pretrained(embedded_path("decoder")).eval()


def test_the_papers_are_true_and_the_folder_is_small():
    folder = embedded_path("decoder")
    papers = json.loads((folder / "PROVENANCE.json").read_text(encoding="utf-8"))
    assert papers["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1] == papers["final"]
    assert rows[-1]["step"] == papers["settings"]["steps"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert sum(f.stat().st_size for f in folder.iterdir()) < 4 * MIB


def test_the_decoder_loads_whole_and_has_grouped_queries(decoder):
    papers = json.loads((embedded_path("decoder") / "PROVENANCE.json").read_text(encoding="utf-8"))
    _, report = AutoModelForCausalLM.from_pretrained(embedded_path("decoder"), output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert papers["parameters"] == sum(p.numel() for p in decoder.parameters())
    assert decoder.config.num_attention_heads == 3 * decoder.config.num_key_value_heads
    assert decoder.dtype == torch.float32


def test_its_tokenizer_writes_any_text(decoder):
    tokenizer = AutoTokenizer.from_pretrained(embedded_path("decoder"))
    for words in (text(OTHER_SEED, 0), "ünïcode 漢字 1,234\n\ttabs", "Question: is 12 + 3 = 15?"):
        ids = tokenizer(words)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == words
    assert len(tokenizer) == decoder.config.vocab_size
    assert decoder.config.pad_token_id == tokenizer.pad_token_id


def loss_of(model, texts):
    tokenizer = AutoTokenizer.from_pretrained(embedded_path("decoder"))
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


def test_its_graph_crosses_the_groups_and_merging_changes_nothing(decoder):
    model = LlamaForCausalLM.from_pretrained(embedded_path("decoder"))
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


def test_names():
    assert type(empty_model("embedded/decoder")).__name__ == "LlamaForCausalLM"
    with pytest.raises(SanError, match=r"No model 'decoda' ships with the package\. Did you mean 'decoder'"):
        embedded_path("decoda")


def test_a_llava_is_joined_of_the_two(decoder):
    torch.manual_seed(0)
    llava = joined(embedded_path("vit"), embedded_path("decoder")).eval()
    tower = ViTModel.from_pretrained(embedded_path("vit"), add_pooling_layer=False)
    own = llava.model.vision_tower.state_dict()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(own[name], tensor), name
    assert not any(own[name].any() for name in own if name.startswith("pooler."))
    for name, tensor in decoder.model.state_dict().items():
        if name != "embed_tokens.weight":
            assert torch.equal(llava.model.language_model.state_dict()[name], tensor), name
    rows = llava.get_input_embeddings().weight
    assert torch.equal(llava.lm_head.weight, rows)
    assert torch.equal(rows[:-1], decoder.get_input_embeddings().weight)
    torch.testing.assert_close(rows[-1], rows[:-1].mean(0))
    processor = processor_of(embedded_path("vit"), embedded_path("decoder"))
    scene, words = caption(OTHER_SEED, 0)
    read = processor(images=draw(scene, OTHER_SEED, 0), text=f"<image>{words}", return_tensors="pt")
    assert int((read["input_ids"] == llava.config.image_token_id).sum()) == image_tokens(processor) == 64
    assert read["pixel_values"].shape == (1, 3, 32, 32)
    logits = llava(**read).logits
    assert torch.isfinite(logits).all()
    assert (logits.argmax(-1) != llava.config.image_token_id).all(), "the token of an image is never the likeliest"
