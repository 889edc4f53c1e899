"""Times merging and unmerging of SAN and of LoRA side by side, and measures what a merge adds to the memory.

    python benchmarks/merging.py                               # both shapes and types: some minutes
    python benchmarks/merging.py --shapes vit --rounds 4 --cycles 1000

TRL merges and unmerges at every step to hand the weights to vLLM, so this has to be quick, lean, and to leave the
frozen weights as they are. In each round every method makes one cycle (merge, unmerge) right beside one of LoRA, now
before it, now after it. What is reported:

| column | what it is |
|---|---|
| merge + unmerge / lora's | median over the rounds of the ratio of these two, with its quartiles |
| extra / adapted | largest sum of live tensors in one merge, less what was there before, over the adapted weights |
| the same in merge_and_unload | the same where nothing is kept, beside the weights that were replaced |
| identical | whether all weights have the bits that they had, after the cycles |

All adapters sit on the same layers, every dense one but the head, with random vectors.
"""

from __future__ import annotations

import copy
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import tyro
from rich.progress import track
from step import SHAPES as STEP_SHAPES
from step import lora_config, silent, synchronize
from torch import nn

from san_bench.report.tables.table import origin
from san_bench.run.provenance import provenance, write_atomically
from san_peft import SanConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A model to merge into: how it is made, and the names of its layers."""

    make: Callable[[], nn.Module]
    dense: tuple[str, ...]
    what: str


SHAPES = {
    name: Shape(
        shape.make, shape.dense, shape.what.partition(",")[0] if name == "vit" else shape.what.rpartition(",")[0]
    )
    for name, shape in STEP_SHAPES.items()
    if name in ("vit", "llama")
}

METHODS: dict[str, Callable[[list[str]], peft.PeftConfig]] = {
    "san": lambda dense: SanConfig(target_modules=dense),
    "san-lora": lambda dense: SanConfig(target_modules=dense, inner=lora_config(dense)),
    "lora": lora_config,
}


class Merger:
    """One method's model."""

    def __init__(self, config: peft.PeftConfig, base: nn.Module) -> None:
        # frozen weights are shared between the methods, not copied; merging puts others in the place of their data
        self.model = peft.get_peft_model(copy.deepcopy(base, {id(p): p for p in base.parameters()}), config).eval()
        own = [p for n, p in self.model.named_parameters() if "san_" in n or "lora_" in n]
        with torch.no_grad():
            for parameter in own:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        layers = [m for m in self.model.modules() if hasattr(m, "base_layer") and isinstance(m.base_layer, nn.Linear)]
        self.adapted = sum(m.base_layer.weight.nbytes for m in layers)

    def cycle(self) -> None:
        self.model.merge_adapter()
        self.model.unmerge_adapter()

    def timed(self) -> float:
        """Seconds of one cycle."""
        synchronize()
        start = time.perf_counter()
        self.cycle()
        synchronize()
        return time.perf_counter() - start

    def extra(self) -> float:
        """What one merge adds to the memory at its fullest moment, over the adapted weights."""
        highest = peak(self.model.merge_adapter)
        self.model.unmerge_adapter()
        return highest / self.adapted

    def extra_unload(self) -> float:
        """The same of a merge that keeps nothing, of a copy: the profiler sees no end of what began before it."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        return (peak(lambda: copy.deepcopy(self.model).merge_and_unload()) - held) / self.adapted


def peak(call: Callable[[], Any]) -> int:
    """Bytes of live tensors at the fullest moment of a call, beyond those before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n and "san_" not in n]


def measure(name: str, shape: Shape, dtype: str, methods: dict[str, Any], rounds: int, cycles: int, seed: int) -> Any:
    """Measures one shape in one type; returns what was measured by method."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    base = shape.make().to(device, DTYPES[dtype]).requires_grad_(False)
    mergers, extra, unloaded, identical = {}, {}, {}, {}
    for method, config in track(methods.items(), description=f"{name} {dtype}: memory and bits"):
        # LoRA writes into the frozen weights themselves, so each method gets its own for this
        merger = Merger(config(list(shape.dense)), copy.deepcopy(base))
        before = bits(merger.model)
        extra[method], unloaded[method] = merger.extra(), merger.extra_unload()
        for _ in range(cycles):
            merger.cycle()
        identical[method] = all(torch.equal(a, b) for a, b in zip(bits(merger.model), before, strict=True))
        del merger, before
        gc.collect()
        mergers[method] = Merger(config(list(shape.dense)), base if method != "lora" else copy.deepcopy(base))
        mergers[method].cycle()
    order, rng = list(methods), random.Random(seed)
    seconds: dict[str, list[float]] = {m: [] for m in methods}
    ratios: dict[str, list[float]] = {m: [] for m in methods}
    for number in track(range(rounds), description=f"{name} {dtype}: rounds"):
        rng.shuffle(order)
        for method in order:
            pair = [mergers[method], mergers["lora"]]
            own, other = (m.timed() for m in pair) if number % 2 else [m.timed() for m in pair[::-1]][::-1]
            seconds[method].append(own)
            ratios[method].append(own / other)
    rows = {}
    for method in methods:
        low, _, high = statistics.quantiles(ratios[method], n=4)
        rows[method] = {
            "ratio": statistics.median(ratios[method]),
            "ratio_quartiles": [low, high],
            "seconds": statistics.median(seconds[method]),
            "extra": extra[method],
            "extra_unload": unloaded[method],
            "identical": identical[method],
        }
    adapted = mergers["lora"].adapted
    facts = {"shape": name, "what": shape.what, "dtype": dtype, "rounds": rounds, "cycles": cycles, "seed": seed}
    return {**facts, "adapted_bytes": adapted, "methods": rows}


def table(result: dict[str, Any]) -> str:
    """Writes a result as a Markdown table."""
    lines = [
        f"{result['what']}; {result['dtype']}; {result['adapted_bytes'] / 2**20:,.0f} MiB of adapted weights; "
        f"n = {result['rounds']} rounds",
        "",
        "| method | merge + unmerge / lora's (quartiles) | s | extra / adapted | the same in merge_and_unload "
        f"| identical after {result['cycles']:,} cycles |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for method, row in result["methods"].items():
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {method} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | {row['seconds']:.3f} | {row['extra']:.2f} "
            f"| {row['extra_unload']:.2f} | {'yes' if row['identical'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Options:
    """Times merging and unmerging side by side."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Of vit and llama."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """Of float32 and bfloat16."""
    rounds: int = 8
    """Rounds of two cycles per method, its own and one of LoRA; an even number is fair to both orders."""
    cycles: int = 100
    """Merges and unmerges after which the bits are compared."""
    seed: int = 0
    """Of the weights and the order."""
    out: Path = Path("runs/benchmarks")
    """Folder of merging.json and merging.md."""


def run(options: Options, methods: dict[str, Any], shapes: dict[str, Shape]) -> None:
    """Measures all methods on all shapes in all types, and writes JSON and tables to a folder."""
    unknown = [s for s in options.shapes if s not in shapes] + [d for d in options.dtypes if d not in DTYPES]
    if unknown:
        raise SystemExit(f"Unknown: {unknown}. Shapes are {', '.join(shapes)}; types {', '.join(DTYPES)}.")
    results = []
    for name in options.shapes:
        for dtype in options.dtypes:
            results.append(measure(name, shapes[name], dtype, methods, options.rounds, options.cycles, options.seed))
            gc.collect()
            print("\n" + table(results[-1]), flush=True)
    command = " ".join(["python", *sys.argv])
    now = {"run": "merging", "finished": datetime.now(UTC).isoformat(timespec="seconds"), "resumed_from_step": 0}
    facts = {"command": command, "results": results, **now, **provenance()}
    write_atomically(options.out / "merging.json", json.dumps(facts, indent=2) + "\n")
    tables = "\n".join(table(result) for result in results)
    write_atomically(options.out / "merging.md", f"{tables}\n{origin([facts], command)}\n")
    print(options.out / "merging.md")


if __name__ == "__main__":
    run(tyro.cli(Options), METHODS, SHAPES)
