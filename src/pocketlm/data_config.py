"""The section `data` of a configuration: where text comes from, what of it is taken, and in which order it is read."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pocketlm.field_types import STREAM_VAL_TOKENS, Count, Natural, Regex, Script, Section


class SourceConfig(BaseModel):
    """One source of a mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    max_documents: Annotated[int, Field(ge=0)] = 0


class DataConfig(Section):
    """From text to rows of tokens."""

    source: str = "stdlib"
    """stdlib | files:GLOB | hf:OWNER/NAME[/CONFIG][@REVISION] | synthetic (tests)."""
    sources: tuple[SourceConfig, ...] = ()
    """In place of `source`, several: tables `[[data.sources]]` with `source`, `weight` (1) and `max_documents` (0)."""
    max_documents: Natural = 0
    """Only the first so many documents of the source; 0 is all."""
    min_chars: Natural = 0
    """Shorter documents are left out."""
    max_chars: Natural = 0
    """Longer documents are left out; 0 is no limit."""
    script: Script | None = None
    """Only documents whose letters are of this Unicode script: latin, cyrillic, han, ..."""
    script_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """So much of a document's letters, at least."""
    keep_regex: Regex | None = None
    """Only documents in which this regular expression is found."""
    drop_regex: Regex | None = None
    """Documents in which this regular expression is found are left out."""
    dedup: Literal["exact", "near"] | None = None
    """Copies of earlier documents are left out: exact ones, or near ones, too."""
    dedup_threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """near: what two documents share of their runs of five words, at least (Jaccard index)."""
    tokenizer: str = "gpt2"
    """gpt2 | byte | bpe:SIZE (trained on the training documents) | a tokenizer.json or its folder | a Hub id."""
    context: Count = 256
    """Tokens in a row; each row trains all of them."""
    document_masks: bool = False
    """Attention and positions begin anew at each document inside a row."""
    dir: str | None = None
    """Where the prepared data set lies; by default data/NAME-FINGERPRINT."""
    val_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    """Share of the documents held out, chosen by the hash of their text."""
    shuffle: Literal["auto", "global", "piece"] = "auto"
    """Rows permuted over the whole data set, or inside each piece in turn. `auto`: inside each piece of a stream."""
    piece_documents: Count = 8192
    """Documents in a piece: a shard file, and the unit of `shuffle = "piece"`."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Train while another process fetches and tokenizes: `auto` text from the Hub, if not shuffled as a whole."""
    val_tokens: Natural = 0
    """Held-out tokens: the pieces from the first on that have so many. 0 is all; of a stream 65,536."""
    segment_pieces: Natural = 0
    """Of a stream: pieces in a segment. At the end of each there is a checkpoint; 0 for no segments."""
    keep_segments: Natural = 0
    """Of a stream: segments on the disk at once, at least 2; 0 for all."""

    @property
    def parts(self) -> tuple[DataConfig, ...]:
        """A source each."""
        given = ({"source": one.source, "max_documents": one.max_documents, "sources": ()} for one in self.sources)
        return tuple(self.model_copy(update=one) for one in given) or (self,)

    @property
    def streams(self) -> bool:
        """Whether the order is one that needs no more than the first piece to begin."""
        if self.sources:
            return any(part.streams for part in self.parts)
        may = self.shuffle != "global" and self.source.startswith("hf:")
        return self.stream == "on" or (self.stream == "auto" and may)

    @property
    def order(self) -> Literal["global", "piece"]:
        """`shuffle`, decided."""
        if self.shuffle == "auto":
            return "piece" if self.streams else "global"
        return self.shuffle

    @property
    def validation_tokens(self) -> int:
        """`val_tokens`, decided; 0 is all."""
        return self.val_tokens or (STREAM_VAL_TOKENS if self.streams else 0)

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if 0 < self.max_chars < self.min_chars:
            raise ValueError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}: no document is left")
        return self
