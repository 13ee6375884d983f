"""What a user chooses about a memory, as one frozen model.

Two kinds of fields. The *fingerprinted* ones shape what was written, so a store remembers them and refuses others; left
None they come from the model. The *free* ones may differ at every open; those that change outputs (`span_blocks`,
`retrieval`, and what `retain_*` drop) are journaled with each turn, so that a replay repeats what was.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from memtier.blocks import FarPositions, MemorySettings, RetrievalMode
from memtier.errors import ConfigError
from memtier.models.bmojo.configuration_bmojo import check_settings

__all__ = ["FINGERPRINTED", "MOST_SPAN_BLOCKS", "MemoryConfig", "resolve_settings"]

FINGERPRINTED = (
    "window_tokens",
    "sink_tokens",
    "eidetic_tokens",
    "span_block_tokens",
    "span_refresh_tokens",
    "memory_layers",
    "far_positions",
    "landmark_keys",
    "recency_share",
)


MOST_SPAN_BLOCKS = 65_536
"""More than any model reads at a time."""


def _as_tuple(value: Any) -> Any:
    # strictness is for types that may hide a mistake; a list is what JSON makes of a tuple
    return tuple(cast(list[Any], value)) if isinstance(value, list) else value


Layer = Annotated[int, Field(ge=0)]
Layers = Annotated[tuple[Layer, ...] | Literal["auto"] | None, BeforeValidator(_as_tuple)]


class MemoryConfig(BaseModel):
    """How much to remember, and at what cost. Frozen; unknown fields are refused.

    Raises:
        ConfigError: a field is unknown, of the wrong type, or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    window_tokens: int | None = Field(None, ge=1, description="Tokens attended exactly. None: the model's.")
    sink_tokens: int | None = Field(None, ge=0, description="First tokens that stay visible for ever.")
    eidetic_tokens: int | None = Field(None, ge=0, description="Surprising old tokens kept verbatim, a layer.")
    span_block_tokens: int | None = Field(None, ge=1, description="Tokens in one block of long-term memory.")
    span_refresh_tokens: int | None = Field(None, ge=1, description="Retrieval chooses anew every so many tokens.")
    memory_layers: Layers = Field(
        None, description="Layers that keep and retrieve blocks. 'auto': evenly spaced ones, within kv_bytes_per_token."
    )
    far_positions: FarPositions | None = Field(None, description="Positions that retrieved keys are given.")
    landmark_keys: int | None = Field(None, ge=0, description="Keys that a block is found by; 0: their mean.")
    recency_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="With landmark_keys: the newest blocks get those places in the span that no head wants more.",
    )

    span_blocks: int | None = Field(
        None, ge=0, le=MOST_SPAN_BLOCKS, description="Blocks retrieved at a time. None: the model's."
    )
    retrieval: RetrievalMode = Field("on", description="'off', 'random' and 'recent' are the controls.")
    hot_bytes: int | None = Field(64 * 2**20, ge=0, description="K/V kept in host memory, a session. None: all.")
    landmark_bytes: int | None = Field(64 * 2**20, ge=0, description="Landmarks kept in host memory, a session.")
    device_pool_bytes: int | None = Field(
        None,
        ge=0,
        description="K/V kept on the device for all sessions. None: on a GPU an eighth of its free memory, at most "
        "2 GiB, else 0. 0: none.",
    )
    kv_bytes_per_token: int = Field(
        16_384,
        ge=1,
        description="With memory_layers='auto': K/V that a token may take in storage, all layers together.",
    )
    inbox_blocks: int = Field(256, ge=1, description="Sealed blocks that may wait for the disk, a session.")
    snapshot_every_tokens: int = Field(32_768, ge=1, description="Tokens between two snapshots of the state.")
    max_batch_sessions: int = Field(
        8, ge=1, description="Sessions whose sampled tokens are read in one forward pass. 1: each alone."
    )
    max_open_sessions: int = Field(64, ge=1, description="Sessions one runtime holds open.")
    max_turn_tokens: int = Field(10_000_000, ge=1, description="Longest single turn that is taken.")
    min_free_bytes: int = Field(
        32 * 2**20, ge=0, description="Free space on the store's disk below which nothing new is taken."
    )
    reserve_bytes: int = Field(
        4 * 2**20, ge=0, description="Space set aside in the store, so that forgetting works on a full disk. 0: none."
    )
    retain_tokens: int | None = Field(
        None, ge=1, description="Blocks further back are dropped when a turn begins. None: none are. Erases nothing."
    )
    retain_bytes: int | None = Field(
        None, ge=0, description="Likewise the oldest blocks, when all take more than this on disk."
    )
    retain_seconds: float | None = Field(
        None, ge=0, description="Likewise blocks of turns that began longer ago than this."
    )
    durability: Literal["turn", "token"] = Field(
        "turn", description="'turn': sampled tokens are acknowledged when the call ends; 'token': one by one."
    )

    def __init__(self, **fields: Any) -> None:
        with _told_by_us():
            super().__init__(**fields)

    @classmethod
    def model_validate(cls, *args: Any, **kwargs: Any) -> MemoryConfig:
        """See pydantic's. Raises ConfigError as the constructor does."""
        with _told_by_us():
            return super().model_validate(*args, **kwargs)

    @classmethod
    def model_validate_json(cls, *args: Any, **kwargs: Any) -> MemoryConfig:
        """See pydantic's. Raises ConfigError as the constructor does."""
        with _told_by_us():
            return super().model_validate_json(*args, **kwargs)


@contextmanager
def _told_by_us() -> Generator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        ours = first.get("ctx", {}).get("error")
        if isinstance(ours, ConfigError):
            # the constructor's, which pydantic has wrapped
            raise ours from ours.__cause__
        # where a field takes several types, pydantic names the one that it tried
        name = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or "all of it"
        raise ConfigError(
            f"MemoryConfig: {name}: {first['msg']}, got {first.get('input')!r}. "
            f"The fields are {', '.join(MemoryConfig.model_fields)}."
        ) from error


def resolve_settings(
    config: MemoryConfig, of_model: MemorySettings, layer_types: Sequence[str], *, kv_channels: int = 1
) -> MemorySettings:
    """The sizes a session runs with: the user's where given, else the model's.

    Args:
        config: what the user chose.
        of_model: the model's own sizes.
        layer_types: kinds of the model's layers, which say where blocks can be kept.
        kv_channels: numbers in the key of a token, all heads of a layer together; for memory_layers="auto".

    Raises:
        ConfigError: the sizes contradict each other or the model.
    """
    names = (*FINGERPRINTED, "span_blocks")
    chosen = {name: value for name in names if (value := getattr(config, name)) is not None}
    if config.memory_layers == "auto":
        chosen["memory_layers"] = _spread(of_model, 2 * kv_channels, config.kv_bytes_per_token)
    settings = replace(of_model, **chosen)
    check_settings(settings, list(layer_types))
    if settings.span_block_tokens > settings.window_tokens:
        raise ConfigError(
            f"span_block_tokens is {settings.span_block_tokens}; it must not exceed window_tokens "
            f"({settings.window_tokens}). Take smaller blocks, or a larger window."
        )
    if config.span_blocks == 0 and config.retrieval != "off":
        raise ConfigError(
            f"span_blocks is 0 and retrieval is {config.retrieval!r}: nothing could be retrieved. "
            f"Set retrieval='off', or span_blocks to 1 or more."
        )
    return settings


def _spread(of_model: MemorySettings, numbers_a_token: int, budget_bytes: int) -> tuple[int, ...]:
    """As many of the model's memory layers as a budget holds, evenly spaced."""
    able, width = of_model.memory_layers, {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
    layer_bytes = numbers_a_token * width[of_model.storage_dtype]
    if not able:
        raise ConfigError("memory_layers is 'auto', and no layer of this model can keep blocks. Leave it out.")
    count = min(len(able), budget_bytes // layer_bytes)
    if not count:
        raise ConfigError(
            f"kv_bytes_per_token is {budget_bytes}; K/V of one layer of this model take {layer_bytes} bytes a token. "
            f"Give at least that."
        )
    return tuple(able[(2 * i + 1) * len(able) // (2 * count)] for i in range(count))
