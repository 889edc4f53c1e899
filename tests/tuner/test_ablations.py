"""The ablations of order on real models: traced, broken, trained, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.golden.models import MODELS
from torch import nn

from san_peft import SanConfig, SanError, SanLayer, trace
from san_peft.propagation import ABLATIONS, ablate


class Block(nn.Module):
    """Attention over tokens and a feed-forward, both with a residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.second(x))))


class Net(nn.Module):
    """An embedding, four blocks and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(5, width), nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.fixture
def net():
    return Net().double()


X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ends(graph):
    return [(edge.anterior, edge.posterior) for edge in graph.edges]


def test_every_layer_of_the_body_has_its_edges(net):
    graph = trace(net, X).select("all")
    assert ("embed", "blocks.0.q") in ends(graph)
    assert ("blocks.0.v", "blocks.0.o") in ends(graph)
    assert not any(posterior == "head" for _, posterior in ends(graph))


def test_reversed_turns_every_edge_that_fits(net):
    graph = trace(net, X).select("all")
    widths = {name: (m.in_features, m.out_features) for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    expected = {(p, a) for a, p in ends(graph) if widths[p][1] == widths[a][0]}
    assert set(ends(ablate(graph, "reversed"))) == expected
    assert ("blocks.1.fc2", "blocks.1.fc1") in expected
    assert ("blocks.0.q", "embed") not in expected  # five channels are read there


def test_skip_one_passes_over_a_layer(net):
    graph = trace(net, X).select("all")
    broken = ends(ablate(graph, "skip-one"))
    assert ("blocks.0.v", "blocks.0.fc1") in broken
    assert ("blocks.0.fc1", "blocks.1.q") not in broken  # sixteen channels do not fit eight
    assert not set(broken) & set(ends(graph))


@pytest.mark.parametrize("seed", range(5))
def test_permuted_keeps_posteriors_sizes_and_how_often_a_scale_is_used(net, seed):
    graph = trace(net, X).select("all")
    broken = ablate(graph, "permuted", seed)
    assert [(e.posterior, e.channels) for e in broken.edges] == [(e.posterior, e.channels) for e in graph.edges]
    assert sorted(e.anterior for e in broken.edges) == sorted(e.anterior for e in graph.edges)
    moved = sum(old != new for old, new in zip(ends(graph), ends(broken), strict=True))
    assert moved > len(graph.edges) / 2
    assert ends(broken) != ends(ablate(graph, "permuted", seed + 1))


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_keeps_edges_and_moves_their_entries(net, seed):
    graph = trace(net, X).select("all")
    broken = ablate(graph, "shuffled", seed)
    assert ends(broken) == ends(graph)
    for old, new in zip(graph.edges, broken.edges, strict=True):
        assert sorted(new.channels.index.tolist()) == sorted(old.channels.index.tolist())
        assert new.channels.index.tolist() != old.channels.index.tolist()


@pytest.mark.parametrize("kind", ABLATIONS)
def test_a_model_trains_and_loads_with_a_broken_order(net, kind, tmp_path, recwarn):
    graph = ablate(trace(net, X).select("all"), kind, seed=3)
    frozen = {name: value.clone() for name, value in net.state_dict().items()}
    model = get_peft_model(net, SanConfig(propagation=graph))
    assert set(ends(model.base_model.propagation_graph)) == set(ends(graph))
    assert not [one for one in recwarn if "are dropped" in str(one.message)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        trained = model(X)
    model.save_pretrained(tmp_path)
    plain = Net().double()
    plain.load_state_dict(frozen)
    before = plain(X)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(X), trained)
    assert (trained - before).abs().max() > 1e-4


def test_exponents_of_single_anteriors(tmp_path):
    """A pattern gives one anterior another exponent: what it propagates is as if all had it, the rest stays."""
    torch.manual_seed(0)
    frozen = MODELS["llama"]()

    def scales(**options):
        model = get_peft_model(copy.deepcopy(frozen), SanConfig(**options)).eval()
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        return model, {n: m.get_input_scale() for n, m in model.named_modules() if isinstance(m, SanLayer)}

    model, mixed = scales(exponent_pattern={"v_proj": 0.0, r"mlp\.up_proj": 2.0})
    _, plain = scales()
    for name, value in plain.items():
        expected = None if value is None else value
        if name.endswith("o_proj"):
            expected = torch.ones_like(value)
        if name.endswith("down_proj"):
            expected = value.square()
        assert (mixed[name] is None) == (expected is None)
        assert expected is None or torch.allclose(mixed[name], expected, atol=1e-6), name
    tokens = torch.arange(6)[None]
    unmerged = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(frozen, tmp_path).eval()
    assert torch.equal(loaded(input_ids=tokens).logits, unmerged)
    model.merge_adapter()
    assert torch.allclose(model(input_ids=tokens).logits, unmerged, atol=1e-5)
    with pytest.raises(SanError, match=r"exponent_pattern\['v_proj'\] must be finite"):
        SanConfig(exponent_pattern={"v_proj": float("nan")})
