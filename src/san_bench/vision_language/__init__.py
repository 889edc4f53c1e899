"""Vision-language models: recipes, conversations about images, chat templates, training and benchmarks."""
