"""Types of the fields of a configuration, with what they allow, and what its sections have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_SIZE = 2**24
STREAM_VAL_TOKENS = 2**16
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["fp32", "bf16", "fp16"]
Determinism = Literal["bitwise", "same-data", "off"]
AttentionKernel = Literal["sdpa", "folded"]
Strategy = Literal["ddp", "fsdp"]
FP32Matmul = Literal["highest", "medium"]
Device = Literal["cuda", "xpu", "mps", "cpu"]
"""Kinds of them, in the order in which `auto` looks for one."""
Tracking = Literal["tensorboard", "trackio", "wandb"]


class Section(BaseModel):
    """A frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _checked_regex(pattern: str, what: str = "a regular expression") -> str:
    import regex  # its tables take a while to import

    try:
        regex.compile(pattern)
    except (regex.error, ValueError) as error:
        raise ValueError(f"{what} ({error})") from None
    return pattern


def _checked_script(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(NO_SCRIPT)
    _checked_regex(rf"\p{{Script={name}}}", NO_SCRIPT)
    return name


NO_SCRIPT = "a Unicode script, as latin, cyrillic, han, arabic"
Regex = Annotated[str, AfterValidator(_checked_regex)]
Script = Annotated[str, AfterValidator(_checked_script)]
