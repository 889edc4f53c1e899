"""The scripts in `benchmarks/`, at their smallest: they run, and they count what they say. No time is asserted."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name, as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def counted(operations: ModuleType, run) -> tuple[float, float]:
    counts = operations.Counts(0, 0)
    with operations.counting(counts):
        run()
    return counts.operations, counts.synchronisations


X = torch.tensor([[1.0, 0.0], [2.0, 3.0]])


@pytest.mark.parametrize(
    ("run", "launched", "waited"),
    [
        (lambda: X.t().unsqueeze(0).expand(3, 2, 2)[0].detach(), 0, 0),
        (lambda: torch.empty_like(X), 0, 0),
        (lambda: X * 2 + X, 2, 0),
        (lambda: X.nonzero(), 1, 1),
        (lambda: X.sum().item(), 2, 1),
        (lambda: bool((X > 0).any()), 3, 1),
        (lambda: torch.equal(X, X), 1, 1),
        (lambda: X[torch.tensor([0])], 1, 0),
        (lambda: X[torch.tensor([True, False])], 1, 1),
        (lambda: X.unique(), 1, 1),
        (lambda: X.cpu(), 0, 1),
        (lambda: X.to("cpu"), 0, 1),
        (lambda: X.to("cpu", non_blocking=True), 0, 0),
        (lambda: X.to(torch.float64), 1, 0),
        (lambda: X.tolist(), 0, 1),
        (lambda: X.numpy(), 0, 1),
    ],
)
def test_what_counts_as_an_operation_and_as_a_synchronization(script, run, launched, waited):
    assert counted(script("operations"), run) == (launched, waited)


def test_a_backward_pass_is_counted_with_the_python_functions_in_it(script):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x / 2

        @staticmethod
        def backward(ctx, grad):
            return grad / 2 if bool(grad.any()) else None

    x = X.clone().requires_grad_()
    loss = Halved.apply(x).sum()
    launched, waited = counted(script("operations"), loss.backward)
    assert waited == 1
    assert launched >= 4  # ones_like, any, item, div


def test_counts_per_layer_do_not_depend_on_the_number_of_layers(script):
    operations = script("operations")
    for method in ("floor", "lora", "san"):
        one, two = (operations.count_per_layer(method, "float32", "recipe", layers=n) for n in ((2, 3), (3, 5)))
        assert one.operations == two.operations > 0
        assert one.names == two.names
        assert one.synchronisations == two.synchronisations
        assert one.saved == two.saved > 0
    assert operations.count("floor", "float32", "recipe", 2).operations > one.operations


@pytest.mark.parametrize("phase", ["step", "evaluation", "decoding"])
def test_lora_never_waits_and_adds_operations(script, phase):
    operations = script("operations")
    floor, lora = (
        operations.count_per_layer(m, "bf16-autocast", "recipe", phase, layers=(2, 3)) for m in ("floor", "lora")
    )
    assert lora.synchronisations == floor.synchronisations == 0
    assert lora.operations > floor.operations > 0


def test_dropout_is_counted(script):
    operations = script("operations")
    still, dropped = (operations.count("lora", "float32", "recipe", 1, dropout=d).operations for d in (0.0, 0.05))
    assert dropped >= still + 10  # five layers, forward and backward


def test_the_counts_as_a_table(script, tmp_path, capsys):
    operations = script("operations")
    chosen = {"settings": ("bf16-autocast",), "targets": ("recipe",), "methods": ("san-dora",), "detail": "san-lora"}
    chosen["layers"] = (2, 3)
    results = operations.run(operations.Options(**chosen, out=tmp_path))
    assert set(results[0]["methods"]) == {"floor", "lora", "san-lora", "dora", "san-dora"}
    assert results[0]["methods"]["san-dora"]["against"] == "dora"
    assert results[0]["methods"]["san-dora"]["goal"] == 0.70
    assert results[0]["methods"]["lora"]["met"] is None
    assert json.loads((tmp_path / "operations.json").read_text())["results"] == results
    page = (tmp_path / "operations.md").read_text()
    assert "| san-dora |" in page
    assert "Measured" in page
    assert "san-lora minus lora" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="sam"):
        operations.run(operations.Options(methods=("sam",), out=tmp_path))


@pytest.mark.parametrize(
    ("name", "dtype", "methods"),
    [
        ("step", "float32", ("floor", "lora", "san", "columns")),
        pytest.param("step", "bfloat16", ("lora", "san", "columns", "full"), marks=pytest.mark.slow),
        pytest.param("hosts", "bfloat16", ("lora", "dora", "san-lora", "san-dora"), marks=pytest.mark.slow),
    ],
)
def test_steps_side_by_side(script, tmp_path, name, dtype, methods):
    module = script(name)
    options = getattr(module, "HostOptions", None) or module.Options
    chosen = {"shapes": ("llama",), "methods": methods, "dtype": dtype, "small": True, "rounds": 2, "host_rounds": 2}
    against = getattr(module, "AGAINST", {})
    threads = torch.get_num_threads()
    module.run(options(**chosen, out=tmp_path), module.METHODS, against, name, module.GOALS)
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / f"{name}.json").read_text())["results"][0]
    assert result["dtype"] == dtype
    assert set(result["methods"]) == set(methods)
    for method, row in result["methods"].items():
        assert row["against"] == against.get(method, "lora")
        assert row["ratio"] > 0
        assert row["host"]["ratio"] > 0
        assert row["saved_activations"] > 0
        assert (row["met"] is not None) == (method in module.GOALS)
    page = (tmp_path / f"{name}.md").read_text()
    marks = "before\n<!-- results:start -->\nold\n<!-- results:end -->\nafter\n"
    assert page.strip() in script("write_results").insert(marks, page)
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_adapters_stay_in_float32_on_bfloat16_weights(script):
    step = script("step")
    shape = step.replace(step.SHAPES["llama"], make=step.SHAPES["llama"].tiny, batch=step.SHAPES["llama"].tiny_batch)
    methods = {m: step.METHODS[m] for m in ("lora", "san", "floor")}
    for stepper in step.steppers_of(methods, shape, "bfloat16", 0).values():
        types = {(p.requires_grad, p.dtype) for p in stepper.model.parameters()}
        assert types == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.slow
def test_all_parts_of_the_benchmark_of_a_gpu(script, tmp_path):
    gpu = script("gpu")
    rows = gpu.run(list(gpu.PARTS), 400, tmp_path, small=True, rounds=2)
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(gpu.PARTS)
    assert [row for row in rows if "error" in row and row["part"] != "kernels"] == []
    steps = {row["method"]: row for row in rows if row["part"] == "llama"}
    assert set(steps) == {"floor", "lora", "san-lora", "san", "dora", "san-dora"}
    assert steps["san-dora"]["against"] == "dora"
    assert isinstance(steps["san"]["met"], bool)
    merged = [row for row in rows if row["part"] == "merging" and row["method"] != "lora"]
    assert all(row["identical"] and row["merges_alike"] and row["changed_by_merging"] for row in merged)
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "gpu.md").read_text().startswith("Tiny models")


def test_a_part_that_fails_or_is_late_leaves_the_others(script, tmp_path, monkeypatch):
    gpu = script("gpu")

    def fails(context):
        yield {"method": "first", "what": "part", "seconds": 1.0}
        raise RuntimeError("several lines\n\nof which the last one counts")

    def waits(context):
        yield {"method": "first", "what": "part", "seconds": 1.0}
        time.sleep(60)

    def late(context):
        raise AssertionError("starts too late")
        yield

    monkeypatch.setattr(gpu, "PARTS", {"fails": fails, "waits": waits, "late": late})
    monkeypatch.setattr(gpu, "SHARES", {"fails": 9.0, "waits": 1.0, "late": 9.0})
    rows = gpu.run(["waits", "fails"], 60, tmp_path, small=True)
    assert [(row["part"], row.get("error")) for row in rows] == [
        ("fails", None),
        ("fails", "RuntimeError: of which the last one counts"),
        ("waits", None),
        ("waits", "TimeoutError: stopped after 1 s"),
    ]
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == rows
    assert gpu.run(["late"], gpu.LEAST - 1, tmp_path, small=True)[0]["error"].startswith("skipped")


def test_a_method_that_fails_leaves_the_others(script):
    gpu, parts = script("gpu_models"), script("gpu_parts")
    context = parts.Context("cpu", True, 2, 0, until=time.monotonic() + 60)

    def broken(model):
        raise ValueError("no such layer")

    class Stops(gpu.Floor):
        def forward(self, **batch):
            raise torch.OutOfMemoryError("too large")

    build = {**gpu.builders(list(gpu.RECIPE), 2, 0.0), "dora": broken, "floor": Stops}
    batch = gpu.texts(True, "cpu")
    rows = {
        r["method"]: r for r in parts.train(context, gpu.llama(True, "cpu"), batch, build, "floor lora dora san", "a")
    }
    assert rows["dora"]["error"] == "ValueError: no such layer"
    assert rows["floor"]["error"] == "OutOfMemoryError: too large"
    assert rows["san"]["ratio"] > 0
    assert "error" not in rows["lora"]


def test_a_limit_inside_a_limit(script):
    gpu = script("gpu_parts")

    def waits():
        with contextlib.suppress(TimeoutError), gpu.limit(0.2):
            time.sleep(30)
        time.sleep(30)

    with gpu.limit(1), pytest.raises(TimeoutError, match="1 s"):
        waits()


def test_methods_share_their_frozen_weights(script):
    gpu = script("gpu_models")
    base = gpu.llama(True, "cpu")
    frozen = {id(p) for p in base.parameters()}
    for method, build in gpu.builders(list(gpu.RECIPE), 2, 0.0).items():
        model = build(gpu.shared_copy(base))
        assert isinstance(model, nn.Module)
        assert {id(p) for p in model.parameters() if not p.requires_grad} == frozen, method


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(script):
    with pytest.raises(SystemExit, match=r"CUDA.*--small"):
        script("gpu").main()
