"""The fleet over machines: Flower as an authenticated bus between the round loop and the sites' workers.

``fleet`` stands in the process of ``fedcast run``, ``worker`` in that of ``fedcast site start``. Between them Flower runs two relays,
``server_relay`` and ``client_relay``, which hand bytes on through Unix sockets. Only these two and ``locked`` import flwr.
"""
