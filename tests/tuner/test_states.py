"""Passes of models in every state that PEFT allows, of their parts, of their copies, and what is left of them."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tests.contract.nets import KINDS, disturb
from tests.golden.models import MODELS
from tests.tuner.hosted import IDS, LLAMA, layers_of
from tests.tuner.passes import (
    CASES,
    CLOSE,
    DORA,
    LORA,
    adapted,
    alone,
    check_law,
    gradients,
    larger,
    output,
    step,
    total,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from san_peft import SanConfig, detach_san

SOME = ["own", "lora", "dora", "all"]
BLOCK = "model.layers.1.mlp"


def with_second(case: str, other: str | None = None) -> PeftModel:
    model = adapted(**CASES[case])
    options = CASES[other or case]
    model.add_adapter("second", SanConfig(target_modules=["v_proj", "up_proj", "down_proj"], **options))
    model.double()
    disturb(model, "second", seed=5)
    return model


def equal_alone(model: PeftModel, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out = output(model, **kwargs)
        with alone(model):
            torch.testing.assert_close(out, output(model, **kwargs), **CLOSE)
    return out


@pytest.mark.parametrize("case", SOME)
def test_adapters_that_are_switched_and_active_together(case):
    model = with_second(case)
    outs = []
    for names in ("default", "second", ["default", "second"], "default"):
        model.base_model.set_adapter(names)
        outs.append(equal_alone(model))
        check_law(model)
    assert torch.equal(outs[0], outs[3])
    assert not any(torch.allclose(outs[i], outs[j], rtol=1e-3) for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize("case", ["own", "lora", "all"])  # PEFT has no such batches for DoRA
def test_a_batch_that_names_its_adapters(case):
    model = with_second(case)
    model.add_adapter("third", SanConfig(**CASES[case]))
    model.double().eval()
    disturb(model, "third", seed=6)
    ids = torch.cat([IDS, IDS.flip(1)])
    names = ["third", "default", "__base__", "second"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        with alone(model):
            torch.testing.assert_close(mixed, model(input_ids=ids, adapter_names=names).logits, **CLOSE)
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    one = model(input_ids=ids[row : row + 1]).logits
            else:
                model.set_adapter(name)
                one = model(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], one, **CLOSE)


@pytest.mark.parametrize("case", [*SOME, "projection"])
@pytest.mark.parametrize("name", ["v_proj", "up_proj", "down_proj", "q_proj", "o_proj"])
def test_one_layer_merged_or_disabled_by_itself(name, case):
    model = adapted(**CASES[case])
    layer = next(
        m for n, m in layers_of(model).items() if n.endswith(f"0.self_attn.{name}") or n.endswith(f"0.mlp.{name}")
    )
    before = equal_alone(model)
    layer.merge()
    torch.testing.assert_close(equal_alone(model), before, **CLOSE)
    layer.unmerge()
    torch.testing.assert_close(equal_alone(model), before, rtol=0, atol=0)
    layer.enable_adapters(False)
    assert not torch.allclose(equal_alone(model), before, rtol=1e-3)
    layer.enable_adapters(True)
    torch.testing.assert_close(equal_alone(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("case", SOME)
def test_modes(case):
    model = adapted(**CASES[case])
    outs = {"both": equal_alone(model)}
    for mode in ("neuron", "synapse", "off"):
        with model.base_model.set_mode(mode):
            outs[mode] = equal_alone(model)
            if mode != "off":
                step(model)
    assert torch.equal(equal_alone(model), outs["both"])
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(output(model), outs["off"], **CLOSE)
    kinds = list(outs)
    assert not any(torch.allclose(outs[a], outs[b], rtol=1e-3) for a in kinds for b in kinds if a < b)


@pytest.mark.parametrize("case", ["lora", "projection"])
def test_one_host_of_another_strength(case):
    model = adapted(**CASES[case])
    before = equal_alone(model)
    layer = layers_of(model)["model.layers.1.mlp.up_proj"]
    layer.host.set_scale("default", 2.5)
    assert not torch.allclose(equal_alone(model), before, rtol=1e-3)
    check_law(model)


# ---------------------------------------------------------------------- parts, copies and threads


@pytest.mark.parametrize("case", SOME)
def test_adapters_without_a_peft_model(case):
    model = adapted(**CASES[case])
    torch.manual_seed(0)
    net = inject_adapter_in_model(SanConfig(**CASES[case]), larger(MODELS["llama-grouped"]().double())).double().eval()
    prefix = "base_model.model."
    net.load_state_dict({n.removeprefix(prefix): p for n, p in model.state_dict().items()})
    out, grads = step(model)
    found, found_grads = step(net)
    torch.testing.assert_close(found, out, **CLOSE)
    torch.testing.assert_close({prefix + n: g for n, g in found_grads.items()}, grads, **CLOSE)


@pytest.mark.parametrize("case", SOME)
def test_a_part_called_by_itself(case):
    """A norm and what reads it, as one block, and a model called inside of checkpointing."""
    model = adapted(**CASES[case])
    seen: dict[str, Tensor] = {}
    block = model.base_model.model.get_submodule("model.layers.1")
    handles = [
        block.register_forward_pre_hook(lambda m, args, kwargs: seen.update(x=args[0], rest=kwargs), with_kwargs=True),
        block.register_forward_hook(lambda m, args, out: seen.update(y=out)),
    ]
    out, expected = step(model)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(
        block(seen["x"].detach(), **{**seen["rest"], "past_key_values": None}), seen["y"], **CLOSE
    )
    for reentrant in (True, False):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        found = checkpoint(lambda x: model(inputs_embeds=x).logits, embedded, use_reentrant=reentrant)
        torch.testing.assert_close(found, out, **CLOSE)
        total(found).backward()
        torch.testing.assert_close(gradients(model), expected, **CLOSE)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("way", [copy.deepcopy, saved], ids=["deepcopy", "pickle"])
def test_copies_are_independent(way, case):
    model = adapted(**CASES[case])
    step(model)
    before = equal_alone(model)
    twin = way(model)
    assert torch.equal(equal_alone(twin), before)
    norm = model.base_model.model.model.layers[0].input_layernorm
    assert type(twin.base_model.model.model.layers[0].input_layernorm) is type(norm)
    disturb(twin, seed=9)
    assert not torch.allclose(equal_alone(twin), before, rtol=1e-3)
    assert torch.equal(equal_alone(model), before)
    again = equal_alone(twin)
    disturb(model, seed=10)
    assert not torch.allclose(equal_alone(model), before, rtol=1e-3)
    assert torch.equal(equal_alone(twin), again)
    check_law(twin)
    with twin.disable_adapter():
        equal_alone(twin)
    assert torch.equal(equal_alone(twin), again)


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
def test_two_threads(case):
    model = adapted(**CASES[case])
    ids = [IDS, IDS.flip(0, 1)]
    with torch.no_grad():
        expected = [model(input_ids=one).logits for one in ids]
    found: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def run(number: int) -> None:
        start.wait()
        for _ in range(8):
            with torch.no_grad():
                found[number].append(model(input_ids=ids[number]).logits)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(one) for one in found] == [8, 8]
    assert all(torch.equal(out, expected[number]) for number in range(2) for out in found[number])
    assert model.base_model.scales._running == {}


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
def test_compiled_code_follows_frozen_weights(case):
    kind = KINDS["dense"]
    torch.manual_seed(0)
    options = {"propagation": kind.graph(), "target_modules": list(kind.targets)}
    model = get_peft_model(kind.net(), SanConfig(**options, **CASES[case])).eval()
    disturb(model)
    torch.compiler.reset()
    compiled, x = torch.compile(model, backend="aot_eager"), kind.input()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        before = model(x)
        for layer in layers_of(model).values():
            layer.get_base_layer().weight.mul_(torch.linspace(0.5, 2, layer.in_features)[None])
        disturb(model, seed=3)
        assert not torch.allclose(model(x), before, rtol=1e-2)
        torch.testing.assert_close(compiled(x), model(x))


# ---------------------------------------------------------------------- nothing is left


def state_of(module: Any) -> dict[str, Any]:
    """Names and types of all attributes of a module; what is in a container counts by its type."""
    found = {n: type(v) for n, v in vars(module).items()}
    found["variants"] = {n: type(v) for n, v in getattr(module, "lora_variant", {}).items()}
    found["hooks"] = [len(getattr(module, n)) for n in vars(module) if n.endswith("_hooks")]
    return found | {"class": type(module)}


@pytest.mark.parametrize("kind", ["dense-lora", "conv2d-lora"])
@pytest.mark.parametrize(
    "host", [LORA, DORA, LoraConfig(r=2, lora_dropout=0.1, lora_bias=True)], ids=["lora", "dora", "bias"]
)
def test_a_detached_model_is_as_peft_makes_it(host, kind):
    case = KINDS[kind]
    targets = [t for t in case.targets if not (host.lora_bias and t == "fc2")]
    model = get_peft_model(case.net(), SanConfig(inner=host, target_modules=targets, propagation=case.graph()))
    model(case.input()).sum().backward()
    with torch.no_grad():
        model.eval()(case.input())
    detach_san(model)
    theirs = copy.copy(host)
    theirs.target_modules = targets
    plain = get_peft_model(case.net(), theirs)
    plain(case.input()).sum().backward()
    plain.eval()
    states = [{n: state_of(m) for n, m in one.base_model.model.named_modules()} for one in (model, plain)]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        assert state == states[1][name], name
    torch.manual_seed(1)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(case.input()), model(case.input()))


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_an_unloaded_model_is_plain(way, case):
    model = adapted(**CASES[case])
    step(model)
    out = equal_alone(model)
    root = getattr(model, way)()
    plain = MODELS["llama-grouped"]().double().eval()
    states = [{n: state_of(m) for n, m in one.named_modules()} for one in (root, plain)]
    for state in states:
        state[""].pop("peft_type", None)
        state[""].pop("_hf_peft_config_loaded", None)
    assert states[0] == states[1]
    if way == "merge_and_unload" and case not in ("shift", "all"):
        torch.testing.assert_close(output(root), out, **CLOSE)
    again = get_peft_model(root, SanConfig(target_modules=LLAMA)).double()
    check_law(again)


@pytest.mark.parametrize("case", ["own", "lora"])
def test_a_cache_means_the_same_wherever_its_reader_scales(case):
    """What a cache holds does not depend on the place: merged in between, or read by a part of the model."""
    model = adapted(**CASES[case])
    caches = [DynamicCache() for _ in range(3)]
    with torch.no_grad():
        for cache in caches:
            model(input_ids=IDS, past_key_values=cache)
        expected = model(input_ids=IDS[:, :1], past_key_values=caches[0]).logits
        inner = model.base_model.model
        hidden = inner.model(input_ids=IDS[:, :1], past_key_values=caches[1])[0]
        torch.testing.assert_close(inner.lm_head(hidden), expected, **CLOSE)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS[:, :1], past_key_values=caches[2]).logits, expected, **CLOSE)
