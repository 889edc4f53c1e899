"""Train, evaluate and resume one run; its scales, model card, trackers and provenance."""
