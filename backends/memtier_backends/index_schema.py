"""The columns of an index and the checks on what goes in: shared by every adapter, so that they agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memtier.errors import ConfigError
from memtier_backends.records import IndexRow

__all__ = ["HIT_COLUMNS", "check_rows", "check_vector", "landmark_column", "rows_schema", "rows_table"]

# What a hit is made of, and the digest it is checked against.
HIT_COLUMNS = ["block", "start", "end", "text", "created_at", "digest"]


def landmark_column(layer: int) -> str:
    return f"landmark_{layer}"


def rows_schema(layers: Sequence[int]) -> pa.Schema:
    """One row a block; `layers` are landmark sizes.

    The text is not compressed: a scan of the files for a text must find it for as long as it is there.
    """
    return pa.schema(
        [
            pa.field("block", pa.int64(), nullable=False),
            pa.field("start", pa.int64(), nullable=False),
            pa.field("end", pa.int64(), nullable=False),
            pa.field("text", pa.string(), nullable=False, metadata={"lance-encoding:compression": "none"}),
            pa.field("created_at", pa.float64(), nullable=False),
            pa.field("innovation", pa.float32(), nullable=True),
            pa.field("digest", pa.string(), nullable=False),
            *(
                pa.field(landmark_column(layer), pa.list_(pa.float32(), size), nullable=False)
                for layer, size in enumerate(layers)
            ),
        ]
    )


def rows_table(rows: Sequence[IndexRow], schema: pa.Schema) -> pa.Table:
    """Rows as a table of `schema`."""
    columns: dict[str, pa.Array] = {
        field.name: pa.array([getattr(row, field.name) for row in rows], type=field.type)
        for field in schema
        if not field.name.startswith("landmark_")
    }
    for layer in range(len(schema.names) - len(columns)):
        field = schema.field(landmark_column(layer))
        flat = np.concatenate([row.landmarks[layer] for row in rows], dtype=np.float32) if rows else np.empty(0, "f4")
        columns[field.name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), field.type.list_size)
    return pa.table(columns, schema=schema)


def check_rows(rows: Sequence[IndexRow], layers: Sequence[int]) -> None:
    """Raises ConfigError unless each row has one finite landmark of the right size a memory layer."""
    for row in rows:
        got = [tuple(np.shape(landmark)) for landmark in row.landmarks]
        if got != [(size,) for size in layers]:
            raise ConfigError(f"block {row.block} has landmarks of shapes {got}; sizes {list(layers)} were expected.")
        if not all(np.isfinite(landmark).all() for landmark in row.landmarks):
            raise ConfigError(f"block {row.block} has a landmark that is not finite; such a step must be taken back.")


def check_vector(layer: int, vector: NDArray[np.float32], layers: Sequence[int]) -> None:
    if not 0 <= layer < len(layers):
        raise ConfigError(f"layer is {layer}; the index holds {len(layers)} memory layers, counted from 0.")
    if np.shape(vector) != (layers[layer],) or not np.isfinite(vector).all():
        raise ConfigError(
            f"the vector has shape {np.shape(vector)}; layer {layer} takes {layers[layer]} finite numbers."
        )
