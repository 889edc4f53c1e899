"""Running recipes: models, training, evaluation, the demo."""
