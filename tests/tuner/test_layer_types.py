"""Embeddings, weights that are made in the forward pass, attributes and names of the frozen layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import KINDS, disturb
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from san_peft import MergeError, SanConfig, SanLayer, TargetError, trace
from san_peft.tuner.frozen import follows_weight, stored_weight

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def layers_of(model: Any) -> dict[str, SanLayer]:
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, SanLayer)}


def adapted(net: nn.Module, x: Tensor, **options: Any) -> PeftModel:
    net = net.double().eval()
    model = get_peft_model(net, SanConfig(propagation=trace(net, x), **options)).double().eval()
    disturb(model)
    return model


# ---------------------------------------------------------------------- embeddings


class Language(nn.Module):
    """Tokens and positions, a block, and a head that may be tied."""

    def __init__(self, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(10, 8, **options), nn.Embedding(5, 8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.fc2(torch.tanh(self.fc1(x + 0 * self.position.weight[0].sum()))) + x)


IDS = torch.tensor([[1, 2, 0, 4], [5, 0, 7, 9]])


def test_an_embedding_is_adapted_only_where_it_is_named():
    net = Language().double()
    assert not any("embed" in layer.fqn for layer in trace(net, IDS).layers)
    graph = trace(net, IDS, embeddings=["embed"])
    assert next(layer for layer in graph.layers if layer.fqn == "embed").out_channels == 8
    assert ("embed", "fc1") in {(e.anterior, e.posterior) for e in graph.edges}
    model = get_peft_model(Language(), SanConfig(propagation=graph))
    assert "san_scale" in str([n for n, _ in model.named_parameters() if ".embed." in n])


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"sparse": True}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("shift", [False, True])
def test_embeddings(options, shift, tmp_path):
    torch.manual_seed(0)
    net = Language(**options).double()
    table = net.embed.weight.detach().clone()
    model = get_peft_model(
        net, SanConfig(target_modules=["embed", "fc1"], shift=shift, propagation=trace(net, IDS, ["embed"]))
    )
    model = model.double().eval()
    with torch.no_grad(), model.disable_adapter():
        frozen = model(IDS)
    assert torch.equal(model(IDS), frozen)
    disturb(model)
    out = model(IDS)
    out.square().sum().backward()
    layer: Any = layers_of(model)["embed"]
    assert layer.san_scale["default"].weight.grad.abs().sum() > 0
    scale, extra = layer.get_scale(), layer.get_shift() if shift else 0
    torch.testing.assert_close(layer(IDS), table[IDS] * scale + extra, **CLOSE)
    torch.testing.assert_close(layer.weight + 0, table * scale + extra, **CLOSE)
    assert (layer.embedding_dim, layer.num_embeddings) == (8, 10)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = (
        PeftModel.from_pretrained(Language(**options).double(), tmp_path, autocast_adapter_dtype=False).double().eval()
    )
    torch.testing.assert_close(again(IDS), out, **CLOSE)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), out, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, table)
    torch.testing.assert_close(model.merge_and_unload()(IDS), out, **CLOSE)


def test_targets_find_the_embedding_by_themselves():
    torch.manual_seed(0)
    from tests.tuner.hosted import IDS as TOKENS
    from tests.tuner.hosted import small_llama

    net = small_llama().double()
    model = get_peft_model(net, SanConfig(target_modules=["embed_tokens", "up_proj", "down_proj"])).double().eval()
    edges = {(e.anterior, e.posterior) for e in model.base_model.propagation_graph.edges}
    assert ("model.embed_tokens", "model.layers.0.self_attn.q_proj") in edges
    disturb(model)
    with torch.no_grad():
        out = model(TOKENS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(TOKENS).logits, out, **CLOSE)


def test_tables_that_are_not_merged():
    torch.manual_seed(0)
    model = adapted(Language(max_norm=1.0), IDS, target_modules=["embed", "fc1"])
    with pytest.raises(MergeError, match=r"max_norm=1\.0"):
        model.merge_adapter()
    model = adapted(Language(tied=True), IDS, target_modules=["embed", "fc1"])
    with pytest.raises(MergeError, match=r"tied \(embed.*head"):
        model.merge_adapter()


@pytest.mark.parametrize("inner", [LoraConfig(r=2)])
def test_hosts_do_not_take_them(inner):
    for net, x, name in (
        (Language(), IDS, "embed"),
        (KINDS["transposed"].net(), KINDS["transposed"].input(), "up2"),
        (KINDS["attention"].net(), KINDS["attention"].input(), "attn"),
    ):
        with pytest.raises(TargetError, match=f"^{name} is a"):
            get_peft_model(net, SanConfig(inner=inner, target_modules=[name], propagation=trace(net, x)))


# ---------------------------------------------------------------------- weights that are made in the forward pass

NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm-hook": weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm-hook": spectral_norm,
}


class Standardised(nn.Conv2d):
    """Normalises its weight whenever it runs, as StdConv2d does."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Same(nn.Conv2d):
    """Pads by itself, which takes nothing from its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Normed(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(6, 8), norm(nn.Linear(8, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(self.one(x))))


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_training_a_weight_that_is_made_anew(norm):
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64)
    plain, net = (Normed(NORMS[norm]).double() for _ in range(2))
    plain.eval()
    model = get_peft_model(net, SanConfig(target_modules=["one", "two"], propagation=trace(net, x))).double().train()
    for _ in range(2):  # the vectors that spectral_norm iterates stay as they are, as running statistics do
        torch.testing.assert_close(model(x), plain(x), **CLOSE)
    disturb(model)
    model.eval()
    layer: Any = layers_of(model)["two"]
    out = layer(x @ torch.ones(6, 8, dtype=torch.float64))
    base, s = layer.get_base_layer(), layer.get_input_scale()
    expected = layer.get_scale() * base(x @ torch.ones(6, 8, dtype=torch.float64) * s)
    torch.testing.assert_close(out, expected, **CLOSE)
    model(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "san_scale" in n)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(MergeError, match="in every forward pass"):
        model.merge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_forward_passes_that_do_something_else_with_their_weight():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def net(kind: Any) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).double()

    for kind, follows in ((Standardised, False), (Same, True)):
        model = adapted(net(kind), x, target_modules=["0", "1"], shift=True)
        assert follows_weight(model.base_model.model[1].get_base_layer()) is follows
        out = model(x)
        out.sum().backward()
        before = {n: p.clone() for n, p in model.state_dict().items()}
        if follows:
            model.merge_adapter()
        else:
            with pytest.raises(MergeError, match="Standardised transforms its weight"):
                model.merge_adapter()
            with pytest.raises(MergeError, match="Standardised transforms its weight"):
                model.merge_and_unload()
            assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        torch.testing.assert_close(model(x), out, **CLOSE)
    dense = nn.Sequential(nn.Linear(6, 8), Doubled(8, 4)).double()
    model = adapted(dense, torch.randn(2, 6, dtype=torch.float64), target_modules=["0", "1"])
    given = torch.randn(2, 6, dtype=torch.float64)
    out = model(given)
    model.merge_adapter()
    torch.testing.assert_close(model(given), out, **CLOSE)


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_standardised_convolutions_of_timm(name):
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    kind = getattr(layers, name)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).double()
    model = adapted(net, x, target_modules=["0", "1"])
    model(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "san_scale" in n)
    with pytest.raises(MergeError, match=f"{name} transforms its weight"):
        model.merge_adapter()


def test_stored_weights_are_found_without_making_them():
    linear = nn.Linear(3, 4)
    assert stored_weight(linear) is linear.weight
    normed = parametrizations.spectral_norm(nn.Linear(3, 4)).train()
    vectors = [b.clone() for b in normed.buffers()]
    assert stored_weight(normed).shape == (4, 3)
    assert all(torch.equal(a, b) for a, b in zip(vectors, normed.buffers(), strict=True))


# ---------------------------------------------------------------------- the wrapper


class Asking(nn.Module):
    """Asks its layers what they are, as Whisper and DaViT do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % self.conv.stride[0] == 0
        assert (self.conv.kernel_size, self.conv.padding_mode) == ((3,), "zeros")
        return self.head(torch.relu(self.conv(x)).mean(-1))


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)])
def test_attributes_of_the_frozen_layer(inner):
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    net = Asking()
    net.conv.note = "mine"
    model = adapted(net, x, target_modules=["conv"], inner=inner)
    layer: Any = model.base_model.model.conv
    expected = model(x)
    assert layer.note == "mine"
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    assert not hasattr(layer, "lora_A") or inner is None
    assert not hasattr(layer, "_hf_hook")
    layer.get_base_layer()._hf_hook = object()
    assert not hasattr(layer, "_hf_hook"), "private names are those of another module"
    del layer.get_base_layer()._hf_hook
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), expected, **CLOSE)
        assert other.base_model.model.conv.stride == (2,)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected, **CLOSE)


class Twice(nn.Module):
    """Holds one layer under two names and calls it by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(6, 8), nn.Linear(8, 8)
        self.holder = nn.ModuleDict({"again": self.fc})
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.holder["again"](self.first(x))))


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)])
@pytest.mark.parametrize("target", ["fc", "again"])
def test_a_layer_under_two_names(inner, target):
    torch.manual_seed(0)
    x, net = torch.randn(4, 6, dtype=torch.float64), Twice().double()
    frozen = net.fc
    if target == "again":
        with pytest.raises(TargetError, match="'again'"):
            adapted(net, x, target_modules=["first", "again"], inner=inner)
        return
    model = adapted(net, x, target_modules=["first", "fc"], inner=inner)
    plain: Any = model.base_model.model
    assert plain.fc is plain.holder["again"]
    assert isinstance(plain.fc, SanLayer)
    out = model(x)
    with model.disable_adapter():
        assert not torch.allclose(model(x), out, rtol=1e-3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    other = copy.deepcopy(model)
    merged: Any = other.merge_and_unload()
    torch.testing.assert_close(merged(x), out, **CLOSE)
    assert merged.fc is merged.holder["again"]
    assert type(merged.fc) is nn.Linear
    model.unload()
    assert plain.fc is plain.holder["again"] is frozen


def test_keyword_calls_and_a_convolution_without_a_batch():
    x = torch.randn(4, 6)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8)), SanConfig(target_modules=["0"], propagation="none"))
    disturb(model)
    layer: Any = model.base_model.model[0]
    assert torch.equal(layer(input=x), layer(x))
    with pytest.raises(KeyError):
        layer()
    up = get_peft_model(
        nn.Sequential(nn.ConvTranspose1d(3, 4, 3, stride=2)), SanConfig(target_modules=["0"], propagation="none")
    )
    disturb(up)
    layer = up.base_model.model[0]
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x)[0], layer(x[0]))
    assert layer(x, output_size=[12]).shape == (2, 4, 12)
