# The names of this room, and where each is: the one list of them. `__init__.py` reads it, and so do editors.
from tl_clt.training.clt import TrainingCLT as TrainingCLT
from tl_clt.training.clt import TrainingCLTConfig as TrainingCLTConfig
from tl_clt.training.clt import init_from_tokens as init_from_tokens
from tl_clt.training.config import CLTSettings as CLTSettings
from tl_clt.training.config import CLTTrainingRunnerConfig as CLTTrainingRunnerConfig
from tl_clt.training.config import DataSettings as DataSettings
from tl_clt.training.data.batches import apply_scale as apply_scale
from tl_clt.training.data.batches import estimate_scale as estimate_scale
from tl_clt.training.data.batches import hook_names as hook_names
from tl_clt.training.data.batches import pack as pack
from tl_clt.training.export import clt_disk_loader as clt_disk_loader
from tl_clt.training.parallel import own_device as own_device
from tl_clt.training.run.memory import MemoryEstimate as MemoryEstimate
from tl_clt.training.run.progress import TrainingProgress as TrainingProgress
from tl_clt.training.run.progress import TrainingTimes as TrainingTimes
from tl_clt.training.run.progress import draw_progress as draw_progress
from tl_clt.training.run.runner import CLTTrainingRunner as CLTTrainingRunner
