"""Scales under activation checkpointing, several passes at a time, and in threads."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tests.contract.nets import disturb
from tests.tuner.hosted import IDS, host_parameters
from tests.tuner.passes import (
    CASES,
    CLOSE,
    LORA,
    adapted,
    alone,
    batch,
    counted,
    gradients,
    output,
    step,
    total,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from san_peft import SanConfig

WAYS = {"non-reentrant": False, "reentrant": True}
HOSTED = [case for case in CASES if case not in ("own", "shift")]


def checkpointed(model: PeftModel, way: str = "non-reentrant") -> PeftModel:
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": WAYS[way]})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("name", ["llama-grouped", "vit", "convnext"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_recomputed_blocks(way, case, name):
    model = adapted(name, **CASES[case]).train()
    out, expected = step(model, name)
    found, grads = step(checkpointed(model, way) if name != "convnext" else through(model, way), name)
    torch.testing.assert_close(found, out, **CLOSE)
    torch.testing.assert_close(grads, expected, **CLOSE)


def through(model: PeftModel, way: str) -> PeftModel:
    """Checkpoints every layer of a ConvNeXt's stages, whose input needs a gradient for the reentrant way."""
    for stage in model.base_model.model.convnext.encoder.stages:
        for layer in stage.layers:
            inside = layer.forward
            layer.forward = lambda x, inside=inside: checkpoint(
                inside, x if x.requires_grad else x.requires_grad_(), use_reentrant=WAYS[way]
            )
    return model


@pytest.mark.parametrize("case", HOSTED)
def test_scales_are_not_computed_again_in_backward(case, monkeypatch):
    model = checkpointed(adapted(**CASES[case]).train())
    calls = counted(monkeypatch)
    for _ in range(2):
        loss = total(output(model))
        computed = len(calls)
        loss.backward()
        assert len(calls) == computed
        assert computed > 0 or case == "all"
        calls.clear()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [None, *WAYS])
def test_two_passes_before_one_backward(way, case):
    model = adapted(**CASES[case]).train()
    if way:
        checkpointed(model, way)
    other = {"input_ids": IDS.flip(1)}

    def run() -> dict:
        first, second = model(**batch("llama-grouped")).logits, model(**other).logits
        (total(first) + 2 * total(second)).backward()
        return gradients(model)

    found = run()
    with alone(model):
        expected = run()
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("case", ["own", "lora", "dora", "all"])
@pytest.mark.parametrize("way", [None, *WAYS])
def test_a_reference_between_forward_and_backward(way, case):
    """As preference optimization runs it: the frozen model, or another adapter, without gradients."""
    model = adapted(**CASES[case]).train()
    _, expected = step(model)
    if way:
        checkpointed(model, way)
    loss = total(output(model))
    with torch.no_grad(), model.disable_adapter():
        reference = output(model)
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, **CLOSE)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(reference, output(model), **CLOSE)
    with torch.no_grad(), model.disable_adapter():
        reference = output(model)
    loss = total(output(model))
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, **CLOSE)


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
@pytest.mark.parametrize("way", [None, *WAYS])
def test_an_evaluation_between_forward_and_backward(way, case):
    model = adapted(**CASES[case]).train()
    _, expected = step(model)
    if way:
        checkpointed(model, way)
    loss = total(output(model))
    with torch.no_grad():
        model.eval()(input_ids=IDS.flip(1))
        model.train()
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, **CLOSE)


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
def test_two_adapters_forward_then_backward_of_both(case):
    model = adapted(**CASES[case]).train()
    model.add_adapter("second", SanConfig(**CASES[case]))
    model.double()
    disturb(model, "second", seed=5)
    expected, losses = {}, []
    for name in ("default", "second"):
        model.set_adapter(name)
        expected |= {n: g for n, g in step(model)[1].items() if f".{name}." in n}
    for name in ("default", "second"):
        model.set_adapter(name)
        for parameter in adapter_parameters(model):
            parameter.requires_grad_(True)
        losses.append(total(output(model)))
    sum(losses).backward()
    found = gradients(model)
    torch.testing.assert_close({n: found[n] for n in expected}, expected, **CLOSE)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "san_" in n or "lora_" in n]


@pytest.mark.parametrize("way", [None, *WAYS])
def test_accumulated_gradients(way):
    model = adapted(inner=LORA).train()
    _, once = step(model)
    if way:
        checkpointed(model, way)
    for _ in range(3):
        total(output(model)).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 3 * once[name], **CLOSE)
    loss = total(output(model))
    if way != "reentrant":
        loss.backward(retain_graph=True)
        loss.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, 2 * once[name], **CLOSE)


def test_steps_under_checkpointing_follow_those_without():
    results = []
    for way in (None, *WAYS):
        model = adapted(inner=LORA).train()
        if way:
            checkpointed(model, way)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            total(output(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({n: p.detach() for n, p in host_parameters(model).items()})
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    torch.testing.assert_close(results[2], results[0], **CLOSE)


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
@pytest.mark.parametrize("way", WAYS)
def test_a_block_by_itself_after_a_pass_of_other_values(way, case):
    model = adapted(**CASES[case]).train()
    step(checkpointed(model, way))
    disturb(model, seed=8)
    block = model.base_model.model.model.layers[1].mlp
    x = torch.randn(2, 6, 16, dtype=torch.float64)

    def run(checkpointing: bool) -> dict:
        given = x.clone().requires_grad_()
        total(checkpoint(block, given, use_reentrant=WAYS[way]) if checkpointing else block(given)).backward()
        return gradients(model)

    expected = run(False)
    assert any(g is not None for g in expected.values())
    torch.testing.assert_close(run(True), expected, **CLOSE)
    loss = total(output(model))
    (loss + total(checkpoint(block, x.clone().requires_grad_(), use_reentrant=WAYS[way]))).backward()
    both = gradients(model)
    for name, gradient in step(model)[1].items():
        other = expected[name]
        torch.testing.assert_close(both[name], gradient if other is None else gradient + other, **CLOSE)
