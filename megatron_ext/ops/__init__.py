"""The operator library: tensors and a shard of the vocabulary in, tensors out."""

from megatron_ext.ops.policy_stats import PolicyStats, policy_stats
from megatron_ext.ops.shard import VocabShard

__all__ = ["PolicyStats", "VocabShard", "policy_stats"]
