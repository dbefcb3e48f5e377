"""Small models that come with the package: trained ones with their CLTs, and such whose circuits are known by
construction."""

from __future__ import annotations

from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tl_clt.arguments import shown
from tl_clt.bundled import ORGANISMS, bundled_organisms
from tl_clt.errors import ModelNotFound, nearest
from tl_clt.features import FeatureStore, Variable
from tl_clt.lens import Backend, HookedModel, load_model
from tl_clt.organisms.circuits import CircuitVariable, KnownCircuit, ground_truth, known_circuits, load_circuit
from tl_clt.organisms.emergence import Checkpoints, Emergence, measure_emergence
from tl_clt.organisms.interchange import find_variables, interchange, probe
from tl_clt.organisms.programs import Program, Step
from tl_clt.organisms.tasks import BenchmarkPrompt, Case, Hop, Task
from tl_clt.organisms.word_model import TrainOptions, training_batches
from tl_clt.transcoder import CrossLayerTranscoder

DEFAULT_PROMPTS = {
    "atlas": "Fact: the capital of the state containing Dallas is",
    "school": "he saw a sled / and there it",
}


class Organism(NamedTuple):
    """A bundled model and its CLT."""

    model: HookedModel
    clt: CrossLayerTranscoder


def load_organism(
    name: str = "atlas",
    *,
    backend: Backend = "hooked",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> Organism:
    """Load a bundled model and its CLT.

    Raises:
        ModelNotFound: there is no organism of that name.
    """
    folder = organism_folder(name)
    model = load_model(name, backend=backend, device=device, dtype=dtype)
    return Organism(model, CrossLayerTranscoder.from_pretrained(folder / "clt", device=device, dtype=dtype))


def load_features(name: str = "atlas") -> FeatureStore:
    """What the features of a bundled CLT mean: `load_features("atlas")[layer, feature]`.

    Raises:
        ModelNotFound: there is no organism of that name.
        CLTMismatch: the store was made for another CLT than the one that is bundled.
    """
    folder = organism_folder(name)
    return FeatureStore.open(folder / "features", CrossLayerTranscoder.from_pretrained(folder / "clt"))


def known_variables(name: str) -> tuple[Variable, ...]:
    """What is known of an organism's text at each token, for labels; nothing of other models' texts."""
    if name not in bundled_organisms():
        return ()
    return import_module(f"tl_clt.organisms.{name}.variables").VARIABLES


def organism_tasks(name: str) -> dict[str, Task]:
    """What an organism has learnt to do, by name, as small programs whose hops are known.

    Raises:
        ModelNotFound: there is no organism of that name.
    """
    organism_folder(name)
    return import_module(f"tl_clt.organisms.{name}.text").TASKS


TEXT_SEED_OFFSET = 1
"""Added to the seed, so that a CLT is not trained on the text that its model was trained on."""
SPARE_TOKENS = 36_000
"""More than a run trains on: some are kept out of training, and the shuffling buffer is filled to the end."""


def training_tokens(name: str, model: HookedModel, n_tokens: int, seed: int) -> Int[Tensor, "n_prompts context"]:
    """Text of an organism for training its CLTs, packed as it was for the model: `<bos>` and whole sentences.

    Args:
        name: the organism.
        model: its model, for the tokenizer.
        n_tokens: so many that are not `<bos>`, or up to a batch of prompts more.
        seed: of the text.

    Raises:
        ModelNotFound: there is no organism of that name.
    """
    organism_folder(name)
    sentences = import_module(f"tl_clt.organisms.{name}.text").sentences(seed + TEXT_SEED_OFFSET)
    options = TrainOptions(n_ctx=model.cfg.n_ctx)
    n_batches = -(-n_tokens // (options.batch_size * (options.n_ctx - 1)))
    assert model.tokenizer is not None
    return torch.cat(list(islice(training_batches(model.tokenizer, sentences, options), n_batches)))


def benchmark_prompts(name: str) -> list[BenchmarkPrompt]:
    """Prompts that an organism was not trained on, with their right answers, in an order of no meaning."""
    organism_folder(name)
    return import_module(f"tl_clt.organisms.{name}.text").benchmark_prompts()


def default_prompt(name: str) -> str:
    """A prompt that shows what the organism can do."""
    organism_folder(name)
    return DEFAULT_PROMPTS[name]


def organism_folder(name: str) -> Path:
    """Where an organism's model, CLT and card lie."""
    known = bundled_organisms()
    if not isinstance(name, str):
        raise ModelNotFound(f"name is {shown(name)}: give the name of a bundled organism ({', '.join(known)}).")
    if name not in known:
        raise ModelNotFound(f"'{name}' is no bundled organism ({', '.join(known)}).{nearest(name, known)}")
    return ORGANISMS / name


__all__ = [
    "Case",
    "BenchmarkPrompt",
    "Checkpoints",
    "CircuitVariable",
    "Emergence",
    "Hop",
    "KnownCircuit",
    "Organism",
    "Program",
    "SPARE_TOKENS",
    "Step",
    "Task",
    "benchmark_prompts",
    "default_prompt",
    "find_variables",
    "ground_truth",
    "interchange",
    "known_circuits",
    "known_variables",
    "load_circuit",
    "load_features",
    "load_organism",
    "measure_emergence",
    "organism_folder",
    "organism_tasks",
    "probe",
    "training_tokens",
]
