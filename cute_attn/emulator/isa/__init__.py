"""The instruction set, one file per family. A new family is a new file and a line here."""

from . import (
    async_copy,
    barrier,
    bits,
    compare,
    control,
    convert,
    floating,
    half,
    integer,
    ldmatrix,
    load_store,
    matrix,
    matrix_fusion,
    move,
    special,
    warp,
)

FAMILIES = (
    async_copy,
    barrier,
    bits,
    compare,
    control,
    convert,
    floating,
    half,
    integer,
    ldmatrix,
    load_store,
    matrix,
    matrix_fusion,
    move,
    special,
    warp,
)
