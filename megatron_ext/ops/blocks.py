"""Products in blocks of a fixed shape, and sums over the blocks in a fixed tree: the same bits on any number of ranks.

A matrix product may round otherwise where it has more columns, and ranks add their shares in an order of their own. So
the sharded dimension is cut into blocks, a power of two of them, whatever the layout: each is multiplied alone, from
tensors of its own, and what the blocks have to add is added in the tree

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

A rank holds consecutive blocks, a subtree: it adds its own, the ranks' sums are gathered and added on every rank.

The number of threads must be the same in all layouts: the product may split a sum over them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.ops.collectives import all_gather
from megatron_ext.ops.shard import VocabShard

NUM = 8  # blocks of a vocabulary: the largest number of ranks that can share one

Leaf = Sequence[slice]  # what of the sharded dimension forms a block: one range, or two for gate and up projections


def vocabulary(shard: VocabShard, caller: str) -> list[Leaf]:
    """This rank's columns of each block of the real vocabulary that it holds; a block is ceil(V / NUM) columns wide.

    Raises ValueError, naming the caller, where the shard begins or ends within a block.
    """
    width = -(-shard.vocab_size // NUM)
    if any(edge % width and edge < shard.vocab_size for edge in (shard.start, shard.stop)):
        raise ValueError(
            f"{caller}: deterministic=True multiplies blocks of ceil({shard.vocab_size} / {NUM}) = {width} columns, "
            f"which columns {shard.start} to {shard.stop} of this rank cut; split the vocabulary over 1, 2, 4 or {NUM} "
            f"ranks, padded to {NUM * width} columns"
        )
    last = max(0, shard.real)
    return [[slice(i, min(i + width, last))] for i in range(0, last, width)]


def product(x: Tensor, weight: Tensor, leaves: Sequence[Leaf]) -> Tensor:
    """``x [T, K] @ weight[N, K]^T``, a block of columns at a time; columns in no block are 0."""
    out = x.new_zeros(len(x), len(weight))
    for part in _ranges(leaves):
        out[:, part] = x @ weight[part].contiguous().T
    return out


def input_gradient(d_out: Tensor, weight: Tensor, leaves: Sequence[Leaf], group: ProcessGroup | None) -> Tensor:
    """``d_out [T, N] @ weight [N, K]`` over all ranks of the group: the blocks' products added in the tree."""
    parts = [
        _left_to_right([d_out[:, part].contiguous() @ weight[part].contiguous() for part in leaf]) for leaf in leaves
    ]
    return tree_sum(parts or [d_out.new_zeros(len(d_out), weight.shape[1])], group)


def weight_gradient(d_out: Tensor, x: Tensor, leaves: Sequence[Leaf], out: Tensor) -> None:
    """``out [N, K] += d_out [T, N]^T @ x [T, K]`` in the dtype of ``out``, a block at a time."""
    x = x.to(out.dtype)
    for part in _ranges(leaves):
        out[part] += d_out[:, part].to(out.dtype).contiguous().T @ x


def tree_sum(parts: Sequence[Tensor], group: ProcessGroup | None) -> Tensor:
    """The sum of all ranks' blocks, in order, on every rank; as many on each, a power of two (the last ones fewer)."""
    return _tree(list(all_gather(_tree(list(parts)), group)))


def _tree(parts: list[Tensor]) -> Tensor:
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def _left_to_right(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _ranges(leaves: Sequence[Leaf]) -> list[slice]:
    return [part for leaf in leaves for part in leaf]
