"""How good a CLT is."""

from tl_clt.evaluation.evaluate import evaluate
from tl_clt.evaluation.faithfulness import measure_faithfulness
from tl_clt.evaluation.faithfulness_report import FaithfulnessReport
from tl_clt.evaluation.graphs import GraphNumbers
from tl_clt.evaluation.replaced import replaced
from tl_clt.evaluation.report import FIGURES, EvaluationReport

__all__ = [
    "FIGURES",
    "EvaluationReport",
    "FaithfulnessReport",
    "GraphNumbers",
    "evaluate",
    "measure_faithfulness",
    "replaced",
]
