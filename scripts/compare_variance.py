"""Compares the variance of scales with and without propagation: `python scripts/compare_variance.py`.

Reads `results/mini-vision/variance.json`, which `keep_results.py` takes out of what `san plot` found, and prints the
numbers of docs/guides/evidence.md: over the layers whose scale is propagated, the ratio of the variances, and the ratio
with the scale to the power of its exponent plus one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

FILE = Path(__file__).parents[1] / "results" / "mini-vision" / "variance.json"


def compare(method: str, other: str, backbone: str) -> str:
    """Returns the comparison in a sentence."""
    records = [r for r in json.loads(FILE.read_text(encoding="utf-8")) if r["backbone"] == backbone]
    own, others = ({r["layer"]: r for r in records if r["method"] == name} for name in (method, other))
    layers = [layer for layer in own if own[layer]["propagated"] and layer in others]
    ratios = [own[layer]["variance"] / others[layer]["variance"] for layer in layers]
    acting = [own[layer]["acting"] / others[layer]["variance"] for layer in layers]
    return (
        f"{method} over {other}, {backbone}, n = {own[layers[0]]['n_runs']} runs: {median(ratios):.2f} in the median "
        f"of {len(layers)} layers ({min(ratios):.2f} to {max(ratios):.2f}), below one in {sum(r < 1 for r in ratios)}; "
        f"acting {median(acting):.1f}"
    )


if __name__ == "__main__":
    print(compare(*(sys.argv[1:] or ("san", "ssf", "vit"))))
