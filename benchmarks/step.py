"""Times a training step of SAN and its peers side by side, and measures what each keeps for the backward pass.

    python benchmarks/step.py                                  # both shapes, eager: about a quarter of an hour
    python benchmarks/step.py --compile                        # compiled as well
    python benchmarks/step.py --dtype bfloat16 --out runs/bfloat16    # bfloat16 weights and autocast, float32 adapters
    python benchmarks/step.py --shapes vit --rounds 5 --out runs/benchmarks
    python benchmarks/step.py --small --rounds 2               # tiny models, to try the script

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

The host time is that of the same step on a tiny model of the same structure and number of blocks, width 64, whose
tensors are so small that the time of Python and of dispatching operations is all that counts; an accelerator waits for
it where its kernels are short. AdamW is the `foreach` one there, as on an accelerator.

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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import tyro
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity

from san_bench.models.adapt import saved_activation_bytes
from san_bench.report.tables.table import origin
from san_bench.run.provenance import provenance, write_atomically
from san_peft import SanConfig

RANK = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Goals = dict[str, tuple[float, float]]
GOALS: Goals = {"san": (0.93, 1.0)}
"""Largest ratios of a method's step and of its saved activations to those of the method it is compared with."""

Batch = dict[str, Tensor]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Shape:
    """A model to measure on: how it is made, its batch, its tiny twin, and the names of its layers."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    tiny: Callable[[], nn.Module]
    tiny_batch: Callable[[], Batch]
    dense: tuple[str, ...]
    ia3: tuple[str, ...]
    ia3_feedforward: tuple[str, ...]
    first: str
    what: str


def vit(**sizes: int) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(num_labels=100, **sizes)
    return transformers.ViTForImageClassification(config)


def llama(**sizes: int) -> nn.Module:
    import transformers

    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 4096}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(**{**shape, **heads, **sizes}, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def images(count: int = 8, side: int = 224) -> Batch:
    return {"pixel_values": torch.randn(count, 3, side, side), "labels": torch.randint(0, 100, (count,))}


def tokens(sequences: int = 2, length: int = 256) -> Batch:
    ids = torch.randint(0, 4096, (sequences, length))
    return {"input_ids": ids, "labels": ids}


SHAPES = {
    "vit": Shape(
        vit, images,
        lambda: vit(hidden_size=64, intermediate_size=256, num_attention_heads=4, image_size=32),
        lambda: images(2, 32),
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), ("k_proj", "v_proj", "fc2"), ("fc2",), "vit.embeddings",
        "ViT-B/16, 8 images of 224x224",
    ),
    "llama": Shape(
        llama, tokens,
        lambda: llama(hidden_size=64, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2),
        lambda: tokens(2, 8),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("k_proj", "v_proj", "down_proj"), ("down_proj",), "model.embed_tokens",
        "four layers of LLaMA-3.2-1B's shape (width 2,048, 32 heads, 8 key-value heads), 2 sequences of 256 tokens",
    ),
}  # fmt: skip


class Scaled(nn.Module):
    """Parametrization of a weight that scales its rows and columns: a copy of the weight in every step."""

    def __init__(self, size: int, anteriors: list[tuple[Scaled, Tensor]]) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(size))
        self.anteriors = anteriors  # a plain list, so that a posterior owns no second copy

    def forward(self, weight: Tensor) -> Tensor:
        scaled = (1 + self.offset)[:, None] * weight
        for anterior, index in self.anteriors:
            scaled = scaled * (1 + anterior.offset)[index]
        return scaled.to(weight.dtype)


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
        model.get_submodule(first).register_forward_hook(lambda m, args, out: out + self.offset.to(out.dtype))

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
    """One method's model, optimiser and batch. On bfloat16 weights it runs under autocast."""

    def __init__(self, model: nn.Module, batch: Batch, half: bool, compiled: bool = False, **adamw: bool) -> None:
        self.model, self.batch = model.train(), batch
        self.autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=half)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, **adamw)
        self.run = torch.compile(self.model) if compiled else self.model

    def step(self) -> None:
        with self.autocast():
            loss = self.run(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved(self) -> int:
        """Bytes that the forward pass keeps for the backward pass."""
        with self.autocast():
            return saved_activation_bytes(self.model, self.batch)

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
        with silent(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
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
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Options:
    """Times training steps side by side."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Of vit and llama."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods; lora must be among them, it is what the others are compared with."""
    rounds: int = 8
    """Rounds of two steps per method, its own and one of LoRA; an even number is fair to both orders."""
    dtype: Dtype = "float32"
    """Of the frozen weights. bfloat16 runs under bfloat16 autocast, with float32 adapters as PEFT makes them."""
    host_rounds: int = 20
    """Rounds of the host time; 0 leaves it out."""
    compile: bool = False
    """Measure compiled models too, without their host time."""
    small: bool = False
    """Measure tiny models, to try the script."""
    seed: int = 0
    """Of the weights, the batch and the order."""
    out: Path = Path("runs/benchmarks")
    """Folder of step.json and step.md."""


def steppers_of(methods: dict[str, Builder], shape: Shape, dtype: Dtype, seed: int, **kind: Any) -> dict[str, Stepper]:
    """Returns a stepper for each method, all of them on the same frozen weights and the same batch."""
    torch.manual_seed(seed)
    base = shape.make().to(DEVICE, DTYPES[dtype])
    batch = {key: v.to(DEVICE, DTYPES[dtype] if v.is_floating_point() else v.dtype) for key, v in shape.batch().items()}
    copies = {
        m: copy.deepcopy(base, {id(p): p for p in base.parameters()}) for m in methods
    }  # frozen weights are shared
    return {m: Stepper(methods[m](net, shape), batch, dtype == "bfloat16", **kind) for m, net in copies.items()}


Pairs = dict[str, list[tuple[float, float]]]


def paired(steppers: dict[str, Stepper], against: dict[str, str], rounds: int, seed: int, label: str) -> Pairs:
    """Times each method's step right beside one of the method it is compared with; returns both times by method."""
    order, rng = list(steppers), random.Random(seed)
    pairs: Pairs = {m: [] for m in steppers}
    for number in track(range(rounds), description=label):
        rng.shuffle(order)
        for method in order:
            pair = [steppers[method], steppers[against[method]]]
            own, other = (s.timed() for s in pair) if number % 2 else [s.timed() for s in pair[::-1]][::-1]
            pairs[method].append((own, other))
    return pairs


def summary(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Returns the median ratio of pairs of times, its quartiles, and the median of the first of the two."""
    ratios = [own / other for own, other in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    median = statistics.median
    return {"ratio": median(ratios), "ratio_quartiles": [low, high], "seconds": median(own for own, _ in pairs)}


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Computes in one thread, which for the smallest of tensors is faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(
    name: str, methods: dict[str, Builder], options: Options, against: dict[str, str], goals: Goals, compiled: bool
) -> dict[str, Any]:
    """Measures one shape; returns what was measured by method.

    Args:
        name: Of the shape.
        methods: What to measure, with lora among it.
        options: Rounds, dtype, seed and sizes.
        against: What a method is compared with where that is not lora.
        goals: Largest ratios of step and saved activations, by method.
        compiled: Whether the models are compiled.
    """
    against, dtype, seed = {m: against.get(m, "lora") for m in methods}, options.dtype, options.seed
    tiny = replace(SHAPES[name], make=SHAPES[name].tiny, batch=SHAPES[name].tiny_batch, what=f"tiny {name}")
    shape = tiny if options.small else SHAPES[name]
    label = f"{name} {'compiled' if compiled else 'eager'} {dtype}"
    host = {}
    if options.host_rounds and not compiled:
        with one_thread():
            steppers = steppers_of(methods, tiny, dtype, seed, foreach=True)
            warm_up(steppers, label)
            pairs = paired(steppers, against, options.host_rounds, seed, f"{label}: host time")
        host = {m: summary(p) for m, p in pairs.items()}
    steppers = steppers_of(methods, shape, dtype, seed, compiled=compiled)
    saved = {m: s.saved() for m, s in steppers.items()}
    warm_up(steppers, label)
    peaks = {} if compiled and DEVICE == "cpu" else {m: s.peak() for m, s in steppers.items()}
    pairs = paired(steppers, against, options.rounds, seed, f"{label}: rounds")
    rows = {}
    for method in methods:
        times, saved_ratio, goal = summary(pairs[method]), saved[method] / saved[against[method]], goals.get(method)
        rows[method] = {
            "trained": steppers[method].trained,
            "against": against[method],
            **times,
            "host": host.get(method),
            "saved_activations": saved[method],
            "saved_ratio": saved_ratio,
            "peak": peaks.get(method),
            "goal": goal,
            "met": None if goal is None else times["ratio"] <= goal[0] and saved_ratio <= goal[1],
        }
    facts = {"shape": name, "what": shape.what, "compiled": compiled, "dtype": dtype, "rounds": options.rounds}
    return {**facts, "seed": seed, "host_rounds": options.host_rounds if host else 0, "methods": rows}


def warm_up(steppers: dict[str, Stepper], label: str) -> None:
    for stepper in track([*steppers.values()] * 2, description=f"{label}: warm-up"):
        stepper.step()
    gc.collect()


def table(result: dict[str, Any]) -> str:
    """Writes a result as a Markdown table."""
    kind = "float32" if result["dtype"] == "float32" else "bfloat16 weights and autocast, float32 adapters"
    kind += f"; {'compiled' if result['compiled'] else 'eager'}; n = {result['rounds']} rounds"
    kind += f", {result['host_rounds']} for the host time" if result["host_rounds"] else ""
    lines = [
        f"{result['what']}; {kind}\n",
        "| method | trained | against | step / its (quartiles) | step, s | host time / its (quartiles) "
        "| saved activations, MiB | / its | peak, MiB | goal: step, saved |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for method, row in result["methods"].items():
        peak = "" if row["peak"] is None else f"{row['peak'] / 2**20:,.0f}"
        met = "met" if row["met"] else "missed"
        goal = "" if row["goal"] is None else "{:.2f}, {:.2f}: ".format(*row["goal"]) + met
        lines.append(
            f"| {method} | {row['trained']:,} | {row['against']} | {spread(row)} | {row['seconds']:.2f} "
            f"| {spread(row['host']) if row['host'] else ''} | {row['saved_activations'] / 2**20:,.0f} "
            f"| {row['saved_ratio']:.2f} | {peak} | {goal} |"
        )
    return "\n".join(lines) + "\n"


def spread(row: dict[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"


def run(options: Options, methods: dict[str, Builder], against: dict[str, str], name: str, goals: Goals) -> None:
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
            with one_thread(options.small):
                results.append(measure(shape, chosen, options, against, goals, compiled))
            print("\n" + table(results[-1]), flush=True)
    command = " ".join(["python", *sys.argv])
    now = {"run": name, "finished": datetime.now(UTC).isoformat(timespec="seconds"), "resumed_from_step": 0}
    facts = {"command": command, "results": results, **now, **provenance()}
    write_atomically(options.out / f"{name}.json", json.dumps(facts, indent=2) + "\n")
    tables = "\n".join(map(table, results))
    write_atomically(options.out / f"{name}.md", f"{tables}\n{origin([facts], command)}\n")
    print(options.out / f"{name}.md")


if __name__ == "__main__":
    run(tyro.cli(Options), METHODS, {}, "step", GOALS)
