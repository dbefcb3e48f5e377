"""What comes with the package: the names of its organisms, and where the model, CLT and feature store of each lie."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

ORGANISMS = Path(__file__).parent / "organisms"


def bundled_organisms() -> list[str]:
    """Names of the organisms whose weights come with the package."""
    return sorted(p.parent.parent.name for p in ORGANISMS.glob("*/model/config.json"))


def bundled_folder(name: str | Path, part: Literal["model", "clt", "features"]) -> Path | None:
    """Where a part of an organism lies, or None where no organism is of that name."""
    return ORGANISMS / str(name) / part if str(name) in bundled_organisms() else None
