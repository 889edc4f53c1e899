"""Models of the recipes' sizes with random weights, their batches, and the methods that `gpu.py` measures."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from san_peft import SanConfig

RECIPE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@contextlib.contextmanager
def made_as(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Makes parameters on a device and in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def llama(small: bool, device: str, layers: int = 32, vocabulary: int = 128256) -> nn.Module:
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
    }
    if small:
        sizes |= {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 96}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    plain = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
    with made_as(device, torch.bfloat16):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **plain))


def llava(small: bool, device: str) -> nn.Module:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    side, vocabulary = 336, 32064
    if small:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        text = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
        side, vocabulary = 28, 96
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=side, patch_size=14),
        text_config=transformers.LlamaConfig(
            **text, vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False
        ),
        image_token_index=vocabulary - 1,
    )
    with made_as(device, torch.bfloat16):
        model = transformers.LlavaForConditionalGeneration(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def vit(small: bool, device: str, dtype: torch.dtype) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(num_labels=100, **({**sizes, "image_size": 32} if small else {}))
    with made_as(device, dtype):
        return transformers.ViTForImageClassification(config)


def texts(small: bool, device: str) -> dict[str, Tensor]:
    """Sixteen records of 244 tokens, as `benchmarks/recipes.py` makes them for the recipe."""
    shape, vocabulary = ((2, 16), 96) if small else ((16, 244), 128256)
    ids = torch.randint(0, vocabulary, shape, device=device)
    return {"input_ids": ids, "labels": ids}


def conversations(small: bool, device: str) -> dict[str, Tensor]:
    """Eight conversations about an image, one of the recipe's sixteen parts of a batch."""
    count, patches, length, side, vocabulary = (2, 4, 12, 28, 96) if small else (8, 576, 104, 336, 32064)
    ids = torch.randint(0, vocabulary - 1, (count, patches + length), device=device)
    ids[:, 1 : 1 + patches] = vocabulary - 1
    labels = ids.masked_fill(ids == vocabulary - 1, -100)
    pixels = torch.randn(count, 3, side, side, device=device, dtype=torch.bfloat16)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def images(small: bool, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    count, side = (2, 32) if small else (64, 224)
    pixels = torch.randn(count, 3, side, side, device=device, dtype=dtype)
    return {"pixel_values": pixels, "labels": torch.randint(0, 100, (count,), device=device)}


class Floor(nn.Module):
    """The frozen model, with one trained vector added to what the first block reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.offset = nn.Parameter(torch.zeros(model.config.hidden_size, device=next(model.parameters()).device))
        first = model.vit.embeddings if hasattr(model, "vit") else model.get_input_embeddings()
        first.register_forward_hook(lambda m, args, out: out + self.offset.to(out.dtype))

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)


Build = Callable[[nn.Module], nn.Module]


def builders(targets: list[str], rank: int, dropout: float, **shared: Any) -> dict[str, Build]:
    """Returns how each method's model is made of a frozen one."""

    def lora(**options: Any) -> peft.LoraConfig:
        size = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout}
        return peft.LoraConfig(target_modules=list(targets), **size, **shared, **options)

    def adapter(make: Callable[[], Any]) -> Build:
        return lambda model: peft.get_peft_model(model, make())

    return {
        "floor": Floor,
        "lora": adapter(lora),
        "san-lora": adapter(lambda: SanConfig(inner=lora())),
        "san": adapter(lambda: SanConfig(target_modules=list(targets), **shared)),
        "dora": adapter(lambda: lora(use_dora=True)),
        "san-dora": adapter(lambda: SanConfig(inner=lora(use_dora=True))),
    }


def shared_copy(base: nn.Module) -> nn.Module:
    """Returns a copy of a model that has the same parameters, not copies of them."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def storages(tensors: Iterator[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Stepper:
    """One method's model, optimizer and batch."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], device: str) -> None:
        self.model, self.batch, self.device = model.train(), batch, device
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0)
        self.run: Callable[..., Any] = self.model

    def step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.run(**self.batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self) -> float:
        """Seconds of one step."""
        synchronize()
        start = time.perf_counter()
        self.step()
        synchronize()
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """What one step does on a GPU: its peak memory, its kernels, its synchronizations."""
        facts: dict[str, Any] = {"trained": sum(p.numel() for p in self.trained)}
        if self.device != "cuda":
            return facts
        own = storages(iter(self.model.parameters()))
        for state in self.optimizer.state.values():
            own |= storages(t for t in state.values() if isinstance(t, Tensor) and t.is_cuda)
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        synchronize()
        facts["peak"] = sum(own.values()) + torch.cuda.max_memory_allocated() - before
        return {**facts, "synchronisations": waits(self.step), **kernels_of(self.step)}


def waits(run: Callable[[], None]) -> int:
    """Counts how often the host waits for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("called a synchronizing" in str(w.message) for w in caught)


def kernels_of(run: Callable[[], None]) -> dict[str, Any]:
    """Returns the number of kernels, their seconds, and the ten that take longest."""
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronize()
    seconds: Counter[str] = Counter()
    count = 0
    for event in profile.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            count += 1
            seconds[event.name()[:120]] += event.duration_ns() / 1e9
    longest = {name: round(value, 6) for name, value in seconds.most_common(10)}
    return {"kernels": count, "kernel_seconds": sum(seconds.values()), "longest": longest}
