"""The base install: san_peft works without the runner's dependencies, and `san` says what to install.

A second environment would need a network and gigabytes of torch. These tests simulate one instead: a process whose
import system finds no package but those that pip installs for `dependencies` in pyproject.toml, and none of `RUNNER`
either, which some versions of typer bring. Accelerate and PyYAML stay, since PEFT imports them.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNNER = {"PIL", "pydantic", "rich", "tyro"}
HIDE = """
import sys
from importlib.machinery import PathFinder

class Base(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path = [Base if finder is PathFinder else finder for finder in sys.meta_path]
"""


def installed_with(lines: list[str]) -> set[str]:
    """Names of the packages that pip installs for these requirements, as far as they are installed here."""
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(line), "") for line in lines]
    while todo:
        requirement, of_extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        for extra in {"", *requirement.extras}:
            if (entry := (canonicalize_name(requirement.name), extra)) not in seen:
                seen.add(entry)
                with contextlib.suppress(PackageNotFoundError):
                    todo += [(Requirement(line), extra) for line in requires(requirement.name) or []]
    return {name for name, _ in seen}


def in_base_install(program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process that finds no module of other packages than those of the base install."""
    base = installed_with(PROJECT["dependencies"])
    hidden = RUNNER | {
        module
        for module, packages in packages_distributions().items()
        if not module.startswith("san_") and not {canonicalize_name(package) for package in packages} & base
    }
    assert "timm" in hidden
    assert not {"torch", "peft", "transformers", "yaml"} & hidden
    code = f"HIDDEN = {hidden!r}\n{HIDE}\n{program}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=280)


def runner_says(program: str) -> None:
    run = in_base_install(program)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", 'san needs: pip install "san-peft[bench]"\n')


def test_san_without_the_runner_says_what_to_install():
    module, _, name = PROJECT["scripts"]["san"].partition(":")
    runner_says(f"import sys; sys.argv = ['san', 'demo']; from {module} import {name}; {name}()")


def test_python_m_san_bench_says_the_same():
    runner_says("import runpy; runpy.run_module('san_bench', run_name='__main__')")


def test_python_m_san_bench_is_the_command():
    run = subprocess.run([sys.executable, "-m", "san_bench", "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert "demo" in run.stdout


@pytest.mark.slow
def test_the_method_and_the_first_example_of_the_readme_work_without_the_runner():
    program = """
import torch
from torch import nn
from peft import LoraConfig, get_peft_model
from san_peft import SanConfig, merge_and_verify, trace

for inner in (None, LoraConfig(r=2, target_modules=["0", "2"])):
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    targets = ["0", "2"] if inner is None else None
    config = SanConfig(target_modules=targets, inner=inner, propagation=trace(net, torch.randn(3, 4)))
    model = get_peft_model(net, config)
    model(torch.randn(3, 4)).sum().backward()
    print(len(model.base_model.propagation_graph.edges), merge_and_verify(model, torch.randn(3, 4)).layers)
"""
    run = in_base_install(program + re.search(r"^```python\n(.*?)^```", README, re.M | re.S)[1])
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[:2] == ["1 2", "1 2"]
    assert len(run.stdout.splitlines()) > 2
