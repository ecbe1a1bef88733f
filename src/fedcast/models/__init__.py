"""Floor 2: the native patch transformer and the forecaster around it."""
