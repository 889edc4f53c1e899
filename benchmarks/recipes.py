"""Runs the recipes of LLaMA-3-8B and LLaVA-1.5-7B on models of their sizes with random weights: time and memory.

    python benchmarks/recipes.py                                      # one GPU of 80 GiB, 64 GiB of memory
    python benchmarks/recipes.py --models llama-3-8b --variants lora san-lora/nf4
    python benchmarks/recipes.py --models llama-3-8b --shrink 16 --steps 2   # a try without a GPU

Each variant is `san train` with the shipped recipe in a process of its own: it loads the model from a folder, trains
for some steps, writes its adapter, and answers questions. What is changed is the method, the type of the weights, the
data, and how long it lasts. Records of text are all of one length, a little below the 256 tokens at which the recipe
cuts; conversations are about an image each. The seconds are those of the median step, and memory is what the allocator
has reserved at most. Random weights learn nothing: what is answered does not count.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from rich.progress import track

from san_bench.config.recipe import load_recipe
from san_bench.config.suite import load_suite
from san_bench.models.embedded import embedded_path
from san_bench.report.tables.table import origin
from san_bench.run.provenance import provenance, write_atomically
from san_bench.run.train import train
from san_bench.suites.engines import in_fresh_process
from san_bench.vision_language.records import MARKER


@dataclasses.dataclass(frozen=True)
class Size:
    """A model to train: its recipe, the suite that has its methods, and how weights and data of its kind are made."""

    recipe: str
    suite: str
    rank: int
    what: str
    model: Callable[[Path, int], None]
    data: Callable[[Path, int], None]
    changes: dict[str, Any]


def llama_config(shrink: int) -> Any:
    """LLaMA-3-8B's configuration; https://huggingface.co/meta-llama/Meta-Llama-3-8B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4096 // shrink,
        intermediate_size=14336 // shrink,
        num_hidden_layers=32 // shrink,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128 // shrink,
        vocab_size=128256 // shrink,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def llava_config(shrink: int) -> Any:
    """LLaVA-1.5-7B's configuration; https://huggingface.co/llava-hf/llava-1.5-7b-hf."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024 // shrink,
        intermediate_size=4096 // shrink,
        num_hidden_layers=max(2, 24 // shrink),
        num_attention_heads=16,
        image_size=max(14, 336 // shrink // 14 * 14),
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=4096 // shrink,
        intermediate_size=11008 // shrink,
        num_hidden_layers=32 // shrink,
        num_attention_heads=32,
        head_dim=128 // shrink,
        vocab_size=32064 // shrink,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=marking_tokenizer().convert_tokens_to_ids(MARKER)
    )


def llava_processor(shrink: int) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = llava_config(shrink).vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    select = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, marking_tokenizer(), patch_size=14, **select)


def marking_tokenizer() -> Any:
    """The tokenizer of the small LLaVA, which has a token for the place of an image."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_path("llava"))


def save_random(model_class: Any, config: Any, folder: Path) -> None:
    """Writes a model with random weights in bfloat16."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)


def save_llama(folder: Path, shrink: int) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    save_random(LlamaForCausalLM, llama_config(shrink), folder)
    AutoTokenizer.from_pretrained(embedded_path("decoder")).save_pretrained(folder)


def save_llava(folder: Path, shrink: int) -> None:
    from transformers import LlavaForConditionalGeneration

    save_random(LlavaForConditionalGeneration, llava_config(shrink), folder)
    llava_processor(shrink).save_pretrained(folder)


def write_texts(folder: Path, records: int) -> None:
    def record(number: int) -> dict[str, str]:
        story = " ".join(f"Then the number was {1000 + number + i}." for i in range(9))
        answer = "true" if number % 2 else "false"
        output = {"output": f"the correct answer is {answer}", "answer": answer}
        return {"instruction": f"Is it odd in the end? {story}", "input": "", **output}

    for name, count, first in (("train", records, 0), ("test", 8, records)):
        rows = [record(first + n) for n in range(count)]
        write_atomically(folder / f"{name}.json", json.dumps(rows))


def write_conversations(folder: Path, records: int) -> None:
    (folder / "images").mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (640, 480), (number * 30, 90, 60)).save(folder / "images" / f"{number}.png")

    def record(number: int) -> dict[str, Any]:
        said = " ".join(f"It has seen the number {number + i}." for i in range(6))
        asked = f"{MARKER}\nWhat has the picture seen?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        return {"id": number, "image": f"images/{number % 8}.png", "conversations": turns}

    for name, count in (("train", records), ("test", 8)):
        write_atomically(folder / f"{name}.json", json.dumps([record(n) for n in range(count)]))


SHORT = {"optimizer.epochs": 1, "checkpoint_steps": 0, "selection": "last"}
SIZES = {
    "llama-3-8b": Size(
        "language/llama-3-8b-san-lora", "commonsense", 32, "LLaMA-3-8B, 16 records in a batch",
        save_llama, write_texts, {**SHORT, "task": "instructions"},
    ),
    "llava-1.5-7b": Size(
        "vision-language/llava-1.5-7b-san-lora", "llava", 128,
        "LLaVA-1.5-7B, 128 conversations about an image in a batch, 8 at a time, gradient checkpointing",
        save_llava, write_conversations, {**SHORT, "task": "conversations", "answering.benchmarks": []},
    ),
}  # fmt: skip
"""What can be measured."""

VARIANTS = ("lora", "san-lora", "san-lora/nf4", "dora", "san-dora", "san")
"""What is trained, and behind a stroke the type of the frozen weights where it is not the recipe's bfloat16."""


def method_of(size: Size, kind: str) -> dict[str, Any]:
    """The method as the suite of the model has it, of the recipe's rank."""
    methods = load_suite(size.suite).methods
    return methods[kind if kind in methods else f"{kind}-r{size.rank}"].model_dump(mode="json")


def build(name: str, shrink: int, place: Path) -> Path:
    """Writes a model unless it is there; returns its folder."""
    folder = place / name / "model"
    if not folder.exists():
        part = folder.with_name("part")
        SIZES[name].model(part, shrink)
        part.rename(folder)
        torch.cuda.empty_cache()
    return folder


def measure(name: str, variants: tuple[str, ...], steps: int, shrink: int, place: Path) -> Iterator[dict[str, Any]]:
    """Trains the variants of one model, one after the other; yields its rows so far after each of them."""
    size, folder, model = SIZES[name], place / name, build(name, shrink, place)
    shutil.rmtree(folder / "data", ignore_errors=True)
    size.data(folder / "data", steps * load_recipe(size.recipe, {}).optimizer.batch_size)
    rows: dict[str, Any] = {}
    for variant in track(variants, description=name):
        kind, _, weights = variant.partition("/")
        output = folder / "runs" / variant.replace("/", "-")
        shutil.rmtree(output, ignore_errors=True)
        changes = {**size.changes, "method": method_of(size, kind), "model": str(model)}
        changes |= {"data": str(folder / "data"), "output": str(output), **({"weights": weights} if weights else {})}
        result = in_fresh_process(train, load_recipe(size.recipe, changes))
        seconds = result["step_seconds"]
        rows[variant] = {
            "trained": result["trainable_parameters"],
            "steps": result["steps"],
            "tokens_per_record": result["train_tokens"] / result["n_train"],
            "cut_records": result["cut_records"],
            "step_seconds": seconds,
            "tokens_per_second": result["train_tokens"] / result["steps"] / seconds,
            "saved_activations": result["saved_activation_mib"] * 2**20,
            "reserved": result["peak_gpu_reserved_mib"] * 2**20,
            "adapter": result["saved_bytes"],
            "total_seconds": result["total_seconds"],
        }
        yield {"model": name, "what": size.what, "shrink": shrink, "variants": rows}


def table(result: dict[str, Any]) -> str:
    """Writes a result as a Markdown table."""
    smaller = "" if result["shrink"] == 1 else f"; every size divided by {result['shrink']}"
    first = next(iter(result["variants"].values()))
    what = f"{result['what']}, of {first['tokens_per_record']:.0f} tokens{smaller}"
    lines = [
        f"{what}; random weights; n = {first['steps']} steps",
        "",
        "| method | trained | step, s | tokens / s | saved activations, GiB | reserved, GiB | adapter, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for variant, row in result["variants"].items():
        lines.append(
            f"| {variant.replace('/', ', ')} | {row['trained']:,} | {row['step_seconds']:.2f} "
            f"| {row['tokens_per_second']:,.0f} | {row['saved_activations'] / 2**30:.1f} "
            f"| {row['reserved'] / 2**30:.1f} | {row['adapter'] / 2**20:,.0f} |"
        )
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Options:
    """Runs the recipes of large models for some steps."""

    models: tuple[str, ...] = tuple(SIZES)
    """Of llama-3-8b and llava-1.5-7b."""
    variants: tuple[str, ...] = VARIANTS
    """Methods, and behind a stroke the type of the frozen weights."""
    steps: int = 10
    """Steps of training of each."""
    shrink: int = 1
    """What every size of a model is divided by."""
    place: Path | None = None
    """Folder for models and runs, which stay there; by default a temporary one, which does not."""
    out: Path = Path("runs/benchmarks")
    """Folder of recipes.json and recipes.md."""


def main(options: Options) -> None:
    """Measures, and writes JSON and tables after each variant."""
    done: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = options.place or Path(temporary)
        for name in options.models:
            for so_far in measure(name, options.variants, options.steps, options.shrink, place):
                done[name] = so_far
                write(list(done.values()), options.out)
    print(options.out / "recipes.md")


def write(results: list[dict[str, Any]], out: Path) -> None:
    command = " ".join(["python", *sys.argv])
    now = {"run": "recipes", "finished": datetime.now(UTC).isoformat(timespec="seconds"), "resumed_from_step": 0}
    facts = {"command": command, "results": results, **now, **provenance()}
    write_atomically(out / "recipes.json", json.dumps(facts, indent=2) + "\n")
    tables = "\n".join(table(result) for result in results)
    write_atomically(out / "recipes.md", f"{tables}\n{origin([facts], command)}\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
