"""Convert pretrained weights from pip packages to checkpoints that transformers or timm load.

Each function takes the weight file and an empty output folder. Nothing is unpickled here.
"""

from __future__ import annotations

import json
import pickletools
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from san_peft.errors import SanError

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
"""ImageNet mean and standard deviation per channel, for pixels in 0 to 1."""

SMILES = r"\[[^\]]+\]|Br|Cl|%[0-9]{2}|>>|."
"""Regular expression of SMILES tokens: bracketed atoms, chlorine and bromine, two-digit ring closures, the reaction
arrow, and single characters."""


def copy(weights: Path, folder: Path) -> None:
    """Copies a checkpoint that transformers loads as it is."""
    for file in weights.parent.iterdir():
        if file.suffix in (".json", ".txt", ".safetensors"):
            shutil.copyfile(file, folder / file.name)


def smollm2(weights: Path, folder: Path) -> None:
    """Dequantises a GGUF file to float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from san_peft.tuner.quantized import forget_quantization

    model: Any = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    forget_quantization(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)


def dinov2(weights: Path, folder: Path) -> None:
    """Extracts the backbone from an ONNX file, in which the exporter renamed the transposed weight matrices."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False))
    state = {name: torch.from_numpy(array.copy()) for name, array in _dinov2_arrays(weights).items()}
    _load(model, state, weights)
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        **IMAGENET,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _dinov2_arrays(file: Path) -> dict[str, np.ndarray]:
    """Returns the backbone's tensors under transformers' parameter names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and node.input[1] in arrays:
            # /backbone/encoder/layer.3/layer.3/attention/attention/query/MatMul
            parts = list(dict.fromkeys(node.name.split("/")[2:-1]))
            found[".".join([*parts, "weight"])] = arrays[node.input[1]].T
    constants = [numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"]
    tables = {len(a[0]): a for a in [*constants, *arrays.values()] if a.ndim == 3 and a.shape[2] == 384}
    found["embeddings.position_embeddings"] = np.concatenate([tables[1], tables[37 * 37]], 1)
    return {_dinov2_name(name): array for name, array in found.items()}


def _dinov2_name(name: str) -> str:
    for old, new in (
        ("attention.attention.", "attention."),
        ("attention.query", "attention.q_proj"),
        ("attention.key", "attention.k_proj"),
        ("attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def efficientnet_lite0(weights: Path, folder: Path) -> None:
    """Loads a checkpoint with other parameter names, but the same order, into timm's model."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = model.state_dict()
    _load(model, dict(zip(own, torch_tensors(weights, list(own.values())), strict=True)), weights)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_args"].pop("num_classes")  # also a top-level key; transformers would pass it twice
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def torch_tensors(file: Path, like: Sequence[Tensor]) -> list[Tensor]:
    """Reads a state dict in torch's legacy format (before version 1.6) without unpickling it.

    The file starts with five pickles: the fourth describes the tensors, the fifth lists their storages in the order in
    which they follow. Both are parsed opcode by opcode and no object is built: the names of storages are the numeric
    strings, each followed by its length, offset, shape and strides.

    Args:
        file: The file.
        like: Tensors with the expected dtypes and shapes.

    Raises:
        SanError: If the file has another format, or contains other tensors.
    """
    with file.open("rb") as opened:
        try:
            pickles = [[(op.name, arg) for op, arg, _ in pickletools.genops(opened)] for _ in range(5)]
        except ValueError as error:
            raise SanError(f"{file} is not a state dict in torch's legacy format (before 1.6).") from error
        described = _storages(pickles[3])
        if len(described) != len(like):
            raise SanError(f"{file} contains {len(described)} tensors, expected {len(like)}.")
        sizes = {name: tensor.element_size() for (name, _), tensor in zip(described, like, strict=True)}
        contents = {}
        for name, _ in _storages(pickles[4]):
            (count,) = struct.unpack("<q", opened.read(8))
            contents[name] = opened.read(count * sizes[name])
    found = []
    for (name, numbers), tensor in zip(described, like, strict=True):
        offset, shape, strides = numbers[1], numbers[2 : 2 + tensor.dim()], numbers[2 + tensor.dim() :][: tensor.dim()]
        if shape != list(tensor.shape):
            raise SanError(f"{file} contains a tensor of shape {tuple(shape)}, expected {tuple(tensor.shape)}.")
        flat = np.frombuffer(contents[name], dtype=str(tensor.dtype).removeprefix("torch."))
        view = np.lib.stride_tricks.as_strided(flat[offset:], shape, [step * flat.itemsize for step in strides])
        found.append(tensor.new_tensor(view.copy()))
    return found


def _storages(opcodes: list[tuple[str, Any]]) -> list[tuple[str, list[int]]]:
    """Returns the names of storages in a pickle, each with the integers that follow it."""
    found: list[tuple[str, list[int]]] = []
    for opcode, arg in opcodes:
        if isinstance(arg, str) and arg.isdigit():
            found.append((arg, []))
        elif isinstance(arg, int) and opcode.startswith("BININT") and found:
            found[-1][1].append(arg)
    return found


def rxn_albert(weights: Path, folder: Path) -> None:
    """Loads an ALBERT with transformers, which unpickles only tensors, and builds a tokenizer from its vocabulary."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import AlbertForMaskedLM, PreTrainedTokenizerFast

    AlbertForMaskedLM.from_pretrained(weights.parent).save_pretrained(folder)
    lines = (weights.parent / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids = {token: number for number, token in enumerate(lines)}
    tokenizer: Any = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), "isolated")
    ends = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def _load(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SanError(f"{file} does not match the parameters of {type(model).__name__}: {error}") from error
