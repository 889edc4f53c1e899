"""The errors that SAN raises on purpose; each message names the thing, the numbers and the way out."""


class SanError(ValueError):
    """Base class of every error that SAN raises on purpose."""


class TargetError(SanError):
    """A target module is missing, matches nothing, or is of a kind that SAN cannot adapt."""


class GraphError(SanError):
    """A propagation graph, an edge or a channel map does not fit itself or the model."""


class TraceError(SanError):
    """The propagation graph of a model could not be traced."""


class AdapterError(SanError):
    """An adapter file, its configuration or its values cannot be used on this model."""


class MergeError(SanError):
    """Scales could not be merged into the weights, or merging changed the outputs too much."""
