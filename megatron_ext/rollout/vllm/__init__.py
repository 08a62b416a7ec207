"""vLLM in the training processes, and what its servers share with it: versions and the transfer of weights."""
