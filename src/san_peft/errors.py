"""Exceptions of this library. Each message names what failed, the numbers involved, and how to fix it."""


class SanError(ValueError):
    """Base class of all exceptions of this library."""


class TargetError(SanError):
    """A target module is missing, matches no layer, or has an unsupported type."""


class GraphError(SanError):
    """A propagation graph, an edge or a channel map is inconsistent or does not match the model."""


class TraceError(SanError):
    """The propagation graph of a model could not be traced."""


class AdapterError(SanError):
    """An adapter checkpoint, its configuration or its values are incompatible with this model."""


class MergeError(SanError):
    """Merging scales into the weights failed, or changed the outputs by more than the tolerance."""
