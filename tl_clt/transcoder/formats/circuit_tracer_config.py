"""`config.yaml` of circuit-tracer's folders, and what we add so that nothing is lost on the way back.

circuit-tracer reads `model_kind`, `model_name`, `feature_input_hook`, `feature_output_hook` and `scan`. Under
the key `tl_clt` stands our whole config (span, activation, scaling record), which it ignores.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import yaml

from tl_clt.errors import FormatError
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.formats.hooks import hook_of_hf
from tl_clt.transcoder.formats.reading import read_config
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

CONFIG = "config.yaml"
OURS = "tl_clt"


def read(
    folder: Path,
    input_hook: str | None = None,
    output_hook: str = "hook_mlp_out",
    beside: Path | None = None,
    **from_files: Any,
) -> CrossLayerTranscoderConfig:
    """The config of a circuit-tracer folder.

    Args:
        folder: where `config.yaml` lies.
        input_hook, output_hook: what the layout reads and writes where no config says so; without an `input_hook` it
            is hook_resid_mid, and a warning says that this was assumed.
        beside: folder of the first layer's file, whose `config.json` may give hooks by their Hugging Face names
            (Gemma Scope 2).
        from_files: what the weight files say (n_layers, d_model, d_transcoder, span, activation, skip, dtype).
    """
    values = read_config(folder / CONFIG)
    ours = values.get(OURS) or {}
    if not isinstance(ours, dict):
        raise FormatError(f"'{folder / CONFIG}': {OURS} holds no mapping of names to values. Remove that key.")
    for key in ("n_layers", "d_model", "d_transcoder"):
        if ours.get(key, from_files[key]) != from_files[key]:
            raise FormatError(
                f"'{folder / CONFIG}' says {key} {ours[key]}, but the weight files have {from_files[key]}."
                " Files of two CLTs are mixed: copy or download it again."
            )
    makers = read_config(beside / "config.json") if beside is not None else {}
    for key in ("hf_hook_point_in", "hf_hook_point_out"):
        if key in makers:
            hook = hook_of_hf(str(makers[key]), f"{beside}/config.json")
            input_hook, output_hook = (hook, output_hook) if key.endswith("_in") else (input_hook, hook)
    lacking = [key for key in ("feature_input_hook", "feature_output_hook") if key not in values]
    if input_hook is None and lacking and not {"input_hook", "output_hook"} <= ours.keys():
        warnings.warn(
            f"'{folder / CONFIG}' does not say where the CLT reads and writes ({', '.join(lacking)}): hook_resid_mid"
            " and hook_mlp_out are assumed. Where its makers meant other places (often mlp.hook_in and mlp.hook_out),"
            " other features fire: state both in that file.",
            stacklevel=2,
        )
    input_hook = input_hook or "hook_resid_mid"
    stated = {
        "model_name": values.get("model_name", makers.get("model_name", "unknown")),
        "input_hook": values.get("feature_input_hook", input_hook),
        "output_hook": values.get("feature_output_hook", output_hook),
        "scan": values.get("scan"),
    }
    return CrossLayerTranscoderConfig.from_dict({**from_files, **stated, **ours})


def write(clt: CrossLayerTranscoder, folder: Path, model_kind: str) -> None:
    """Write `config.yaml`."""
    values = {
        "model_kind": model_kind,
        "model_name": clt.cfg.model_name,
        "feature_input_hook": clt.cfg.input_hook,
        "feature_output_hook": clt.cfg.output_hook,
        "scan": clt.cfg.scan or clt.cfg.model_name,
        OURS: {k: list(v) if isinstance(v, tuple) else v for k, v in clt.cfg.to_dict().items()},
    }
    (folder / CONFIG).write_text(yaml.safe_dump(values, sort_keys=False))


def check_activation(clt: CrossLayerTranscoder) -> None:
    """Raise unless the activation is one that circuit-tracer has (ReLU, or thresholds as JumpReLU)."""
    if clt.cfg.activation == "topk":
        raise FormatError(
            "circuit-tracer's layout has no topk: it would read this CLT as ReLU and trace other features."
            " Save it with layout='native'."
        )
