"""Where a token's numbers lie in the packed buffers of the kernels: the order of stats.py.

sums      [T, 4]        fp32   ShardStats: MAXIMUM, TOTAL, MOMENT, TARGET
words     [T, 5 + ...]  32 bit what is sent to a token's owner: its sums, FLOOR, and KEYS int16 counts from COUNTS on
numbers   [T, 8]        fp32   GlobalStats: MAXIMUM, TOTAL, ENTROPY, TARGET, THETA, MASS, NUCLEUS_ENTROPY, SIZE
          [T, 4]               without a nucleus its first four
state     [T, 2]        fp64   of the search: BITS of the cutoff token's key found so far, ABOVE, the mass above them
sums of the search [T, 4] fp64 AT_MASS, AT_MOMENT, AT_ABOVE, AT_EQUAL: AtTheta of nucleus.py
"""

# pyright: reportMissingImports=false
import triton.language as tl

MAXIMUM: tl.constexpr = tl.constexpr(0)
TOTAL: tl.constexpr = tl.constexpr(1)
MOMENT: tl.constexpr = tl.constexpr(2)
ENTROPY: tl.constexpr = tl.constexpr(2)
TARGET: tl.constexpr = tl.constexpr(3)

FLOOR: tl.constexpr = tl.constexpr(4)
COUNTS: tl.constexpr = tl.constexpr(10)  # in int16: after five words of 32 bit

THETA: tl.constexpr = tl.constexpr(4)
MASS: tl.constexpr = tl.constexpr(5)
NUCLEUS_ENTROPY: tl.constexpr = tl.constexpr(6)
SIZE: tl.constexpr = tl.constexpr(7)

BITS: tl.constexpr = tl.constexpr(0)
ABOVE: tl.constexpr = tl.constexpr(1)

AT_MASS: tl.constexpr = tl.constexpr(0)
AT_MOMENT: tl.constexpr = tl.constexpr(1)
AT_ABOVE: tl.constexpr = tl.constexpr(2)
AT_EQUAL: tl.constexpr = tl.constexpr(3)

SHARD_COLUMNS: tl.constexpr = tl.constexpr(4)  # of sums
GLOBAL_COLUMNS: tl.constexpr = tl.constexpr(8)  # of numbers
STATE_COLUMNS: tl.constexpr = tl.constexpr(2)
AT_COLUMNS: tl.constexpr = tl.constexpr(4)  # of the sums of the search
