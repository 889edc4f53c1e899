"""Running statistics: frozen with the layers they belong to, trained and saved with norms that are trained."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torchvision
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tests.contract.nets import disturb
from torch import nn

from san_peft import SanConfig, detach_san, trace

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 1


def resnet() -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    with torch.no_grad():
        for buffer in (b for n, b in net.named_buffers() if n.endswith("running_var")):
            buffer.fill_(0.8)
    return net


GRAPH = trace(copy.deepcopy(resnet()).eval(), IMAGES[:1])


def config(**options) -> SanConfig:
    return SanConfig(propagation=GRAPH, modules_to_save=["fc"], **options)


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in net.named_buffers() if ".modules_to_save." not in n and "running" in n}


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)])
@pytest.mark.parametrize("train_norms", [False, True])
def test_a_trained_adapter_loads_with_equal_outputs(train_norms, inner, tmp_path):
    model = get_peft_model(resnet(), config(train_norms=train_norms, inner=inner)).train()
    before = statistics(model)
    train(model)
    after = statistics(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    own = {n: b for n, b in model.named_buffers() if ".modules_to_save." in n and "running_mean" in n}
    assert bool(own) == train_norms
    assert all(b.abs().max() > 0 for b in own.values())
    out = model.eval()(IMAGES)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(resnet(), tmp_path).eval()
    assert torch.equal(again(IMAGES), out)
    with model.disable_adapter():
        assert torch.equal(model(IMAGES), resnet().eval()(IMAGES))


def test_training_mode_gives_what_evaluation_gives():
    model = get_peft_model(resnet(), config())
    disturb(model)
    out = model(IMAGES)
    assert torch.equal(model.train()(IMAGES), out)
    assert torch.equal(model.eval()(IMAGES), out)


def test_in_a_model_without_a_peft_model():
    net = resnet()
    inject_adapter_in_model(config(), net)
    before = statistics(net)
    net.train()(IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in statistics(net).items())


def test_a_second_adapter_that_trains_its_norms_has_statistics_of_its_own():
    model = get_peft_model(resnet(), config())
    model.add_adapter("second", config(train_norms=True))
    model.set_adapter("second")
    before = statistics(model)
    train(model)
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    norm = model.base_model.model.bn1
    assert not torch.equal(norm.modules_to_save["second"].running_mean, norm.original_module.running_mean)


@pytest.mark.parametrize("way", ["unload", "merge_and_unload", "detach"])
def test_a_plain_model_takes_statistics_again(way):
    model = get_peft_model(resnet(), config(inner=LoraConfig(r=2)))
    net = detach_san(model).base_model.model if way == "detach" else getattr(model, way)()
    before = statistics(net)
    net(IMAGES)
    after = statistics(net)
    assert len(after) == len(before)
    assert not any(torch.equal(value, before[name]) for name, value in after.items())


def test_spectral_norms_are_frozen_too():
    normed = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    net = nn.Sequential(OrderedDict(stem=nn.Linear(6, 8), normed=normed, head=nn.Linear(8, 3)))
    x = torch.randn(4, 6)
    model = get_peft_model(net, SanConfig(target_modules=["stem"], propagation="none"))
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()(x)
    assert before
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
