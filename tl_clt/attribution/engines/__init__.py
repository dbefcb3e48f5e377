"""Ways to find the rows of a graph. All give the same numbers; `autograd` is the definition."""

from tl_clt.attribution.engines.autograd import AutogradEngine
from tl_clt.attribution.engines.choose import EngineChoice, EngineMaker
from tl_clt.attribution.engines.engine import Engine
from tl_clt.attribution.engines.sweep import SweepEngine

__all__ = ["AutogradEngine", "Engine", "EngineChoice", "EngineMaker", "SweepEngine"]
