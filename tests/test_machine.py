"""What memory can be had: the least that the system and a container leave."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
import torch

from tl_clt import attribute, machine
from tl_clt.errors import MemoryLimit
from tl_clt.machine import free_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("place", [0, 1])
def test_a_containers_limit_is_known_in_either_version(monkeypatch, tmp_path, place: int) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setitem(machine.__dict__, "GROUP_FILES", tuple([(tmp_path / "none", used)] * place + [(limit, used)]))
    limit.write_text("5000\n")
    used.write_text("1000\n")
    assert free_memory(CPU) == 4000
    used.write_text("6000\n")
    assert free_memory(CPU) == 0
    for no_limit in ("max\n", f"{2**63 - 4096}\n"):
        limit.write_text(no_limit)
        assert free_memory(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_devices() -> None:
    assert free_memory(CPU) > 0
    assert free_memory(torch.device("meta")) is None
    # In a process of its own: another test's freed memory, which this one may still hold, could be handed out again.
    code = (
        "import torch; from tl_clt.machine import held_memory; cpu = torch.device('cpu'); before = held_memory(cpu);"
        "held = torch.ones(2**26); print((held_memory(cpu) - before) / held.nbytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) >= 0.9


def test_tracing_heeds_a_containers_limit(monkeypatch, tmp_path) -> None:
    from tl_clt import load_organism

    model, clt = load_organism("atlas")
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text(str(2**20))
    used.write_text("0")
    monkeypatch.setattr(machine, "GROUP_FILES", ((limit, used),))
    with pytest.raises(MemoryLimit, match="limit"):
        attribute(model, clt, "Fact: the capital of the state containing Dallas is")
