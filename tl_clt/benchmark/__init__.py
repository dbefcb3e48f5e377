"""Transcoders judged by models whose mechanism is known."""

from tl_clt.benchmark.hops import HopReport, measure_hops, neurons_as_transcoder
from tl_clt.benchmark.judges import BenchmarkReport, Candidate, Judge, known_judges, load_judge, run_benchmark
from tl_clt.benchmark.tasks import Neurons, OrganismReport, TaskReport, find_neurons, measure_organism, measure_task

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
