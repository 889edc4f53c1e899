"""Drafts audio, time series and trajectories."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from san_peft.propagation.inputs.spec import TOKENS, Draft, ModelSpec

FRAMES = 2 * TOKENS
"""Frames of a derived audio clip, after the convolutions that encode its samples."""
SAMPLES = (4_000, 16_000)
"""Samples of a derived audio clip, for a model whose convolutions are not in its config."""


def drafts(spec: ModelSpec) -> Iterator[Draft]:
    """Yields drafts of the arguments that are neither text nor images; none for a model without them."""
    if "input_features" in spec.accepted:
        yield from _spectrograms(spec)
    if "input_values" in spec.accepted:
        yield from _sounds(spec)
    elif "past_values" in spec.accepted:
        yield _series(spec)
    elif {"states", "actions", "returns_to_go"} <= spec.accepted.keys():
        yield _trajectory(spec)


def _spectrograms(spec: ModelSpec) -> Iterator[Draft]:
    """Yields spectrograms: of fixed length for a Whisper-like encoder, else short ones with bands last."""
    section = "audio_config"
    bands = spec.find("num_mel_bins", section=section)
    positions = spec.find("max_source_positions", section=section)
    if bands and positions:
        yield from _with_mask(spec, {"input_features": spec.noise(1, bands, 2 * positions)}, 2 * positions)
        return
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "feature_size")
    bands = spec.find(*names, section=section)
    if bands is None:
        return
    for frames in (4 * FRAMES, 16 * FRAMES):
        for shape in ((1, frames, bands), (1, 1, frames, bands)):
            yield from _with_mask(spec, {"input_features": spec.noise(*shape)}, frames)


def _with_mask(spec: ModelSpec, draft: Draft, frames: int) -> Iterator[Draft]:
    masks = [name for name in ("feature_attention_mask", "input_features_mask") if name in spec.accepted]
    yield {**draft, **{name: spec.ones(1, frames) for name in masks}}


def _sounds(spec: ModelSpec) -> Iterator[Draft]:
    """Yields a spectrogram if the config has its length, else waveforms, shortest first."""
    bands, length = spec.find("num_mel_bins"), spec.find("max_length")
    if bands and length and not spec.find("conv_kernel"):
        yield {"input_values": spec.noise(1, length, bands)}
        return
    kernels, strides = spec.find("conv_kernel"), spec.find("conv_stride")
    lengths = list(SAMPLES)
    if kernels and strides:
        lengths = []
        for frames in (FRAMES, 8 * FRAMES):
            for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
                frames = (frames - 1) * stride + kernel
            lengths.append(frames)
    for samples in lengths:
        yield {"input_values": spec.noise(1, samples)}
        yield {"input_values": spec.noise(1, 1, samples)}


def _series(spec: ModelSpec) -> Draft:
    """Returns a time series, with the additional arguments of probabilistic forecasting models."""
    length, lags = spec.find("context_length", default=TOKENS), spec.find("lags_sequence")
    if lags is None:
        draft = {"past_values": spec.noise(1, length, spec.find("num_input_channels", default=1))}
        return {**draft, "past_observed_mask": torch.ones_like(draft["past_values"])} if _wants_mask(spec) else draft
    length, ahead, features = length + max(lags), spec.find("prediction_length"), spec.find("num_time_features")
    size = spec.find("input_size", default=1)
    values = spec.noise(1, length, size) if size > 1 else spec.noise(1, length)
    draft = {"past_values": values, "past_observed_mask": torch.ones_like(values)}
    draft["past_time_features"] = spec.noise(1, length, features)
    draft["future_values"] = spec.noise(1, ahead, *values.shape[2:])
    draft["future_time_features"] = spec.noise(1, ahead, features)
    if number := spec.find("num_static_categorical_features"):
        draft["static_categorical_features"] = spec.numbers([[0] * number])
    if number := spec.find("num_static_real_features"):
        draft["static_real_features"] = spec.noise(1, number)
    return draft


def _wants_mask(spec: ModelSpec) -> bool:
    return "past_observed_mask" in spec.required(())


def _trajectory(spec: ModelSpec) -> Draft:
    """Returns states, actions and returns of a few steps, as in a decision transformer."""
    one = spec.noise(1, TOKENS, 1)
    return {
        "states": spec.noise(1, TOKENS, spec.find("state_dim")),
        "actions": spec.noise(1, TOKENS, spec.find("act_dim")),
        "rewards": one,
        "returns_to_go": one.clone(),
        "timesteps": spec.numbers([list(range(TOKENS))]),
    }
