"""One process of several that train the same small LLaMA; `test_distributed.py` starts it and reads what it writes."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from san_peft import SanConfig, SanError, TraceError, merge_and_verify

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HOSTS: dict[str, Callable[[], SanConfig]] = {
    "own": lambda: SanConfig(target_modules=TARGETS),
    "late": lambda: SanConfig(target_modules=TARGETS),
    "lora": lambda: SanConfig(inner=LoraConfig(r=3, target_modules=TARGETS)),
    "feature": lambda: SanConfig(inner=LoraConfig(r=3, target_modules=TARGETS), decomposition="feature"),
    "dora": lambda: SanConfig(inner=LoraConfig(r=3, use_dora=True, target_modules=TARGETS)),
    "half": lambda: SanConfig(inner=LoraConfig(r=3, target_modules=TARGETS)),
    "loha": lambda: SanConfig(inner=LoHaConfig(r=2, target_modules=TARGETS)),
    "gpt2": lambda: SanConfig(inner=LoraConfig(r=3, fan_in_fan_out=True, target_modules=["c_attn", "c_fc", "c_proj"])),
}
STEPS, BATCH = 3, 4


def base_model(host: str) -> PreTrainedModel:
    """A LLaMA, or a GPT-2 for its transposed weights, in float64 (there rounding is no excuse) or bfloat16."""
    torch.manual_seed(0)
    if host == "gpt2":
        quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 50}
        return GPT2LMHeadModel(GPT2Config(**size, **quiet, initializer_range=0.2)).double()
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=50,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16 if host == "half" else torch.float64)


def build(host: str) -> PeftModel:
    """The model with an adapter that has moved from its start, where half of LoRA's gradients are zero."""
    torch.manual_seed(1)
    base = base_model(host)
    known = patch.object(import_module("san_peft.propagation.trace"), "derive_inputs", side_effect=TraceError("late"))
    with known if host == "late" else nullcontext():  # it is wired in its first forward pass
        model = get_peft_model(base, HOSTS[host]())
    assert (model.peft_config["default"].edges is None) == (host == "late")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batches(rank: int, world: int) -> Iterator[Tensor]:
    """This process's part of every global batch."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS + 1):
        yield torch.randint(0, 50, (BATCH, 8), generator=generator)[rank::world]


def gather(tensor: Tensor) -> Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def train(model: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Trains and returns losses, first gradients, outputs between and after the last steps, and final parameters."""
    static = getattr(model, "static_graph", False)  # checkpointing is off in eval mode, which would change the graph
    found: dict[str, Tensor] = {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    probe = torch.arange(1, 9)[None]
    losses = []
    model.train()
    for step, ids in enumerate(batches(rank, world)):
        if step == STEPS:
            model.train(static)  # eval mode, and then trained further: nothing kept for generation may go stale
            with torch.no_grad():
                found["out.before"] = model(input_ids=probe).logits
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            found |= {f"grad.{plain(n)}": gather(p.grad) for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with torch.no_grad():
        found["out.after"] = model(input_ids=probe).logits
    found |= {f"last.{plain(n)}": gather(p) for n, p in model.named_parameters() if p.requires_grad}
    mean = torch.stack(losses)
    if world > 1:
        dist.all_reduce(mean)
    return {**found, "losses": mean / world}


def plain(name: str) -> str:
    return name.removeprefix("module.")


# ------------------------------------------------------------------ how the model is spread


def ddp(model: PeftModel, **options: bool) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def accelerate_ddp(model: PeftModel) -> nn.Module:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_model(model)


def fsdp(model: PeftModel) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    base = model.base_model.model
    for block in base.transformer.h if hasattr(base, "transformer") else base.model.layers:
        fully_shard(block)
    return fully_shard(model)


def accelerate_fsdp(model: PeftModel) -> nn.Module:
    """What accelerate does with FSDP2 and PEFT's policy, past its refusal of the CPU."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=fsdp_auto_wrap_policy(model), cpu_ram_efficient_loading=False
    )
    stand_in: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(stand_in, model)


def checkpointed(reentrant: bool) -> Callable[[PeftModel], PeftModel]:
    def switch(model: PeftModel) -> PeftModel:
        if reentrant:
            model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    return switch


SPREAD: dict[str, Callable[[PeftModel], nn.Module]] = {
    "ddp": ddp,
    "accelerate-ddp": accelerate_ddp,
    "fsdp": fsdp,
    "accelerate-fsdp": accelerate_fsdp,
    "ddp-checkpointed": lambda model: ddp(checkpointed(False)(model)),
    "ddp-reentrant": lambda model: ddp(checkpointed(True)(model), static_graph=True),
    "fsdp-checkpointed": lambda model: fsdp(checkpointed(False)(model)),
    "fsdp-reentrant": lambda model: fsdp(checkpointed(True)(model)),
}
CASES = [(spread, host) for spread in ("ddp", "fsdp", "accelerate-fsdp") for host in ("own", "lora", "feature", "dora")]
CASES += [
    ("fsdp", "gpt2"),
    ("ddp", "late"),
    ("accelerate-ddp", "lora"),
    ("ddp-checkpointed", "lora"),
    ("ddp-reentrant", "lora"),
    ("fsdp-reentrant", "lora"),
]
CASES += [("fsdp-checkpointed", host) for host in ("own", "lora")]


def save_gathered(model: PeftModel, folder: Path) -> None:
    """Gathers the adapter of a sharded model on the first process, which saves it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder), state_dict=tensors)


def refusals() -> dict[str, str]:
    """What is refused, with the message."""
    found = {}
    sharded = fsdp(build("lora"))
    try:
        merge_and_verify(sharded)
    except SanError as error:
        found["merge"] = str(error)
    try:
        get_peft_model(sharded.unload(), HOSTS["own"]())
    except SanError as error:
        found["inject"] = str(error)
    try:
        train(fsdp(build("loha")), dist.get_rank(), dist.get_world_size())
    except SanError as error:
        found["delta"] = str(error)
    try:
        train(fsdp(build("late")), dist.get_rank(), dist.get_world_size())
    except SanError as error:
        found["late"] = str(error)
    reentrant = ddp(checkpointed(True)(build("lora")))
    try:
        train(reentrant, dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        found["ddp-reentrant"] = str(error)
    return found


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    report: dict[str, Any] = {}
    for spread, host in [*CASES, ("fsdp", "half")]:
        name = f"{spread}-{host}"
        try:
            model = build(host)
            spread_out = SPREAD[spread](model)
            sharded = {isinstance(parameter, DTensor) for parameter in model.parameters()}
            assert sharded == {"fsdp" in spread}, sharded
            found = train(spread_out, rank, world)
            if "fsdp" in spread:
                save_gathered(model, out / name)
            if rank == 0:
                save_file({k: v.contiguous() for k, v in found.items()}, out / f"{name}.safetensors")
        except Exception:
            report[name] = traceback.format_exc()
    report["refusals"] = refusals()
    if rank == 0:
        (out / "report.json").write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
