"""One tiny model, CLT and graph for tests that do not turn on the architecture."""

from __future__ import annotations

import pytest
import torch

from tests.attribution.helpers import TOKENS
from tests.models import tiny_clt, tiny_hooked
from tl_clt import attribute


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("gpt2", dtype=torch.float64)


@pytest.fixture(scope="module")
def clt(model):
    return tiny_clt(model)


@pytest.fixture(scope="module")
def graph(model, clt):
    return attribute(model, clt, TOKENS)
