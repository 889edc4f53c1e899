"""Images of conversations: validation before training, reading, and padding to squares."""

from __future__ import annotations

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
from san_bench.image.decode import to_rgb, upright_size
from san_bench.image.survey import in_chunks, thread_count
from san_bench.vision_language.records import Conversation, leaves_root
from san_peft.errors import SanError

ImageState = Literal["good", "outside", "missing", "unreadable", "mislabelled"]
"""State of an image; a mislabelled one is readable, but its suffix belongs to another format."""

KINDRED = {"MPO": "JPEG"}
"""Formats accepted under another suffix: cameras write MPO, a JPEG with several pictures, as .jpg."""

TEXTS: dict[ImageState, str] = {
    "outside": "paths are outside the image folder",
    "missing": "images are missing",
    "unreadable": "images cannot be read",
    "mislabelled": "images do not have the format of their suffix",
}


@dataclass(frozen=True)
class FolderCount:
    """Number of images by state in one folder; each file counts once."""

    images: int
    missing: int
    unreadable: int
    mislabelled: int


@dataclass(frozen=True)
class Preflight:
    """Image report of conversations.

    Attributes:
        kept: Training conversations: all of them, unless some are dropped.
        dropped: Dropped conversations.
        problems: Problems by kind, each with all its files. Mislabelled images are a warning, since they are usable.
        folders: Counts per image folder.
        bad: Problem of each invalid image, such as `missing` or `mislabelled (GIF)`.
    """

    kept: tuple[Conversation, ...]
    dropped: tuple[Conversation, ...]
    problems: tuple[Problem, ...]
    folders: dict[str, FolderCount]
    bad: dict[str, str]

    def require(self) -> tuple[Conversation, ...]:
        """Returns the training conversations.

        Raises:
            SanError: If any has an unreadable image, or all were dropped; the message counts the problems and lists
                the first files of each kind.
        """
        errors = [str(problem) for problem in self.problems if problem.level == "error"]
        if errors and not (self.dropped and self.kept):
            leave = ", or drop their conversations with conversation.drop_bad_images=true in the recipe"
            way_out = ": without them, no conversation is left" if self.dropped else leave
            raise SanError("Images are invalid:\n  " + "\n  ".join(errors) + f"\nFix them{way_out}.")
        return self.kept

    def report(self) -> dict[str, Any]:
        """Returns the report as JSON data: counts per folder, and every invalid image with its record IDs."""
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
    """Decodes every image of conversations and collects all problems.

    Args:
        records: The conversations.
        root: Image folder. Links inside it are followed.
        drop: Drops conversations whose image is missing, unreadable or outside the folder.
        workers: Reader threads; by default one per CPU core, up to eight.

    Returns:
        The report. A path outside the folder is never opened.

    Raises:
        SanError: If the folder does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        raise SanError(f"There is no image folder {root}.")
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
) -> dict[str, tuple[ImageState, str]]:
    """Determines the state of images.

    Args:
        files: Paths relative to the folder.
        root: Image folder. A path outside it is never opened.
        workers: Reader threads; by default one per CPU core, up to eight.
        decode: Decodes every image; otherwise only finds missing ones.

    Returns:
        State of each image, and the reason.
    """
    files = list(dict.fromkeys(files))
    endings = Image.registered_extensions()
    with ThreadPoolExecutor(thread_count(workers)) as pool:
        found = pool.map(lambda chunk: [_look(root, files[i], endings, decode) for i in chunk], in_chunks(len(files)))
        return dict(zip(files, chain.from_iterable(found), strict=True))


def problems_of_images(
    name: str,
    looks: Mapping[str, tuple[ImageState, str]],
    uses: Mapping[str, int],
    about: str = "conversations are about",
) -> list[Problem]:
    """Returns the problems of images, one per kind with all its files.

    Args:
        name: Task name of the problems.
        looks: State of each image; see `survey`.
        uses: Number of records per image.
        about: End of the message: who uses the images.
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
    """Reads an image as 8-bit RGB; see `san_bench.image.decode.to_rgb`.

    Raises:
        SanError: If its path is outside the folder, or it is missing or cannot be decoded.
    """
    with _open(root, image) as opened:
        return to_rgb(opened)


def read_size(root: str | Path, image: str) -> tuple[int, int]:
    """Reads width and height of an image without decoding it.

    Raises:
        SanError: If its path is outside the folder, or it is missing or not an image.
    """
    with _open(root, image) as opened:
        return upright_size(opened)


@contextmanager
def _open(root: str | Path, image: str) -> Iterator[Image.Image]:
    if leaves_root(image):
        raise SanError(f"The image {image!r} is outside the image folder {root}, so it is not opened.")
    try:
        with Image.open(Path(root) / image) as opened:
            yield opened
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SanError(
            f"The image {Path(root) / image} cannot be read: {error}. `san data check` lists all unreadable images."
        ) from error


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Pads an image to a centered square, as `image_aspect_ratio pad` of LLaVA-1.5 does.

    Args:
        image: An RGB image.
        colour: Colour of the padding. If the borders differ by a pixel, the second one is wider.

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
    """Converts channel means from 0 to 1 to an RGB colour, rounded down as in LLaVA.

    Example:
        >>> mean_colour((0.48145466, 0.4578275, 0.40821073))
        (122, 116, 104)
    """
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


def _look(root: Path, file: str, endings: dict[str, str], decode: bool) -> tuple[ImageState, str]:
    if leaves_root(file):
        return "outside", ""
    path = root / file
    if not path.is_file():
        return "missing", ""
    if not decode:
        return "good", ""
    try:
        with Image.open(path) as image:
            to_rgb(image)
            found = image.format or "no format"
    except Exception as error:  # any decoding error is a finding
        return "unreadable", str(error).replace(str(path), path.name)
    if endings.get(path.suffix.lower()) in (found, KINDRED.get(found)):
        return "good", ""
    return "mislabelled", found


def _folders(states: dict[str, ImageState]) -> dict[str, FolderCount]:
    counts: dict[str, Counter[str]] = {}
    for file, state in states.items():
        if state != "outside":
            counts.setdefault(PurePosixPath(file).parent.as_posix(), Counter())[state] += 1
    return {
        folder: FolderCount(count.total(), count["missing"], count["unreadable"], count["mislabelled"])
        for folder, count in sorted(counts.items())
    }
