"""Train SAN over LoRA with FSDP2: in one process, or with `torchrun --nproc-per-node 2 examples/fsdp.py`."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from san_peft import SanConfig


def pretrained() -> LlamaForCausalLM:
    torch.manual_seed(0)  # in place of a pretrained model
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=50))


def main() -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("nccl" if gpu else "gloo")
    else:
        dist.init_process_group("nccl" if gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    config = SanConfig(inner=LoraConfig(r=4, target_modules="all-linear"), task_type="CAUSAL_LM")
    model = get_peft_model(pretrained().to(device), config)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    rows = torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(1))[rank::world].to(device)
    for step in range(10):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 3 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict=tensors)
            PeftModel.from_pretrained(pretrained(), folder)
            print(f"saved from {world} ranks, loaded in one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
