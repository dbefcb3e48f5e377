"""The cross-layer transcoder, its file formats, and the catalogue of public ones."""

from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.hub import PublicTranscoders, check_fits, public_transcoders
from tl_clt.transcoder.transcoder import CrossLayerTranscoder, Encoding, ExplainedVariance, explained_variance

__all__ = [
    "CrossLayerTranscoder",
    "CrossLayerTranscoderConfig",
    "Encoding",
    "ExplainedVariance",
    "PublicTranscoders",
    "check_fits",
    "explained_variance",
    "public_transcoders",
]
