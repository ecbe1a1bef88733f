"""Floor 2: what a model is trained to do."""
