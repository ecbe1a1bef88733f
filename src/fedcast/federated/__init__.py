"""The round loop, client work and the fleets that carry tasks to sites."""
