"""From one prompt to an attribution graph, and from a graph to what matters in it."""

from tl_clt.attribution.attribute import attribute
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.influence import GraphScores, InfluenceShares, PruneMasks
from tl_clt.attribution.local import LocalReplacementModel, build_local_model
from tl_clt.attribution.nodes import NodeKind, Nodes

__all__ = [
    "AttributionGraph",
    "GraphScores",
    "InfluenceShares",
    "LocalReplacementModel",
    "NodeKind",
    "Nodes",
    "PruneMasks",
    "attribute",
    "build_local_model",
]
