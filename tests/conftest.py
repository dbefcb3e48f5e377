"""Settings and fixtures of all tests: shapes checked at run time, no network, two threads."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Before the first import of tl_clt, and never taken down: modules imported late are checked as well.
import jaxtyping

from tests import checking

checking.install("tl_clt")

import gc
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.models import FAMILIES, HOOKED, Model, random_tokens, save_hf, tiny_bridge, tiny_hf, tiny_hooked
from tests.warm_process import WarmProcess
from tl_clt.lens import load_model

THREADS = int(os.environ.get("OMP_NUM_THREADS", "0"))
"""Threads of every test where the environment names a number of them."""

N_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

torch.set_num_threads(THREADS or 2)


def pytest_configure(config: pytest.Config) -> None:
    """Files are handed to workers in the order below, not those of most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model's tests come first: they take longest, and at the end one worker would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("real_model") is None)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: collections of garbage, which some tests ask for, need not look through it again."""
    gc.collect()
    gc.freeze()


ORACLES = Path(__file__).parent / "data" / "oracles"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts from the same random state.

    Tiny models run on one thread, unless OMP_NUM_THREADS says otherwise: handing work to a second one costs ten times
    what it saves. So does the real model where several workers share the cores, and threads would wait for each other.
    """
    torch.manual_seed(0)
    if request.node.get_closest_marker("real_model") is None or N_WORKERS > 1:
        torch.set_num_threads(THREADS or 1)
    yield
    torch.set_num_threads(THREADS or 2)


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without run-time checks of annotations, for tests of the messages that users get instead of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def session_models(tmp_path_factory: pytest.TempPathFactory):
    """`session_models(kind)`: the float64 model of a kind ("hooked-llama", "bridge-gpt2"), made once."""
    made: dict[str, Model] = {}

    def get(kind: str) -> Model:
        if kind not in made:
            backend, name = kind.split("-")
            if backend == "hooked":
                made[kind] = tiny_hooked(name)
            else:
                made[kind] = tiny_bridge(name, tmp_path_factory.mktemp(kind), exact=True)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def warm_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    """Runs code in fresh processes that have torch, TransformerLens and what draws loaded."""
    process = WarmProcess(tmp_path_factory.mktemp("streams"))
    yield process
    process.close()


KINDS = (*(f"hooked-{arch}" for arch in HOOKED), *(f"bridge-{family}" for family in FAMILIES))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, session_models) -> Model:
    """Every tiny model, of either kind, in float64. Shared: leave it as it was."""
    return session_models(request.param)


@pytest.fixture
def generating(model: Model, request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    """Every tiny model; the one with learned positions with a tokenizer.

    Without one, HookedTransformer's own generate with a key-value cache loses count of the positions.
    """
    if request.node.callspec.params["model"] == "hooked-gpt2":
        return load_model(save_hf(tiny_hf("gpt2"), tmp_path), dtype=torch.float64)
    return model


@pytest.fixture(params=["hooked-gpt2", "bridge-llama"])
def one_of_each(request: pytest.FixtureRequest, session_models) -> Model:
    """One HookedTransformer and one TransformerBridge, for what does not turn on the architecture."""
    return session_models(request.param)


@pytest.fixture
def tokens(model: Model) -> torch.Tensor:
    """Two prompts of seven tokens [batch, pos]."""
    return random_tokens(model, batch=2, pos=7)


@pytest.fixture(params=sorted(p.name for p in ORACLES.iterdir() if p.is_dir()))
def oracle(request: pytest.FixtureRequest) -> Path:
    """Each folder of what circuit-tracer computes on a small model."""
    return ORACLES / request.param


@contextmanager
def small_disk() -> Iterator[None]:
    """No file can grow beyond 4 KiB, which the system says as it would of a full disk.

    Within a test only: what pytest itself writes between tests may go to a larger file.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def modules_after(*codes: str) -> list[set[str]]:
    """Names of the top-level modules that are loaded after each piece of code, all run in one fresh interpreter."""
    tell = "print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    script = "\n".join(["import sys", *(f"{code}\n{tell}" for code in codes)])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in run.stdout.splitlines()]
