"""`load_model`: what it loads equals the Hugging Face model; what it cannot load says why."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers.utils import logging as hf_logging

from tests.models import HOOKED, random_tokens, save_hf, tiny_bridge, tiny_hf, tiny_hooked
from tl_clt.errors import ConfigError, ModelNotFound, ModelUnsupported, TokenizerMissing
from tl_clt.lens import HookedTransformer, TransformerBridge, load_model, to_tokens
from tl_clt.transcoder import CrossLayerTranscoder

KIND = {"hooked": HookedTransformer, "bridge": TransformerBridge}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPT-2 with its tokenizer."""
    return save_hf(tiny_hf("gpt2"), tmp_path / "tiny-gpt2")


@pytest.mark.parametrize(
    ("family", "backend"),
    [("gpt2", "hooked"), ("gpt2", "bridge"), ("llama", "hooked"), ("llama", "bridge"), ("gemma3", "bridge")],
)
def test_logits_equal_hugging_faces(family, backend, tmp_path: Path):
    hf_model = tiny_hf(family)
    model = load_model(save_hf(hf_model, tmp_path / "m"), backend=backend)
    assert isinstance(model, KIND[backend])
    tokens = random_tokens(model, batch=2, pos=30)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (model.cfg.n_ctx, model.cfg.d_vocab, model.cfg.n_layers) == (64, 64, 3)
    assert model.cfg.model_name == "m" and not model.training
    assert to_tokens(model, "w3 w4").tolist() == [0, 3, 4]


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("word", ["llama", "gemma", "llama-gemma-2-2b", "pythia", "a folder", "gemma-3-270m.gguf"])
def test_words_in_a_path_do_not_change_the_architecture(word: str, backend, tmp_path: Path):
    hf_model = tiny_hf("gpt2")
    model = load_model(save_hf(hf_model, tmp_path / word / "run-1"), backend=backend)
    tokens = random_tokens(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_words_in_the_folders_own_name_do_not_either(backend, tmp_path: Path):
    hf_model = tiny_hf("gpt2")
    model = load_model(save_hf(hf_model, tmp_path / "gemma-2-2b-llama"), backend=backend)
    tokens = random_tokens(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_relative_folder_is_taken(folder: Path, backend, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    assert load_model("tiny-gpt2", backend=backend).cfg.n_layers == 3
    assert load_model("./tiny-gpt2", backend=backend).cfg.n_layers == 3


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_that_asked_for(folder: Path, backend, dtype: torch.dtype):
    model = load_model(folder, backend=backend, dtype=dtype)
    assert model.W_E.dtype == dtype and model.cfg.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(random_tokens(model)).dtype == dtype


@pytest.mark.parametrize(
    ("family", "backend"),
    [("gpt2", "hooked"), ("gpt2", "bridge"), ("llama", "hooked"), ("llama", "bridge"), ("gemma3", "bridge")],
)
def test_a_folder_without_a_tokenizer_takes_token_ids(family, backend, tmp_path: Path):
    hf_model = tiny_hf(family)
    model = load_model(save_hf(hf_model, tmp_path / "m", tokenizer=False), backend=backend)
    tokens = random_tokens(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert to_tokens(model, [3, 4]).tolist() == [3, 4]
    with pytest.raises(TokenizerMissing):
        to_tokens(model, "w3 w4")


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_loading_leaves_no_files_and_no_settings_behind(folder: Path, backend):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    state = hf_logging.is_progress_bar_enabled(), logging.getLogger().level
    load_model(folder, backend=backend)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert (hf_logging.is_progress_bar_enabled(), logging.getLogger().level) == state


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_loading_says_nothing(folder: Path, backend, capfd: pytest.CaptureFixture):
    capfd.readouterr()
    load_model(folder, backend=backend)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_backend_raises(folder: Path):
    with pytest.raises(ConfigError, match="backend is 'nnsight': give one of hooked, bridge"):
        load_model(folder, backend="nnsight")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "near"), [("gpt2-smal", "gpt2-small"), ("gemma-2-2bb", "gemma-2-2b")])
def test_an_unknown_name_raises_with_the_nearest(name: str, near: str):
    with pytest.raises(ModelNotFound, match=rf"'{name}' is no bundled organism .* Nearest: '{near}'"):
        load_model(name)


def test_an_unknown_bundled_organism_raises_with_the_nearest():
    with pytest.raises(ModelNotFound, match=r"bundled organism \(.*atlas.*\)"):
        load_model("atlass")


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2-smal", "with space", "a/b/c"])
def test_a_hub_name_that_cannot_be_reached_raises_on_the_bridge(name: str):
    with pytest.raises(ModelNotFound, match=f"'{name}' could not be loaded"):
        load_model(name, backend="bridge")


def test_a_known_hub_name_without_a_connection_raises():
    with pytest.raises(ModelNotFound, match="'gpt2' could not be loaded"):
        load_model("gpt2")


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-folder", "~/no-such-folder", "../no/such"])
def test_a_path_that_does_not_exist_is_no_hub_name(path: str, backend):
    with pytest.raises(ModelNotFound, match="does not exist. Check the path of the model folder"):
        load_model(path, backend=backend)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_folder_without_a_config_raises(folder: Path, backend):
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        load_model(folder, backend=backend)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no_such_type"}', "{}"])
def test_a_config_that_is_none_raises(folder: Path, backend, text: str):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelNotFound, match="could not be loaded"):
        load_model(folder, backend=backend)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_folder_without_weights_raises(folder: Path, backend):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="could not be loaded"):
        load_model(folder, backend=backend)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_weight_file_raises(folder: Path, backend, keep: float):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ModelNotFound, match="a weight file is truncated"):
        load_model(folder, backend=backend)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_tokenizer_raises(folder: Path, backend, name: str):
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(ModelNotFound, match="tokenizer"):
        load_model(folder, backend=backend)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_weights_of_another_shape_raise(folder: Path, backend):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"n_embd": 32', '"n_embd": 40'))
    with pytest.raises(ModelNotFound, match="could not be loaded"):
        load_model(folder, backend=backend)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_file_that_is_no_gguf_raises(folder: Path, backend):
    with pytest.raises(ModelNotFound, match=r"is no \.gguf file"):
        load_model(folder / "model.safetensors", backend=backend)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_missing_gguf_raises(backend, tmp_path: Path):
    with pytest.raises(ModelNotFound, match=r"does not exist\. Check the path of the \.gguf file"):
        load_model(tmp_path / "no.gguf", backend=backend)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 8, b"no gguf at all" * 9])
def test_a_file_that_is_gguf_by_name_only_raises(content: bytes, tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelNotFound, match=r"x\.gguf' is truncated or no \.gguf file"):
        load_model(tmp_path / "x.gguf")


def write_gguf(path: Path) -> Path:
    """A llama of one layer in a .gguf file, with a byte-pair tokenizer of five words."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    words = ["<s>", "</s>", "a", "b", "ab"]
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (5, 32), "output_norm": (32,), "output": (5, 32)}
    for name, shape in {
        "attn_norm": (32,),
        "ffn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
    }.items():
        shapes[f"blk.0.{name}"] = shape
    for name, shape in shapes.items():
        weight = 1 + 0.2 * torch.randn(shape) if len(shape) == 1 else torch.randn(shape) / shape[-1] ** 0.5
        writer.add_tensor(f"{name}.weight", weight.numpy(), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_loads_alike_as_both_kinds(tmp_path: Path):
    path = write_gguf(tmp_path / "tiny.gguf")
    hooked, bridge = (load_model(path, backend=backend) for backend in ("hooked", "bridge"))
    tokens = torch.tensor([[0, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), bridge(tokens), rtol=1e-4, atol=1e-4)
    assert hooked.cfg.model_name == bridge.cfg.model_name == "tiny"
    assert to_tokens(hooked, "ab").tolist() == to_tokens(bridge, "ab").tolist()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.97])
def test_a_truncated_gguf_raises(keep: float, tmp_path: Path):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ModelNotFound, match=r"tiny\.gguf' is truncated or no \.gguf file"):
        load_model(path)


def test_a_gemma_of_unknown_size_is_for_the_bridge(tmp_path: Path):
    folder = save_hf(tiny_hf("gemma3"), tmp_path / "m")
    with pytest.raises(ModelUnsupported, match=r"gemma3_text with 3 layers of width 32 .* backend='bridge'"):
        load_model(folder)


@pytest.mark.parametrize("arch", HOOKED)
def test_test_models_have_no_weight_at_zero_or_one(arch):
    """A bias of zero or a gain of one would hide a term that is left out."""
    for name, parameter in tiny_hooked(arch).named_parameters():
        assert ((parameter != 0) & (parameter != 1)).all(), name


def test_exact_bridges_compute_norms_in_their_own_dtype(tmp_path: Path):
    model = tiny_bridge("llama", tmp_path, exact=True)
    _, cache = model.run_with_cache(random_tokens(model))
    x = cache["blocks.0.hook_resid_pre"]
    scale = (x.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    torch.testing.assert_close(cache["blocks.0.ln1.hook_scale"], scale, rtol=1e-14, atol=0)


@pytest.mark.parametrize("device", ["cuda:99", "meta", torch.device("meta")])
def test_a_device_that_is_not_here_is_refused(folder: Path, device):
    with pytest.raises(ConfigError, match="which is not here: give one of cpu"):
        load_model(folder, device=device)
    with pytest.raises(ConfigError, match="which is not here: give one of cpu"):
        CrossLayerTranscoder.from_pretrained("atlas", device=device)
