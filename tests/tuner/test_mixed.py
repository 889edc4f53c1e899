"""Batches whose samples name their adapters: right, or refused with PEFT's words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.contract.nets import KINDS, adapted, disturb, outputs
from tests.tuner.hosted import IDS, small_llama
from torch import Tensor, nn
from transformers import XLNetConfig, XLNetLMHeadModel

from san_peft import AdapterError, SanConfig, SanError, trace

NAMES = ["one", "__base__", "two"]


def with_two(net: nn.Module, **options: Any) -> Any:
    model = get_peft_model(net, SanConfig(**options), adapter_name="one")
    model.add_adapter("two", SanConfig(**options))
    disturb(model, "one", seed=1)
    disturb(model, "two", seed=2)
    return model.eval()


class Turned(nn.Module):
    """A net whose layers read the sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x.transpose(0, 1))))
        return self.head((x + x.mean(0)).transpose(0, 1))


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)])
@pytest.mark.parametrize("length", [3, 4, 6])
def test_samples_along_another_axis_are_refused_whatever_the_length(length, inner):
    torch.manual_seed(0)
    x = torch.randn(3, length, 6)
    net = Turned()
    model = with_two(net, propagation=trace(net, x), target_modules=["first", "second"], inner=inner)
    with torch.no_grad(), pytest.raises(AdapterError, match=r"first .*3 samples"):
        model(x, adapter_names=NAMES)
    assert model(x).shape == (3, length, 2)


@pytest.mark.parametrize("length", [3, 5])
def test_xlnet(length):
    torch.manual_seed(0)
    net = XLNetLMHeadModel(XLNetConfig(vocab_size=30, d_model=16, n_layer=2, n_head=2, d_inner=24))
    model = with_two(net, target_modules=["layer_1", "layer_2"], propagation="none")
    ids = torch.randint(30, (3, length))
    with torch.no_grad(), pytest.raises(AdapterError, match="wrong samples"):
        model(input_ids=ids, adapter_names=NAMES)


def test_a_language_model_is_checked_once_and_generates():
    model = with_two(small_llama())
    ids = torch.cat([IDS, IDS.flip(1)[:1]])
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids).logits
            torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-5)
    calls: list[int] = []
    model.base_model.model.model.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=ids, adapter_names=NAMES)
    assert len(calls) == 1
    fresh = with_two(small_llama())
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    tokens = fresh.generate(input_ids=ids, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        if name != "__base__":
            fresh.set_adapter(name)
            assert torch.equal(fresh.generate(input_ids=ids[row : row + 1], **options)[0], tokens[row])


def test_one_sample_for_all_adapters():
    """The question of who is who has an answer where all samples are the same, too."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6).expand(3, -1, -1).contiguous()
    net = Turned()
    model = with_two(net, propagation=trace(net, x), target_modules=["first", "second"])
    with pytest.raises(AdapterError, match="input of first"):
        model(x, adapter_names=NAMES)
    dense = adapted(KINDS["dense"])
    same = KINDS["dense"].input()[:1].expand(3, -1).contiguous()
    out = dense(same, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(out[0], out[2])
    assert not torch.allclose(out[0], out[1], rtol=1e-3)


def test_errors_in_the_words_of_peft():
    model = adapted(KINDS["dense"])
    x = KINDS["dense"]
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same as the number of inputs, but"):
        outputs(model, x, torch.float32, adapter_names=["default"] * 3)
    with pytest.raises(SanError, match="got 0 and 4"):
        outputs(model, x, torch.float32, adapter_names=[])
    with pytest.raises(ValueError, match="non-existing adapter"):
        outputs(model, x, torch.float32, adapter_names=["other"] * 4)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model.train()(x.input(), adapter_names=["default"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        outputs(model, x, torch.float32, adapter_names=["default"] * 4)
