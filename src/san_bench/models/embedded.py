"""Load the small shipped models: three vision models, a decoder language model and a vision-language model.

The vision-language model (LLaVA) is assembled from the ViT as its vision tower and the decoder as its language model.
Only a PEFT adapter ships for it: the projector, and a low-rank update of both. It is assembled on first use, in the
assets cache of huggingface_hub (`HF_ASSETS_CACHE`).

Example:
    >>> embedded_path().name, embedded_path("decoder").name
    ('vit-tiny-procedural', 'decoder-tiny-procedural')
"""

from __future__ import annotations

import hashlib
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_bench.models.cache import assembled
from san_peft.errors import SanError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

EMBEDDED = ("vit", "swin", "convnext")
"""The vision models."""

MODELS = (*EMBEDDED, "decoder", "llava")
"""All models."""


def embedded_path(name: str = "vit") -> Path:
    """Returns the folder of a shipped model, for any `from_pretrained` of transformers.

    Args:
        name: One of `MODELS`.

    Raises:
        SanError: If the model does not exist, or the cache that `llava` is assembled in is not writable.
    """
    if name not in MODELS:
        from san_bench.config.strict import suggest  # needs the extra bench; the embedded models do not

        raise SanError(f"No model {name!r} ships with the package.{suggest(name, MODELS)}")
    return _assembled() if name == "llava" else asset(name)


def asset(name: str) -> Path:
    """Returns the folder of a model's shipped files."""
    return Path(str(resources.files("san_bench.models") / "assets" / f"{name}-tiny-procedural"))


def joined(tower: Path, decoder: Path) -> LlavaForConditionalGeneration:
    """Builds a LLaVA from a ViT and a decoder, with a newly initialised projector.

    The decoder gets an image token. Its embedding is the mean of the others, so with tied output embeddings it is never
    the most likely token. The pooler of the tower is unused and set to zero.

    Args:
        tower: Folder of a ViT.
        decoder: Folder of a LLaMA with tied embeddings, and its tokenizer.
    """
    import torch
    from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, ViTModel

    vision = ViTModel.from_pretrained(tower, add_pooling_layer=False)
    language = LlamaForCausalLM.from_pretrained(decoder)
    language.resize_token_embeddings(language.config.vocab_size + 1, mean_resizing=False)
    embedding: Any = language.get_input_embeddings()
    rows: Tensor = embedding.weight.data
    rows[-1] = rows[:-1].double().mean(0).to(rows.dtype)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision.config, text_config=language.config, image_token_index=len(rows) - 1,
            vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=True,
        )
    )  # fmt: skip
    missing, _ = model.model.vision_tower.load_state_dict(vision.state_dict(), strict=False)
    for parameter in model.model.vision_tower.pooler.parameters():
        torch.nn.init.zeros_(parameter)
    if {key.split(".")[0] for key in missing} != {"pooler"}:
        raise SanError(f"The tower in {tower} lacks {', '.join(missing)}.")
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    return model


def processor_of(tower: Path, decoder: Path) -> LlavaProcessor:
    """Returns the processor of the model that `joined` builds."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        AutoImageProcessor.from_pretrained(tower), tokenizer, AutoConfig.from_pretrained(tower).patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def _assembled() -> Path:
    """Returns the folder of the LLaVA in the cache, named by a hash of its parts."""
    parts = [asset("vit") / "model.safetensors", asset("decoder") / "model.safetensors",
             asset("llava") / "adapter_model.safetensors"]  # fmt: skip
    digest = hashlib.sha256(version("transformers").encode())
    for part in parts:
        digest.update(part.read_bytes())
    return assembled("embedded", "llava", digest.hexdigest(), lambda folder: _assemble(folder))


def _assemble(folder: Path) -> None:
    """Saves the LLaVA in half precision, like its parts; the adapter is merged in double precision."""
    import json

    from peft import PeftModel

    model = joined(asset("vit"), asset("decoder")).double()
    model = PeftModel.from_pretrained(model, asset("llava")).double().merge_and_unload()
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # the dtype that `from_pretrained` loads in
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor_of(asset("vit"), asset("decoder")).save_pretrained(folder)
