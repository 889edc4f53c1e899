"""The small models that ship with the package: three of images, and one of texts. Two of them make a LLaVA.

Example:
    >>> embedded_path().name, embedded_path("decoder").name
    ('vit-tiny-procedural', 'decoder-tiny-procedural')
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_bench.data.conversations import MARKER
from san_bench.strict import suggest
from san_peft.errors import SanError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

EMBEDDED = ("vit", "swin", "convnext")
"""The models of images."""

MODELS = (*EMBEDDED, "decoder")
"""All models."""


def embedded_path(name: str = "vit") -> Path:
    """Returns the folder of a small model that ships with the package, for any `from_pretrained` of transformers.

    Args:
        name: One of `MODELS`.

    Raises:
        SanError: If there is no such model.
    """
    if name not in MODELS:
        raise SanError(f"No model {name!r} ships with the package.{suggest(name, MODELS)}")
    return Path(str(resources.files("san_bench.data") / "assets" / f"{name}-tiny-procedural"))


def joined(tower: Path, decoder: Path) -> LlavaForConditionalGeneration:
    """Returns a LLaVA of a ViT and a decoder, with a new projector between them.

    The decoder gets one more token, for the place of an image: its embedding is the mean of the others, so, as the
    output shares it, it is never the likeliest. The pooler of the tower, which nothing reads, is zero.

    Args:
        tower: Folder of a ViT.
        decoder: Folder of a LLaMA that shares its embedding with its output, with its tokenizer.
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
    """Returns the processor of the model that `joined` makes of the same two."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.add_special_tokens({"additional_special_tokens": [MARKER]})
    return LlavaProcessor(
        AutoImageProcessor.from_pretrained(tower), tokenizer, AutoConfig.from_pretrained(tower).patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
