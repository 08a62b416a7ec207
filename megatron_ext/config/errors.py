"""The error of a run that must not start. Exit code 2."""

from __future__ import annotations

from megatron_ext.config.redact import redact_text


class ConfigError(ValueError):
    """A fault of the configuration or of the data: the run must not start. Exit code 2. It shows no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact_text(message))
