"""How good a CLT is."""

from tl_clt.evaluation.evaluate import evaluate, replaced
from tl_clt.evaluation.faithfulness import FaithfulnessReport, measure_faithfulness
from tl_clt.evaluation.report import FIGURES, EvaluationReport, GraphNumbers

__all__ = [
    "FIGURES",
    "EvaluationReport",
    "FaithfulnessReport",
    "GraphNumbers",
    "evaluate",
    "measure_faithfulness",
    "replaced",
]
