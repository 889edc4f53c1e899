"""What an operation does to a channel's scale: names of operations on a path, and the kind that follows from them."""

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


def kind_of(via: Iterable[str]) -> str:
    """Returns the kind of an edge from the operations it passed, the strongest of them.

    `residual` (a sum with another stream, or with a constant per position) is stronger than `norm` (a normalisation, or
    a constant per channel added outside a layer), that than `activation`.
    A name that is neither a norm, a sum nor a linear operation counts as an activation, ReLU included: ReLU commutes
    with a positive scale only, and a trained scale may turn negative.

    Args:
        via: Names of the operations on the path.

    Returns:
        One of exact, activation, norm, residual.
    """
    kind = 0
    for name in via:
        if name in _RESIDUAL:
            return KINDS[3]
        kind = max(kind, 2 if name in _NORMS else 0 if name in _EXACT else 1)
    return KINDS[kind]


def join(path: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Returns a path with further operations at its end, every operation named once."""
    return tuple(dict.fromkeys((*path, *names)))


def is_activation(path: Iterable[str]) -> bool:
    """Whether a path passed an activation."""
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
"""Operations that move channels and change none: they are run on the channels' codes themselves."""

TAKES = frozenset("index index_select gather take masked_select embedding repeat_interleave".split())
"""Of these, the ones that take entries where integers or truth values say."""

WRITES = frozenset("index_put scatter index_copy masked_scatter".split())
"""Operations that move some entries of one tensor into another: as movements, where no constant stays beside them."""

PILES = frozenset("index_add scatter_add scatter_reduce col2im".split())
"""Operations that add entries up where they fall on the same place."""

KEEPS = frozenset(
    (
        "clone detach alias _to_copy to contiguous neg native_dropout dropout view_as lift _conj conj_physical "
        "resolve_conj resolve_neg _neg_view"
    ).split()
)
"""Operations that leave every entry at its place and commute with a scale."""

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
"""What may follow the last layer of a model: it is a head all the same."""

CHOICES = frozenset("maximum minimum fmax fmin logaddexp".split())
"""Element-wise functions of two streams that do not commute with a scale."""

NORM_OPS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
"""Normalisations, recognised in an operation's name (`native_layer_norm`, `_fused_rms_norm`, ...)."""

REDUCTIONS = frozenset("mean sum var std var_mean amax amin max min linalg_vector_norm norm prod logsumexp".split())
"""Reductions: over tokens they keep the channels, over channels they give a statistic."""

SUMS = {"mean": (), "sum": (), **{name: (name,) for name in ("amax", "amin", "max", "min", "logsumexp")}}
"""Reductions that combine streams as a sum does, and what they leave on the path beside that."""

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
"""Operations over the last axes (how many), which mix pixels and no channels."""

ALONG = {
    **dict.fromkeys(("cumsum", "_fft_r2c", "_fft_c2r", "_fft_c2c"), MIX),
    **{name: name for name in ("sort", "topk", "cummax", "cummin", "logcumsumexp")},
}
"""Operations along some axes, which they mix or sort, and what they leave on the path of channels on the others."""

COMPARISONS = frozenset(
    "eq ne lt le gt ge isnan isinf isfinite logical_not logical_and logical_or argmax argmin any all item "
    "_local_scalar_dense sym_size zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "is_nonzero equal rand_like randn_like bernoulli new_empty_strided".split()
)
"""Operations whose results carry no channel."""

BLIND = frozenset(
    "sym_size zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty rand_like randn_like "
    "new_empty_strided".split()
)
"""Of these, the ones that look at a tensor's shape and not at its entries."""

ZEROS = frozenset("zeros zeros_like new_zeros zero".split())
"""Operations that give nothing but zeros."""

EMPTY = frozenset("empty empty_like new_empty empty_strided new_empty_strided empty_permuted".split())
"""Operations that give memory in which nothing has been written yet."""
