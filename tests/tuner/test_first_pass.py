"""Wiring in the first forward pass, where example inputs cannot be derived when the adapter is put on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tests.contract.nets import Dense, disturb
from torch import Tensor, nn
from transformers import DynamicCache

from san_peft import MergeError, PropagationGraph, SanConfig, SanError, SanLayer, TraceError, merge_and_verify, trace

TARGETS = ["stem", "fc1"]


def dense(seed: int = 0) -> Dense:
    torch.manual_seed(seed)
    return Dense()


def batch() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def late(**options) -> PeftModel:
    return get_peft_model(dense(), SanConfig(target_modules=TARGETS, **options))


def edges_of(model: PeftModel) -> list[str]:
    return sorted(map(str, model.base_model.propagation_graph.edges))


def expected(**options) -> PeftModel:
    return get_peft_model(dense(), SanConfig(target_modules=TARGETS, propagation=trace(dense(), batch()), **options))


def test_a_plain_module_needs_no_example_inputs():
    model = late()
    assert edges_of(model) == []
    assert model.peft_config["default"].edges is None
    out = model(batch())
    assert torch.equal(out, dense()(batch()))  # scales are one until then
    assert edges_of(model) == edges_of(expected())
    assert len(edges_of(model)) == 2


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2, init_lora_weights=False)], ids=["own", "lora"])
def test_training_is_that_of_a_model_wired_at_once(inner):
    losses = {}
    for name, make in (("late", late), ("at once", expected)):
        torch.manual_seed(3)
        model = make(inner=copy.deepcopy(inner), init_weights=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses[name] = []
        for _ in range(3):
            loss = model(batch()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    # the first pass of one that is not at the identity is wired as well, before it runs
    assert losses["late"] == losses["at once"]
    assert losses["late"][2] < losses["late"][0]


class Noisy(nn.Module):
    """Dropout, a buffer and a cache that the forward pass writes into, and a batch that it writes into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, *, cache: list[Tensor], bias: Tensor) -> Tensor:
        cache.append(x)
        x.mul_(2.0)
        self.count += 1
        return self.b(self.drop(self.norm(self.a(x)))) + bias + len(cache)


def test_nothing_but_the_wiring_is_to_be_seen():
    """Random state, modes, buffers, caches and the batch itself are as if the model had run once."""
    outs, states, caches, counts = [], [], [], []
    for net in (Noisy(), get_peft_model(Noisy(), SanConfig(target_modules=["a"]))):
        torch.manual_seed(7)
        x, cache, bias = batch(), [], torch.zeros(3, requires_grad=True)
        out = net(x * 1.0, cache=cache, bias=bias * 1.0)
        out.sum().backward()
        outs.append(out)
        states.append(torch.get_rng_state())
        caches.append(len(cache))
        assert bias.grad is not None
        counts += [buffer.item() for name, buffer in net.named_buffers() if name.endswith("count")]
        assert net.training
    assert torch.equal(*outs)
    assert torch.equal(*states)
    assert caches == [1, 1]
    assert counts == [1, 1]
    assert edges_of(net) == ["a -> b [identity] (through layer_norm)"]


def test_grad_modes():
    model = late()
    with torch.inference_mode():
        model.eval()(batch())
    assert edges_of(model) == edges_of(expected())
    model.train()(batch()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_saved_before_and_after(tmp_path):
    model = late()
    with pytest.warns(UserWarning, match="before its first forward pass"):
        model.save_pretrained(tmp_path / "before")
    loaded = PeftModel.from_pretrained(dense(), tmp_path / "before")
    assert edges_of(loaded) == []
    loaded(batch())
    assert edges_of(loaded) == edges_of(expected())
    disturb(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.save_pretrained(tmp_path / "after")
    again = PeftModel.from_pretrained(dense(), tmp_path / "after")
    assert edges_of(again) == edges_of(expected())  # known, so not traced again
    assert torch.equal(again.eval()(batch()), loaded.eval()(batch()))


def test_merging_before_it():
    model = late()
    model.merge_adapter()  # at the identity there is nothing to lose
    model(batch())
    assert edges_of(model) == []
    model.unmerge_adapter()
    model(batch())
    assert edges_of(model) == edges_of(expected())
    moved = late(init_weights=False)
    for merge in (moved.merge_adapter, moved.merge_and_unload):
        with pytest.raises(MergeError, match=r"'default' are traced in its first forward pass.*propagation='none'"):
            merge()
    report = merge_and_verify(moved, probe=(batch(),))
    assert report.max_abs_difference < 1e-5
    assert report.layers == 3


def test_disabled_adapters_wait():
    model = late()
    with model.disable_adapter():
        model(batch())
    assert edges_of(model) == []
    model(batch())
    assert edges_of(model) == edges_of(expected())


def test_a_wrong_batch_raises_what_the_model_raises():
    model = late()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        model(torch.randn(5, 7))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        model(batch(), mask=None)
    model(batch())
    assert edges_of(model) == edges_of(expected())


def test_what_runs_and_cannot_be_traced(monkeypatch):
    import san_peft.tuner.first_pass as first_pass

    def fails(*_):
        raise TraceError("on purpose")

    monkeypatch.setattr(first_pass, "trace_plain", fails)
    model = late()
    with pytest.raises(TraceError, match="on purpose"):
        model(batch())


def test_two_adapters_and_mixed_batches():
    model = late(init_weights=False)
    model.add_adapter("other", SanConfig(target_modules=["fc1"], init_weights=False))
    model.eval()
    mixed = model(batch(), adapter_names=["default", "other", "__base__", "default", "other"])
    assert not model.base_model.scales.pending
    assert torch.allclose(mixed[2], dense().eval()(batch())[2])
    model.set_adapter("other")
    assert torch.allclose(mixed[1], model(batch())[1])
    assert edges_of(model) == ["fc1 -> fc2 [identity] (through relu)"]


def test_without_a_peft_model():
    net = inject_adapter_in_model(SanConfig(target_modules=TARGETS), dense())
    net(batch())
    assert sum(bool(m.san_incoming.get("default")) for m in net.modules() if isinstance(m, SanLayer)) == 2
    copied = copy.deepcopy(inject_adapter_in_model(SanConfig(target_modules=TARGETS), dense()))
    copied(batch())
    assert sum(bool(m.san_incoming.get("default")) for m in copied.modules() if isinstance(m, SanLayer)) == 2


def test_default_targets_are_all_layers():
    """Without a graph no head is known."""
    model = get_peft_model(dense(), SanConfig())
    assert model.peft_config["default"].target_modules == {"stem", "fc1", "fc2", "head"}


def test_a_gate_needs_the_edges_first():
    with pytest.raises(TraceError, match=r"cannot be derived.*gate=True adds parameters"):
        late(gate=True)


def test_other_schemes():
    model = late(propagation="none")
    model(batch())
    assert edges_of(model) == []
    assert model.peft_config["default"].edges == []
    model = late(propagation="exact")
    model(batch())
    assert edges_of(model) == sorted(
        map(str, (e for e in expected().base_model.propagation_graph.edges if e.kind == "exact"))
    )
    with pytest.raises(SanError):
        late(
            propagation=PropagationGraph(
                trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(1, 4)).edges
            )
        )


def test_compiled():
    model = late(init_weights=False)
    plain = expected(init_weights=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    compiled = torch.compile(model, backend="eager")
    first = compiled(batch())
    assert edges_of(model) == edges_of(expected())
    assert torch.allclose(first, compiled(batch()))
    torch._dynamo.reset()
    whole = torch.compile(late(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="first forward pass"):
        whole(batch())
    torch._dynamo.reset()


def test_recorded_by_jit():
    model = late().eval()
    with pytest.raises(SanError, match=r"torch\.jit\.trace.*propagation='none'"):
        torch.jit.trace(model.base_model.model, batch())
    model(batch())
    with torch.no_grad():
        recorded = torch.jit.trace(model.base_model.model, batch())
    assert torch.allclose(recorded(batch()), model(batch()))


class Cached(nn.Module):
    """A language model's way with a cache, in small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v, self.o, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor, past_key_values: DynamicCache | None = None) -> Tensor:
        v = self.v(x)[:, None]
        if past_key_values is not None:
            _, v = past_key_values.update(v, v, 0)
        q = self.q(x)[:, None]
        return self.head(self.o(nn.functional.scaled_dot_product_attention(q, v, v)[:, 0]))


def test_a_cache_is_not_filled_twice():
    model = get_peft_model(Cached(), SanConfig(target_modules=["v"])).eval()
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.randn(2, 3, 6), past_key_values=cache)
    assert cache.get_seq_length() == 3
    assert [e.posterior for e in model.base_model.propagation_graph.edges] == ["o"]
