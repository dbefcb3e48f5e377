"""Whole runs of the runner, on one process or several."""

from __future__ import annotations

from typing import Any

import torch

from tests.training.conftest import D_VOCAB, N_CTX, config, tiny_model
from tl_clt.errors import TlCltError
from tl_clt.training import CLTTrainingRunner


def tokens() -> torch.Tensor:
    return torch.randint(0, D_VOCAB, (60, N_CTX), generator=torch.Generator().manual_seed(1))


def run(changes: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    """Weights of the CLT, metrics, and what the callback saw. Only the main process is given a model that works."""
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    seen: list[int] = []
    cfg = config(**{"dtype": "float64", "training_tokens": 64 * 12, "model_name": "tiny"} | changes)
    runner = CLTTrainingRunner(
        cfg,
        model=tiny_model() if main else None,
        dataset=tokens() if main else torch.zeros(0),
        on_progress=lambda progress: seen.append(progress.step),
    )
    clt = runner.run(resume)
    device = clt.W_enc.device.type
    weights = (
        {
            name: value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
            for name, value in clt.state_dict().items()
        }
        if device == "cpu"
        else {}
    )
    return {"weights": weights, "device": device, "metrics": runner.record.metrics._asdict(), "seen": seen}


def refused(changes: dict[str, Any], resume: str | None = None) -> str:
    """The error that a run ends with."""
    try:
        run(changes, resume)
    except TlCltError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"
