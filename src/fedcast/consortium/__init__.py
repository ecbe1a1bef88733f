"""A consortium: its certificates and keys, the start-up kits of its coordinator and its sites, and the network between them.

Flower carries the messages, over its own command line programs; nothing here imports it. ``certificates`` and ``provision`` make the kits,
``kits`` reads them, ``coordinator`` runs the SuperLink and registers the sites, ``network`` says whether a coordinator is to be trusted and
reached, ``diagnosis`` why a site cannot join.
"""

from fedcast.consortium.diagnosis import diagnose
from fedcast.consortium.kits import CoordinatorKit, SiteKit

__all__ = ["CoordinatorKit", "SiteKit", "diagnose"]
