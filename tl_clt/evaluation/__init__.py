"""How good a CLT is."""

from tl_clt.evaluation.faithfulness import FaithfulnessReport, measure_faithfulness, residual_changes
from tl_clt.evaluation.fidelity import FidelityReport, evaluate, replaced

__all__ = [
    "FaithfulnessReport",
    "FidelityReport",
    "evaluate",
    "measure_faithfulness",
    "replaced",
    "residual_changes",
]
