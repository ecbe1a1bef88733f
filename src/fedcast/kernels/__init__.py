"""Native kernels for the training step: optional, compiled on this machine, the same interface as the torch path."""
