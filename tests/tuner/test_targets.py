"""Which layers a configuration means: the same ones, however they are named."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from tests.contract.nets import Image
from tests.golden.models import MODELS
from torch import Tensor, nn

from san_peft import SanConfig, SanLayer, TargetError, trace


def carrying(model: nn.Module) -> set[str]:
    """Names of the layers that carry a scale."""
    net = model.base_model.model if isinstance(model, PeftModel) else model
    return {n for n, m in net.named_modules() if isinstance(m, SanLayer) and (len(m.san_scale) or len(m.san_host))}


def llama(layers: int = 3) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, vocab_size=40
        )
    )


pytestmark = pytest.mark.filterwarnings("ignore:.* edges are dropped")

WAYS = {
    "default": None,
    "all-linear": "all-linear",
    "list": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "pattern": r".*_proj",
    "in full": [f"model.layers.{i}.mlp.{name}_proj" for i in range(3) for name in ("gate", "up", "down")],
}


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)], ids=["own", "lora"])
@pytest.mark.parametrize("numbers", [[0], 1, [0, 2]])
@pytest.mark.parametrize("way", WAYS)
def test_layers_to_transform(way, numbers, inner):
    config = SanConfig(target_modules=WAYS[way], layers_to_transform=numbers, inner=copy.deepcopy(inner))
    model = get_peft_model(llama(), config)
    wanted = {numbers} if isinstance(numbers, int) else set(numbers)
    names = carrying(model)
    assert {int(name.split(".")[2]) for name in names} == wanted
    assert len(names) == (3 if way == "in full" else 7) * len(wanted)
    assert all(edge.anterior in names for edge in model.base_model.propagation_graph.edges)
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()


def test_layers_pattern_and_exclude_modules():
    model = get_peft_model(
        llama(), SanConfig(layers_to_transform=[1], layers_pattern="layers", exclude_modules=["v_proj"])
    )
    assert len(carrying(model)) == 6
    with pytest.raises(TargetError, match=r"21 layers.*layers_to_transform=\[7\]"):
        get_peft_model(llama(), SanConfig(layers_to_transform=[7]))
    with pytest.raises(TargetError, match=r"layers_pattern='blocks'"):
        get_peft_model(llama(), SanConfig(layers_to_transform=[1], layers_pattern="blocks"))


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_layers_to_transform_of_encoders_and_decoders(name):
    model = get_peft_model(MODELS[name](), SanConfig(layers_to_transform=[0]))
    assert carrying(model)
    assert all(".0." in name for name in carrying(model))


class Nested(nn.Sequential):
    """Children whose names end as those of others: `2` and `3.2`."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.Sequential(nn.Dropout(0.0), nn.ReLU(), nn.Linear(6, 3))
        )


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)], ids=["own", "lora"])
def test_names_that_end_as_others_do(inner, tmp_path):
    graph = trace(Nested(), torch.zeros(2, 4))
    assert graph.heads == ("3.2",)
    model = get_peft_model(Nested(), SanConfig(propagation=graph, inner=copy.deepcopy(inner), init_weights=False))
    assert carrying(model) == {"0", "2"}
    assert len(model.base_model.propagation_graph.edges) == 1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Nested(), tmp_path)
    assert carrying(again) == {"0", "2"}
    x = torch.randn(3, 4)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_dropout_that_ends_as_a_layer_does():
    net = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Dropout(0.0), nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2))
    model = get_peft_model(net, SanConfig(propagation=trace(net, torch.zeros(2, 4))))
    assert carrying(model) == {"0", "1.1"}


def test_a_config_can_be_used_again():
    config = SanConfig()
    given = copy.deepcopy(config)
    small, large = get_peft_model(llama(2), config), get_peft_model(llama(4), config)
    for model, layers in ((small, 2), (large, 4)):
        expected = get_peft_model(llama(layers), SanConfig())
        assert model.base_model.propagation_graph == expected.base_model.propagation_graph
        assert len(carrying(model)) == 7 * layers
    assert {name: getattr(config, name) for name in ("edges", "placement", "target_modules")} == {
        name: getattr(given, name) for name in ("edges", "placement", "target_modules")
    }
    again = get_peft_model(llama(2), SanConfig(train_norms=True))
    assert again.peft_config["default"].modules_to_save


def test_one_config_for_two_adapters():
    config = SanConfig(inner=LoraConfig(r=2))
    model = get_peft_model(llama(2), config)
    model.add_adapter("other", config)
    assert model.peft_config["other"].edges == model.peft_config["default"].edges
    assert model.peft_config["other"] is not model.peft_config["default"]


@pytest.mark.parametrize(
    ("inner", "taken"),
    [
        (LoraConfig(r=2), {"stem", "last", "flat"}),
        (VeraConfig(r=2), {"flat"}),
        (IA3Config(feedforward_modules=[]), {"stem", "depthwise", "grouped", "last", "flat"}),
    ],
    ids=["lora", "vera", "ia3"],
)
def test_layers_that_a_host_cannot_take(inner, taken):
    graph = trace(Image(), torch.zeros(2, 3, 4, 4))
    config = SanConfig(inner=inner, propagation=graph)
    if len(taken) == 5:
        model = get_peft_model(Image(), config)
    else:
        with pytest.warns(UserWarning, match=rf"{5 - len(taken)} of 5 layers .*cannot adapt"):
            model = get_peft_model(Image(), config)
    assert carrying(model) == taken
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    named = SanConfig(inner=inner, propagation=graph, target_modules=["stem", "depthwise", "flat"])
    if len(taken) < 5:
        with pytest.raises(TargetError, match=r"depthwise|stem"):
            get_peft_model(Image(), named)


class Twice(nn.Module):
    """Returns the sum of what its layers make of one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def test_all_linear_without_a_graph():
    model = get_peft_model(Twice(), SanConfig(target_modules="all-linear", propagation="none"))
    assert carrying(model) == {"body", "head"}
    assert carrying(get_peft_model(llama(1), SanConfig(target_modules="all-linear", propagation="none"))) == {
        f"model.layers.0.{name}"
        for name in (*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down")))
    }


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(3, 4, 3, dilation=2, padding=2), r"dilation \(2, 2\)"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'"),
        (Padded(3, 4, 3), "Padded .*padding"),
    ],
)
def test_convolutions_that_matrices_of_lora_do_not_follow(conv, reason):
    net, x = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(2)), torch.randn(1, 3, 8, 8)
    net(x)
    graph = trace(net, x)
    with pytest.warns(UserWarning, match=f"1 of 2 layers .*LORA cannot adapt .*0: .*{reason}"):
        model = get_peft_model(copy.deepcopy(net), SanConfig(inner=LoraConfig(r=2), propagation=graph))
    assert carrying(model) == {"2"}
    with pytest.raises(TargetError, match=reason):
        get_peft_model(net, SanConfig(inner=LoraConfig(r=2), propagation=graph, target_modules=["0"]))


def test_layers_that_peft_refuses_in_an_architecture():
    from transformers import MambaConfig, MambaForCausalLM

    net = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=1))
    with pytest.warns(UserWarning, match=r"out_proj.* PEFT refuses in a mamba|cannot adapt"):
        model = get_peft_model(net, SanConfig(inner=LoraConfig(r=2)))
    assert carrying(model) == {f"backbone.layers.0.mixer.{name}" for name in ("in_proj", "x_proj")}


def test_dense_layers_with_names_that_experts_had():
    """PEFT takes `down_proj` in Qwen3-Next for the tensor of all experts, here it is the shared expert."""
    from tests.zoo.test_zoo import subject_of

    net = subject_of("Qwen3NextForCausalLM").base()
    model = get_peft_model(net, SanConfig(inner=LoraConfig(r=2)))
    assert any(name.endswith("shared_expert.down_proj") for name in carrying(model))
    assert not model.base_model.hosts["LORA"].peft_config["default"].target_parameters
