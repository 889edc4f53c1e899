"""The parts of `gpu.py`: each measures one thing, and yields a row for each method."""

from __future__ import annotations

import contextlib
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from gpu_models import (
    RECIPE,
    Build,
    Floor,
    Stepper,
    builders,
    conversations,
    free,
    images,
    kernels_of,
    llama,
    llava,
    shared_copy,
    synchronize,
    texts,
    vit,
    waits,
)
from torch import Tensor, nn

AGAINST = {"san-dora": "dora"}
GOALS = {"san": 0.95, "san-lora": 1.05, "san-dora": 0.70}
"""Largest ratio of a step to that of LoRA (SAN over DoRA: of PEFT's DoRA). The goal for peak memory is 1 for all."""

Rows = Iterator[dict[str, Any]]


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` inside after a time; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    started, before = time.monotonic(), signal.signal(signal.SIGALRM, late)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:  # a limit around this one goes on
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - started), 0.1))


def last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"[:300]


@dataclass
class Context:
    """What all parts share: the device, the sizes, the time, and the LLaMA that several of them use."""

    device: str
    small: bool
    rounds: int
    seed: int
    until: float = 0.0
    kept: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the part should end."""
        return self.until - time.monotonic()

    def llama(self) -> nn.Module:
        if "llama" not in self.kept:
            torch.manual_seed(self.seed)
            self.kept["llama"] = llama(self.small, self.device)
        return self.kept["llama"]

    def adapted(self, method: str) -> nn.Module:
        """Returns the LLaMA with a method's adapter, which the parts share."""
        models = self.kept.setdefault("adapted", {})
        if method not in models:
            targets = builders(list(RECIPE), 4 if self.small else 32, 0.05)
            models[method] = targets[method](shared_copy(self.llama()))
        return models[method]


def compare(context: Context, steppers: dict[str, Stepper], what: str, facts: dict[str, Any] | None = None) -> Rows:
    """Times steppers beside each other, and yields a row for each."""
    rows: dict[str, dict[str, Any]] = {m: {"method": m, "what": what} for m in steppers}
    for method in list(steppers):
        try:
            started = time.monotonic()
            for _ in range(2):
                steppers[method].step()
            synchronize()
            rows[method]["warm_up_seconds"] = time.monotonic() - started
            rows[method] |= (facts or {}).get(method, {}) | steppers[method].facts()
        except TimeoutError:
            raise
        except Exception as error:
            rows[method]["error"] = last_line(error)
        if "error" in rows[method]:  # outside of the handler, whose traceback holds the activations
            del steppers[method]
            free()
    against = {m: AGAINST.get(m, "lora") for m in steppers}
    lone = [m for m in steppers if against[m] not in steppers]
    for method in lone:
        rows[method]["error"] = f"nothing to compare with: {against[method]} failed"
    order, rng = [m for m in steppers if m not in lone], random.Random(context.seed)
    pairs: dict[str, list[tuple[float, float]]] = {m: [] for m in order}
    longest = 0.0
    for number in range(context.rounds if order else 0):
        started = time.monotonic()
        if number >= 2 and context.left() < longest + 2:
            break
        rng.shuffle(order)
        for method in order:
            pair = [steppers[method], steppers[against[method]]]
            own, other = (s.timed() for s in pair) if number % 2 else [s.timed() for s in pair[::-1]][::-1]
            pairs[method].append((own, other))
        longest = max(longest, time.monotonic() - started)
    for method, row in rows.items():
        if pairs.get(method):
            row |= summary(pairs[method], against[method])
            judge(row, rows.get(against[method], {}))
        yield row


def summary(pairs: list[tuple[float, float]], against: str) -> dict[str, Any]:
    ratios = sorted(own / other for own, other in pairs)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "against": against,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
        "seconds": statistics.median(own for own, _ in pairs),
        "rounds": len(pairs),
    }


def judge(row: dict[str, Any], base: dict[str, Any], trains: bool = True) -> None:
    """Adds the ratios to what a row is compared with, and whether the goals of a training step are met."""
    for name in ("peak", "kernels", "kernel_seconds"):
        if row.get(name) and base.get(name):
            row[f"{name}_ratio"] = row[name] / base[name]
    goal = GOALS.get(row["method"])
    if goal is not None and trains:
        row["goal"] = goal
        row["met"] = row["ratio"] <= goal and row.get("peak_ratio", 0.0) <= 1.0


def train(
    context: Context, base: nn.Module, batch: dict[str, Tensor], build: dict[str, Build], methods: str, what: str
) -> Rows:
    """Builds methods on one frozen model, and compares their steps."""
    steppers, facts = {}, {}
    for method in methods.split():
        started = time.monotonic()
        try:
            steppers[method] = Stepper(build[method](shared_copy(base)), batch, context.device)
            facts[method] = {"build_seconds": time.monotonic() - started}
        except TimeoutError:
            raise
        except Exception as error:
            yield {"method": method, "what": what, "error": last_line(error)}
    yield from compare(context, steppers, what, facts)


def part_llama(context: Context) -> Rows:
    base = context.llama()
    batch = texts(context.small, context.device)
    build: dict[str, Build] = {
        m: lambda _, m=m: context.adapted(m) for m in ("lora san-lora san dora san-dora").split()
    }
    build["floor"] = Floor
    what = "LLaMA-3-8B, bfloat16, 16 records of 244 tokens, rank 32 on q k v up down, dropout 0.05, eager"
    yield from train(context, base, batch, build, "floor lora san-lora san dora san-dora", what)


def part_llava(context: Context) -> Rows:
    torch.manual_seed(context.seed)
    base = llava(context.small, context.device)
    output = base.get_output_embeddings()
    targets = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
        and module is not output
        and "vision_tower" not in name
        and "multi_modal_projector" not in name
    ]
    build = builders(targets, 4 if context.small else 128, 0.05, modules_to_save=["multi_modal_projector"])
    what = (
        "LLaVA-1.5-7B, bfloat16, 8 conversations of 680 tokens, rank 128 on the decoder's dense layers, "
        "gradient checkpointing, eager"
    )
    batch = conversations(context.small, context.device)
    yield from train(context, base, batch, build, "lora san-lora san", what)


def vit_with(context: Context, dtype: torch.dtype) -> Rows:
    torch.manual_seed(context.seed)
    base = vit(context.small, context.device, dtype)
    dense = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
    build = builders(dense, 4 if context.small else 16, 0.0)
    what = f"ViT-B/16, {str(dtype).removeprefix('torch.')} weights, 64 images, rank 16 on the dense layers, eager"
    batch = images(context.small, context.device, dtype)
    yield from train(context, base, batch, build, "floor lora san-lora san dora san-dora", what)


def part_compiled(context: Context) -> Rows:
    """Yields compiled steps; a method that does not compile in its share of the time is left out."""
    from torch._dynamo.utils import counters

    context.kept.clear()
    free()
    torch.manual_seed(context.seed)
    base = llama(context.small, context.device, layers=4, vocabulary=8192)
    batch = {k: v % base.config.vocab_size for k, v in texts(context.small, context.device).items()}
    build = builders(list(RECIPE), 4 if context.small else 32, 0.05)
    what = "four layers of LLaMA-3-8B, bfloat16, 16 records of 244 tokens, rank 32 on q k v up down, compiled"
    steppers, facts = {}, {}
    for number, method in enumerate(methods := ("lora", "san-lora", "san")):
        row = {"method": method, "what": what}
        counters.clear()
        stepper = Stepper(build[method](shared_copy(base)), batch, context.device)
        stepper.run = torch.compile(stepper.model, backend="eager" if context.small else "inductor")
        share = max(context.left() - 10, 5) / (len(methods) - number)
        try:
            started = time.monotonic()
            with limit(share):
                stepper.step()
                stepper.step()
                synchronize()
            facts[method] = {"compile_seconds": time.monotonic() - started}
            facts[method]["graph_breaks"] = sum(counters["graph_break"].values())
            steppers[method] = stepper
        except Exception as error:
            yield {**row, "error": last_line(error)}
    yield from compare(context, steppers, what, facts)


def part_generation(context: Context) -> Rows:
    """Yields milliseconds per token of greedy generation, the prompt's pass included."""
    prompts, tokens = (2, 6) if context.small else (16, 64)
    ids = torch.randint(0, 96, (prompts, tokens), device=context.device)
    what = f"LLaMA-3-8B, bfloat16, greedy generation after {prompts} prompts of {tokens} tokens, adapter unmerged"

    def generate(model: nn.Module, count: int) -> float:
        """Seconds per token."""
        config = transformers.GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0
        )
        synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        synchronize()
        return (time.perf_counter() - start) / count

    models, lengths, counted = {}, {}, {}
    for method in ("frozen", "lora", "san-lora", "san", "dora", "san-dora"):
        row = {"method": method, "what": what}
        try:
            model = (context.llama() if method == "frozen" else context.adapted(method)).eval()
            generate(model, 2)
            slow = generate(model, 4)
            # a slow method makes fewer tokens, so that all of them have their turn
            lengths[method] = max(4, min(tokens, int(context.left() / 40 / slow)))
            models[method] = model
            if context.device == "cuda":
                counts: dict[str, Any] = kernels_of(lambda model=model: generate(model, 4))
                counts = {"kernels": counts["kernels"] / 4, "kernel_seconds": counts["kernel_seconds"] / 4}
                waiting = [waits(lambda model=model, n=n: generate(model, n)) for n in (4, 8)]
                counted[method] = {**counts, "synchronisations": (waiting[1] - waiting[0]) / 4}
        except TimeoutError:
            raise
        except Exception as error:
            yield {**row, "error": last_line(error)}
    if "lora" not in models:
        return
    pairs: dict[str, list[tuple[float, float]]] = {m: [] for m in models}
    longest = 0.0
    for number in range(min(context.rounds, 4)):
        if number and context.left() < longest + 2:
            break
        started = time.monotonic()
        for method, model in models.items():
            other = AGAINST.get(method, "lora")
            if other in models:
                length = min(lengths[method], lengths[other])
                pair = [models[other], model] if number % 2 else [model, models[other]]
                times = [generate(m, length) for m in pair]
                pairs[method].append((times[1], times[0]) if number % 2 else (times[0], times[1]))
        longest = max(longest, time.monotonic() - started)
    rows = {}
    for method in models:
        other = AGAINST.get(method, "lora")
        if pairs[method]:
            rows[method] = {"method": method, "what": what, **summary(pairs[method], other)}
            rows[method] |= {"tokens": min(lengths[method], lengths[other]), **counted.get(method, {})}
    for method, row in rows.items():
        judge(row, rows.get(AGAINST.get(method, "lora"), {}), trains=False)
        yield row


def part_merging(context: Context) -> Rows:
    """Yields seconds of a cycle of merge and unmerge, and whether the weights return bit for bit."""
    cycles = 3 if context.small else 100
    base = context.llama()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}

    def same() -> bool:
        return all(torch.equal(p, before[name]) for name, p in base.named_parameters())

    methods = ("san-lora", "san", "san-dora", "lora")
    for number, method in enumerate(methods):
        share = context.left() / (len(methods) - number)
        row: dict[str, Any] = {"method": method, "what": "merge and unmerge, LLaMA-3-8B, bfloat16"}
        try:
            model = context.adapted(method).eval()
            generator = torch.Generator(context.device).manual_seed(context.seed)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(torch.randn(p.shape, device=p.device, generator=generator), alpha=0.01)
            layer = next(m for n, m in base.named_modules() if n.endswith("layers.1.mlp.down_proj"))
            synchronize()
            if context.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                allocated = torch.cuda.memory_allocated()
            merged, merges_alike, identical, done = None, True, True, 0
            started = time.perf_counter()
            while done < cycles and (done < 2 or time.perf_counter() - started < share):
                model.merge_adapter()
                now = layer.weight.detach().clone()
                merges_alike &= merged is None or torch.equal(now, merged)
                merged = now
                model.unmerge_adapter()
                done += 1
                identical &= torch.equal(layer.weight, before_of(before, "layers.1.mlp.down_proj.weight"))
            synchronize()
            row |= {"seconds": (time.perf_counter() - started) / done, "cycles": done, "merges_alike": merges_alike}
            moved = not torch.equal(merged, before_of(before, "layers.1.mlp.down_proj.weight"))
            row |= {"identical": bool(identical and same()), "changed_by_merging": moved}
            if context.device == "cuda":
                row["peak"] = torch.cuda.max_memory_allocated() - allocated
        except TimeoutError:
            raise
        except Exception as error:
            row["error"] = last_line(error)
        finally:
            with torch.no_grad():
                for name, p in base.named_parameters():
                    p.copy_(before[name])
        context.kept["adapted"].pop(method, None)  # its adapter is no longer that of training
        if method != "lora" and "identical" in row:
            row["met"] = row["identical"]
        yield row


def before_of(before: dict[str, Tensor], end: str) -> Tensor:
    return next(value for name, value in before.items() if name.endswith(end))
