"""How good a CLT is."""

from tl_clt.evaluation.across import TaskComparison, compare_tasks
from tl_clt.evaluation.behaviour import PrunedToBehaviour, find_consensus, prune_to_behaviour
from tl_clt.evaluation.curves import FaithfulnessCurves, measure_curves
from tl_clt.evaluation.evaluate import evaluate
from tl_clt.evaluation.faithfulness import FaithfulnessReport, measure_faithfulness
from tl_clt.evaluation.neurons import Neurons, find_neurons
from tl_clt.evaluation.report import FIGURES, EvaluationReport, GraphNumbers
from tl_clt.replacement import replaced

__all__ = [
    "FIGURES",
    "EvaluationReport",
    "FaithfulnessCurves",
    "FaithfulnessReport",
    "GraphNumbers",
    "Neurons",
    "PrunedToBehaviour",
    "TaskComparison",
    "compare_tasks",
    "evaluate",
    "find_consensus",
    "find_neurons",
    "measure_curves",
    "measure_faithfulness",
    "prune_to_behaviour",
    "replaced",
]
