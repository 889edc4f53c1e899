"""Times a training step of SAN and its peers side by side, and measures what each keeps for the backward pass.

    python benchmarks/step.py                                  # both shapes, eager: about a quarter of an hour
    python benchmarks/step.py --compile                        # compiled as well
    python benchmarks/step.py --shapes vit --rounds 5 --out runs/benchmarks

In each round every method makes one step (forward, backward, AdamW) right beside one of LoRA on the same batch, now
before it, now after it, in an order of methods that changes from round to round. What is reported is the median over
the rounds of the ratio of these two, so that a busy moment of the machine touches both alike. LoRA stands beside itself
too: its quartiles say how much of a difference is noise. All adapters sit on the same layers, every dense one but the
head.

| name | what is trained |
|---|---|
| floor | the input of the first block alone: the frozen network with the gradient passed through all its layers |
| san | scales, propagated along every traced edge |
| ssf | scales and shifts without propagation |
| lora, dora | PEFT's, rank 16 |
| ia3 | PEFT's, on its default places: keys, values (or the fused qkv) and the input of the second feed-forward layer |
| columns | SAN the naive way: the weight's rows and columns are scaled, as a copy, in every step |
| full | everything |

Peak memory is the largest sum of live tensors during one step, parameters and optimiser state included: on CUDA as the
allocator counts it, on the CPU from the profiler's record of every allocation.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import tyro
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils import parametrize

from san_bench.report.table import origin
from san_bench.run.build import saved_activation_bytes
from san_bench.run.provenance import provenance, write_atomically
from san_peft import SanConfig

RANK = 16


@dataclass(frozen=True)
class Shape:
    """A model to measure on: how it is made, its batch, and the names of its layers."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    dense: tuple[str, ...]
    ia3: tuple[str, ...]
    ia3_feedforward: tuple[str, ...]
    first: str
    what: str


def vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(num_labels=100)
    return transformers.ViTForImageClassification(config)


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=4096,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.randint(0, 100, (8,))}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(0, 4096, (2, 256))
    return {"input_ids": ids, "labels": ids}


SHAPES = {
    "vit": Shape(
        vit,
        images,
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        ("k_proj", "v_proj", "fc2"),
        ("fc2",),
        "vit.embeddings",
        "ViT-B/16, 8 images of 224x224",
    ),
    "llama": Shape(
        llama,
        tokens,
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("k_proj", "v_proj", "down_proj"),
        ("down_proj",),
        "model.embed_tokens",
        "four layers of LLaMA-3.2-1B's shape (width 2,048, 32 heads, 8 key-value heads), 2 sequences of 256 tokens",
    ),
}


class Scaled(nn.Module):
    """Parametrization of a weight that scales its rows and columns: a copy of the weight in every step."""

    def __init__(self, size: int, anteriors: list[tuple[Scaled, Tensor]]) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(size))
        self.anteriors = anteriors  # a plain list, so that a posterior owns no second copy

    def forward(self, weight: Tensor) -> Tensor:
        weight = (1 + self.offset)[:, None] * weight
        for anterior, index in self.anteriors:
            weight = weight * (1 + anterior.offset)[index]
        return weight


def columns(model: nn.Module, dense: tuple[str, ...]) -> nn.Module:
    """SAN on the same layers and edges, on weights in place of activations (the biases are left unscaled)."""
    adapter = peft.get_peft_model(copy.deepcopy(model), SanConfig(target_modules=list(dense)))
    edges = adapter.base_model.propagation_graph.edges
    model.requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if n.endswith(dense)}
    scaled = {n: Scaled(m.out_features, []) for n, m in layers.items()}
    for edge in edges:
        scaled[edge.posterior].anteriors.append((scaled[edge.anterior], edge.channels.index))
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", scaled[name])
    return model


class Floor(nn.Module):
    """The frozen model, with one trained vector added to what the first block reads."""

    def __init__(self, model: nn.Module, first: str) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.offset = nn.Parameter(torch.zeros(model.config.hidden_size))
        model.get_submodule(first).register_forward_hook(lambda m, args, out: out + self.offset)

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)


def on_dense(make: Callable[[list[str]], peft.PeftConfig]) -> Builder:
    """Builds a PEFT method that sits on every dense layer but the head."""
    return lambda model, shape: peft.get_peft_model(model, make(list(shape.dense)))


def ia3(model: nn.Module, shape: Shape) -> nn.Module:
    config = peft.IA3Config(target_modules=list(shape.ia3), feedforward_modules=list(shape.ia3_feedforward))
    return peft.get_peft_model(model, config)


def lora_config(dense: list[str], **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=dense, **options)


Builder = Callable[[nn.Module, Shape], nn.Module]
METHODS: dict[str, Builder] = {
    "floor": lambda model, shape: Floor(model, shape.first),
    "san": on_dense(lambda dense: SanConfig(target_modules=dense)),
    "ssf": on_dense(lambda dense: SanConfig(target_modules=dense, propagation="none", shift=True)),
    "lora": on_dense(lora_config),
    "dora": on_dense(lambda dense: lora_config(dense, use_dora=True)),
    "ia3": ia3,
    "columns": lambda model, shape: columns(model, shape.dense),
    "full": lambda model, shape: copy.deepcopy(model).requires_grad_(True),
}


class Stepper:
    """One method's model, optimiser and batch."""

    def __init__(self, build: Builder, base: nn.Module, shape: Shape, batch: dict[str, Tensor], compiled: bool) -> None:
        # frozen weights are shared between the methods, not copied
        self.model = build(copy.deepcopy(base, {id(p): p for p in base.parameters()}), shape).train()
        self.batch = batch
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.run = torch.compile(self.model) if compiled else self.model

    def step(self) -> None:
        self.run(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self) -> float:
        """Seconds of one step."""
        synchronize()
        start = time.perf_counter()
        self.step()
        synchronize()
        return time.perf_counter() - start

    def peak(self) -> int:
        """Bytes of live tensors at the fullest moment of a step, this method's parameters and state included."""
        own = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.model.parameters()}
        for state in self.optimizer.state.values():
            own |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return sum(own.values()) + torch.cuda.max_memory_allocated() - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            self.step()
        changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = highest = 0
        for event in sorted(changes, key=lambda e: e.start_ns()):
            live += event.nbytes()
            highest = max(highest, live)
        return sum(own.values()) + highest


@contextmanager
def silent() -> Iterator[None]:
    """Hides what the profiler's own library writes past Python."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    name: str,
    methods: dict[str, Builder],
    rounds: int,
    compiled: bool,
    seed: int,
    against: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measures one shape; returns what was measured by method.

    Args:
        name: Of the shape.
        methods: What to measure, with lora among it.
        rounds: How often.
        compiled: Whether the models are compiled.
        seed: Of the weights, the batch and the order.
        against: What a method is compared with where that is not lora.
    """
    against = {method: (against or {}).get(method, "lora") for method in methods}
    shape = SHAPES[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    base = shape.make().to(device)
    batch = {key: value.to(device) for key, value in shape.batch().items()}
    steppers = {m: Stepper(build, base, shape, batch, compiled) for m, build in methods.items()}
    saved = {m: saved_activation_bytes(s.model, batch) for m, s in steppers.items()}
    label = f"{name} {'compiled' if compiled else 'eager'}"
    for stepper in track(steppers.values(), description=f"{label}: warm-up"):
        for _ in range(2):
            stepper.step()
    peaks = {} if compiled and device == "cpu" else {m: s.peak() for m, s in steppers.items()}
    gc.collect()
    order, rng = list(methods), random.Random(seed)
    seconds: dict[str, list[float]] = {m: [] for m in methods}
    ratios: dict[str, list[float]] = {m: [] for m in methods}
    for number in track(range(rounds), description=f"{label}: rounds"):
        rng.shuffle(order)
        for method in order:
            pair = [steppers[method], steppers[against[method]]]
            own, other = (s.timed() for s in pair) if number % 2 else [s.timed() for s in pair[::-1]][::-1]
            seconds[method].append(own)
            ratios[method].append(own / other)
    rows = {}
    for method in methods:
        low, _, high = statistics.quantiles(ratios[method], n=4)
        rows[method] = {
            "trained": steppers[method].trained,
            "against": against[method],
            "ratio": statistics.median(ratios[method]),
            "ratio_quartiles": [low, high],
            "seconds": statistics.median(seconds[method]),
            "saved_activations": saved[method],
            "saved_ratio": saved[method] / saved[against[method]],
            "peak": peaks.get(method),
        }
    facts = {"shape": name, "what": shape.what, "compiled": compiled, "rounds": rounds, "seed": seed}
    return {**facts, "methods": rows}


def table(result: dict[str, Any]) -> str:
    """Writes a result as a Markdown table."""
    head = f"{result['what']}; {'compiled' if result['compiled'] else 'eager'}; n = {result['rounds']} rounds"
    lines = [
        head,
        "",
        "| method | trained | against | step / its (quartiles) | step, s "
        "| saved activations, MiB | / its | peak, MiB |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for method, row in result["methods"].items():
        low, high = row["ratio_quartiles"]
        peak = "" if row["peak"] is None else f"{row['peak'] / 2**20:,.0f}"
        lines.append(
            f"| {method} | {row['trained']:,} | {row['against']} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['seconds']:.2f} | {row['saved_activations'] / 2**20:,.0f} | {row['saved_ratio']:.2f} | {peak} |"
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Options:
    """Times training steps side by side."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Of vit and llama."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods; lora must be among them, it is what the others are compared with."""
    rounds: int = 8
    """Rounds of two steps per method, its own and one of LoRA; an even number is fair to both orders."""
    compile: bool = False
    """Measure compiled models too."""
    seed: int = 0
    """Of the weights, the batch and the order."""
    out: Path = Path("runs/benchmarks")
    """Folder of step.json and step.md."""


def run(options: Options, methods: dict[str, Builder], against: dict[str, str], name: str) -> None:
    """Measures methods on all shapes, and writes JSON and tables to a folder."""
    unknown = [m for m in options.methods if m not in methods] + [s for s in options.shapes if s not in SHAPES]
    chosen = {m: methods[m] for m in methods if m in options.methods}
    missing = {against.get(m, "lora") for m in chosen} - chosen.keys()
    if unknown or missing:
        raise SystemExit(
            f"Unknown: {unknown or 'none'}; missing, because others are compared with them: {missing or 'none'}. "
            f"Methods are {', '.join(methods)}; shapes {', '.join(SHAPES)}."
        )
    results = []
    for compiled in (False, True) if options.compile else (False,):
        for shape in options.shapes:
            results.append(measure(shape, chosen, options.rounds, compiled, options.seed, against))
            gc.collect()
            print("\n" + table(results[-1]), flush=True)
    command = " ".join(["python", *sys.argv])
    now = {"run": name, "finished": datetime.now(UTC).isoformat(timespec="seconds"), "resumed_from_step": 0}
    facts = {"command": command, "results": results, **now, **provenance()}
    write_atomically(options.out / f"{name}.json", json.dumps(facts, indent=2) + "\n")
    tables = "\n".join(table(result) for result in results)
    write_atomically(options.out / f"{name}.md", f"{tables}\n{origin([facts], command)}\n")
    print(options.out / f"{name}.md")


if __name__ == "__main__":
    run(tyro.cli(Options), METHODS, {}, "step")
