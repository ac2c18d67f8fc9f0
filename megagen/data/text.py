"""Text encoders: captions to embeddings padded with zeros.

Legend: B batch, L tokens, D features.

Described by a JSON spec ``{"name": ..., options...}`` that is stored with a dataset, like a codec.
"""

from __future__ import annotations

import html
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megagen.core import process
from megagen.core.options import StrictOptions
from megagen.core.streams import Streams
from megagen.data.codecs import build_from_spec
from megagen.data.pretrained import load_pretrained

TEXT_ENCODERS: dict[str, str] = {
    "hashed": "megagen.data.text:HashedText",
    "umt5": "megagen.data.text:UMT5Text",
}


class TextEncoder(ABC):
    """Captions to embeddings.

    Attributes:
        name: its key in ``TEXT_ENCODERS``.
        options: its parsed options.
        dim: D of the embeddings.
        max_length: L of the embeddings.
    """

    name: ClassVar[str]
    Options: ClassVar[type[StrictOptions]]
    options: StrictOptions
    dim: int
    max_length: int

    def spec(self) -> dict[str, Any]:
        """JSON from which ``build_text_encoder`` makes this encoder again."""
        return {"name": self.name, **self.options.model_dump(mode="json")}

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to embeddings.

        Returns:
            Embeddings fp32 ``[B, max_length, dim]``, zero after a caption's last token, and the
            mask bool ``[B, max_length]`` of its tokens; both on the CPU.
        """


def build_text_encoder(spec: Mapping[str, Any], where: str = "text_encoder") -> TextEncoder:
    """The text encoder that a spec describes.

    Raises:
        ConfigError: unknown name or option.
        DataError: its weights are not there.
    """
    encoder: TextEncoder = build_from_spec(spec, TEXT_ENCODERS, where)
    return encoder


class HashedTextOptions(StrictOptions):
    """Options of ``HashedText``.

    Attributes:
        dim: features of a word's vector.
        max_length: words of a caption, its end mark included; what is beyond is cut.
        seed: another seed gives other vectors.
    """

    dim: int = Field(64, ge=1)
    max_length: int = Field(16, ge=1)
    seed: int = 0


class HashedText(TextEncoder):
    """Each word its own fixed standard normal vector, drawn from a stream keyed by the word.

    No weights and no vocabulary: for small closed vocabularies, where a model learns what the words
    mean. Case and punctuation are ignored. Every caption ends in an end mark, so the empty caption
    is one token and not all zeros.
    """

    name = "hashed"
    Options = HashedTextOptions
    _END = "</s>"

    def __init__(self, options: HashedTextOptions) -> None:
        self.options = options
        self.dim, self.max_length = options.dim, options.max_length
        self._streams = Streams(options.seed)
        self._vectors: dict[str, Tensor] = {}

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See the class."""
        embeds = torch.zeros(len(captions), self.max_length, self.dim)
        mask = torch.zeros(len(captions), self.max_length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            words = re.findall(r"[^\W_]+", caption.lower())[: self.max_length - 1]
            words.append(self._END)
            embeds[row, : len(words)] = torch.stack([self._vector(word) for word in words])
            mask[row, : len(words)] = True
        return embeds, mask

    def _vector(self, word: str) -> Tensor:
        if word not in self._vectors:
            generator = self._streams.generator("hashed_text", word)
            self._vectors[word] = torch.randn(self.dim, generator=generator)
        return self._vectors[word]


class UMT5TextOptions(StrictOptions):
    """Options of ``UMT5Text``.

    Attributes:
        path: a diffusers pipeline directory or a hub id.
        subfolder: the encoder's folder in it; None: ``path`` itself.
        tokenizer_subfolder: the tokenizer's folder in it; None: ``path`` itself.
        revision: git revision of a hub id.
        max_length: tokens, the end mark included; what is beyond is cut.
        precision: fp32, or bf16 for weights and arithmetic (half the memory: 11 GB for UMT5-XXL).
    """

    path: str
    subfolder: str | None = "text_encoder"
    tokenizer_subfolder: str | None = "tokenizer"
    revision: str | None = None
    max_length: int = Field(512, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"


class UMT5Text(TextEncoder):
    """Wan's text encoder: the last hidden state of ``UMT5EncoderModel``, padding set to zero."""

    name = "umt5"
    Options = UMT5TextOptions

    def __init__(self, options: UMT5TextOptions) -> None:
        from transformers import AutoTokenizer, UMT5EncoderModel  # seconds to import

        self.options = options
        self.tokenizer = load_pretrained(
            AutoTokenizer,
            options.path,
            subfolder=options.tokenizer_subfolder,
            revision=options.revision,
        )
        self.model = load_pretrained(
            UMT5EncoderModel,
            options.path,
            subfolder=options.subfolder,
            revision=options.revision,
            torch_dtype=torch.float32 if options.precision == "fp32" else torch.bfloat16,
        )
        self.model.eval().requires_grad_(False).to(process.device())
        self.dim, self.max_length = int(self.model.config.d_model), options.max_length

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See the class. HTML entities are resolved and white space is collapsed, as Wan does."""
        tokens = self.tokenizer(
            [clean(caption) for caption in captions],
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(process.device())
        states = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask.bool()
        return states.float().masked_fill(~mask[..., None], 0.0).cpu(), mask.cpu()


def clean(caption: str) -> str:
    """A caption without HTML entities and with single spaces."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(caption))).strip()
