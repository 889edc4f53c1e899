"""Generating with several adapters in one batch, and folders that other programs load without SAN."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tests.contract.nets import disturb
from tests.golden.models import MODELS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from san_peft import SanConfig, merge_and_verify, save_as_lora

IDS = torch.randint(0, 50, (4, 5), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
BEAMS = {**GREEDY, "num_beams": 3}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            vocab_size=50,
        )
    ).eval()


def adapted(**options) -> PeftModel:
    model = get_peft_model(llama(), SanConfig(task_type="CAUSAL_LM", **options)).eval()
    disturb(model, size=0.5)
    return model


def several() -> PeftModel:
    """A model with a scale of its own, another one, and one over LoRA."""
    model = adapted(target_modules=TARGETS)
    model.add_adapter("second", SanConfig(task_type="CAUSAL_LM", target_modules=TARGETS))
    model.add_adapter("hosted", SanConfig(task_type="CAUSAL_LM", inner=LoraConfig(r=2), target_modules=TARGETS))
    disturb(model, "second", seed=1, size=0.5)
    disturb(model, "hosted", seed=2, size=0.5)
    return model.eval()


def alone(model: PeftModel, names: list[str], options: dict) -> list[Tensor]:
    """What every sample's adapter generates for that sample by itself."""
    out = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                out.append(model.generate(input_ids=IDS[row : row + 1], **options)[0])
        else:
            model.set_adapter(name)
            out.append(model.generate(input_ids=IDS[row : row + 1], **options)[0])
    return out


# ---------------------------------------------------------------------- generating


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_one_batch_of_several_adapters_generates_what_each_does_alone(options):
    model = several()
    names = ["hosted", "__base__", "default", "second"]
    expected = alone(model, names, options)
    mixed = model.generate(input_ids=IDS, adapter_names=names, **options)
    for row, one in enumerate(expected):
        assert torch.equal(mixed[row, : len(one)], one), names[row]
    same = [model.generate(input_ids=IDS, adapter_names=["default"] * 4, **options)[0], mixed[0]]
    assert not torch.equal(*same), "the adapters differ in what they generate"


def test_a_trained_head_follows_the_beams_of_its_sample():
    model = adapted(target_modules=TARGETS, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(torch.randn(50, 32))
    names = ["default", "__base__", "default", "__base__"]
    expected = alone(model, names, BEAMS)
    mixed = model.generate(input_ids=IDS, adapter_names=names, **BEAMS)
    for row, one in enumerate(expected):
        assert torch.equal(mixed[row, : len(one)], one), row


def test_a_weighted_adapter_generates_beside_those_it_was_made_of():
    model = several()
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    names = ["mean", "default", "second", "mean"]
    expected = alone(model, names, GREEDY)
    mixed = model.generate(input_ids=IDS, adapter_names=names, **GREEDY)
    assert all(torch.equal(row[: len(one)], one) for row, one in zip(mixed, expected, strict=True))


# ---------------------------------------------------------------------- folders for servers


def names_and_shapes(folder: Path) -> dict[str, tuple[str, list[int]]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {k: (tensors.get_slice(k).get_dtype(), tensors.get_slice(k).get_shape()) for k in tensors.keys()}
    return found


def stable(config: Path) -> dict:
    return {k: v for k, v in json.loads(config.read_text(encoding="utf-8")).items() if not k.startswith("_")}


def run(program: str) -> None:
    """Runs a program in a fresh process."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


HOSTS = {"own": None, "lora": LoraConfig(r=2), "dora": LoraConfig(r=2, use_dora=True)}


@pytest.mark.slow
def test_the_merged_folder_is_one_of_the_architecture(tmp_path):
    """The same files, tensors and configuration as of the plain model; transformers alone loads it."""
    llama().save_pretrained(tmp_path / "plain")
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    before = {}
    for name, inner in HOSTS.items():
        folder = tmp_path / name
        model = adapted(target_modules=TARGETS, inner=inner)
        with torch.no_grad():
            before[name] = model(input_ids=IDS).logits
        merge_and_verify(model).model.save_pretrained(folder)
        assert sorted(p.name for p in folder.iterdir()) == files
        assert names_and_shapes(folder) == names_and_shapes(tmp_path / "plain")
        assert stable(folder / "config.json") == stable(tmp_path / "plain/config.json")
    run(f"""
import sys, torch
from transformers import LlamaForCausalLM
for name in {list(HOSTS)}:
    folder = {str(tmp_path)!r} + "/" + name
    model, loading = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    with torch.no_grad():
        torch.save(model.eval()(input_ids=torch.tensor({IDS.tolist()})).logits, folder + ".pt")
assert not {{"peft", "san_peft"}} & set(sys.modules), "nothing of PEFT is needed"
""")
    for name, expected in before.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "gpt2", "qwen2"])
def test_merged_folders_of_other_architectures(name, tmp_path):
    torch.manual_seed(0)
    base = MODELS[name]()
    base.save_pretrained(tmp_path / "plain")
    model = get_peft_model(base, SanConfig()).eval()
    disturb(model)
    merge_and_verify(model).model.save_pretrained(tmp_path / "merged")
    assert names_and_shapes(tmp_path / "merged") == names_and_shapes(tmp_path / "plain")
    assert stable(tmp_path / "merged/config.json") == stable(tmp_path / "plain/config.json")


# What servers read of a LoRA's configuration; of the rest they take the value that changes nothing, or refuse.
READ = {"r", "lora_alpha", "target_modules", "peft_type", "task_type", "base_model_name_or_path", "inference_mode"}


@pytest.mark.slow
def test_the_closest_lora_is_one_that_servers_load(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    before = {}
    cases = [("own", 4), ("own", 40), ("lora", 40)]  # more than any of these layers has: nothing is lost
    for name, rank in cases:
        folder = tmp_path / f"{name}-{rank}"
        model = adapted(target_modules=TARGETS, inner=HOSTS[name])
        report = save_as_lora(model, folder, rank)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        default = json.loads(json.dumps(LoraConfig().to_dict()))
        assert {k for k, v in config.items() if k not in READ and v != default.get(k)} <= {"peft_version"}
        assert (config["r"], config["lora_alpha"], config["lora_bias"]) == (rank, rank, False)
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {k.rpartition(".lora_")[2] for k in tensors} == {"A.weight", "B.weight"}
        assert {v.shape[0] if ".lora_A." in k else v.shape[1] for k, v in tensors.items()} == {rank}
        layers = {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in tensors}
        assert layers == set(config["target_modules"])
        assert (report.error > 0.01) is (rank == 4)
        if rank == 40:
            with torch.no_grad():
                before[folder.name] = model(input_ids=IDS).logits
    run(f"""
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
for name in {[f"{name}-{rank}" for name, rank in cases]}:
    folder = {str(tmp_path)!r} + "/"
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder + "base"), folder + name).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor({IDS.tolist()})).logits, folder + name + ".pt")
assert "san_peft" not in sys.modules
""")
    for name, expected in before.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_merged_model_generates_what_the_adapter_did(tmp_path):
    model = adapted(target_modules=TARGETS, inner=LoraConfig(r=2))
    before = model.generate(input_ids=IDS, **BEAMS)
    merge_and_verify(model).model.save_pretrained(tmp_path)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).generate(input_ids=IDS, **BEAMS), before)
