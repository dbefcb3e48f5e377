"""Seeing a graph."""

from tl_clt.viewer.text import graph_tree, node_name

__all__ = ["graph_tree", "node_name"]
