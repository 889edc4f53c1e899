"""The tuner on transformers models: targets, wiring, options, and PEFT's other doors."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from tests.contract.nets import disturb
from tests.golden.models import MODELS
from torch import nn

import san_peft
from san_peft import Edge, PropagationGraph, SanConfig, SanError, SanLayer, merge_and_verify, trace
from san_peft.propagation.graph import ChannelMap


def vit() -> nn.Module:
    torch.manual_seed(0)
    return MODELS["vit"]().eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return MODELS["llama-grouped"]().eval()


def ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 50, (batch, 7), generator=torch.Generator().manual_seed(0))


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def layers_of(model: nn.Module) -> dict[str, SanLayer]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, SanLayer)}


def carrying(model: nn.Module, adapter_name: str = "default") -> set[str]:
    return {name for name, layer in layers_of(model).items() if layer.get_scale(adapter_name) is not None}


# ------------------------------------------------------------------ targets


def test_a_trained_module_of_several_layers_is_kept_in_merging():
    """Such as the projector of LLaVA: it is no layer with a weight of its own."""
    model = get_peft_model(
        vit(), SanConfig(target_modules=["fc1"], modules_to_save=["layers.1.mlp"], init_weights=False)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
        expected = model(image()).logits
    plain = model.merge_and_unload()
    assert not layers_of(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(image()).logits, expected, atol=1e-4, rtol=1e-4)


def test_no_targets_means_every_traced_layer_but_the_heads():
    model = get_peft_model(vit(), SanConfig())
    expected = {layer.fqn for layer in trace(vit()).layers} - {"classifier"}
    assert carrying(model) == expected
    assert "classifier" not in layers_of(model)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj", "v_proj"], 4), (r".*layers\.1\.mlp\.fc[12]", 2), ("all-linear", 12), (["vit.layers.0.mlp.fc1"], 1)],
)
def test_targets_as_peft_matches_them(targets, count):
    model = get_peft_model(vit(), SanConfig(target_modules=targets))
    assert len(carrying(model)) == count


def test_a_posterior_without_a_scale_of_its_own_is_still_fed():
    model = get_peft_model(llama(), SanConfig(target_modules=["v_proj"]))
    layer = layers_of(model)["model.layers.0.self_attn.o_proj"]
    assert layer.get_scale() is None
    assert layer.get_input_scale().tolist() == [1.0] * 16
    disturb(model)
    scale = layers_of(model)["model.layers.0.self_attn.v_proj"].get_scale()
    assert torch.equal(layer.get_input_scale(), scale.view(2, 1, 4).expand(2, 2, 4).reshape(16))
    before = model(ids()).logits
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(ids()).logits, before, rtol=1e-4, atol=1e-5)
    status = {s.name: s for s in model.get_layer_status()}
    assert status["model.model.layers.0.self_attn.o_proj"].module_type == "san.SanLayer"


def test_an_edge_whose_anterior_has_no_scale_is_not_rerouted():
    model = get_peft_model(vit(), SanConfig(target_modules=["fc1"]))
    edges = model.base_model.propagation_graph.edges
    assert {(e.anterior.split(".")[-1], e.posterior.split(".")[-1]) for e in edges} == {("fc1", "fc2")}


@pytest.mark.parametrize("number", [0, 1, [1]])
def test_layers_to_transform(number):
    with pytest.warns(UserWarning, match="edges are dropped"):
        model = get_peft_model(vit(), SanConfig(target_modules=["fc1", "fc2"], layers_to_transform=number))
    wanted = number if isinstance(number, int) else number[0]
    assert carrying(model) == {f"vit.layers.{wanted}.mlp.fc1", f"vit.layers.{wanted}.mlp.fc2"}


def test_excluded_layers_warn_of_the_edges_they_cut():
    with pytest.warns(UserWarning, match=r"edges are dropped.*fc2 -> "):
        model = get_peft_model(vit(), SanConfig(exclude_modules=["fc2"]))
    assert not any(name.endswith("fc2") for name in carrying(model))


def test_trained_norms_and_head():
    model = get_peft_model(vit(), SanConfig(train_norms=True, modules_to_save=["classifier"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "san_" not in n}
    norms = {n for n, m in vit().named_modules() if isinstance(m, nn.LayerNorm)}
    assert len(norms) == 5
    expected = {f"{n}.modules_to_save.default.{p}" for n in {*norms, "classifier"} for p in ("weight", "bias")}
    assert {n.removeprefix("base_model.model.") for n in trained} == expected


def test_what_is_inside_a_module_to_save_is_left_to_it():
    """A head of several layers, as RoBERTa's, and one with a norm, as ConvNeXt's in timm, are trained as a whole."""
    import timm

    config = tf.RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    roberta = get_peft_model(tf.RobertaForSequenceClassification(config), SanConfig(task_type="SEQ_CLS"))
    assert not any("classifier" in name for name in layers_of(roberta))
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5)
    model = get_peft_model(convnext, SanConfig(train_norms=True, modules_to_save=["head"]))
    assert not any("head" in name for name in layers_of(model))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".head." in n]
    assert len(trained) == len(list(timm.create_model("convnext_atto").head.parameters())) == 4
    assert all(n.startswith("base_model.model.head.modules_to_save.default.") for n in trained)


def test_norms_of_a_language_model_are_found_too():
    model = get_peft_model(llama(), SanConfig(train_norms=True))
    assert sum("norm" in n and p.requires_grad for n, p in model.named_parameters()) == 5


def test_parameters_of_vit_base():
    """122,112 without head, as counted in the guide to the method: 83,712 of scales and 38,400 of norms."""
    with torch.device("meta"):
        import timm

        base = timm.create_model("vit_base_patch16_224")
    config = SanConfig(train_norms=True, modules_to_save=["head"])
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and ".head." not in n}
    assert sum(v for n, v in trained.items() if "san_scale" in n) == 83_712
    assert sum(trained.values()) == 122_112


# ------------------------------------------------------------------ parity with an independent formula


def test_one_vit_block_equals_the_formula_written_out():
    """The definition once more by hand on one block of a ViT, in float64: scales on rows, the same on columns."""
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    model = tf.ViTForImageClassification(config).double().eval()
    adapted = get_peft_model(copy.deepcopy(model), SanConfig())
    disturb(adapted)
    x = image().double()
    g = {name.split(".")[-1]: layer.get_scale().double() for name, layer in layers_of(adapted).items()}
    vit, block = model.vit, model.vit.layers[0]
    linear = nn.functional.linear

    patches = nn.functional.conv2d(x, vit.embeddings.patch_embeddings.projection.weight, stride=8).flatten(2).mT
    patches = g["projection"] * (patches + vit.embeddings.patch_embeddings.projection.bias)
    stream = torch.cat([vit.embeddings.cls_token.expand(2, -1, -1), patches], 1) + vit.embeddings.position_embeddings
    h = block.layernorm_before(stream)
    q, k, v = (
        g[n] * linear(g["projection"] * h, getattr(block.attention, n).weight, getattr(block.attention, n).bias)
        for n in ("q_proj", "k_proj", "v_proj")
    )
    heads = [t.view(2, 5, 2, 8).transpose(1, 2) for t in (q, k, v)]
    mixed = ((heads[0] @ heads[1].mT / 8**0.5).softmax(-1) @ heads[2]).transpose(1, 2).reshape(2, 5, 16)
    out = block.attention.o_proj
    stream = stream + g["o_proj"] * linear(g["v_proj"] * mixed, out.weight, out.bias)
    h = block.layernorm_after(stream)
    h = nn.functional.gelu(g["fc1"] * linear(g["o_proj"] * h, block.mlp.fc1.weight, block.mlp.fc1.bias))
    stream = stream + g["fc2"] * linear(g["fc1"] * h, block.mlp.fc2.weight, block.mlp.fc2.bias)
    expected = model.classifier(vit.layernorm(stream)[:, 0])
    torch.testing.assert_close(adapted(x).logits, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ options


def test_exponent_zero_is_the_host_alone():
    one = get_peft_model(vit(), SanConfig(exponent=0.0)).eval()
    none = get_peft_model(vit(), SanConfig(propagation="none")).eval()
    disturb(one)
    disturb(none)
    assert torch.equal(one(image()).logits, none(image()).logits)


def test_exponent_minus_one_undoes_exact_edges():
    model = get_peft_model(llama(), SanConfig(target_modules=["v_proj", "up_proj"], propagation="exact", exponent=-1.0))
    assert len(model.base_model.propagation_graph.edges) == 4
    disturb(model)
    torch.testing.assert_close(model(ids()).logits, llama()(ids()).logits, rtol=1e-4, atol=1e-5)


def test_a_bound_holds_what_is_propagated_and_merges():
    model = get_peft_model(vit(), SanConfig(bound=0.25)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "san_scale" in name:
                parameter.fill_(3.0)
    layers = [m for m in model.modules() if isinstance(m, SanLayer) and m.get_input_scale() is not None]
    assert all(torch.allclose(m.get_input_scale(), torch.tensor(1.25), atol=1e-4) for m in layers)
    assert all(torch.equal(m.get_scale(), torch.full((m.out_features,), 4.0)) for m in layers)
    report = merge_and_verify(model)
    assert report.max_abs_difference <= report.tolerance
    with pytest.raises(SanError, match="bound must be positive"):
        SanConfig(bound=0.0)


def test_detach_changes_gradients_and_not_outputs():
    found = {}
    for detach in (False, True):
        model = get_peft_model(vit(), SanConfig(detach=detach)).train()
        disturb(model)
        out = model(image()).logits
        out.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if "san_" in n}
        found[detach] = out.detach(), grads
    torch.testing.assert_close(found[False][0], found[True][0])
    name = next(n for n in found[False][1] if "fc1" in n)
    assert not torch.allclose(found[False][1][name], found[True][1][name])


def test_gate_adds_a_vector_per_posterior_and_acts_where_something_is_propagated():
    model = get_peft_model(vit(), SanConfig(gate=True, propagation="exact")).eval()
    gates = {n: p for n, p in model.named_parameters() if "san_gate" in n}
    assert len(gates) == len(model.base_model.propagation_graph.edges) == 2
    before = model(image()).logits
    for gate in gates.values():
        gate.data.fill_(0.5)
    layer = layers_of(model)["vit.layers.0.attention.o_proj"]
    assert layer.get_input_scale().tolist() == [1.5] * 16
    assert not torch.allclose(model(image()).logits, before, rtol=1e-3)


def test_random_start_for_tests():
    model = get_peft_model(vit(), SanConfig(init_weights=False)).eval()
    assert not torch.equal(model(image()).logits, vit()(image()).logits)


@pytest.mark.parametrize("scheme", ["all", "exact", "feedforward", "reference", "none"])
def test_schemes(scheme):
    model = get_peft_model(vit(), SanConfig(propagation=scheme))
    expected = trace(vit()).select(scheme).edges
    assert model.base_model.propagation_graph.edges == expected


@pytest.mark.parametrize("form", ["graph", "json", "dict"])
def test_a_graph_of_ones_own(form):
    graph = PropagationGraph([Edge("vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc2", ChannelMap.identity(32))])
    value = {"graph": graph, "json": graph.to_json(), "dict": graph.to_dict()}[form]
    model = get_peft_model(vit(), SanConfig(target_modules=["fc1"], propagation=value))
    assert model.base_model.propagation_graph.edges == graph.edges


def test_plain_module_with_a_graph_or_none():
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 2))
    wired = get_peft_model(copy.deepcopy(net), SanConfig(propagation=trace(net, torch.randn(1, 4))))
    assert carrying(wired) == {"0", "2"}
    assert len(wired.base_model.propagation_graph.edges) == 1
    assert carrying(get_peft_model(net, SanConfig(propagation="none"))) == {"0", "2", "3"}


def test_half_precision_scales_near_one_are_kept():
    """A scale of 1.001 is lost in bfloat16, its offset from one is not."""
    model = get_peft_model(vit().bfloat16(), SanConfig(), autocast_adapter_dtype=False)
    layer = next(iter(layers_of(model).values()))
    layer.san_scale["default"].weight.data.fill_(0.001)
    assert layer.get_scale()[0].item() == pytest.approx(1.001, rel=1e-5)


# ------------------------------------------------------------------ PEFT's and transformers' other doors


def test_loading_never_traces(tmp_path, monkeypatch):
    model = get_peft_model(vit(), SanConfig(train_norms=True)).eval()
    disturb(model)
    model.save_pretrained(tmp_path)

    def refuse(*_):
        raise AssertionError("traced")

    module = sys.modules["san_peft.propagation.trace"]
    monkeypatch.setattr(module, "trace", refuse)
    again = PeftModel.from_pretrained(vit(), tmp_path).eval()
    assert torch.equal(again(image()).logits, model(image()).logits)


def test_auto_model_and_generate(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SanConfig(task_type="CAUSAL_LM")).eval()
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    first = model.generate(input_ids=ids(), **options)
    assert torch.equal(again.generate(input_ids=ids(), **options), first)
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)
    beams = model.generate(input_ids=ids(2), num_beams=2, adapter_names=["default", "__base__"], **options)
    assert beams.shape[0] == 2


def test_adapters_of_transformers_itself(tmp_path):
    model = llama()
    model.add_adapter(SanConfig(), adapter_name="mine")
    disturb(model, "mine")
    expected = model(ids()).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SAN"
    other = llama()
    other.load_adapter(str(tmp_path), adapter_name="theirs")
    torch.testing.assert_close(other.eval()(ids()).logits, expected)
    other.disable_adapters()
    assert torch.equal(other(ids()).logits, llama()(ids()).logits)


def test_trainer_resumes(tmp_path):
    """transformers' Trainer saves and resumes an adapter; the vectors go on from where they were."""
    data = [{"pixel_values": image(8)[i], "labels": i % 2} for i in range(8)]

    def run(steps: int, resume: bool) -> dict[str, torch.Tensor]:
        tf.set_seed(0)
        model = get_peft_model(vit(), SanConfig(modules_to_save=["classifier"]))
        arguments = tf.TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            label_names=["labels"],
            logging_strategy="no",
            lr_scheduler_type="constant",
        )
        tf.Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    run(2, False)
    resumed = run(4, True)
    whole = run(4, False)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(reentrant):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = get_peft_model(llama(), SanConfig())
        disturb(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if "san_" in n}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_registering_again_changes_nothing_and_another_method_is_refused():
    from san_peft.tuner import _peft

    _peft.register(SanConfig, san_peft.SanModel)
    with pytest.raises(RuntimeError, match="Another method named SAN"):
        _peft.register(PeftConfig, san_peft.SanModel)


def test_model_card_says_how_to_load(tmp_path):
    get_peft_model(vit(), SanConfig()).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import san_peft" in card
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_importing_in_either_order():
    for first, second in (("peft", "san_peft"), ("san_peft", "peft")):
        program = f"import {first}, {second}; print(*(t.value for t in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING))"
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert "SAN" in run.stdout.split()


def test_modes_refuse_nonsense():
    model = get_peft_model(vit(), SanConfig())
    with pytest.raises(SanError, match=r"Unknown mode 'neurons'; choose from both, neuron, synapse, off"):
        model.base_model.set_mode("neurons")
    model.merge_adapter()
    with pytest.raises(SanError, match=r"of 13 layers are merged"):
        model.base_model.set_mode("neuron")
