"""vLLM on GPUs of its own, over HTTP: servers that are started, watched, replaced and given the weights.

No answer of a server is used before reply.py has checked it, and nobody is served without the token (guard.py).
"""
