"""Flat parameters and the local training loop."""
