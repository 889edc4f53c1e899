"""Draws examples of mini-vision's tasks: `python scripts/draw_mini_vision.py docs/guides/mini-vision.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from san_bench.image.mini import tasks as mini


def main() -> None:
    """Writes the first images of each task, which cover its classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("file", type=Path, metavar="PNG")
    parser.add_argument("--columns", type=int, default=16)
    args = parser.parse_args()
    rows = [
        np.concatenate(list(mini.draw_images(name, np.arange(args.columns))[0].images), axis=1) for name in mini.TASKS
    ]
    Image.fromarray(np.concatenate(rows)).quantize(128).save(args.file, optimize=True)


if __name__ == "__main__":
    main()
