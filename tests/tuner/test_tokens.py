"""Tokens that are trained beside scales, and parameters that SAN does not adapt."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import disturb

from san_peft import AdapterError, SanConfig, SanError, detach_san, hotswap, merge_and_verify, propagate

IDS = torch.tensor([[1, 2, 3, 4], [5, 3, 2, 9]])
TOKENS = [2, 5]


def llama(tied: bool = False) -> tf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=30,
        tie_word_embeddings=tied,
    )
    return tf.LlamaForCausalLM(config).eval()


def config(host: str | None = None, **options) -> SanConfig:
    """With the tokens in the configuration of SAN, or in that of its host."""
    given = {"target_modules": ["v_proj", "up_proj"], "task_type": "CAUSAL_LM", **options}
    if host == "there":
        return SanConfig(inner=LoraConfig(r=2, trainable_token_indices=TOKENS), **given)
    inner = None if host is None else LoraConfig(r=2)
    return SanConfig(inner=inner, trainable_token_indices=TOKENS, **given)


def trained(tied: bool, host: str | None, name: str = "default", model: PeftModel | None = None) -> PeftModel:
    if model is None:
        model = get_peft_model(llama(tied), config(host), adapter_name=name).eval()
    else:
        model.add_adapter(name, config(host))
    disturb(model, name, seed=len(name))
    with torch.no_grad():
        model.get_input_embeddings().token_adapter.trainable_tokens_delta[name].add_(0.3 * len(name))
    return model


def out(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("host", [None, "here", "there"])
def test_tokens_are_trained_saved_loaded_and_merged(tied, host, tmp_path):
    model = get_peft_model(llama(tied), config(host))
    assert torch.equal(out(model), out(llama(tied)))
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    (tokens,) = (name for name in grads if "trainable_tokens_delta" in name)
    assert grads[tokens].abs().max() > 0
    assert grads[tokens].shape == (2, 16)
    model = trained(tied, host)
    expected = out(model)
    assert (expected - out(llama(tied))).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(tied), tmp_path).eval()
    assert again.peft_config["default"].trainable_token_indices == TOKENS
    assert torch.equal(out(again), expected)
    swapped = get_peft_model(llama(tied), config(host)).eval()
    hotswap(swapped, tmp_path)
    assert torch.equal(out(swapped), expected)
    again.merge_adapter()
    torch.testing.assert_close(out(again), expected, rtol=1e-4, atol=1e-5)
    again.unmerge_adapter()
    assert torch.equal(out(again), expected)
    merged = merge_and_verify(again, {"input_ids": IDS}).model
    torch.testing.assert_close(out(merged), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight[2], model.get_input_embeddings().weight[2])


@pytest.mark.parametrize("host", [None, "here"])
def test_several_adapters_with_tokens(host):
    model = trained(False, host, "one")
    model = trained(False, host, "second", model)
    outputs = {}
    for name in ("one", "second"):
        model.set_adapter(name)
        outputs[name] = out(model)
    mixed = out(model, adapter_names=["second", "one"])
    torch.testing.assert_close(mixed[0], outputs["second"][0])
    torch.testing.assert_close(mixed[1], outputs["one"][1])
    model.base_model.add_weighted_adapter(["one", "second"], [1.0, 0.0], "new")
    model.set_adapter("new")
    if host is None:
        torch.testing.assert_close(out(model), outputs["one"])
    deltas = model.get_input_embeddings().token_adapter.trainable_tokens_delta
    torch.testing.assert_close(deltas["new"], deltas["one"])
    model.add_adapter("other", SanConfig(**{**config().to_dict(), "trainable_token_indices": [1]}))
    with pytest.raises(AdapterError, match="differ in trainable_token_indices"):
        model.base_model.add_weighted_adapter(["one", "other"], [1.0, 0.0], "newer")


def test_tokens_of_an_adapter_that_is_there_stay_with_it(tmp_path):
    inner = LoraConfig(r=2, target_modules=["v_proj", "up_proj"], trainable_token_indices=TOKENS)
    model = get_peft_model(llama(), inner).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    before = out(model)
    propagate(model)
    attached = out(model)
    assert not torch.allclose(attached, before, rtol=1e-3)
    model.save_pretrained(tmp_path / "san")
    again = PeftModel.from_pretrained(llama(), tmp_path / "san").eval()
    assert torch.equal(out(again), attached)
    detach_san(again)
    assert torch.equal(out(again), before)
    again.save_pretrained(tmp_path / "lora")
    assert torch.equal(out(PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()), before)


def test_san_and_its_host_must_agree_on_tokens():
    with pytest.raises(SanError, match=r"disagree on trainable_token_indices: \[1\] here, \[2, 5\] in inner"):
        SanConfig(inner=LoraConfig(trainable_token_indices=TOKENS), trainable_token_indices=[1])


def test_parameters_that_are_no_layers_are_refused_with_the_reason():
    with pytest.raises(SanError, match=r"target_parameters=\['experts.gate_up_proj'\].*Mixtral"):
        SanConfig(target_parameters=["experts.gate_up_proj"])
    with pytest.raises(SanError, match=r"target_parameters=.*SAN adapts layers, not bare parameters"):
        SanConfig(inner=LoraConfig(target_parameters=["experts.gate_up_proj"]))
