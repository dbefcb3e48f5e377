"""Ways to find the rows of a graph. All give the same numbers; `autograd` is the definition."""

from tl_clt.attribution.engines.autograd import AutogradEngine

__all__ = ["AutogradEngine"]
