"""Prompt suffixes of LLaVA-1.5 for training and evaluation. No torch."""

SHORT = "Answer the question using a single word or phrase."
"""Suffix for short answers."""

LETTER = "Answer with the option's letter from the given choices directly."
"""Suffix for multiple choice."""

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
"""Line before the suffix in VizWiz."""
