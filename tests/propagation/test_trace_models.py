"""Tracing whole models: exact edges are exact, nothing of the model changes, and every device gives one graph."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from peft import get_peft_model
from tests.golden.models import MODELS
from torch import Tensor, nn

from san_peft import SanConfig, TraceError, merge_and_verify, trace

# ------------------------------------------------------------------ exact means exact


@pytest.mark.parametrize(
    "name", ["timm-vit", "vit", "bert", "gpt2", "gpt-neox", "llama-grouped", "gemma", "phi3", "t5", "timm-swin"]
)
def test_minus_one_leaves_the_function_of_exact_edges_unchanged(name):
    """A law: scaling rows of the anterior by g and columns of the posterior by 1/g changes nothing on an exact edge.

    It holds where nothing else reads those rows, as in these models (in ConvNeXt a shortcut does).
    """
    from san_peft.functional import fold, propagate

    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    graph = trace(model)
    exact = graph.select("exact").edges
    assert exact
    before = outputs(model)
    for edge in exact:
        scale = torch.rand(edge.channels.source_size, dtype=torch.float64) + 0.5
        reached = torch.zeros(edge.channels.source_size, dtype=torch.bool)
        reached[edge.channels.index] = True
        scale = torch.where(reached, scale, 1.0)  # queries and keys of a fused layer act elsewhere
        anterior, posterior = (model.get_submodule(fqn) for fqn in (edge.anterior, edge.posterior))
        set_weight(anterior, *fold(anterior.weight, anterior.bias, scale, **layout(anterior)))
        inverse = propagate(scale, edge.channels.index, exponent=-1.0)
        set_weight(posterior, *fold(posterior.weight, posterior.bias, None, inverse, **layout(posterior)))
    torch.testing.assert_close(outputs(model), before, rtol=1e-9, atol=1e-9)


def layout(layer: nn.Module) -> dict[str, object]:
    return {"groups": getattr(layer, "groups", 1), "transposed": type(layer).__name__ == "Conv1D"}


def set_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias


@torch.no_grad()
def outputs(model: nn.Module) -> list[Tensor]:
    from san_peft.propagation.inputs import derive_inputs

    inputs = derive_inputs(model)
    noise = torch.Generator().manual_seed(1)

    def filled(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=noise, dtype=x.dtype) if x.is_floating_point() else x

    if isinstance(inputs, dict):
        out = model(**{k: filled(v) if isinstance(v, Tensor) else v for k, v in inputs.items()})
        return [v for v in out.values() if isinstance(v, Tensor)]
    return [model(*map(filled, inputs))]


# ------------------------------------------------------------------ leaves no mark


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "grads": [p.grad for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "random": torch.get_rng_state(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "threads": torch.get_num_threads(),
    }


def assert_unchanged(before, after):
    for key in ("training", "hooks", "grads", "buffers", "fastpath", "threads"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())


class Stateful(nn.Module):
    """Counts its calls in buffers, draws random numbers, and may raise at the end."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.fails = fails
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.norm(self.a(x)) + torch.randn(4)
        self.last = y.mean(0)
        if self.fails:
            raise ValueError("on purpose")
        return self.b(y)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails):
    model = Stateful(fails)
    model.norm.eval()  # a mixture of modes has to come back
    before = snapshot(model)
    if fails:
        with pytest.raises(TraceError, match="on purpose"):
            trace(model, torch.randn(3, 4))
    else:
        before["random"] = torch.get_rng_state()
        x = torch.ones(3, 4)
        assert trace(model, x).edges
    after = snapshot(model)
    if fails:  # the input above was drawn in between
        before["random"] = after["random"]
    assert_unchanged(before, after)


def test_a_whole_model_is_as_it_was():
    model = MODELS["timm-vit"]().train()
    before = snapshot(model)
    trace(model)
    assert_unchanged(before, snapshot(model))


def test_tracing_twice_gives_the_same():
    model = MODELS["swin"]()
    assert trace(model) == trace(model)


def test_half_precision_and_training_mode_give_the_same():
    model = MODELS["vit"]()
    assert trace(model.train()) == trace(model.eval()) == trace(model.bfloat16())


@pytest.mark.gpu
def test_on_a_gpu():
    model = MODELS["vit"]()
    assert trace(model) == trace(model.cuda())


# ------------------------------------------------------------------ inputs and devices


def test_inputs_as_tensor_tuple_or_dict():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    x = torch.randn(1, 4)
    assert trace(net, x) == trace(net, (x,)) == trace(net, {"input": x})


def test_a_timm_model_inside_transformers_has_the_same_graph():
    inner = MODELS["timm-vit"]()
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224")
    wrapper = transformers.AutoModelForImageClassification.from_config(config)
    wrapper.timm_model = inner
    names = [(e.anterior.removeprefix("timm_model."), e.posterior.removeprefix("timm_model.")) for e in trace(wrapper)]
    assert names == [(e.anterior, e.posterior) for e in trace(inner)]


def test_inputs_that_cannot_be_derived():
    with pytest.raises(TraceError, match=r"cannot be derived.*trace\(model, example_inputs\).*propagation='none'"):
        trace(nn.Sequential(nn.Linear(4, 8)))


def test_inputs_that_do_not_fit():
    with pytest.raises(TraceError, match=r"Sequential.*RuntimeError.*trace\(model, example_inputs\)"):
        trace(nn.Sequential(nn.Linear(4, 8)), torch.randn(1, 5))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_meta_device_gives_the_same_graph(name):
    with torch.device("meta"):
        empty = MODELS[name]()
    assert trace(empty) == trace(MODELS[name]())
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("kind", ["LlavaNext", "LlavaOnevision"])
def test_tiles_of_an_image_change_nothing_in_the_graph_of_a_llava(kind):
    """Both cut an image into tiles, and write a new line after each row of them."""
    whole = MODELS["llava"]()
    parts = {"vision_config": whole.config.vision_config, "text_config": whole.config.text_config}
    config = getattr(transformers, f"{kind}Config")(
        **parts, image_token_id=49, image_grid_pinpoints=[[32, 32], [16, 32]], vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu",
    )  # fmt: skip
    build = getattr(transformers, f"{kind}ForConditionalGeneration")
    assert trace(build(config)) == trace(whole)
    with torch.device("meta"):
        empty = build(config)
    assert trace(empty) == trace(whole)


def test_inside_a_context_of_the_meta_device():
    """As `with torch.device("meta")` around both building and tracing has it."""
    expected = trace(MODELS["vit"]())
    with torch.device("meta"):
        assert trace(MODELS["vit"]()) == expected


def test_mixtral_on_meta_says_that_routing_needs_numbers():
    with torch.device("meta"):
        empty = MODELS["mixtral"]()
    barriers = trace(empty).barriers
    assert {barrier.operation for barrier in barriers if ".mlp." not in barrier.layer} == {"index"}


@pytest.mark.slow
def test_llama_7b_on_meta_is_small():
    """In a process of its own, so that memory is this test's; time is told, not asserted."""
    program = """
import resource, time, torch, transformers
from san_peft import trace
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
graph = trace(model)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
print(f"{len(graph.edges)} edges, {time.perf_counter() - start:.1f} s, {grown:.2f} GiB")
assert len(graph.edges) == 32 * 7 - 2 and not graph.barriers
assert grown < 1, grown
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    print(run.stdout)


def test_attention_implementation_does_not_matter():
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    graphs = [
        trace(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name))
        for name in ("eager", "sdpa")
    ]
    assert graphs[0] == graphs[1]


def test_a_head_behind_a_soft_cap():
    """Gemma 2's logits are capped: its tied head is a head, so it gets no edges and the model can be merged."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=40, sliding_window=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config)
    graph = trace(model)
    assert graph.heads == ("lm_head",)
    adapted = get_peft_model(model, SanConfig(init_weights=False)).eval()
    assert "lm_head" not in {edge.posterior for edge in adapted.base_model.propagation_graph.edges}
    report = merge_and_verify(adapted)
    assert report.effect > 100 * report.max_abs_difference
