"""Decoders left on disk give what decoders in memory give."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from tests.models import tiny_clt
from tl_clt.errors import FormatError
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.decoders import LazyDecoders

N_LAYERS, D_MODEL = 3, 8
SAVED = [
    ("native", 3),
    ("native", 2),
    ("native", 1),
    ("circuit-tracer", 3),
    ("circuit-tracer", 2),
    ("circuit-tracer", 1),
]


@pytest.fixture(params=SAVED, ids=lambda p: f"{p[0]}-span{p[1]}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[CrossLayerTranscoder, CrossLayerTranscoder]:
    """A CLT in memory, and the same CLT with its decoders on disk."""
    layout, span = request.param
    dense = tiny_clt((N_LAYERS, D_MODEL), span=span)
    dense.save_pretrained(tmp_path / "clt", layout)
    lazy = CrossLayerTranscoder.from_pretrained(tmp_path / "clt", lazy_decoder=True)
    assert isinstance(lazy.W_dec, LazyDecoders)
    return dense, lazy


def test_no_decoder_weight_is_in_memory(pair):
    dense, lazy = pair
    in_memory = sum(p.numel() for p in lazy.parameters())
    assert in_memory == sum(p.numel() for p in dense.parameters()) - sum(dense.W_dec[s].numel() for s in dense.layers)


@pytest.mark.parametrize("batch", [(6,), (2, 3), ()])
def test_decode_equals_dense(pair, batch: tuple[int, ...]):
    dense, lazy = pair
    x = torch.randn(*batch, N_LAYERS, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(lazy(x), dense(x), rtol=1e-12, atol=1e-12)


def test_decode_without_an_active_feature_is_the_bias(pair):
    dense, lazy = pair
    acts = torch.zeros(6, N_LAYERS, dense.cfg.d_transcoder, dtype=torch.float64)
    assert torch.equal(lazy.decode(acts), dense.b_dec.expand(6, -1, -1))


@pytest.mark.parametrize("features", [[3], [5, 1, 9], [4, 4, 4], [7, 0, 7, 23, 6, 0], [10, 11, 12, 2], []])
def test_rows_equal_dense_in_any_order_and_with_duplicates(pair, features: list[int]):
    dense, lazy = pair
    index = torch.tensor(features, dtype=torch.long)
    for source in dense.layers:
        assert torch.equal(lazy.decoder_rows(source, index), dense.decoder_rows(source, index))


def test_whole_layers_equal_dense(pair):
    dense, lazy = pair
    assert len(lazy.W_dec) == N_LAYERS
    for source in dense.layers:
        assert torch.equal(lazy.W_dec[source], dense.W_dec[source])


def test_a_feature_that_does_not_exist_raises(pair):
    for clt in pair:
        with pytest.raises(IndexError):
            clt.decoder_rows(0, torch.tensor([1, 24]))


def test_dtype_of_rows_is_that_asked_for(tmp_path: Path):
    tiny_clt((N_LAYERS, D_MODEL)).save_pretrained(tmp_path / "clt")
    lazy = CrossLayerTranscoder.from_pretrained(tmp_path / "clt", dtype="bfloat16", lazy_decoder=True)
    assert lazy.decoder_rows(0, torch.tensor([1])).dtype == torch.bfloat16
    lazy = lazy.to(torch.float32)
    assert lazy.decoder_rows(0, torch.tensor([1])).dtype == torch.float32
    assert lazy(torch.randn(2, N_LAYERS, D_MODEL)).dtype == torch.float32


def test_a_lazy_clt_saves_as_a_dense_one_does(pair, tmp_path: Path):
    dense, lazy = pair
    lazy.save_pretrained(tmp_path / "again")
    again = CrossLayerTranscoder.from_pretrained(tmp_path / "again")
    assert again.cfg == dense.cfg
    for source in dense.layers:
        assert torch.equal(again.W_dec[source], dense.W_dec[source])


def test_clts_are_copied_pickled_and_compared(pair, tmp_path, monkeypatch):
    for clt in pair:
        made = pickle.dumps(clt)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        for same in (copy.copy(clt), copy.deepcopy(clt), pickle.loads(made)):
            assert same.cfg == clt.cfg and hash(same.cfg) == hash(clt.cfg)
            for name, values in clt.state_dict().items():
                assert torch.equal(same.state_dict()[name], values)
            assert torch.equal(same.W_dec[1], clt.W_dec[1])
            assert (same == clt) is False  # As torch's modules: each is itself alone.
        assert clt == clt and len({clt, clt}) == 1


def test_a_pickle_whose_decoder_files_are_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_clt((N_LAYERS, D_MODEL)).save_pretrained("clt")
    lazy = CrossLayerTranscoder.from_pretrained("clt", lazy_decoder=True)
    made = pickle.dumps(lazy)
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(made).W_dec[0], lazy.W_dec[0])
    (tmp_path / "clt").rename(tmp_path / "moved")
    for copied in (lambda: pickle.loads(made), lambda: copy.deepcopy(lazy)):
        with pytest.raises(FormatError, match="decoders left on disk.*not there. Put its folder back"):
            copied()
