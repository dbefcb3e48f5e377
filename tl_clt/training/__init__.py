"""Training of cross-layer transcoders with SAELens's trainer and activation store. The only importer of sae_lens."""

from tl_clt.training.config import CLTTrainingRunnerConfig
from tl_clt.training.memory import MemoryEstimate
from tl_clt.training.runner import CLTTrainingRunner, TrainingProgress
from tl_clt.training.sharding import own_device

__all__ = ["CLTTrainingRunner", "CLTTrainingRunnerConfig", "MemoryEstimate", "TrainingProgress", "own_device"]
