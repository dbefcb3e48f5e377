"""Seeing a graph."""

from tl_clt.viewer.story import Group, Path, group_features, strongest_paths
from tl_clt.viewer.text import graph_tree, node_name

__all__ = ["Group", "Path", "graph_tree", "group_features", "node_name", "strongest_paths"]
