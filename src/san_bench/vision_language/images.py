"""The images of conversations: looked at before the training, and padded to squares in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from san_bench.datacheck.found import Problem
from san_bench.vision_language.records import Conversation, leaves_root
from san_peft.errors import SanError

CHUNK = 64
"""Images that a thread reads at a time."""

State = Literal["good", "outside", "missing", "unreadable", "mislabelled"]
"""What an image is found to be; what is mislabelled can be read, but its name says another format."""

KINDRED = {"MPO": "JPEG"}
"""Formats that files of another one's ending may hold: cameras write JPEG files with a second picture."""

TEXTS: dict[State, str] = {
    "outside": "paths leave the folder of images",
    "missing": "images are missing",
    "unreadable": "images cannot be read",
    "mislabelled": "images are of another format than their names say",
}


@dataclass(frozen=True)
class FolderCount:
    """How the images of one folder are; each file counts once, however many conversations are about it."""

    images: int
    missing: int
    unreadable: int
    mislabelled: int


@dataclass(frozen=True)
class Preflight:
    """What was found of the images of conversations.

    Attributes:
        kept: The conversations to train with: all of them, unless dropping was asked for.
        dropped: The conversations that were left out.
        problems: What is wrong, each with all its files. What is mislabelled is a warning: it can be trained with.
        folders: Counts for each folder of images.
        bad: What is wrong with each image that is not good, such as `missing` or `mislabelled (GIF)`.
    """

    kept: tuple[Conversation, ...]
    dropped: tuple[Conversation, ...]
    problems: tuple[Problem, ...]
    folders: dict[str, FolderCount]
    bad: dict[str, str]

    def require(self) -> tuple[Conversation, ...]:
        """Returns the conversations to train with.

        Raises:
            SanError: If any of them has an image that cannot be read, or all were left out; the message counts all
                that is wrong, with the first files of each kind.
        """
        errors = [str(problem) for problem in self.problems if problem.level == "error"]
        if errors and not (self.dropped and self.kept):
            leave = ", or leave their conversations out with conversation.drop_bad_images=true in the recipe"
            way_out = ": no conversation is left without them" if self.dropped else leave
            raise SanError("The images are not as they must be:\n  " + "\n  ".join(errors) + f"\nMend them{way_out}.")
        return self.kept

    def report(self) -> dict[str, Any]:
        """Returns what was found, for a file: counts by folder, and every bad image with its records' ids."""
        ids: dict[str, list[str | int]] = {image: [] for image in self.bad}
        for record in (*self.kept, *self.dropped):
            if record.image in ids:
                ids[record.image].append(record.id)
        out = {record.image for record in self.dropped}
        return {
            "conversations": len(self.kept) + len(self.dropped),
            "dropped": len(self.dropped),
            "folders": {folder: asdict(count) for folder, count in self.folders.items()},
            "bad": [
                {"image": image, "reason": reason, "dropped": image in out, "records": ids[image]}
                for image, reason in self.bad.items()
            ],
        }


def preflight(
    records: Sequence[Conversation], root: str | Path, drop: bool = False, workers: int | None = None
) -> Preflight:
    """Decodes every image of conversations, and notes every problem at once.

    Args:
        records: The conversations.
        root: Folder that their images are below. Links inside it are followed.
        drop: Leaves out the conversations whose images are missing, cannot be read or are not below the folder.
        workers: Threads that read; by default as many as there are processors, up to eight.

    Returns:
        What was found. A path that leaves the folder is never opened.

    Raises:
        SanError: If there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise SanError(f"There is no folder of images {root}.")
    uses = Counter(record.image for record in records if record.image is not None)
    looks = survey(uses, root, workers)
    bad = {file for file, (state, _) in looks.items() if state not in ("good", "mislabelled")} if drop else set()
    return Preflight(
        tuple(record for record in records if record.image not in bad),
        tuple(record for record in records if record.image in bad),
        tuple(problems_of_images("images", looks, uses)),
        _folders({file: state for file, (state, _) in looks.items()}),
        {file: f"{state}{f' ({why})' if why else ''}" for file, (state, why) in looks.items() if state != "good"},
    )


def survey(
    files: Iterable[str], root: Path, workers: int | None = None, decode: bool = True
) -> dict[str, tuple[State, str]]:
    """Looks at images.

    Args:
        files: Their paths below the folder.
        root: The folder. A path that leaves it is never opened.
        workers: Threads that read; by default as many as there are processors, up to eight.
        decode: Decodes every image; otherwise only those that are not there are found.

    Returns:
        How each image is, and why.
    """
    files = list(dict.fromkeys(files))
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    endings = Image.registered_extensions()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda chunk: [_look(root, file, endings, decode) for file in chunk], chunks)
        return dict(zip(files, chain.from_iterable(found), strict=True))


def problems_of_images(
    name: str, looks: Mapping[str, tuple[State, str]], uses: Mapping[str, int], about: str = "conversations are about"
) -> list[Problem]:
    """Returns what is wrong with images, each kind of it once with all its files.

    Args:
        name: What the problems are reported under.
        looks: How each image is; see `survey`.
        uses: How many records are about each image.
        about: What these records are called, and do.
    """
    problems = []
    for state, text in TEXTS.items():
        items = [f"{file}{f' ({why})' if why else ''}" for file, (seen, why) in looks.items() if seen == state]
        if items:
            concerned = sum(uses[file] for file, (seen, _) in looks.items() if seen == state)
            said = f"{len(items):,} {text}, which {concerned:,} {about}"
            problems.append(Problem(name, said, tuple(items), "warning" if state == "mislabelled" else "error"))
    return problems


def read_image(root: str | Path, image: str) -> Image.Image:
    """Reads the image of a conversation, in RGB.

    Raises:
        SanError: If its path leaves the folder, or it is missing or cannot be decoded.
    """
    with _open(root, image) as opened:
        return opened.convert("RGB")


def read_size(root: str | Path, image: str) -> tuple[int, int]:
    """Reads width and height of the image of a conversation, without decoding it.

    Raises:
        SanError: If its path leaves the folder, or it is missing or no image.
    """
    with _open(root, image) as opened:
        return opened.size


@contextmanager
def _open(root: str | Path, image: str) -> Iterator[Image.Image]:
    if leaves_root(image):
        raise SanError(f"The image {image!r} leaves the folder of images {root}, so it is not opened.")
    try:
        with Image.open(Path(root) / image) as opened:
            yield opened
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SanError(
            f"The image {Path(root) / image} cannot be read: {error}. `san data check` finds all such images."
        ) from error


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Returns an image in the middle of the smallest square that holds it, as LLaVA-1.5's `image_aspect_ratio pad`.

    Args:
        image: An image in RGB.
        colour: Colour of the two borders. Where their widths differ by a pixel, the second one is wider.

    Example:
        >>> padded = pad_to_square(Image.new("RGB", (4, 1), "white"), (122, 116, 104))
        >>> padded.size, padded.getpixel((0, 0)), padded.getpixel((0, 1)), padded.getpixel((0, 2))
        ((4, 4), (122, 116, 104), (255, 255, 255), (122, 116, 104))
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def mean_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """Returns the means of a processor, on the scale 0 to 1, as a colour; LLaVA rounds down.

    Example:
        >>> mean_colour((0.48145466, 0.4578275, 0.40821073))
        (122, 116, 104)
    """
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


def _look(root: Path, file: str, endings: dict[str, str], decode: bool) -> tuple[State, str]:
    if leaves_root(file):
        return "outside", ""
    path = root / file
    if not path.is_file():
        return "missing", ""
    if not decode:
        return "good", ""
    try:
        with Image.open(path) as image:
            image.load()
            found = image.format or "no format"
    except Exception as error:  # whatever stops an image from being decoded is the finding
        return "unreadable", str(error).replace(str(path), path.name)
    if endings.get(path.suffix.lower()) in (found, KINDRED.get(found)):
        return "good", ""
    return "mislabelled", found


def _folders(states: dict[str, State]) -> dict[str, FolderCount]:
    counts: dict[str, Counter[str]] = {}
    for file, state in states.items():
        if state != "outside":
            counts.setdefault(PurePosixPath(file).parent.as_posix(), Counter())[state] += 1
    return {
        folder: FolderCount(count.total(), count["missing"], count["unreadable"], count["mislabelled"])
        for folder, count in sorted(counts.items())
    }
