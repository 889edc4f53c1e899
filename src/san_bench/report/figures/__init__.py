"""Figures: accuracy, losses, trained scales, similarity of scale vectors."""
