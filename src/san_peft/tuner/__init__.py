"""SAN as a PEFT method: configuration, layer and model."""
