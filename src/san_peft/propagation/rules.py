"""Classifies operations by their effect on channels, and paths of operations by their effect on a scale."""

from __future__ import annotations

from collections.abc import Iterable

KINDS = ("exact", "activation", "norm", "residual")

RESIDUAL = "residual"
OFFSET = "offset"
BIAS = "bias"
ATTENTION = "attention"
MIX = "mix"
POOL = "pool"
GATED = "gated"
SELF_GATE = "self_gate"

_RESIDUAL = frozenset({RESIDUAL, OFFSET})
_EXACT = frozenset({ATTENTION, MIX, POOL, GATED})
_NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "norm", BIAS})


def path_kind(via: Iterable[str]) -> str:
    """Returns the kind of a path: the strongest kind among its operations.

    From strong to weak: `residual` is a sum with another stream or with a constant per position, `norm` is a
    normalisation or a per-channel constant added outside a layer, `activation` is any other operation that is not
    linear. ReLU counts as an activation: it commutes only with positive scales, and a trained scale may be negative.

    Args:
        via: Names of the operations on the path.

    Returns:
        One of `KINDS`.
    """
    kind = 0
    for name in via:
        if name in _RESIDUAL:
            return KINDS[3]
        kind = max(kind, 2 if name in _NORMS else 0 if name in _EXACT else 1)
    return KINDS[kind]


def join(path: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Appends operations to a path, without duplicates."""
    return tuple(dict.fromkeys((*path, *names)))


def is_activation(path: Iterable[str]) -> bool:
    """Returns whether a path contains an activation."""
    return any(name not in _RESIDUAL | _EXACT | _NORMS for name in path)


MOVES = frozenset(
    (
        "view _unsafe_view reshape _reshape_alias permute transpose t expand slice select unsqueeze squeeze cat stack "
        "split split_with_sizes unsafe_split chunk unbind roll constant_pad_nd repeat flip index index_select gather "
        "unfold im2col pixel_shuffle pixel_unshuffle native_channel_shuffle narrow diagonal movedim swapaxes "
        "repeat_interleave lift_fresh rot90 take masked_select embedding tril triu slice_scatter select_scatter "
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
    ).split()
)
"""Operations that move entries without changing them. They are run on the codes themselves."""

TAKES = frozenset("index index_select gather take masked_select embedding repeat_interleave".split())
"""The operations of `MOVES` that take entries by integer or boolean indices."""

WRITES = frozenset("index_put scatter index_copy masked_scatter".split())
"""Operations that write entries of one tensor into another. They are followed like `MOVES` if they leave no constants
between the written entries."""

PILES = frozenset("index_add scatter_add scatter_reduce col2im".split())
"""Operations that sum the entries that are written to the same position."""

KEEPS = frozenset(
    (
        "clone detach alias _to_copy to contiguous neg native_dropout dropout view_as lift _conj conj_physical "
        "resolve_conj resolve_neg _neg_view"
    ).split()
)
"""Element-wise operations that commute with a scale."""

ACTIVATIONS = {
    name: name.lstrip("_")
    for name in (
        "gelu relu silu sigmoid tanh elu leaky_relu hardswish hardsigmoid hardtanh mish softplus celu selu prelu "
        "_prelu_kernel relu6 exp log sqrt rsqrt pow square erf abs clamp clamp_min clamp_max reciprocal cos sin "
        "log_sigmoid_forward threshold round floor sgn sign log1p expm1 ceil trunc frac exp2 log2 log10 logit erfc "
        "tan sinh cosh asin acos atan asinh acosh atanh hardshrink softshrink nan_to_num angle "
        "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask"
    ).split()
}
"""Element-wise functions that do not commute with a scale."""

LAST = frozenset(("tanh", "sigmoid", "clamp", "clamp_min", "clamp_max", "hardtanh", "log_sigmoid_forward", BIAS))
"""Operations after which the last layer of a model still counts as a head."""

CHOICES = frozenset("maximum minimum fmax fmin logaddexp".split())
"""Element-wise functions of two streams that do not commute with a scale."""

NORM_OPS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
"""Normalisations, matched as substrings of operation names (`native_layer_norm`, `_fused_rms_norm`, ...)."""

REDUCTIONS = frozenset("mean sum var std var_mean amax amin max min linalg_vector_norm norm prod logsumexp".split())
"""Reductions. Over tokens they keep the channels; over channels they return a statistic."""

SUMS = {"mean": (), "sum": (), **{name: (name,) for name in ("amax", "amin", "max", "min", "logsumexp")}}
"""Reductions that combine streams like a sum, with the names that they add to the path besides `residual`."""

POOLS = {
    "avg_pool1d": 1,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "_adaptive_avg_pool2d": 2,
    "_adaptive_avg_pool3d": 3,
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3,
    "grid_sampler_2d": 2,
    "grid_sampler_3d": 3,
}
"""Operations that mix pixels but not channels, with the number of trailing axes that they act on."""

ALONG = {
    **dict.fromkeys(("cumsum", "_fft_r2c", "_fft_c2r", "_fft_c2c"), MIX),
    **{name: name for name in ("sort", "topk", "cummax", "cummin", "logcumsumexp")},
}
"""Operations that mix or sort entries along some axes, with the name that they add to the path."""

COMPARISONS = frozenset(
    "eq ne lt le gt ge isnan isinf isfinite logical_not logical_and logical_or argmax argmin any all item "
    "_local_scalar_dense sym_size zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "is_nonzero equal rand_like randn_like bernoulli new_empty_strided".split()
)
"""Operations whose results carry no channels."""

BLIND = frozenset(
    "sym_size zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty rand_like randn_like "
    "new_empty_strided".split()
)
"""The operations of `COMPARISONS` that depend on the shape of a tensor but not on its values."""

ZEROS = frozenset("zeros zeros_like new_zeros zero".split())
"""Operations that return only zeros."""

EMPTY = frozenset("empty empty_like new_empty empty_strided new_empty_strided empty_permuted".split())
"""Operations that return uninitialised memory."""
