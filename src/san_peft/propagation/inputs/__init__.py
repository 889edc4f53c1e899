"""Derives example inputs for a model from its configuration, its forward signature and the shapes of its layers.

`derive.py` assembles the inputs. `images.py` and `sequences.py` draft the arguments of one modality, smallest first.
The model, or its image or audio encoder, runs on these drafts until it accepts one.
"""

from san_peft.propagation.inputs.derive import derive_inputs

__all__ = ["derive_inputs"]
