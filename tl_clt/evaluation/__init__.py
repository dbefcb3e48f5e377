"""How good a CLT is."""

from tl_clt.evaluation.faithfulness import measure_faithfulness
from tl_clt.evaluation.faithfulness_report import FaithfulnessReport
from tl_clt.evaluation.fidelity import FidelityReport, evaluate, replaced

__all__ = [
    "FaithfulnessReport",
    "FidelityReport",
    "evaluate",
    "measure_faithfulness",
    "replaced",
]
