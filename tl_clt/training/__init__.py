"""Training of cross-layer transcoders with SAELens's trainer and activation store. The only importer of sae_lens."""

from tl_clt.training.clt import CLTSettings
from tl_clt.training.data.batches import DataSettings
from tl_clt.training.parallel import own_device
from tl_clt.training.run.config import CLTTrainingRunnerConfig
from tl_clt.training.run.memory import MemoryEstimate
from tl_clt.training.run.runner import CLTTrainingRunner, TrainingProgress

__all__ = [
    "CLTSettings",
    "CLTTrainingRunner",
    "CLTTrainingRunnerConfig",
    "DataSettings",
    "MemoryEstimate",
    "TrainingProgress",
    "own_device",
]
