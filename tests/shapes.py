"""Awkward sizes by name, each with the reason why it is here.

T time, B batch, I input, H hidden. A vector holds 4, 8 or 16 lanes (SSE2 and NEON, AVX2, AVX-512 in float32; half of
that in float64), a panel of packed weights up to 4 vectors, a tile of the product up to 9 rows.
Knows nothing of cells or of any implementation.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    T: int
    B: int
    I: int
    H: int
    why: str


SHAPES = {
    "no time": Shape(0, 3, 4, 5, "a call with nothing to do returns its state"),
    "no batch": Shape(4, 0, 3, 5, "no rows: gradients of parameters are zeros"),
    "no time, no batch": Shape(0, 0, 2, 3, "every array of activations is empty"),
    "one of each": Shape(1, 1, 1, 1, "no loop runs twice"),
    "one step": Shape(1, 9, 6, 12, "a decoder's call: nothing follows in time"),
    "one step of one row": Shape(1, 1, 37, 21, "weights are used once, as they stand: squares and tails of both products"),
    "one step of few rows": Shape(1, 7, 18, 35, "likewise; the rows are a tile of 4 and one of 3"),
    "one row": Shape(7, 1, 5, 20, "a matrix-vector product, whose path may be its own"),
    "one input": Shape(5, 4, 1, 9, "the product with x has a depth of 1"),
    "one unit": Shape(6, 5, 3, 1, "the recurrent product has a depth of 1; every lane but one is padding"),
    "unit tail": Shape(4, 3, 2, 3, "fewer units than the narrowest vector has lanes"),
    "4 lanes + 1": Shape(3, 2, 3, 5, "a tail of one unit after a vector of 4"),
    "8 lanes - 1": Shape(3, 6, 4, 7, "a vector of 8 less one unit; rows divide by 2 and 3, not by 4"),
    "8 lanes + 1": Shape(3, 8, 7, 9, "a tail of one unit after a vector of 8; 8 rows are two tiles of 4, not 6 + 2"),
    "16 lanes - 1": Shape(3, 3, 8, 15, "a vector of 16 less one unit"),
    "16 lanes": Shape(4, 12, 16, 16, "no tail anywhere: 12 rows divide by 2, 3, 4 and 6"),
    "16 lanes + 1": Shape(3, 5, 17, 17, "a tail of one unit after a vector of 16"),
    "two vectors + 1": Shape(3, 7, 6, 33, "a pair of unit blocks and one lonely unit; 7 rows"),
    "panel - 1": Shape(3, 4, 9, 63, "a panel of 4 vectors of 16 less one unit"),
    "panel": Shape(3, 6, 32, 64, "exactly a panel of 4 vectors of 16"),
    "panel + 1": Shape(3, 2, 5, 65, "one unit in the second panel"),
    "two panels + 2": Shape(4, 4, 12, 130, "an odd number of blocks on either side of a split of the units"),
    "prime batch": Shape(4, 13, 6, 18, "rows divide by no tile"),
    "rows for many threads": Shape(3, 67, 4, 10, "more rows than any tile, and a row left over for every split"),
    "wide input": Shape(3, 5, 130, 8, "the product with x is much deeper than the recurrent one"),
    "deep product": Shape(2, 3, 11, 257, "the recurrent product is one longer than a block of k = 256"),
    "long": Shape(131, 2, 3, 4, "more steps than a chunk of time holds; a row alone does not fill a tile"),
    "long and wide": Shape(70, 9, 21, 24, "several chunks of time, whose gradients of weights add up"),
}
