"""Save adapters of this version with their outputs, for `tests/regression` of later versions.

    python scripts/freeze_adapters.py 0.2.0

Run it at a release. Folders that exist are not written again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import save_file
from tests.regression.subject import FOLDER, WEIGHTS, base, new_base, outputs

from san_peft import SanConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CASES = {
    "scales": {},
    "everything": {"shift": True, "gate": True, "train_norms": True, "bound": 0.5, "modules_to_save": ["lm_head"]},
    "lora": {"inner": LoraConfig(r=2)},
    "lora-scales": {"inner": LoraConfig(r=2), "own_scale": True, "shift": True, "exponent": 0.5},
    "dora": {"inner": LoraConfig(r=2, use_dora=True)},
    "ia3": {"inner": IA3Config(feedforward_modules=[])},
}
"""Options of each adapter."""


def freeze(version: str, names: list[str]) -> None:
    """Writes the adapters that do not exist yet.

    Args:
        version: The version of this package, which names the folder.
        names: Names in `CASES`.
    """
    if not WEIGHTS.exists():
        save_file({name: value.contiguous() for name, value in new_base().state_dict().items()}, WEIGHTS)
    for name in names:
        folder = FOLDER / version / name
        if folder.exists():
            continue
        model = get_peft_model(base(), SanConfig(**{"target_modules": TARGETS, **CASES[name]}))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * 0.2)
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        save_file({"logits": outputs(model)}, folder / "outputs.safetensors")
        print(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("cases", nargs="*", default=list(CASES), help="names of adapters; default: all")
    given = parser.parse_args()
    freeze(given.version, given.cases)
