"""The operator library: tensors and a shard of the vocabulary in, tensors out."""

from megatron_ext.ops.linear_policy_stats import linear_policy_stats
from megatron_ext.ops.options import PolicyStats
from megatron_ext.ops.policy_stats import policy_stats
from megatron_ext.ops.shard import VocabShard

__all__ = ["PolicyStats", "VocabShard", "linear_policy_stats", "policy_stats"]
