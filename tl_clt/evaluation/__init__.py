"""How good a CLT is."""

from tl_clt.evaluation.fidelity import FidelityReport, evaluate, replaced

__all__ = ["FidelityReport", "evaluate", "replaced"]
