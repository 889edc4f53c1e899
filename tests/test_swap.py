"""Swapping an adapter in place: all of it or nothing, from where its configuration comes from."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.contract.nets import KINDS, disturb
from tests.golden.models import MODELS
from tests.tuner.test_combining import NORMED

from san_peft import AdapterError, SanConfig, hotswap
from san_peft.tuner import loading


def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def adapted(seed: int = 0, **options) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(MODELS["vit"]().eval(), SanConfig(**options))
    disturb(model, seed=seed)
    return model


def check_refused(model: PeftModel, text: str, *arguments, error=AdapterError, **options) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        hotswap(model, *arguments, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_vectors_are_copied_in_place(tmp_path):
    first, second = adapted(), adapted(seed=1)
    second.save_pretrained(tmp_path)
    parameters = dict(first.named_parameters())
    hotswap(first, str(tmp_path))
    assert torch.equal(first(image()).logits, second(image()).logits)
    assert all(parameters[name] is parameter for name, parameter in first.named_parameters())


def test_nothing_is_compiled_again(tmp_path):
    first, second = adapted(), adapted(seed=1)
    second.save_pretrained(tmp_path)
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(first, backend=count)
    with torch.no_grad():
        compiled(image())
        compiled_once = len(graphs)
        hotswap(compiled, str(tmp_path))
        torch.testing.assert_close(compiled(image()).logits, second(image()).logits)
    assert len(graphs) == compiled_once


def test_an_adapter_in_a_folder_of_its_name(tmp_path):
    second = adapted(seed=1)
    second.add_adapter("other", SanConfig(shift=True))
    second.add_adapter("third", SanConfig())
    disturb(second, "third", seed=3)
    second.save_pretrained(tmp_path)
    first = adapted()
    hotswap(first, tmp_path, subfolder="third", revision="main")
    second.set_adapter("third")
    assert torch.equal(first(image()).logits, second(image()).logits)
    check_refused(first, "other.*default.*shift", tmp_path, subfolder="other")
    check_refused(first, "Can't find 'adapter_config.json'", tmp_path, subfolder="nowhere", error=ValueError)
    hotswap(second, tmp_path, "third")
    second.set_adapter("default")
    expected = second(image()).logits
    second.set_adapter("third")
    assert torch.equal(second(image()).logits, expected)


def test_configuration_and_tensors_come_from_the_same_place(tmp_path, monkeypatch):
    first = adapted()
    first.save_pretrained(tmp_path)
    config, asked = PeftConfig.from_pretrained(tmp_path), []
    file = str(tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr(PeftConfig, "from_pretrained", lambda path, **where: asked.append((path, where)) or config)
    monkeypatch.setattr(loading, "hf_hub_download", lambda path, name, **where: asked.append((path, where)) or file)
    hotswap(first, "who/what", subfolder="cats", revision="v2", token="secret", cache_dir="here")
    where = {"subfolder": "cats", "revision": "v2", "token": "secret", "cache_dir": "here"}
    assert asked == [("who/what", where)] * 2


def test_saved_modules_and_their_statistics_are_swapped(tmp_path):
    def make(seed: int) -> PeftModel:
        options = {"propagation": NORMED.graph(), "modules_to_save": ["head"], "train_norms": True}
        model = get_peft_model(NORMED.net(), SanConfig(target_modules=list(NORMED.targets), **options)).eval()
        disturb(model, seed=seed)
        for _ in range(seed):
            model.train()(NORMED.input() + seed)
            with torch.no_grad():
                model.base_model.model.head.modules_to_save["default"].weight.add_(0.5)
        return model.eval()

    x = NORMED.input()
    first, second = make(0), make(2)
    assert not torch.allclose(first(x), second(x))
    second.save_pretrained(tmp_path)
    hotswap(first, tmp_path)
    assert torch.equal(first(x), second(x))
    norms = [model.base_model.model.norm.modules_to_save["default"] for model in (first, second)]
    assert norms[0].num_batches_tracked == norms[1].num_batches_tracked == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"propagation": "exact"}, "differs from 'default' in edges"),
        ({"shift": True}, "in shift"),
        ({"exponent": 2.0}, "in exponent"),
        ({"train_norms": True}, r"has 10 tensors that do not belong to it, such as .*layernorm"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, text):
    adapted(**options).save_pretrained(tmp_path)
    check_refused(adapted(), text, str(tmp_path))


def test_hosts_that_differ_are_named_by_their_fields(tmp_path):
    lora, dora = (get_peft_model(KINDS[f"dense-{k}"].net(), KINDS[f"dense-{k}"].config()) for k in ("lora", "dora"))
    dora.save_pretrained(tmp_path)
    check_refused(lora, r"in inner \(use_dora: True there, False here\)", tmp_path)


def test_other_mistakes(tmp_path):
    first = adapted()
    first.save_pretrained(tmp_path)
    check_refused(first, "nobody.*default", tmp_path, "nobody")
    first.merge_adapter()
    check_refused(first, "merged", str(tmp_path))
    first.unmerge_adapter()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(tensors)[-1]
    save_file({**tensors, name: tensors[name] * float("nan")}, tmp_path / "adapter_model.safetensors")
    check_refused(first, rf"\d+ of \d+ entries of {name} are not finite", tmp_path)
    save_file({**tensors, name: tensors[name][:-1].clone()}, tmp_path / "adapter_model.safetensors")
    check_refused(first, rf"{name} has shape", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "own_scale": True}))
    check_refused(first, "in own_scale", tmp_path)
