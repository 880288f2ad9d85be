"""Large matrices of a vocabulary cut by rows: each block of rows is gathered, used and released by itself."""

from zeroxide.rows.block import BLOCKS, WEIGHT, RowBlock, RowRange, blocks_of, in_blocks, rows_of
from zeroxide.rows.cut import CutMatrix, cut_matrix, cut_rows
from zeroxide.rows.weight import CutWeight

__all__ = [
    "BLOCKS",
    "WEIGHT",
    "CutMatrix",
    "CutWeight",
    "RowBlock",
    "RowRange",
    "blocks_of",
    "cut_matrix",
    "cut_rows",
    "in_blocks",
    "rows_of",
]
