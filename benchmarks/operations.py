"""Counts the operations and synchronizations of a training step, an evaluation pass and a decoding step, by method.

    python benchmarks/operations.py                                       # every setting: under a minute
    python benchmarks/operations.py --settings bf16-autocast --targets recipe
    python benchmarks/operations.py --settings bf16-autocast --targets recipe --detail san-lora

Operations are counted below autograd, by a `TorchDispatchMode`. Views, metadata and bare allocations are left out: on a
GPU each of the rest is at least one kernel launch. Synchronizations are the operations for which a GPU makes the host
wait: `nonzero`, `item`, `bool(tensor)`, `equal`, `masked_select`, `unique`, indexing with a mask, and copies of an
accelerator's tensor to the CPU. A fused kernel that is registered with torch counts as one operation.

The model is a small grouped-query LLaMA. Counts are per decoder layer, (8 layers - 4 layers) / 4, so embedding, head
and loss drop out, and they do not depend on the machine. The column `constant` has the synchronizations of a step that
do not grow with the number of layers, less those of the frozen model; it is negative where the last layer has fewer
than the others.

| name | what is trained |
|---|---|
| floor | the input of the first layer: the frozen network with the gradient passed through all its layers |
| lora, dora | PEFT's, rank 8 |
| san | scales, propagated along every traced edge |
| san-lora, san-dora | the same LoRA or DoRA as a host: its scale is extracted by norm and propagated |
| san-lora-projection | the same LoRA, the scale extracted by projection |
| ssf | scales and shifts without propagation |
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import tyro
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from san_bench.models.adapt import saved_activation_bytes
from san_bench.report.origin import origin
from san_bench.run.provenance import provenance, write_atomically
from san_peft import SanConfig

RANK = 8
SAVED_BATCH = (4, 64)
"""Sequences and tokens of the pass whose saved activations are measured; the counts take fewer."""

LAYERS = (4, 8)
TARGETS = {
    "recipe": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "dense": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""The layers with an adapter: those of the LLaMA-3-8B recipe, and every dense layer but the head."""

SETTINGS = {
    "bf16-autocast": (torch.bfloat16, True),
    "bf16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
}
"""Dtype of the frozen weights, and whether the pass runs under bfloat16 autocast. PEFT makes the adapters float32."""

WHAT = {
    "bf16-autocast": "bfloat16 weights, float32 adapters, bfloat16 autocast",
    "bf16": "bfloat16 weights, float32 adapters, no autocast",
    "float32": "float32",
}
PHASES = ("step", "evaluation", "decoding")
AGAINST = {"san-dora": "dora"}
"""What a method is compared with where that is not lora."""

GOALS = {
    "bf16-autocast": {"san": 0.80, "san-lora": 0.95, "san-dora": 0.70},
    "float32": {"san": 0.92, "san-lora": 1.05, "san-dora": 0.75},
}
"""Largest ratio of a step's operations to those of the method it is compared with. Synchronizations should be 0."""

UNCOUNTED = """
view _unsafe_view t transpose permute expand slice select detach unsqueeze squeeze alias as_strided split
split_with_sizes unbind _reshape_alias reshape lift_fresh empty empty_like empty_strided new_empty new_empty_strided
promote_types result_type is_same_size sym_size unfold chunk narrow detach_ set_ resize_ view_as
""".split()
"""ATen operations that launch nothing: views, metadata and bare allocations."""

WAITING = """
nonzero _local_scalar_dense is_nonzero equal item masked_select unique _unique2 unique_dim unique_consecutive bincount
""".split()
"""ATen operations for whose result the host waits."""

MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")


def waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    """Says whether the host waits for this ATen operation on a GPU."""
    if name in WAITING:
        return True
    if name in MASKED:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and any(isinstance(a, Tensor) for a in args[1:])
    if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking") and True not in args[2:]:
        source = args[1] if name == "copy_" else args[0]
        return source.device.type != "cpu" and out.device.type == "cpu"
    return False


class Operations(TorchDispatchMode):
    """Counts the operations that reach a kernel, and those that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        namespace, _, name = func._schema.name.rpartition("::")
        if namespace != "aten" or name not in UNCOUNTED:
            self.names[name if namespace == "aten" else f"{namespace}::{name}"] += 1
        if namespace == "aten" and waits(name, args, kwargs, out):
            self.waiting[name] += 1
        return out


class Transfers(TorchFunctionMode):
    """Counts what would copy an accelerator's tensor to the host, where the tensor is on the CPU and nothing happens.

    On an accelerator such a call is a copy below autograd, which `Operations` counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        here = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "cpu"
        to_host = name in ("cpu", "tolist", "numpy") or (name == "to" and "cpu" in (*args[1:2], kwargs.get("device")))
        if here and to_host and not kwargs.get("non_blocking"):
            self.waiting[name] += 1
        return func(*args, **kwargs)


@dataclass
class Counts:
    """What one pass of a model does."""

    operations: float
    """Operations that launch something."""
    synchronisations: float
    """Operations for which the host waits."""
    saved: float = 0
    """Bytes kept for the backward pass, parameters left out; of a training step alone."""
    names: Counter[str] = field(default_factory=Counter)
    """The operations by name."""
    waiting: Counter[str] = field(default_factory=Counter)
    """The synchronizations by name."""

    def per_layer(self, fewer: Counts, layers: int) -> Counts:
        """Returns the difference from a model with fewer layers, per layer."""
        names, waiting = (
            {name: (more[name] - less[name]) / layers for name in sorted(more | less) if more[name] != less[name]}
            for more, less in ((self.names, fewer.names), (self.waiting, fewer.waiting))
        )
        pairs = ((getattr(self, name), getattr(fewer, name)) for name in ("operations", "synchronisations", "saved"))
        return Counts(*((more - less) / layers for more, less in pairs), Counter(names), Counter(waiting))


@contextlib.contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Adds what runs inside to the counts."""
    with Transfers() as transfers, Operations() as operations:
        yield
    counts.names += operations.names
    counts.waiting += operations.waiting + transfers.waiting
    counts.operations, counts.synchronisations = counts.names.total(), counts.waiting.total()


class Floor(nn.Module):
    """The frozen model, with one trained vector added to what the first decoder layer reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.offset = nn.Parameter(torch.zeros(model.config.hidden_size))
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda m, args, out: out + self.offset.to(out.dtype))

    def forward(self, *args: Any, **batch: Any) -> Any:
        return self.model(*args, **batch)


Config = Callable[[list[str], float], peft.PeftConfig]


def lora(targets: list[str] | None, dropout: float, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=targets, **options)


METHODS: dict[str, Config | None] = {
    "floor": None,
    "lora": lora,
    "san": lambda targets, dropout: SanConfig(target_modules=targets),
    "san-lora": lambda targets, dropout: SanConfig(inner=lora(targets, dropout)),
    "san-lora-projection": lambda targets, dropout: SanConfig(inner=lora(targets, dropout), decomposition="projection"),
    "dora": lambda targets, dropout: lora(targets, dropout, use_dora=True),
    "san-dora": lambda targets, dropout: SanConfig(inner=lora(targets, dropout, use_dora=True)),
    "ssf": lambda targets, dropout: SanConfig(target_modules=targets, propagation="none", shift=True),
}


def build(
    method: str, dtype: torch.dtype, targets: str, layers: int, dropout: float = 0.0, device: str = "cpu"
) -> nn.Module:
    """Returns a small LLaMA, its weights of a dtype, with a method's adapter on some of its layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    config = transformers.LlamaConfig(**sizes, **heads, use_cache=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device, dtype)
    make = METHODS[method]
    return Floor(model) if make is None else peft.get_peft_model(model, make(list(TARGETS[targets]), dropout))


def count_model(model: nn.Module, phase: str = "step", autocast: bool = False) -> Counts:
    """Counts one pass of a model, after one that is not counted.

    Args:
        model: Of `build`.
        phase: `"step"` for forward and backward in training mode, `"evaluation"` for a forward pass without gradients
            in evaluation mode, `"decoding"` for one token with a filled `DynamicCache`.
        autocast: Whether the forward pass runs under bfloat16 autocast.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids, many = (torch.randint(0, 96, size, generator=generator).to(device) for size in ((2, 16), SAVED_BATCH))

    def cast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()

    counts = Counts(0, 0)
    rounds = contextlib.nullcontext(), counting(counts)
    model.train(phase == "step")
    if phase == "step":
        for inside in rounds:
            with inside:
                with cast():
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
            model.zero_grad(set_to_none=True)
        with cast():
            counts.saved = saved_activation_bytes(model, {"input_ids": many, "labels": many})
    elif phase == "evaluation":
        for inside in rounds:
            with torch.no_grad(), cast(), inside:
                model(input_ids=ids)
    else:
        cache = transformers.DynamicCache()
        with torch.no_grad(), cast():  # entered once, so autocast casts the adapters in the first pass alone
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            for inside in rounds:
                with inside:
                    model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    return counts


def count(method: str, setting: str, targets: str, layers: int, phase: str = "step", **options: Any) -> Counts:
    """Counts what one pass of a whole model does.

    Args:
        method: Of `METHODS`.
        setting: Of `SETTINGS`.
        targets: Of `TARGETS`.
        layers: Number of decoder layers.
        phase: Of `PHASES`.
        **options: `dropout` of the adapter, and the `device`.
    """
    dtype, autocast = SETTINGS[setting]
    return count_model(build(method, dtype, targets, layers, **options), phase, autocast)


def count_per_layer(
    method: str, setting: str, targets: str, phase: str = "step", layers: tuple[int, int] = LAYERS, **options: Any
) -> Counts:
    """Counts what each decoder layer adds to a pass, from a model with few layers and one with more."""
    few, many = (count(method, setting, targets, n, phase, **options) for n in layers)
    return many.per_layer(few, layers[1] - layers[0])


@dataclass(frozen=True)
class Options:
    """Counts operations and synchronizations per decoder layer."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods; floor, lora and dora are added where others are compared with them."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Of bf16-autocast, bf16 and float32."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Of recipe and dense."""
    dropout: float = 0.0
    """Of the adapters; the recipes use 0.05."""
    layers: tuple[int, int] = LAYERS
    """Decoder layers of the two models whose difference is counted."""
    detail: str | None = None
    """Print one method's operations by name, minus those of LoRA."""
    device: str = "cpu"
    """Where to run. On a GPU, kernels that Triton launches past torch's dispatcher are not counted."""
    out: Path = Path("runs/benchmarks")
    """Folder of operations.json and operations.md."""


def measure(methods: tuple[str, ...], options: Options) -> list[dict[str, Any]]:
    """Counts all phases of methods, floor and lora among them; returns the content of each setting's table."""
    found: dict[tuple[str, ...], tuple[Counts, Counts]] = {}
    small, large = options.layers
    for chosen in options.targets:
        for dtype in dict.fromkeys(SETTINGS[s][0] for s in options.settings):
            for method in methods:
                models = [build(method, dtype, chosen, n, options.dropout, options.device) for n in options.layers]
                for setting in (s for s in options.settings if SETTINGS[s][0] == dtype):
                    for phase in PHASES:
                        few, many = (count_model(m, phase, SETTINGS[setting][1]) for m in models)
                        found[setting, chosen, method, phase] = few, many.per_layer(few, large - small)
    results = []
    for setting in options.settings:
        for chosen in options.targets:
            rows = {}
            for method in methods:
                against, goal = AGAINST.get(method, "lora"), GOALS.get(setting, {}).get(method)
                (few, layer), (floor, floor_layer) = (found[setting, chosen, m, "step"] for m in (method, "floor"))
                base = found[setting, chosen, against, "step"][1]
                ratio = layer.operations / base.operations
                phases = {p: found[setting, chosen, method, p][1] for p in PHASES}
                never = not any(c.synchronisations for c in phases.values())
                pairs = ((few, layer), (floor, floor_layer))
                once, once_floor = (c.synchronisations - small * each.synchronisations for c, each in pairs)
                rows[method] = {
                    "against": against,
                    "operations": {p: c.operations for p, c in phases.items()},
                    "synchronisations": {p: c.synchronisations for p, c in phases.items()},
                    "constant_synchronisations": once - once_floor,
                    "saved": layer.saved,
                    "saved_ratio": layer.saved / base.saved,
                    "ratio": ratio,
                    "goal": goal,
                    "met": never and (goal is None or ratio <= goal) if method.startswith("san") else None,
                    "names": {p: dict(c.names) for p, c in phases.items()},
                    "waiting": {p: dict(c.waiting) for p, c in phases.items()},
                }
            facts = {"setting": setting, "targets": chosen, "layers": list(options.layers), "rank": RANK}
            results.append({**facts, "dropout": options.dropout, "device": options.device, "methods": rows})
    return results


def number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"


def table(result: dict[str, Any]) -> str:
    """Writes a result as a Markdown table."""
    small, large = result["layers"]
    lines = [
        f"Operations per decoder layer, ({large} layers - {small} layers) / {large - small}; "
        f"{WHAT[result['setting']]}; adapters of rank {result['rank']} on {' '.join(TARGETS[result['targets']])}; "
        f"dropout {result['dropout']:g}\n",
        "| method | step | against | / its | goal | synchronizations: step | constant | evaluation | decoding "
        "| operations: evaluation | decoding | saved activations / its | goals |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for method, row in result["methods"].items():
        operations, waiting = row["operations"], row["synchronisations"]
        goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
        met = {None: "", True: "met", False: "missed"}[row["met"]]
        lines.append(
            f"| {method} | {number(operations['step'])} | {row['against']} | {row['ratio']:.2f} | {goal} "
            f"| {number(waiting['step'])} | {number(row['constant_synchronisations'])} "
            f"| {number(waiting['evaluation'])} | {number(waiting['decoding'])} "
            f"| {number(operations['evaluation'])} | {number(operations['decoding'])} | {row['saved_ratio']:.2f} "
            f"| {met} |"
        )
    return "\n".join(lines) + "\n"


def detail(result: dict[str, Any], method: str) -> str:
    """Writes how a method's operations differ from those of LoRA, by name, as a Markdown table."""
    ours, base = (result["methods"][m] for m in (method, "lora"))
    lines = [
        f"{method} minus lora, per decoder layer; {WHAT[result['setting']]}; {result['targets']}",
        "",
        "| operation | " + " | ".join(PHASES) + " |",
        "|---|" + "---:|" * len(PHASES),
    ]
    differences = {
        name: [ours["names"][p].get(name, 0) - base["names"][p].get(name, 0) for p in PHASES]
        for name in {name for row in (ours, base) for names in row["names"].values() for name in names}
    }
    for name, values in sorted(differences.items(), key=lambda item: (-item[1][0], item[0])):
        if any(values):
            lines.append(f"| {name} | " + " | ".join(f"{v:+.4g}" if v else "" for v in values) + " |")
    sums = [sum(values[n] for values in differences.values()) for n in range(len(PHASES))]
    lines.append("| total | " + " | ".join(f"{v:+.4g}" for v in sums) + " |")
    waiting = {p: names for p, names in ours["waiting"].items() if names}
    lines += ["", f"Synchronizations of {method}: {waiting or 'none'}"]
    return "\n".join(lines) + "\n"


def run(options: Options) -> list[dict[str, Any]]:
    """Counts, prints the tables, and writes JSON and tables to a folder."""
    asked = {*options.methods, *([options.detail] if options.detail else [])}
    unknown = [*(asked - METHODS.keys()), *(set(options.settings) - SETTINGS.keys())]
    unknown += set(options.targets) - TARGETS.keys()
    if unknown:
        known = (", ".join(names) for names in (METHODS, SETTINGS, TARGETS))
        raise SystemExit("Unknown: {}. Methods are {}; settings {}; targets {}.".format(", ".join(unknown), *known))
    asked |= {"floor", "lora"} | {AGAINST[m] for m in asked if m in AGAINST}
    methods = tuple(m for m in METHODS if m in asked)
    results = measure(methods, options)
    for result in results:
        print("\n" + table(result), flush=True)
        if options.detail:
            print(detail(result, options.detail), flush=True)
    command = " ".join(["python", *sys.argv])
    now = {"run": "operations", "finished": datetime.now(UTC).isoformat(timespec="seconds"), "resumed_from_step": 0}
    facts = {"command": command, "results": results, **now, **provenance()}
    write_atomically(options.out / "operations.json", json.dumps(facts, indent=2) + "\n")
    tables = "\n".join(map(table, results))
    write_atomically(options.out / "operations.md", f"{tables}\n{origin([facts], command)}\n")
    print(options.out / "operations.md")
    return results


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # tensors are tiny
    run(tyro.cli(Options))
