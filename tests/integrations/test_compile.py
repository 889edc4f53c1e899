"""Compiling without a graph break, swapping under compiled code, and exporting what was merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import disturb
from tests.golden.models import GROUPED, IMAGE, TEXT
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from san_peft import SanConfig, hotswap, merge_and_verify

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ONE = {"num_hidden_layers": 1}  # compiling takes its time
NETS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**TEXT, **GROUPED, **ONE})),
    "vit": lambda: ViTForImageClassification(ViTConfig(**{**IMAGE, **ONE})),
}
INPUTS = {
    "llama": {"input_ids": IDS, "labels": IDS, "use_cache": False},
    "vit": {"pixel_values": PIXELS, "labels": torch.tensor([0, 1])},
}
TARGETS = {"llama": ["v_proj", "up_proj", "down_proj"], "vit": ["v_proj", "fc1", "fc2"]}
HOSTS = {"own": None, "lora": LoraConfig(r=2), "dora": LoraConfig(r=2, use_dora=True)}
CASES = [(net, host) for net in INPUTS for host in HOSTS]
QUICK = [("llama", "lora"), ("llama", "dora"), ("vit", "own")]


def some(quick: list) -> list:
    """All cases, those that are not quick marked as slow."""
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(net: str, host: str, seed: int = 0) -> PeftModel:
    torch.manual_seed(0)
    inner = copy.deepcopy(HOSTS[host])
    model = get_peft_model(NETS[net]().eval(), SanConfig(target_modules=TARGETS[net], inner=inner)).eval()
    disturb(model, seed=seed)
    return model


def step(model: nn.Module, net: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a training step."""
    model.zero_grad()
    loss = model(**INPUTS[net]).loss
    loss.backward()
    found = {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_steps_agree(model: PeftModel, net: str, backend: str) -> None:
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        loss, gradients = step(model, net)
        other_loss, other = step(compiled, net)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-5)
        assert other.keys() == gradients.keys()
        assert any("san_" in name or "lora_" in name for name in other)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.sub_(0.05 * parameter.grad)
        torch._dynamo.config.error_on_recompile = True  # the second step runs what the first has compiled
    torch._dynamo.config.error_on_recompile = False


@pytest.fixture
def _recompiling() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield


@pytest.mark.usefixtures("_recompiling")
@pytest.mark.parametrize(("net", "host"), some(QUICK))
def test_a_training_step_compiles_without_a_break(net, host):
    assert_steps_agree(adapted(net, host), net, "aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("_recompiling")
@pytest.mark.parametrize(("net", "host"), CASES)
def test_a_training_step_through_inductor(net, host):
    assert_steps_agree(adapted(net, host), net, "inductor")


@pytest.mark.parametrize("host", ["lora", *(pytest.param(h, marks=pytest.mark.slow) for h in ("own", "dora"))])
def test_swapping_an_adapter_keeps_compiled_code(host, tmp_path):
    model, other = adapted("llama", host), adapted("llama", host, seed=1)
    other.save_pretrained(tmp_path)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = compiled(input_ids=IDS, use_cache=False).logits
        model(input_ids=IDS, use_cache=False)  # an eager call between them changes nothing that is compiled
        with torch._dynamo.config.patch(error_on_recompile=True):
            hotswap(model, str(tmp_path))
            swapped = compiled(input_ids=IDS, use_cache=False).logits
        expected = other(input_ids=IDS, use_cache=False).logits
    assert not torch.allclose(swapped, first, atol=1e-3)
    torch.testing.assert_close(swapped, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- exporting


class Logits(nn.Module):
    """A model that takes tensors and gives one."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        options = {"use_cache": False} if self.name == "input_ids" else {}
        return self.model(**{self.name: x}, **options).logits


def merged(net: str, host: str) -> tuple[Logits, Tensor, Tensor]:
    """A merged model, an input, and what it gave before merging."""
    model = adapted(net, host)
    name, x = ("input_ids", IDS) if net.startswith("llama") else ("pixel_values", PIXELS)
    with torch.no_grad():
        before = model(**{name: x}).logits
    return Logits(merge_and_verify(model).model, name).eval(), x, before


@pytest.mark.parametrize(("net", "host"), some(QUICK))
def test_what_was_merged_exports(net, host):
    model, x, before = merged(net, host)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("net", "host"), some([("llama", "lora")]))
def test_what_was_merged_runs_in_onnx(net, host, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, before = merged(net, host)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), before, rtol=1e-3, atol=1e-4)
