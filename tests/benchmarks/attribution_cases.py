"""Random models and CLTs of real models' shapes, made from a seed and written so that any library can load them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

GPT2 = {"act_fn": "gelu_new", "normalization_type": "LN"}
GEMMA = {
    "act_fn": "gelu_pytorch_tanh",
    "normalization_type": "RMS",
    "final_rms": True,
    "gated_mlp": True,
    "positional_embedding_type": "rotary",
    "use_normalization_before_and_after": True,
}


@dataclass(frozen=True)
class Case:
    """One model, CLT and prompt."""

    name: str
    settings: dict
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_transcoder: int
    n_pos: int
    l0: float
    """Active features per layer and position, on average."""
    d_vocab: int = 5000
    seed: int = 5

    def config(self) -> dict:
        return {
            **self.settings,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "d_head": self.d_head,
            "d_mlp": 4 * self.d_model,
            "n_ctx": 1024,
            "d_vocab": self.d_vocab,
            "device": "cpu",
            "seed": self.seed,
            "original_architecture": "custom",
        }


def gpt2(n_pos: int, d_transcoder: int, l0: float) -> Case:
    """GPT-2 small: 12 layers, LayerNorm, a key-value head for each head."""
    return Case(f"gpt2 {n_pos} tokens", GPT2, 12, 768, 12, 64, d_transcoder, n_pos, l0)


def gemma(n_pos: int, d_transcoder: int, l0: float) -> Case:
    """Gemma 3 270M: 18 layers, RMSNorm before and after, four heads on one key-value head."""
    settings = {**GEMMA, "n_key_value_heads": 1, "rotary_dim": 256}
    return Case(f"gemma {n_pos} tokens", settings, 18, 640, 4, 256, d_transcoder, n_pos, l0)


@torch.no_grad()
def write_case(case: Case, folder: Path) -> None:
    """Write model.safetensors, cfg.json, tokens.json, and a JumpReLU CLT in circuit-tracer's layout under clt/."""
    torch.manual_seed(case.seed)
    model = HookedTransformer(HookedTransformerConfig(**case.config()))
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight)
        kind = name.rsplit(".", 1)[-1]
        if kind == "w":
            weight.copy_(1 + 0.2 * noise)
        elif kind.startswith("b"):
            weight.copy_(0.05 * noise)
        elif "embed" in name:
            weight.copy_(noise)
        else:
            weight.copy_(noise * 0.6 / math.sqrt(weight.shape[-2]))
    folder.mkdir(parents=True)
    save_file({n: w.detach().clone() for n, w in model.named_parameters()}, folder / "model.safetensors")
    (folder / "cfg.json").write_text(json.dumps(case.config()))
    tokens = torch.randint(1, case.d_vocab, (case.n_pos,))
    tokens[0] = 0
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    _write_clt(case, model, folder / "clt")


def _write_clt(case: Case, model: HookedTransformer, folder: Path) -> None:
    """Random features; thresholds at the quantile of random tokens' pre-activations that gives the wanted L0."""
    folder.mkdir()
    samples = torch.randint(1, case.d_vocab, (8, 64))
    _, cache = model.run_with_cache(samples, names_filter=lambda n: n.endswith(("hook_resid_mid", "hook_mlp_out")))
    for t in range(case.n_layers):
        x = cache[f"blocks.{t}.hook_resid_mid"].flatten(0, 1)
        size = cache[f"blocks.{t}.hook_mlp_out"].norm(dim=-1).mean() / math.sqrt(case.l0 * case.n_layers)
        W_enc = torch.randn(case.d_transcoder, case.d_model) / x.norm(dim=-1).mean()
        b_enc = 0.02 * torch.randn(case.d_transcoder)
        threshold = torch.quantile(x @ W_enc.T + b_enc, 1 - case.l0 / case.d_transcoder, dim=0).clamp_min(1e-3)
        W_dec = torch.randn(case.d_transcoder, case.n_layers - t, case.d_model) * 2 * size / math.sqrt(case.d_model)
        encoder = {"W_enc": W_enc, "b_enc": b_enc, "b_dec": 0.01 * torch.randn(case.d_model), "threshold": threshold}
        save_file({f"{k}_{t}": v for k, v in encoder.items()}, folder / f"W_enc_{t}.safetensors")
        save_file({f"W_dec_{t}": W_dec}, folder / f"W_dec_{t}.safetensors")
    (folder / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\nmodel_name: custom\nfeature_input_hook: hook_resid_mid\n"
        "feature_output_hook: hook_mlp_out\nscan: custom\n"
    )


def read_case(folder: Path) -> tuple[HookedTransformer, Tensor]:
    """Model and prompt of a case."""
    model = HookedTransformer(HookedTransformerConfig(**json.loads((folder / "cfg.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model.eval().requires_grad_(False), torch.tensor(json.loads((folder / "tokens.json").read_text()))
