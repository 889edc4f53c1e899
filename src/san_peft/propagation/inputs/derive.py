"""Assembles example inputs for a model: text, images, audio, and their companion arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from san_peft.errors import TraceError
from san_peft.propagation.inputs import images, sequences
from san_peft.propagation.inputs.spec import TOKENS, Draft, ModelSpec, parameters

FEATURES = {
    "get_image_features": ("image_token_id", "image_token_index"),
    "get_audio_features": ("audio_token_id", "audio_token_index"),
}
"""Methods that compute the features of placeholder tokens in a text, with the config names of these tokens."""
WAYS_OUT = (
    "Two ways out: SanConfig(propagation=san_peft.trace(model, example_inputs)), or SanConfig(propagation='none')."
)


def derive_inputs(model: nn.Module) -> dict[str, Any] | tuple[Tensor, ...]:
    """Derives a small example input: keyword arguments, or a tuple of arguments.

    Images and audio are seeded noise of the smallest size that the model accepts. Token ids are spread over the
    vocabulary, without special tokens. If several forms are possible, the model or its image encoder runs on each,
    smallest first, until it accepts one. The model is not changed.

    Args:
        model: A transformers or timm model, or an image model that begins with a two-dimensional convolution.

    Returns:
        Inputs on the model's device, or on the CPU for a model on the meta device, in the dtype of its parameters.

    Raises:
        TraceError: If no input can be derived, or the model accepts none of the derived inputs.
    """
    try:
        spec = ModelSpec(model)
        if hasattr(spec.config, "model_type") and hasattr(model, "main_input_name"):
            return _of_transformers(spec)
        return _of_images(spec)
    except TraceError:
        raise
    except Exception as error:
        raise _failure(model, f"{type(error).__name__}: {error}") from error


def _failure(model: nn.Module, reason: str) -> TraceError:
    return TraceError(f"The inputs of a {type(model).__name__} cannot be derived: {reason}. {WAYS_OUT}")


def _first(spec: ModelSpec, drafts: Sequence[Draft | tuple[Any, ...]]) -> Any:
    """Returns the first draft that the model accepts; a single draft is not tried."""
    if len(drafts) == 1:
        return drafts[0]
    raised: dict[str, None] = {}
    for draft in drafts:
        if spec.run(spec.model, draft) is not None:
            return draft
        raised[f"{type(spec.error).__name__}: {spec.error}"] = None
    raise _failure(spec.model, f"it raised {'; '.join(list(raised)[:3])}" if raised else "its modality is unknown")


def _of_images(spec: ModelSpec) -> tuple[Tensor, ...]:
    """Derives the input of a timm model, or of another model that begins with a convolution: one image."""
    full = images.timm_size(spec.model)
    layers = (m for m in spec.model.modules() if not [*m.children()] and [*m.parameters()])
    first = next((m for m in layers if full is None or isinstance(m, nn.Conv2d)), None)
    if not isinstance(first, nn.Conv2d) or len(spec.required(())) > 1:
        return _first(spec, ())
    patch = max(first.kernel_size) if first.kernel_size == first.stride else 1
    channels = dict.fromkeys((first.in_channels, images.timm_channels(spec.model) or first.in_channels))
    full = full or next((m.image_size for m in spec.model.modules() if getattr(m, "image_size", None)), None)
    sizes = [*images.sizes(full, patch), *((side, side) for side in images.TINY)]
    return _first(spec, [(spec.noise(1, n, *size),) for size in sizes for n in channels])


def _of_transformers(spec: ModelSpec) -> dict[str, Any]:
    text = _text_config(spec.config)
    parts = [[*images.drafts(spec)], [*sequences.drafts(spec)]]
    inserted: dict[int, int] = {}
    for place, (method, names) in enumerate(FEATURES.items()):
        token = spec.find(*names)
        if token is not None and parts[place] and "input_ids" in spec.accepted:
            inserted[token] = 1
            if hasattr(spec.model, method):
                draft, inserted[token] = _features(spec, method, parts[place])
                parts[place] = [draft]
            elif "attention_mask" in spec.accepted:  # the model inserts the features by itself
                mask = {"attention_mask": spec.ones(1, TOKENS + 1)}
                parts[place] = [{**draft, **mask} for draft in parts[place]]
    words = _text(spec, text, inserted)
    found = [{**image, **sound, **words} for image in parts[0] or [{}] for sound in parts[1] or [{}]]
    missing = spec.required(found[0])
    if missing or not found[0]:
        given = spec.model.dummy_inputs
        if spec.required(given) or not given.keys() <= spec.accepted.keys():
            raise _failure(spec.model, f"it takes {', '.join(missing) or spec.model.main_input_name}")
        found = [{name: value.to(spec.device) for name, value in given.items()}]
    if any(getattr(c, "use_cache", False) for c in (spec.config, text)) and (
        "use_cache" in spec.accepted or "kwargs" in spec.accepted
    ):
        found = [{**draft, "use_cache": False} for draft in found]
    return _first(spec, found)


def _text_config(config: Any) -> Any:
    """Returns the config of a model's text input, or of its text output if it has no text input."""
    for name in ("text_config", "text_encoder", "decoder"):
        if hasattr(getattr(config, name, None), "model_type"):
            return getattr(config, name)
    return config


def _features(spec: ModelSpec, method: str, drafts: list[Draft]) -> tuple[Draft, int]:
    """Returns the first draft that a feature method accepts, and the number of placeholder tokens for its features.

    Args:
        spec: The model.
        method: Its method that computes image or audio features.
        drafts: Arguments with images or audio.

    Raises:
        TraceError: If it accepts none.
    """
    function = getattr(spec.model, method)
    accepted = parameters(function)
    for draft in drafts:
        if "qformer_input_ids" in spec.accepted:
            draft = {**draft, "qformer_input_ids": spec.numbers([spec.words(text=spec.find("qformer_config"))])}
        known = {name: value for name, value in draft.items() if name in accepted}
        out = spec.run(function, known or draft)
        if out is not None:
            return draft, spec.find("num_query_tokens") or _count(out)
    raise _failure(spec.model, f"its {method} raised {type(spec.error).__name__}: {spec.error}")


def _count(out: Any) -> int:
    """Returns the number of feature vectors of an image or an audio clip."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            out = getattr(out, name)
            break
    parts = [out] if isinstance(out, Tensor) else list(out)
    return sum(part.numel() // part.shape[-1] for part in parts)


def _text(spec: ModelSpec, text: Any, inserted: dict[int, int]) -> Draft:
    """Returns the text arguments, including placeholder tokens for images and audio."""
    accepted, draft = spec.accepted, {}
    translates = getattr(spec.config, "is_encoder_decoder", False)
    kind = type(spec.model).__name__
    if "input_ids" in accepted:
        words = spec.words(TOKENS, text)
        ids = [words[0], *(token for token, count in inserted.items() for _ in range(count)), *words[1:]]
        end = spec.find("eos_token_id")
        if translates and isinstance(end, int) and 0 <= end < getattr(text, "vocab_size", 0):
            ids[-1] = end  # classification heads look for it
        draft["input_ids"] = spec.numbers([ids])
        if "mm_token_type_ids" in accepted and inserted:
            draft["mm_token_type_ids"] = spec.numbers([[int(word in inserted) for word in ids]])
        if "bbox" in accepted:
            draft["bbox"] = spec.numbers([[[10 * i, 10 * i, 10 * i + 8, 10 * i + 5] for i in range(1, len(ids) + 1)]])
        if kind.endswith("MultipleChoice"):
            draft = {name: value[:, None].repeat(1, 2, *(1,) * (value.dim() - 1)) for name, value in draft.items()}
    elif "inputs" in accepted and "pixel_values" not in accepted:
        draft["inputs"] = spec.noise(1, TOKENS, spec.find("d_model"))  # Perceiver without an input preprocessor
    if translates and "decoder_input_ids" in accepted and "Classification" not in kind:  # it shifts its own input
        decoder = getattr(spec.config, "decoder", None) or text
        draft["decoder_input_ids"] = spec.numbers([spec.words(TOKENS - 1, decoder)])
    if "task_inputs" in accepted:
        draft["task_inputs"] = spec.ones(1, spec.find("task_seq_len"))
    if "visual_feats" in accepted:
        draft["visual_feats"] = spec.noise(1, 4, spec.find("visual_feat_dim"))
        draft["visual_pos"] = spec.noise(1, 4, spec.find("visual_pos_dim")).abs()
    if "visual_embeds" in accepted:
        draft["visual_embeds"] = spec.noise(1, 4, spec.find("visual_embedding_dim"))
        draft["attention_mask"] = spec.ones(1, TOKENS)
    return draft
