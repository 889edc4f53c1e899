"""Quantised bases: the graph, the start, training, and the way back to a plain model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tests.contract.nets import disturb
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from san_peft import (
    AdapterError,
    MergeError,
    SanConfig,
    SanLayer,
    TargetError,
    dequantize,
    merge_and_verify,
    save_as_lora,
    trace,
)
from san_peft.tuner import quantized, row_norms

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 50}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
OURS = {
    "own": lambda: SanConfig(target_modules=TARGETS),
    "lora": lambda: SanConfig(inner=LoraConfig(r=4, target_modules=TARGETS)),
    "dora": lambda: SanConfig(inner=LoraConfig(r=4, target_modules=TARGETS, use_dora=True)),
}


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_int4() -> TorchAoConfig:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


QUANTIZED = {
    "bnb-4bit": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "bnb-8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": torchao_int8,
    "torchao-int4": torchao_int4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SIZES, **GROUPED)).save_pretrained(path)
    return path


@pytest.fixture(params=QUANTIZED)
def load(request, folder):
    """Loads the same quantised base, as often as it is called."""

    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        options = {"quantization_config": QUANTIZED[request.param](), "device_map": "cpu", "dtype": dtype}
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    return make


@pytest.fixture(params=OURS)
def config(request):
    return OURS[request.param]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def layers_of(model: nn.Module) -> dict[str, SanLayer]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, SanLayer)}


def trained(model: PeftModel) -> PeftModel:
    disturb(model.eval(), size=0.05)
    return model


# ---------------------------------------------------------------------- graph and start


def test_the_graph_is_that_of_the_dense_model(load, folder):
    dense = trace(AutoModelForCausalLM.from_pretrained(folder))
    graph = trace(load())
    assert len(graph.edges) > 8
    assert (graph.edges, graph.barriers, graph.heads) == (dense.edges, dense.barriers, dense.heads)
    sizes = [(layer.fqn, layer.in_channels, layer.out_channels) for layer in graph.layers]
    assert sizes == [(layer.fqn, layer.in_channels, layer.out_channels) for layer in dense.layers]


def test_the_start_is_the_quantised_base_bit_for_bit(load, config):
    base = load()
    quantized.keep_exact(base)
    before = logits(base)
    model = get_peft_model(base, config()).eval()
    assert any(quantized.is_quantized(layer.get_base_layer()) for layer in layers_of(model).values())
    assert torch.equal(logits(model), before)
    disturb(model)
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_scales_are_those_over_the_unpacked_weight(load, config):
    model = trained(get_peft_model(load(), config()))
    layer = layers_of(model)["model.layers.1.self_attn.v_proj"]
    weight = quantized.dense_weight(layer.get_base_layer()).float()
    assert weight.shape == (32, 64)
    if layer.host is None:
        expected = 1 + layer.san_scale["default"].weight
    elif layer.host.lora_magnitude_vector:
        expected = layer.host.lora_magnitude_vector["default"].weight / weight.norm(dim=1)
    else:
        expected = (weight + layer.host.get_delta_weight("default")).norm(dim=1) / weight.norm(dim=1)
    torch.testing.assert_close(layer.get_scale(), expected)
    posterior = layers_of(model)["model.layers.1.self_attn.o_proj"]
    torch.testing.assert_close(posterior.get_input_scale(), expected.view(2, 1, 16).expand(2, 2, 16).reshape(64))


def test_four_bits_that_ran_on_a_cpu_that_repacks_them_are_refused(folder):
    import bitsandbytes as bnb

    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU lacks AVX512-BF16, for which bitsandbytes packs 4-bit weights anew")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTIZED["bnb-4bit"](), device_map="cpu")
    trace(base)
    get_peft_model(base, OURS["own"]())
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTIZED["bnb-4bit"](), device_map="cpu")
    logits(base)
    with pytest.raises(AdapterError, match=r"14 4-bit layers, such as .*q_proj, have run .*Load the model again"):
        get_peft_model(base, OURS["own"]())
    with pytest.raises(MergeError, match=r"Linear4bit \(torch.uint8\) cannot be dequantised"):
        dequantize(base)


# ---------------------------------------------------------------------- training


def test_training_lowers_the_loss_and_reaches_every_vector(load, config):
    torch.manual_seed(0)
    model = get_peft_model(prepare_model_for_kbit_training(load()), config()).train()
    frozen = {n: quantized.dense_weight(layer.get_base_layer()) for n, layer in layers_of(model).items()}
    mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert mine
    assert all("san_" in n or "lora_" in n for n in mine)
    optimizer = torch.optim.AdamW(mine.values(), lr=0.02)
    losses, reached = [], set()
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        reached |= {n for n, p in mine.items() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert reached == mine.keys()
    for name, layer in layers_of(model).items():
        assert torch.equal(quantized.dense_weight(layer.get_base_layer()), frozen[name]), name


def test_gradients_are_those_over_the_unpacked_model(load):
    """Of the scale of LoRA, through the weight that is unpacked again in the backward pass."""
    model = trained(get_peft_model(load(), OURS["lora"]()))
    scale = {n: layer.get_scale() for n, layer in layers_of(model).items() if layer.get_scale() is not None}
    sum(s.square().sum() for s in scale.values()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.zeros(())
    for name in scale:
        layer = layers_of(model)[name]
        weight = quantized.dense_weight(layer.get_base_layer()).float()
        a, b = layer.host.lora_A["default"].weight, layer.host.lora_B["default"].weight
        changed = weight + layer.host.scaling["default"] * b @ a
        total = total + (changed.norm(dim=1) / weight.norm(dim=1)).square().sum()
    total.backward()
    assert len(found) == 2 * len(scale)
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_nothing_unpacked_is_kept_and_norms_are_taken_once(load, monkeypatch):
    model = trained(get_peft_model(load(), OURS["lora"]()))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for layer in layers_of(model).values():
            layer.get_scale()
    assert saved
    assert max(t.numel() for t in saved) <= 128 * 4, "a factor, never a weight"
    calls = []
    original = row_norms.row_norms
    monkeypatch.setattr(row_norms, "row_norms", lambda *args: calls.append(args) or original(*args))
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        logits(model.eval())
    assert not calls


# ---------------------------------------------------------------------- saving, merging, unpacking


def test_an_adapter_is_saved_and_loads_on_the_quantised_base(load, config, tmp_path):
    model = trained(get_peft_model(load(), config()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path).eval()), logits(model))


def test_merging_is_refused_and_names_the_way_out(load, config, tmp_path):
    model = trained(get_peft_model(load(), config()))
    before = logits(model)
    attempts = (
        lambda: merge_and_verify(model),
        model.merge_adapter,
        lambda: model.merge_adapter(safe_merge=True),
        model.merge_and_unload,
        lambda: save_as_lora(model, tmp_path / "lora", 2),
    )
    for attempt in attempts:
        with pytest.raises(MergeError, match=r"quantised weight.*san_peft\.dequantize\(model\) first"):
            attempt()
    assert torch.equal(logits(model), before)
    assert not any(layer.merged for layer in layers_of(model).values())


def test_unpacked_it_merges_into_a_plain_model(load, config, tmp_path):
    model = trained(get_peft_model(load(), config()))
    before = logits(model)
    assert dequantize(model) == 14
    assert dequantize(model) == 0
    after = logits(model)
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02 * before.abs().max().item())
    for name, module in model.named_modules():
        assert not (isinstance(module, nn.Linear) and quantized.is_quantized(module)), name
        if isinstance(module, SanLayer) and module.host is not None:
            assert type(module.host).__module__ == "peft.tuners.lora.layer", name
    report = merge_and_verify(model)
    assert all(type(m) is nn.Linear for m in report.model.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(logits(report.model), after, rtol=1e-4, atol=1e-4)
    report.model.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain), logits(report.model))


def test_unpacked_in_the_type_of_the_model(load):
    """Eight-bit weights unpack to float32, which a model in bfloat16 could not multiply."""
    base = load(torch.bfloat16)
    model = get_peft_model(base, OURS["own"]()).eval()
    before = logits(model)
    assert before.dtype == torch.bfloat16
    dequantize(model)
    assert {layer.get_base_layer().weight.dtype for layer in layers_of(model).values()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), before, rtol=0.1, atol=0.05)


# ---------------------------------------------------------------------- what cannot be adapted


class QuantLinear(nn.Module):
    """Stands for a layer of GPTQ or AWQ: numbers packed into integers, and no weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_features = self.out_features = size
        self.register_buffer("qweight", torch.zeros(size // 8, size, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("options", [{}, {"inner": LoraConfig(r=2)}], ids=["own", "lora"])
def test_a_layer_without_a_weight_is_refused_with_the_way_out(options):
    net = nn.Sequential(nn.Linear(8, 8), QuantLinear(8))
    config = SanConfig(target_modules=["0", "1"], propagation=trace(net, torch.zeros(1, 8)), **options)
    with pytest.raises(TargetError, match=r"1 is a QuantLinear, which SAN cannot.*torchao"):
        get_peft_model(net, config)
    assert type(net[0]) is nn.Linear


def test_a_weight_that_cannot_be_unpacked_leaves_the_model():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = nn.Parameter(net[1].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    before = list(net)
    with pytest.raises(MergeError, match=r"Linear \(torch.float8_e4m3fn\) cannot be dequantised"):
        dequantize(net)
    assert list(net) == before


# ---------------------------------------------------------------------- what transformers has unpacked


def marked(folder: Path) -> nn.Module:
    """A dense model as transformers leaves one that it has unpacked from a GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = GgufConfig(gguf_file="model.gguf")
    model.hf_quantizer = GgufHfQuantizer(config)
    model.config.quantization_config, model.is_quantized = config, True
    return model.eval()


@pytest.mark.parametrize("verb", ["merge_and_verify", "merge_and_unload", "dequantize"])
def test_a_dense_model_with_the_mark_of_a_gguf_file_saves_once_merged(folder, tmp_path, verb):
    with pytest.raises(ValueError, match="not serializable"):
        marked(folder).save_pretrained(tmp_path)
    model = trained(get_peft_model(marked(folder), OURS["own"]()))
    before = logits(model)
    if verb == "dequantize":
        assert dequantize(model) == 0
        plain = model.base_model.merge_and_unload()
    else:
        plain = merge_and_verify(model).model if verb == "merge_and_verify" else model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_still_packed_in_part_keeps_its_mark(load):
    base = load()
    assert quantized.forget_quantization(base) is base
    assert base.hf_quantizer is not None
