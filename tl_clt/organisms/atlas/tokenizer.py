"""The word-level tokenizer of the atlas organism.

Each word, punctuation mark and place name is one token, names of several words ("Salt Lake City") included.
Spaces are not tokens and belong to none: `" Austin"` and `"Austin"` both become the token `Austin`, and
decoding puts the spaces back, so that a text reads naturally. Words outside the vocabulary become `<unk>`.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tl_clt.organisms.atlas.text import vocabulary

PAD_TOKEN = "<pad>"
BOS_TOKEN = "<bos>"
UNK_TOKEN = "<unk>"


def word_pattern(words: list[str]) -> str:
    """Return the regular expression of one token: a name of several words, else a word, else a mark.

    Longer names come first, so that "Salt Lake City" is never cut short, nor "Virginia Beach" to "Virginia".
    """
    names = sorted((word for word in words if " " in word), key=lambda name: (-len(name), name))
    return rf"\b(?:{'|'.join(re.escape(name) for name in names)})\b|\w+|[^\w\s]"


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer, with `<bos>` put before each text unless special tokens are switched off.

    Parameters
    ----------
    max_length:
        Longest text, in tokens, the model takes.
    """
    words = vocabulary()
    special = [PAD_TOKEN, BOS_TOKEN, UNK_TOKEN]
    ids = {token: index for index, token in enumerate([*special, *words])}
    core = Tokenizer(WordLevel(ids, unk_token=UNK_TOKEN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(word_pattern(words)), behavior="removed", invert=True)
    # Joins tokens with spaces, except before a full stop or a colon. No token begins with "##".
    spacing = decoders.WordPiece(prefix="##", cleanup=True)
    core.decoder = decoders.Sequence([spacing, decoders.Replace(" :", ":")])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A $B",
        special_tokens=[(BOS_TOKEN, ids[BOS_TOKEN])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS_TOKEN,
        unk_token=UNK_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
