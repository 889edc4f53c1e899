"""Image classification: recipes, tasks, layouts of data on disk, preprocessing, training and scoring."""
