"""List the image files of a data folder: each folder once, without hidden files, system files and outputs of runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from san_bench.datacheck.found import Found, counted
from san_bench.image.decode import EXTENSIONS

SYSTEM = frozenset(
    "__macosx|thumbs.db|ehthumbs.db|desktop.ini|$recycle.bin|system volume information|@eadir|lost+found".split("|")
)
"""Names, in lower case, of files and folders that operating systems create beside names that begin with a dot."""

OUTPUTS = ("recipe.yaml", "result.json", "suite.yaml", "rows.jsonl", "export.json")
"""Files that mark a folder as the output of `san train`, `san bench` or `san export`."""


class Tree:
    """The folders and image files below a data folder.

    A linked folder is followed only if it leads out of the data folder, and every folder is read once, so links cannot
    multiply the images.

    Args:
        root: The data folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real = root.resolve()
        self._seen = {self._real}
        self._left: defaultdict[str, list[str]] = defaultdict(list)
        self._known: dict[Path, tuple[list[Path], list[Path], list[Path]]] = {}

    def folders(self, path: Path) -> list[Path]:
        """Returns the folders directly inside a folder, sorted."""
        return self._entries(path)[0]

    def beside(self, path: Path) -> list[str]:
        """Returns the images directly inside a folder, as paths relative to the root."""
        return [self._name(file) for file in self._entries(path)[1]]

    def images(self, path: Path) -> list[str]:
        """Returns the images of a class, as paths relative to the root, in the order of torchvision's `ImageFolder`.

        Args:
            path: The folder of the class; images in all folders below it belong to the class too.
        """
        found = []
        for folder in sorted(self._below(path), key=str):
            _, images, others = self._entries(folder)
            found += map(self._name, images)
            self._left["other"] += map(self._name, others)
        return found

    def report(self, found: Found) -> None:
        """Adds to a report how many files and folders were left out, and why."""
        others = self._left["other"]
        if others:
            kinds = Counter(Path(name).suffix.lower() or "no extension" for name in others).most_common(5)
            what = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
            found.add(f"{counted(len(others), 'file')} left out that Pillow does not read ({what})", others, "warning")
        if outputs := self._left["output"]:
            found.add(f"{counted(len(outputs), 'folder')} left out with the output of a run", outputs, "warning")
        if links := self._left["link"]:
            found.add(f"{counted(len(links), 'linked folder')} left out that lead back into the data", links, "warning")
        if hidden := self._left["hidden"]:
            found.layout += f", {counted(len(hidden), 'hidden or system file')} left out"

    def _below(self, path: Path) -> Iterator[Path]:
        yield path
        for folder in self._entries(path)[0]:
            yield from self._below(folder)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _entries(self, path: Path) -> tuple[list[Path], list[Path], list[Path]]:
        """Returns folders, images and other files directly inside a folder, and remembers what is left out."""
        if path not in self._known:
            folders, images, others = [], [], []
            for entry in sorted(path.iterdir()):
                if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
                    self._left["hidden"].append(self._name(entry))
                elif entry.is_dir():
                    if self._is_new(entry):
                        folders.append(entry)
                elif entry.name.lower().endswith(EXTENSIONS):
                    images.append(entry)
                else:
                    others.append(entry)
            self._known[path] = folders, images, others
        return self._known[path]

    def _is_new(self, folder: Path) -> bool:
        if any((folder / name).is_file() for name in OUTPUTS):
            self._left["output"].append(self._name(folder))
            return False
        real = folder.resolve()
        around = self._real in real.parents or real in self._real.parents
        if real in self._seen or (folder.is_symlink() and around):
            self._left["link"].append(self._name(folder))
            return False
        self._seen.add(real)
        return True
