"""Several processes and several devices: DDP and FSDP2 on the CPU over gloo, offloading, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.integrations import worker
from torch import Tensor

from san_peft import MergeError, SanConfig, SanError, SanLayer, TargetError

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-5, "atol": 1e-8}  # norms and the loss of transformers compute in float32
FLOAT32 = {"rtol": 1e-3, "atol": 1e-6}  # moments are summed in float32, in another order
CASES = [f"{spread}-{host}" for spread, host in worker.CASES]
BLOCK = "base_model.model.model.layers.0"
PROBE = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> Path:
    """The folder in which two processes have left what they found in all cases."""
    folder = tmp_path_factory.mktemp("spread")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker.__file__, str(folder)]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one process finds on the whole batches."""
    return {host: worker.train(worker.build(host)) for host in sorted({host for _, host in worker.CASES})}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, spread, alone):
    report = json.loads((spread / "report.json").read_text(encoding="utf-8"))
    assert case not in report, report[case]
    found, expected = load_file(spread / f"{case}.safetensors"), alone[case.rpartition("-")[2]]
    assert found.keys() == expected.keys()
    close = FLOAT32 if case.endswith("feature") else CLOSE
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")


def test_the_comparison_is_one_of_moving_numbers(alone):
    """Edges lead from block to block, every gradient is there, and training changes what is compared."""
    for name, expected in alone["own"].items():
        torch.testing.assert_close(alone["late"][name], expected, **CLOSE)
    for host, found in alone.items():
        edges = worker.build(host.replace("late", "own")).base_model.propagation_graph.edges
        blocks = {(e.anterior.split(".")[2], e.posterior.split(".")[2]) for e in edges if "head" not in e.posterior}
        assert blocks == {("0", "0"), ("0", "1"), ("1", "1")}
        assert all(v.abs().max() > 1e-5 for n, v in found.items() if n.startswith("grad.")), host
        assert (found["out.before"] - found["out.after"]).abs().max() > 1e-3
        assert found["losses"].unique().numel() == worker.STEPS + 1


def test_a_frozen_model_in_half_precision_under_fsdp(spread):
    """The adapter and its gradients stay in float32; they agree as far as bfloat16 in between allows."""
    found, expected = load_file(spread / "fsdp-half.safetensors"), worker.train(worker.build("half"))
    gradients = [name for name in expected if name.startswith("grad.")]
    assert gradients
    for name in gradients:
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() < 0.05 * expected[name].norm(), name


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("fsdp", "accelerate-fsdp"))])
def test_the_gathered_adapter_loads_on_one_device(case, spread, alone):
    host = case.rpartition("-")[2]
    again = PeftModel.from_pretrained(worker.base_model(host), spread / case).eval()
    with torch.no_grad():
        out = again(input_ids=PROBE).logits
    close = FLOAT32 if host == "feature" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(out, alone[host]["out.after"], **close)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("merge", r"model\.layers\.0\.self_attn\.q_proj cannot be merged: .* 2 devices"),
        ("inject", r"model\.layers\.0\.self_attn\.q_proj .* 2 devices.*get_peft_model"),
        ("delta", r"LOHA .*sharded.*FSDP2.*propagation='none'"),
        ("late", r"sharded model cannot be traced.*propagation='none'"),
        ("ddp-reentrant", "mark a variable ready only once"),
    ],
)
def test_what_is_refused(what, text, spread):
    refusals = json.loads((spread / "report.json").read_text(encoding="utf-8"))["refusals"]
    assert what in refusals, f"{what} went through"
    assert re.search(text, refusals[what]), refusals[what]


def test_a_process_of_a_group_keeps_no_scale():
    """FSDP2 writes gathered parameters past their version counters: nothing says whether a kept scale is still true."""
    model = worker.build("lora").eval()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch.no_grad():
            before = model(input_ids=PROBE).logits
            factor = model.get_submodule(f"{BLOCK}.self_attn.v_proj.base_layer.lora_B.default").weight
            factor.data.mul_(3)
            found = model(input_ids=PROBE).logits
            factor.add_(0)  # which its version counter sees
    finally:
        torch.distributed.destroy_process_group()
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=PROBE).logits)
    assert not torch.allclose(found, before)


# ------------------------------------------------------------------ offloading


def offloaded(model: PeftModel, how: str, folder: Path) -> PeftModel:
    if how == "cpu":
        return cpu_offload(model, torch.device("cpu"))
    if how == "disk":
        return disk_offload(model, str(folder), torch.device("cpu"))
    blocks = {BLOCK: "disk", BLOCK.replace(".0", ".1"): "disk"}
    rest = ("embed_tokens", "norm", "rotary_emb")
    devices = {**blocks, **{f"base_model.model.model.{n}": "cpu" for n in rest}, "base_model.model.lm_head": "cpu"}
    return dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["cpu", "disk", "device-map"])
@pytest.mark.parametrize("host", ["own", "lora", "dora"])
def test_an_offloaded_model_gives_what_the_model_gives(host, how, tmp_path):
    model = worker.build(host).eval()
    with torch.no_grad():
        expected = model(input_ids=PROBE).logits
        away = offloaded(copy.deepcopy(model), how, tmp_path)
        layer, plain = (m.base_model.model.model.layers[0].self_attn.v_proj for m in (away, model))
        assert all(p.is_meta for p in layer.parameters())
        for _ in range(2):
            torch.testing.assert_close(away(input_ids=PROBE).logits, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.get_scale(), plain.get_scale())
    assert all(p.is_meta for p in layer.parameters())
    with pytest.raises(MergeError, match="offloaded"):
        away.merge_adapter()


def test_a_host_whose_weights_change_while_offloaded_is_read_anew(tmp_path):
    model = worker.build("lora").eval()
    away = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    name = f"{BLOCK}.self_attn.v_proj.base_layer.lora_B.default"
    with torch.no_grad():
        away(input_ids=PROBE)
        away.get_submodule(name)._hf_hook.weights_map["weight"].mul_(3)
        model.get_submodule(name).weight.mul_(3)
        torch.testing.assert_close(away(input_ids=PROBE).logits, model(input_ids=PROBE).logits)


def test_a_block_that_is_loaded_as_a_whole_says_so(tmp_path):
    model = cpu_offload(worker.build("lora").eval(), torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(SanError, match=r"model\.layers\.0\.mlp\.down_proj, .*preload_module_classes"):
        model(input_ids=PROBE)


@pytest.mark.parametrize("host", ["own", "lora"])
def test_factors_of_two_devices_meet_on_one(host):
    model = worker.build(host)
    layer = next(m for m in model.modules() if isinstance(m, SanLayer) and m.san_incoming.get("default"))
    first = layer.san_incoming["default"][0]
    other = copy.copy(first)
    other.factor = lambda adapter_name: first.factor(adapter_name).to("meta")
    layer.san_incoming["default"] = [other, first]
    assert layer.get_input_scale().is_meta


# ------------------------------------------------------------------ tensor parallelism


@pytest.mark.parametrize("attribute", ["_hf_tp_plan", "_hf_device_mesh"])
@pytest.mark.parametrize("name", ["v_proj", "o_proj"])
def test_tensor_parallel_layers_are_refused(attribute, name):
    """A target, and a layer that would only be fed."""
    model = worker.base_model("own")
    setattr(model.model.layers[1].self_attn.get_submodule(name), attribute, "colwise")
    before = {n: type(m) for n, m in model.named_modules()}
    for options in ({"target_modules": ["v_proj"]}, {"inner": LoraConfig(target_modules=["v_proj"])}):
        with pytest.raises(TargetError, match=rf"model\.layers\.1\.self_attn\.{name} is split by tensor parallelism"):
            get_peft_model(model, SanConfig(**options))
        assert {n: type(m) for n, m in model.named_modules()} == before
