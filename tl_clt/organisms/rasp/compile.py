"""Compile programs to the weights of transformers: `python -m tl_clt.organisms.rasp.compile --output FOLDER`.

Needs the extra `rasp` (Tracr, jax and haiku); what it writes needs neither. Weights keep Tracr's names and shapes. The
JSON file beside them says what each coordinate of the residual stream stands for and which tokens there are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file

from tl_clt.errors import ExtraMissing
from tl_clt.organisms.programs import PROGRAMS, Program

COMPILED = ("sum", "equal", "parity", "automaton")
"""Programs that are compiled; `hops` is written by hand."""

BOS = "bos"


def as_rasp(program: Program) -> dict[str, Any]:
    """Inputs and steps in RASP: inputs are fetched to the last position by attention, steps are computed by MLPs."""
    from tracr.rasp import rasp  # pyright: ignore[reportMissingImports]

    n_inputs = len(program.inputs)
    known: dict[str, Any] = {}
    for i, name in enumerate(program.inputs):
        back = n_inputs - 1 - i
        if back == 0:
            known[name] = rasp.tokens
        else:
            fetch = rasp.Select(rasp.indices, rasp.indices, lambda key, query, back=back: key == query - back)
            known[name] = rasp.Aggregate(fetch, rasp.tokens, default=None).named(name)
    for step in program.steps:
        known[step.name] = rasp.SequenceMap(step.function, *(known[a] for a in step.arguments)).named(step.name)
    return known


def compile_program(program: Program) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights by Tracr's names, and what is known of them.

    Raises:
        ExtraMissing: Tracr is not installed.
    """
    try:
        from tracr.compiler import compiling  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ExtraMissing("Compiling RASP programs needs Tracr: pip install 'tl_clt[rasp]'.") from error
    known = as_rasp(program)
    compiled = compiling.compile_rasp_to_model(
        known[program.steps[-1].name],
        vocab=set(range(program.n_values)),
        max_seq_len=len(program.inputs),
        causal=True,
        compiler_bos=BOS,
    )
    weights = {
        f"{module}/{name}": torch.from_numpy(np.array(value, dtype=np.float32))
        for module, values in compiled.params.items()
        for name, value in values.items()
    }
    encoding = compiled.input_encoder.encoding_map
    # Tracr numbers expressions as they are made; the last input keeps its name "tokens".
    names: dict[str, str] = {e.label: name for name, e in known.items() if e.label != "tokens"}
    labels: list[list[str]] = [label.split(":") for label in compiled.residual_labels]
    about = {
        "residual_stream": [":".join([names.get(first, first), *value]) for first, *value in labels],
        "token_ids": [encoding[value] for value in range(program.n_values)],
        "bos_id": encoding[BOS],
        "n_heads": compiled.model_config.num_heads,
        "n_layers": compiled.model_config.num_layers,
    }
    return weights, about


def main(output: Annotated[Path, typer.Option(help="Folder for the files.")]) -> None:
    """Compile all programs."""
    output.mkdir(parents=True, exist_ok=True)
    for name in COMPILED:
        weights, about = compile_program(PROGRAMS[name])
        save_file(weights, output / f"{name}.safetensors")
        (output / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
