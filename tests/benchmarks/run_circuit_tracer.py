"""One case through circuit-tracer, in an environment that holds it: CASE OUTPUT THREADS BATCH_SIZE LAZY."""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.replacement_model import ReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformer_lens import HookedTransformerConfig
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
threads, batch_size, lazy = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "lazy"
torch.set_num_threads(threads)
cfg = HookedTransformerConfig(**json.loads((folder / "cfg.json").read_text()))
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(cfg.d_vocab)}, unk_token="w1"))
with tempfile.TemporaryDirectory() as temp:
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", pad_token="w2", eos_token="w0").save_pretrained(
        temp
    )
    tokenizer = AutoTokenizer.from_pretrained(temp, add_bos_token=True)
clt = load_clt(str(folder / "clt"), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=lazy)
model = ReplacementModel.from_config(cfg, clt, tokenizer=tokenizer)
state = load_file(folder / "model.safetensors")
names = set(model.state_dict())


def renamed(name: str) -> str:
    """`blocks.0.mlp.W_in` is kept as `blocks.0.mlp.old_mlp.W_in`."""
    parent, leaf = name.rsplit(".", 1)
    return name if name in names else f"{parent}.old_{parent.rsplit('.', 1)[-1]}.{leaf}"


state = {renamed(name): weight for name, weight in state.items()}
missing = [name for name in state if name not in names]
if missing:
    raise SystemExit(f"weights that this version keeps under other names: {missing}")
model.load_state_dict(state, strict=False)
tokens = torch.tensor(json.loads((folder / "tokens.json").read_text()))
started = time.perf_counter()
graph = attribute(tokens, model, batch_size=batch_size)
seconds = time.perf_counter() - started
save_file({"adjacency": graph.adjacency_matrix.contiguous()}, output)
print(
    json.dumps(
        {
            "seconds": seconds,
            "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "n_features": len(graph.active_features),
        }
    )
)
