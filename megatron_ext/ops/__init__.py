"""The operator library: tensors and a shard of the vocabulary in, tensors out. It needs torch alone.

Nothing here imports another room of the repository; docs/operator.md shows how to use it in another trainer.
"""

from megatron_ext.ops.linear_policy_stats import linear_policy_stats
from megatron_ext.ops.options import PolicyStats
from megatron_ext.ops.policy_stats import policy_stats
from megatron_ext.ops.sampling_support import sampling_support
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.support import Support

__all__ = ["PolicyStats", "Support", "VocabShard", "linear_policy_stats", "policy_stats", "sampling_support"]
