"""How one set of problems is sampled and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import DataConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to decode and what to report. Raises ConfigError for values that contradict each other."""

    samples: int = 8
    ks: tuple[int, ...] = ()  # pass@k; empty: the powers of two up to ``samples``
    temperature: float = 1.0
    top_p: float = 1.0
    max_prompt_tokens: int = 4096
    max_response_tokens: int = 1024
    max_left_out: float = DataConfig().max_left_out  # share of the data's rows that may have a fault
    seed: int = 0
    limit: int | None = None  # only the first problems of the file
    allow_shorter: bool = False  # responses end where the model's positions do, if they do before max_response_tokens

    def __post_init__(self) -> None:
        for name in ("samples", "max_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit: expected at least 1, found {self.limit}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p: expected a share in (0, 1], found {self.top_p}")
        if not 0 <= self.max_left_out <= 1:
            raise ConfigError(f"--max-left-out: expected a share from 0 to 1, found {self.max_left_out}")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"--temperature: expected 0 (greedy) to 100, found {self.temperature}")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(f"--temperature 0 samples the same response {self.samples} times: use --samples 1")
        bad = [k for k in self.ks if not 1 <= k <= self.samples]
        if bad:
            raise ConfigError(
                f"--k: pass@{max(bad)} cannot be estimated from --samples {self.samples}; expected values from 1 to "
                f"{self.samples}: raise --samples or leave out {', '.join(map(str, bad))}"
            )

    def reported_ks(self) -> list[int]:
        powers = [2**i for i in range(self.samples.bit_length()) if 2**i <= self.samples]
        return sorted(set(self.ks or powers))
