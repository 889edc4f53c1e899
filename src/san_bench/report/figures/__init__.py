"""Plot accuracy, training loss, trained scales and their similarity."""
