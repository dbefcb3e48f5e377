"""Records of features, as a store of features gives them."""

from __future__ import annotations

from typing import Any


def a_record(layer: int = 0, feature: int = 3, **changed: Any) -> dict[str, Any]:
    record = {
        "layer": layer,
        "feature": feature,
        "label": 'says "Texas"',
        "label_score": 0.875,
        "label_score_random": 0.5,
        "density": 0.03125,
        "max_activation": 7.25,
        "histogram": {"edges": [0.0, 2.5, 7.25], "counts": [12, 3]},
        "top_logits": [[" Texas", 1.5], [" Ohio", 0.1]],
        "bottom_logits": [["the", -0.7]],
        "examples": [
            {"quantile": "top", "tokens": ["in", " Dal", "las"], "activations": [0.0, 7.25, 0.1], "position": 1},
            {"quantile": "top", "tokens": ["é", "</script>"], "activations": [6.0, 0.0], "position": 0},
            {"quantile": "0.5-0.75", "tokens": [" a"], "activations": [2.0], "position": 0},
        ],
        "connected": [{"layer": 1, "feature": 17, "weight": -0.3}],
    }
    return {**record, **changed}


def some_records() -> list[dict[str, Any]]:
    """Of two layers, with gaps, one without a label and one that never fired."""
    silent = {"label": None, "label_score": None, "label_score_random": None, "density": 0.0, "max_activation": 0.0}
    nothing = {"examples": [], "connected": [], "top_logits": [], "bottom_logits": []}
    return [a_record(0, 0), a_record(0, 3), a_record(2, 1, **silent, **nothing), a_record(2, 2, **silent)]
