"""Transcoders judged by models whose mechanism is known."""

from tl_clt.benchmark.hops import HopReport, measure_hops, neurons_as_transcoder
from tl_clt.benchmark.judges import BenchmarkReport, Candidate, Judge, known_judges, load_judge, run_benchmark
from tl_clt.benchmark.tasks import OrganismReport, TaskReport, measure_organism, measure_task
from tl_clt.evaluation import Neurons, find_neurons

__all__ = [
    "BenchmarkReport",
    "Candidate",
    "HopReport",
    "Judge",
    "Neurons",
    "OrganismReport",
    "TaskReport",
    "find_neurons",
    "known_judges",
    "load_judge",
    "measure_hops",
    "measure_organism",
    "measure_task",
    "neurons_as_transcoder",
    "run_benchmark",
]
