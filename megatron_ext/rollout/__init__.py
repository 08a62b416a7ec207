"""Where responses come from: the engines' contract, one folder for each engine, sampling, and rewards.

An engine imports nothing of the trainer, and vLLM is imported nowhere else.
"""
