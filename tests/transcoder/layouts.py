"""Folders as other libraries write them, and what their makers' formulas give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

L, D, F, K = 3, 6, 10, 3


class Made(NamedTuple):
    """A folder in a public layout, and what its maker's own formula gives for some inputs."""

    folder: Path
    acts: Callable[[Tensor, int], Tensor]
    """Features of a layer from its input."""
    outputs: Callable[[Tensor], Tensor]
    """MLP outputs [n, n_layers, d_model] from inputs of the same shape."""
    hooks: tuple[str, str]
    dtype: torch.dtype


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def plt_outputs(acts, W_dec, b_dec, skip):
    return lambda x: torch.stack(
        [acts(x[:, i], i) @ W_dec[i].float() + b_dec[i].float() + skip(x[:, i], i) for i in range(L)], 1
    )


def gemma_scope_2(folder: Path, with_config: bool = True) -> Made:
    """Per-layer transcoders with affine skip, listed by a config.yaml, a config.json beside each."""
    layers = [
        {
            "w_enc": rand(D, F),
            "w_dec": rand(F, D),
            "b_enc": rand(F),
            "b_dec": rand(D),
            "threshold": rand(F).abs(),
            "affine_skip_connection": rand(D, D),
        }
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        sub = folder / f"layer_{i}_width_16k_l0_small_affine"
        sub.mkdir(parents=True)
        save_file(tensors, sub / "params.safetensors")
        makers = {
            "architecture": "jump_relu",
            "model_name": "google/gemma-3-270m-pt",
            "hf_hook_point_in": f"model.layers.{i}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"model.layers.{i}.post_feedforward_layernorm.output",
            "affine_connection": True,
        }
        if with_config:
            (sub / "config.json").write_text(json.dumps(makers))
    listed = [f"layer_{i}_width_16k_l0_small_affine" for i in range(L)]
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "transcoders": listed}))

    def acts(x: Tensor, i: int) -> Tensor:
        pre = x @ layers[i]["w_enc"] + layers[i]["b_enc"]
        return pre * (pre > layers[i]["threshold"])

    def skip(x: Tensor, i: int) -> Tensor:
        return x @ layers[i]["affine_skip_connection"]

    outputs = plt_outputs(acts, [t["w_dec"] for t in layers], [t["b_dec"] for t in layers], skip)
    return Made(folder, acts, outputs, ("mlp.hook_in", "hook_mlp_out"), torch.float32)


def gemma_scope_2_without_config(folder: Path) -> Made:
    return gemma_scope_2(folder, with_config=False)


def gemma_scope_1(folder: Path) -> Made:
    """`.npz` files in folders of their own, listed by file and by folder."""
    layers = [
        {
            "W_enc": np.random.randn(D, F).astype("f4"),
            "W_dec": np.random.randn(F, D).astype("f4"),
            "b_enc": np.random.randn(F).astype("f4"),
            "b_dec": np.random.randn(D).astype("f4"),
            "threshold": np.abs(np.random.randn(F)).astype("f4"),
        }
        for _ in range(L)
    ]
    listed = []
    for i, arrays in enumerate(layers):
        sub = folder / f"layer_{i}/width_16k/average_l0_{70 + i}"
        sub.mkdir(parents=True)
        (np.savez if i else np.savez_compressed)(sub / "params.npz", **arrays)
        listed.append(str(sub.relative_to(folder)) + ("/params.npz" if i else ""))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "transcoders": listed}))
    tensors = [{k: torch.from_numpy(v) for k, v in arrays.items()} for arrays in layers]

    def acts(x: Tensor, i: int) -> Tensor:
        pre = x @ tensors[i]["W_enc"] + tensors[i]["b_enc"]
        return pre * (pre > tensors[i]["threshold"])

    outputs = plt_outputs(acts, [t["W_dec"] for t in tensors], [t["b_dec"] for t in tensors], lambda x, i: 0 * x)
    return Made(folder, acts, outputs, ("ln2.hook_normalized", "hook_mlp_out"), torch.float32)


def qwen3(folder: Path) -> Made:
    """bfloat16, ReLU, `layer_{i}.safetensors`, hooks by config.yaml."""
    folder.mkdir()
    b = torch.bfloat16
    layers = [
        {
            "W_enc": rand(F, D, dtype=b),
            "W_dec": rand(F, D, dtype=b),
            "b_enc": rand(F, dtype=b),
            "b_dec": rand(D, dtype=b),
        }
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        save_file(tensors, folder / f"layer_{i}.safetensors")
    config = {
        "model_name": "Qwen/Qwen3-4B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": "qwen3-4b",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def acts(x: Tensor, i: int) -> Tensor:
        return torch.relu(x @ layers[i]["W_enc"].float().T + layers[i]["b_enc"].float())

    outputs = plt_outputs(acts, [t["W_dec"] for t in layers], [t["b_dec"] for t in layers], lambda x, i: 0 * x)
    return Made(folder, acts, outputs, ("mlp.hook_in", "mlp.hook_out"), b)


def largest(pre: Tensor) -> Tensor:
    """The K largest that are positive, written as a comparison with the K-th."""
    return torch.relu(pre) * (pre >= pre.sort(-1, descending=True).values[..., K - 1 : K])


def topk_set(folder: Path) -> Made:
    """Per-layer transcoders whose config.yaml says topk."""
    folder.mkdir()
    layers = [
        {"W_enc": rand(F, D), "W_dec": rand(F, D), "b_enc": rand(F), "b_dec": rand(D), "W_skip": rand(D, D)}
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        save_file(tensors, folder / f"layer_{i}.safetensors")
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"feature_input_hook": "mlp.hook_in", "activation": "topk", "k": K})
    )

    def acts(x: Tensor, i: int) -> Tensor:
        return largest(x @ layers[i]["W_enc"].T + layers[i]["b_enc"])

    def skip(x: Tensor, i: int) -> Tensor:
        return x @ layers[i]["W_skip"].T

    outputs = plt_outputs(acts, [t["W_dec"] for t in layers], [t["b_dec"] for t in layers], skip)
    return Made(folder, acts, outputs, ("mlp.hook_in", "hook_mlp_out"), torch.float32)


def sparsify(folder: Path) -> Made:
    layers = [
        {
            "encoder.weight": rand(F, D),
            "encoder.bias": rand(F),
            "W_dec": rand(F, D),
            "b_dec": rand(D),
            "W_skip": rand(D, D),
        }
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        sub = folder / f"layers.{i}.mlp"
        sub.mkdir(parents=True)
        save_file(tensors, sub / "sae.safetensors")
        config = {
            "activation": "topk",
            "expansion_factor": 32,
            "normalize_decoder": True,
            "num_latents": F,
            "k": K,
            "multi_topk": False,
            "skip_connection": True,
            "transcode": True,
            "d_in": D,
        }
        (sub / "cfg.json").write_text(json.dumps(config))

    def acts(x: Tensor, i: int) -> Tensor:
        return largest(x @ layers[i]["encoder.weight"].T + layers[i]["encoder.bias"])

    def skip(x: Tensor, i: int) -> Tensor:
        return x @ layers[i]["W_skip"].T

    outputs = plt_outputs(acts, [t["W_dec"] for t in layers], [t["b_dec"] for t in layers], skip)
    return Made(folder, acts, outputs, ("mlp.hook_in", "mlp.hook_out"), torch.float32)


def clt_outputs(acts, write, b_dec, skip=lambda x, t: 0 * x):
    return lambda x: torch.stack(
        [sum(acts(x[:, s], s) @ write(s, t) for s in range(t + 1)) + b_dec[t] + skip(x[:, t], t) for t in range(L)], 1
    )


def gemma_scope_2_clt(folder: Path) -> Made:
    folder.mkdir()
    layers = [
        {
            "w_enc": rand(D, F),
            "w_dec": rand(F, L, D),
            "b_enc": rand(F),
            "b_dec": rand(D),
            "threshold": rand(F).abs(),
            "affine_skip_connection": rand(D, D),
        }
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
    makers = {
        "hf_hook_point_in": "model.layers.{layer}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.{layer}.post_feedforward_layernorm.output",
    }
    (folder / "config.json").write_text(json.dumps(makers))

    def acts(x: Tensor, i: int) -> Tensor:
        pre = x @ layers[i]["w_enc"] + layers[i]["b_enc"]
        return pre * (pre > layers[i]["threshold"])

    outputs = clt_outputs(
        acts,
        lambda s, t: layers[s]["w_dec"][:, t],
        [t["b_dec"] for t in layers],
        lambda x, t: x @ layers[t]["affine_skip_connection"],
    )
    return Made(folder, acts, outputs, ("mlp.hook_in", "hook_mlp_out"), torch.float32)


def listed_gemma_scope_2_clt(folder: Path) -> Made:
    made = gemma_scope_2_clt(folder)
    for i in range(L):
        (folder / f"params_layer_{i}.safetensors").rename(folder / f"part_{i}.safetensors")
    listed = [f"part_{i}.safetensors" for i in range(L)]
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "cross_layer_transcoder", "transcoders": listed}))
    return made


def llamascopium(folder: Path, act_fn: str = "jumprelu", with_norm: bool = True) -> Made:
    folder.mkdir()
    W_D = [rand(t + 1, F, D) for t in range(L)]
    b_D = [rand(D) for _ in range(L)]
    W_E, b_E, log_threshold = rand(L, D, F), rand(L, F), rand(L, F)
    tensors = {"W_E": W_E, "b_E": b_E}
    if act_fn == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = log_threshold
    tensors |= {f"W_D.{t}": W_D[t] for t in range(L)} | {f"b_D.{t}": b_D[t] for t in range(L)}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "sae_type": "clt",
        "act_fn": act_fn,
        "d_model": D,
        "expansion_factor": F / D,
        "hook_points_in": [f"blocks.{i}.hook_resid_mid" for i in range(L)],
        "hook_points_out": [f"blocks.{i}.hook_mlp_out" for i in range(L)],
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": with_norm,
        "top_k": K,
        "dtype": "torch.float32",
    }
    (folder / "config.json").write_text(json.dumps(config))

    def acts(x: Tensor, i: int) -> Tensor:
        pre = x @ W_E[i] + b_E[i]
        norm = torch.cat([W_D[t][i] for t in range(i, L)], dim=-1).norm(dim=-1) if with_norm else torch.ones(F)
        scaled = pre * norm
        if act_fn == "jumprelu":
            return scaled * (scaled > log_threshold[i].exp()) / norm
        return largest(scaled) if act_fn == "topk" else torch.relu(scaled) / norm

    return Made(
        folder, acts, clt_outputs(acts, lambda s, t: W_D[t][s], b_D), ("hook_resid_mid", "hook_mlp_out"), torch.float32
    )


LAYOUTS: dict[str, Callable[[Path], Made]] = {
    "gemma-scope-2": gemma_scope_2,
    "gemma-scope-2-no-config": gemma_scope_2_without_config,
    "gemma-scope-2-clt": gemma_scope_2_clt,
    "gemma-scope-2-clt-listed": listed_gemma_scope_2_clt,
    "gemma-scope-1": gemma_scope_1,
    "qwen3": qwen3,
    "topk-by-config": topk_set,
    "sparsify": sparsify,
    "llamascopium": llamascopium,
    "llamascopium-relu": lambda folder: llamascopium(folder, "relu"),
    "llamascopium-no-norm": lambda folder: llamascopium(folder, "jumprelu", False),
    "llamascopium-topk": lambda folder: llamascopium(folder, "topk", False),
}
