"""Measures SAN beside LoRA and DoRA on one GPU, on models of the sizes that the recipes train, with random weights.

    python benchmarks/gpu.py                               # every part, at most 8 minutes on an H200
    python benchmarks/gpu.py --parts llama compiled --seconds 300
    python benchmarks/gpu.py --small                       # every part with tiny models on the CPU, to try the script

| part | what is measured |
|---|---|
| llama | a training step on LLaMA-3-8B's shapes, with the recipe's rank, layers, dropout, batch and length |
| llava | a training step on LLaVA-1.5-7B's shapes: frozen tower, trained projector, gradient checkpointing |
| vit, vit-bf16 | a training step of ViT-B/16, with float32 and with bfloat16 weights |
| generation | greedy generation of 64 tokens with an unmerged adapter, on the model of `llama` |
| merging | cycles of merge and unmerge, and whether the weights come back bit for bit, on the model of `llama` |
| kernels | the fused kernels of the library against plain operations, where the library has them |
| compiled | a training step under `torch.compile`, on four layers of LLaMA-3-8B's shape |

Training runs under bfloat16 autocast with float32 adapters, clipped gradients and AdamW. In each round every method
makes one step beside one of the method it is compared with, now before it, now after it, and the ratio is the median
over the rounds. All methods share one copy of the frozen weights. Peak memory is what one method needs: its parameters
and optimizer state, and the allocator's peak in a step. Kernels and their time are those of one step in the profiler,
and synchronizations are what `torch.cuda.set_sync_debug_mode` warns of in one.

Parts run in the order above, each with a share of the time. A part that fails leaves its error in the table, one that
would start too late is skipped, and files are written after each row. Besides torch, the script needs PEFT,
transformers and jaxtyping alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from gpu_kernels import part_kernels
from gpu_models import free
from gpu_parts import (
    Context,
    Rows,
    last_line,
    limit,
    part_compiled,
    part_generation,
    part_llama,
    part_llava,
    part_merging,
    vit_with,
)

from san_bench.run.provenance import write_atomically

SHARES = {
    "llama": 130.0,
    "llava": 75.0,
    "vit": 30.0,
    "vit-bf16": 30.0,
    "generation": 60.0,
    "merging": 30.0,
    "kernels": 25.0,
    "compiled": 150.0,
}
"""Most seconds of each part, in the order in which they run."""

LEAST = 12.0
"""Seconds without which no part starts."""

PARTS: dict[str, Callable[[Context], Rows]] = {
    "llama": part_llama,
    "llava": part_llava,
    "vit": lambda context: vit_with(context, torch.float32),
    "vit-bf16": lambda context: vit_with(context, torch.bfloat16),
    "generation": part_generation,
    "merging": part_merging,
    "kernels": part_kernels,
    "compiled": part_compiled,
}


def origins(commit: str | None = None) -> dict[str, Any]:
    """Returns where the numbers come from, also where the library is not installed but on the path."""
    from importlib.metadata import PackageNotFoundError

    try:
        from san_bench.run.provenance import provenance

        facts = provenance()
        return {**facts, "commit": facts["commit"] or commit}
    except PackageNotFoundError:
        versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        python = sys.version.split()[0]
        facts = {
            "python": python,
            "commit": commit,
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
        return {**facts, "versions": versions, "device": name}


def decimal(value: float | None, digits: int = 2, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


def table(part: str, rows: list[dict[str, Any]]) -> str:
    """Writes a part's rows as Markdown tables, one for each of what was measured."""
    texts = []
    for what in dict.fromkeys(row["what"] for row in rows):
        chosen = [row for row in rows if row["what"] == what]
        columns: dict[str, Callable[[dict[str, Any]], str]] = {
            "trained": lambda r: f"{r['trained']:,}" if "trained" in r else "",
            "against": lambda r: r.get("against", ""),
            "time / its (quartiles)": spread,
            "ms": lambda r: decimal(r.get("seconds"), 3 if part == "kernels" else 1, 1e-3),
            "peak, GiB": lambda r: decimal(r.get("peak"), 2, 2**30),
            "peak / its": lambda r: decimal(r.get("peak_ratio")),
            "kernels": lambda r: decimal(r.get("kernels"), 0),
            "kernels / its": lambda r: decimal(r.get("kernels_ratio")),
            "time in kernels, ms": lambda r: decimal(r.get("kernel_seconds"), 1, 1e-3),
            "synchronizations": lambda r: decimal(r.get("synchronisations"), 0),
            "build, s": lambda r: decimal(r.get("build_seconds"), 1),
            "compile, s": lambda r: decimal(r.get("compile_seconds"), 0),
            "graph breaks": lambda r: decimal(r.get("graph_breaks"), 0),
            "tokens": lambda r: decimal(r.get("tokens"), 0),
            "cycles": lambda r: decimal(r.get("cycles"), 0),
            "weights return": lambda r: {True: "bit for bit", False: "changed"}.get(r.get("identical"), ""),
            "TB / s": lambda r: decimal(r.get("bytes_per_second"), 2, 1e12),
            "relative difference": lambda r: decimal(r.get("relative_difference"), 5),
            "goal": lambda r: decimal(r.get("goal")),
            "": lambda r: r.get("error") or {True: "met", False: "missed"}.get(r.get("met"), ""),
        }
        cells = {title: [get(row) for row in chosen] for title, get in columns.items()}
        cells = {title: column for title, column in cells.items() if any(column) or title == ""}
        count = max((row.get("rounds", 0) for row in chosen), default=0)
        lines = [f"{part}: {what}{f'; n = {count} rounds' if count else ''}", ""]
        lines += ["| method | " + " | ".join(cells) + " |", "|---|" + "---:|" * (len(cells) - 1) + "---|"]
        for number, row in enumerate(chosen):
            lines.append(f"| {row['method']} | " + " | ".join(column[number] for column in cells.values()) + " |")
        texts.append("\n".join(lines) + "\n")
    return "\n".join(texts)


def spread(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return ""
    low, high = row.get("ratio_quartiles", (None, None))
    return decimal(row["ratio"]) + ("" if low is None else f" ({low:.2f} to {high:.2f})")


@dataclass
class Report:
    """What was measured so far, in gpu.json and gpu.md."""

    out: Path
    command: str
    small: bool
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        now = {"finished": datetime.now(UTC).isoformat(timespec="seconds")}
        whole = {"run": "gpu", "command": self.command, "small": self.small, **now, **self.facts, "rows": self.rows}
        write_atomically(self.out / "gpu.json", json.dumps(whole, indent=1) + "\n")
        parts = dict.fromkeys(row["part"] for row in self.rows)
        tables = "\n".join(table(p, [r for r in self.rows if r["part"] == p]) for p in parts)
        note = "Tiny models stand in for those named.\n\n" if self.small else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.facts["versions"].items())
        facts = self.facts
        source = (
            f"Measured {now['finished'][:10]} by `{self.command}`; commit {facts['commit'] or 'unknown'}; {versions}, "
            f"Python {facts['python']}; {facts['cpu']}, {facts['threads']} threads, device {facts['device']}."
        )
        write_atomically(self.out / "gpu.md", f"{note}{tables}\n{source}\n")


def run(
    parts: list[str],
    seconds: float,
    out: Path,
    small: bool = False,
    rounds: int = 6,
    seed: int = 0,
    commit: str | None = None,
) -> list[dict[str, Any]]:
    """Runs parts in the order of `PARTS`; returns the rows.

    Args:
        parts: Of `PARTS`.
        seconds: Time for all of them.
        out: Folder of gpu.json and gpu.md, which are written after each row.
        small: Whether tiny models on the CPU take the place of large ones on a GPU.
        rounds: Most rounds of a comparison.
        seed: Of weights, batches and orders.
        commit: What to write down where there is no git checkout.
    """
    end = time.monotonic() + seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
    transformers.logging.set_verbosity_error()
    context = Context("cpu" if small else "cuda", small, rounds, seed)
    report = Report(out, " ".join(["python", *sys.argv]), small, origins(commit))
    for part in [p for p in PARTS if p in parts]:
        left, started = end - time.monotonic(), time.monotonic()
        if left < LEAST:
            report.add({"part": part, "method": "all", "what": part, "error": f"skipped: {left:.0f} s were left"})
            continue
        time_here = min(SHARES[part], left - 3)
        context.until = started + time_here * 0.9
        try:
            with limit(time_here):
                for row in PARTS[part](context):
                    report.add({"part": part, **row})
        except Exception as error:
            report.add({"part": part, "method": "all", "what": part, "error": last_line(error)})
        free()
        print(table(part, [r for r in report.rows if r["part"] == part]), flush=True)
        print(f"{part}: {time.monotonic() - started:.0f} s\n", flush=True)
    torch.set_num_threads(threads)
    print(out / "gpu.md")
    return report.rows


def main() -> None:
    words = argparse.ArgumentParser(description="Measures SAN beside LoRA and DoRA on one GPU.")
    words.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="which parts")
    words.add_argument("--seconds", type=float, default=450.0, help="time for all parts")
    words.add_argument("--rounds", type=int, default=6, help="most rounds of a comparison; an even number")
    words.add_argument("--seed", type=int, default=0, help="of weights, batches and orders")
    words.add_argument("--small", action="store_true", help="tiny models on the CPU, to try the script")
    words.add_argument("--commit", help="commit to write down where the code is no git checkout")
    words.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of gpu.json and gpu.md")
    options = words.parse_args()
    if not options.small and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; --small tries the script without one.")
    run(options.parts, options.seconds, options.out, options.small, options.rounds, options.seed, options.commit)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
