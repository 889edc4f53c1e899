"""The rules of CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
CODE = [
    *SOURCES,
    *(p for d in ("tests", "examples", "scripts", "benchmarks") for p in sorted((ROOT / d).rglob("*.py"))),
]
ROOMS = [
    "errors",
    "rounding",
    "kernels",
    "scaling",
    "functional",
    "products",
    "decomposition",
    "propagation",
    "tuner",
    "export",
    "swap",
    "__init__",
]
RUNNER: dict[str, set[str]] = {
    "__init__": set(),
    "kinds": set(),
    "config": {"kinds"},
    "datacheck": {"config", "kinds"},
    "models": {"config"},
    "run": {"config", "kinds", "models"},
    "image": {"config", "datacheck", "models", "run"},
    "language": {"config", "datacheck", "models", "run"},
    "vision_language": {"config", "datacheck", "image", "language", "models", "run"},
    "report": {"config", "run", "vision_language"},
    "graph": {"models", "run"},
    "suites": {"config", "kinds", "models", "report", "run"},
    "cli_report": {"report"},
    "cli_vqa": {"vision_language"},
    "cli_train": {"config", "models", "run"},
    "cli": {"cli_report", "cli_train", "cli_vqa", "config", "datacheck", "graph", "models", "run", "suites"},
    "quiet": set(),
    "entry": {"cli", "quiet"},
    "__main__": {"entry"},
}
"""What each folder of the runner may import from the others; the same table stands in CONTRIBUTING.md."""

SAME_IN_EACH = {"load", "read", "examine", "main"}
"""Functions that several modules of one role have under one name, such as `load(task, data)` of each data set."""

DOOR = ROOT / "src/san_peft/tuner/_peft.py"


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every imported module or object."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def at_top(path: Path) -> Iterator[ast.AST]:
    """Nodes that run on import, so nothing inside functions or `if TYPE_CHECKING`."""
    return run(path, functions=False)


def run(path: Path, functions: bool = True) -> Iterator[ast.AST]:
    """Nodes that run at some time, so nothing inside `if TYPE_CHECKING`."""
    todo: list[ast.AST] = [tree_of(path)]
    while todo:
        node = todo.pop()
        if not functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo.extend(node.orelse)
            continue
        yield node
        todo.extend(ast.iter_child_nodes(node))


def where(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what}"


def test_the_method_never_imports_the_runner():
    found = [
        where(path, line, name)
        for path in SOURCES
        if "san_peft" in path.parts
        for line, name in imports(ast.walk(tree_of(path)))
        if name.split(".")[0] == "san_bench"
    ]
    assert not found, "\n".join(found)


def test_imports_point_downwards():
    """Rooms of san_peft, from the ground up; a room imports from those below it, and from itself."""
    package = ROOT / "src/san_peft"
    found = []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        assert room in ROOMS, (
            f"{path.relative_to(ROOT)} stands in no known room: give it one in CONTRIBUTING.md and here."
        )
        for line, name in imports(ast.walk(tree_of(path))):
            parts = name.split(".")
            if parts[0] == "san_peft" and len(parts) > 1:
                target = parts[1] if parts[1] in ROOMS else "__init__"
                if target != room and ROOMS.index(target) > ROOMS.index(room):
                    found.append(where(path, line, f"{room} imports {name}, which is above it"))
    assert not found, "\n".join(found)


def test_folders_of_the_runner_import_what_they_may():
    package = ROOT / "src/san_bench"
    found = []
    for path in sorted(package.rglob("*.py")):
        folder = path.relative_to(package).parts[0].removesuffix(".py")
        assert folder in RUNNER, f"{path.relative_to(ROOT)}: give {folder} a row here and in CONTRIBUTING.md."
        for line, name in imports(ast.walk(tree_of(path))):
            parts = name.split(".")
            if parts[0] == "san_bench" and len(parts) > 1 and parts[1] in RUNNER:
                if parts[1] not in RUNNER[folder] | {folder}:
                    found.append(where(path, line, f"{folder} imports {name}"))
    assert not found, "\n".join(found)


def assert_no_circle(needs: dict[str, set[str]]) -> None:
    todo = dict(needs)
    while todo:
        done = {name for name, needed in todo.items() if not needed & todo.keys()}
        assert done, f"a circle among {sorted(todo)}"
        todo = {name: needed for name, needed in todo.items() if name not in done}


def test_what_folders_may_import_has_no_circle():
    assert_no_circle(RUNNER)
    with pytest.raises(AssertionError, match="a circle among"):
        assert_no_circle(RUNNER | {"config": {"suites"}})


@pytest.mark.parametrize("package", ["san_peft", "san_bench"])
def test_no_circle_between_files(package):
    root = ROOT / "src"
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / package).rglob("*.py"))
    }
    needs = {}
    for module, path in modules.items():
        names = [name for _, name in imports(run(path))]
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        needs[module] = (found & modules.keys()) - {module, package}
    assert_no_circle(needs)


def public_names(package: str, aliases: bool = True) -> dict[str, list[str]]:
    """Public functions, classes and type aliases of a package, with the lines that define them.

    Constants in capitals, such as a table `KINDS`, belong to their module.
    """
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "src" / package).rglob("*.py")):
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = [node.name]
            elif aliases and isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [t.id for t in targets if isinstance(t, ast.Name) and not t.id.isupper()]
            else:
                names = []
            for name in names:
                if not name.startswith("_"):
                    places.setdefault(name, []).append(where(path, node.lineno, name))
    return places


def test_a_public_name_of_the_runner_is_defined_once():
    places = public_names("san_bench", aliases=False)
    twice = [place for name, many in places.items() if len(many) > 1 and name not in SAME_IN_EACH for place in many]
    assert not twice, "\n".join(twice)


def test_no_public_name_is_defined_in_both_packages():
    method, runner = public_names("san_peft"), public_names("san_bench")
    both = [place for name in sorted(method.keys() & runner) for place in (*method[name], *runner[name])]
    assert not both, "\n".join(both)


def test_propagation_knows_torch_only():
    heavy = {"peft", "transformers", "timm", "accelerate", "diffusers"}
    found = [
        where(path, line, name)
        for path in sorted((ROOT / "src/san_peft/propagation").rglob("*.py"))
        for line, name in imports(at_top(path))
        if name.split(".")[0] in heavy
    ]
    assert not found, "\n".join(found)


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_one_door_to_the_internals_of_peft():
    found = []
    for path in SOURCES:
        if path == DOOR:
            continue
        for line, name in imports(ast.walk(tree_of(path))):
            if name.split(".")[0] == "peft" and any(map(private, name.split("."))):
                found.append(where(path, line, name))
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute):
                chain = ast.unparse(node)
                if re.fullmatch(r"peft(\.\w+)+", chain) and any(map(private, chain.split("."))):
                    found.append(where(path, node.lineno, chain))
    assert not found, "Only tuner/_peft.py names an underscore of PEFT:\n" + "\n".join(found)


def test_nothing_unpickles():
    found = []
    for path in SOURCES:
        for line, name in imports(ast.walk(tree_of(path))):
            if name.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib", "shelve"} or name == "torch.load":
                found.append(where(path, line, name))
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                found.append(where(path, node.lineno, "torch.load"))
    assert not found, "\n".join(found)


def test_no_error_is_swallowed():
    def empty(statement: ast.stmt) -> bool:
        return isinstance(statement, ast.Pass) or (
            isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        )

    found = [
        where(path, node.lineno, "an except that does nothing")
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or all(map(empty, node.body)))
    ]
    assert not found, "\n".join(found)


def test_nothing_is_left_unfinished():
    words = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")
    found = [
        where(path, number, line.strip())
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_one_room(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < 450, f"{path.relative_to(ROOT)} has {lines} lines: perhaps it is two rooms in one."


def test_help_is_light_at_the_door():
    """`san --help`, and importing the command, bring in neither torch nor what needs it."""
    program = """
import contextlib, io, sys
import san_bench.cli
sys.argv = ["san", "--help"]
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    try:
        san_bench.cli.main()
    except SystemExit as stop:
        assert stop.code in (0, None), stop.code
assert "demo" in printed.getvalue(), printed.getvalue()
heavy = {"torch", "peft", "transformers", "timm", "sklearn", "datasets", "matplotlib", "pandas"} & set(sys.modules)
assert not heavy, f"`san --help` imports {', '.join(sorted(heavy))}"
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def tracked() -> list[Path]:
    """Files under version control, or all that could be where there is none (a source archive)."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0 and listing.stdout:
        return [ROOT / name for name in listing.stdout.split("\0") if name]
    return [p for p in ROOT.rglob("*") if p.is_file() and not {".venv", ".git", "runs"} & set(p.parts)]


def test_no_file_names_a_machine():
    """No path of a developer's machine, and no address of a package registry's files."""
    folders = r"(?<![\w./])/(?:home|root|work|Users|tmp)/\w"
    traces = re.compile(folders + r"|index[-]url|:[/]/\S+\.(?:whl|tgz)\b|python[h]osted")
    found = []
    for path in tracked():
        if path.exists() and path.suffix not in {".png", ".safetensors", ".ico"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if traces.search(line):
                    found.append(where(path, number, line.strip()[:120]))
    assert not found, "\n".join(found)


def test_the_oldest_versions_are_the_floors():
    """What the workflow runs as the oldest is what pyproject.toml promises."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["bench"], *extras["demo"], *extras["vision"]]
    floors = dict(re.fullmatch(r"([\w-]+)>=([\w.]+)", line).groups() for line in wanted if line != "san-peft[bench]")
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert {name: version_of(v) for name, v in pins.items()} == {name: version_of(v) for name, v in floors.items()}


def version_of(text: str) -> tuple[int, ...]:
    numbers = [int(part) for part in text.split(".")]
    return (*numbers, *[0] * (3 - len(numbers)))
