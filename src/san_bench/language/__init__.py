"""Language models: recipes, records, prompts, tokenizers, training, and scoring by generation or likelihood."""
