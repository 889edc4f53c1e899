"""Example inputs for a model, derived from what it says of itself: its configuration, its forward signature, its sizes.

`derive.py` puts inputs together; `images.py` and `sequences.py` draft the arguments of one kind, smallest first; what a
model takes is found out by running it, or the part of it that reads images or audio, on these drafts.
"""

from san_peft.propagation.inputs.derive import derive_inputs

__all__ = ["derive_inputs"]
