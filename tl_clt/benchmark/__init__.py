"""Transcoders judged by models whose mechanism is known."""

from tl_clt.benchmark.hops import HopReport, measure_hops, neurons_as_transcoder
from tl_clt.benchmark.judges import BenchmarkReport, Candidate, Judge, known_judges, load_judge, run_benchmark

__all__ = [
    "BenchmarkReport",
    "Candidate",
    "HopReport",
    "Judge",
    "known_judges",
    "load_judge",
    "measure_hops",
    "neurons_as_transcoder",
    "run_benchmark",
]
