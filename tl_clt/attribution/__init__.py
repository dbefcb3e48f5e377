"""From one prompt to an attribution graph, and from a graph to what matters in it."""

from tl_clt.attribution.attribute import attribute
from tl_clt.attribution.direct import HeadEffects, find_direct_edges, find_head_effects
from tl_clt.attribution.edges import Node, NodeKind, Nodes
from tl_clt.attribution.graph import AttributionGraph, GraphTables, RankedNode
from tl_clt.attribution.influence import GraphScores, InfluenceShares
from tl_clt.attribution.local import LocalReplacementModel, build_local_model
from tl_clt.attribution.pruning import PruneMasks, check_thresholds
from tl_clt.attribution.supernodes import (
    CollapsedGraph,
    Supernodes,
    collapse,
    find_supernodes,
    score_subgraph,
)
from tl_clt.attribution.targets import DifferenceTarget, DirectionTarget, FeatureTarget, TokenTarget

__all__ = [
    "check_thresholds",
    "AttributionGraph",
    "CollapsedGraph",
    "DifferenceTarget",
    "DirectionTarget",
    "FeatureTarget",
    "GraphScores",
    "GraphTables",
    "HeadEffects",
    "InfluenceShares",
    "LocalReplacementModel",
    "Node",
    "NodeKind",
    "Nodes",
    "PruneMasks",
    "RankedNode",
    "Supernodes",
    "TokenTarget",
    "attribute",
    "build_local_model",
    "collapse",
    "find_direct_edges",
    "find_head_effects",
    "find_supernodes",
    "score_subgraph",
]
