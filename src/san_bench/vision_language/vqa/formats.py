"""The last lines of questions, as LLaVA-1.5 is trained on them and asked with them. No torch."""

SHORT = "Answer the question using a single word or phrase."
"""Last line of a question that wants a short answer."""

LETTER = "Answer with the option's letter from the given choices directly."
"""Last line of a question of multiple choice."""

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
"""Line before the last one in VizWiz."""
