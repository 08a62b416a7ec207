"""What may be written: ``***`` for secrets, wherever a configuration or a message leaves the process.

Configurations should hold no secret, but addresses with a password and tokens do get into them. Everything that writes
one (config.json, MANIFEST.json, an exported README.md, ``--print-config``, reports, messages of ConfigError) comes
through here. No torch: the schema imports it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRET_NAME = re.compile(r"(password|passwd|secret|token|credential|(api|access|private)[_-]?key)s?$", re.IGNORECASE)
IN_URL = re.compile(
    r"(?<=://)[^/\s]+(?=@)"
    r"|(?<=[?&])(?P<name>[\w-]*(?:token|secret|key|passw(?:or)?d|pwd|sig|signature|credential|auth)s?=)[^&\s'\"]+",
    re.IGNORECASE,
)
TOKEN = re.compile(  # what Hugging Face, OpenAI and Anthropic, GitHub, GitLab, AWS, Slack issue; and HTTP headers
    r"(?<![A-Za-z0-9])(?:(?:hf|gh[oprsu])_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}"
    r"|A[KS]IA[A-Z0-9]{16}\w*|xox[abprs]-[\w-]{10,})|(?<=\bBearer )[^\s'\"]{8,}"
)
HIDDEN = "***"


def redact(value: Any, name: str = "") -> Any:
    """A copy of JSON-like data in which strings under a secret's name and secrets inside other strings are hidden."""
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return HIDDEN if SECRET_NAME.search(name) else redact_text(value)


def redact_text(text: str) -> str:
    """``text`` without the user and password of its URLs, their secret parameters, and tokens known by their form."""
    return TOKEN.sub(HIDDEN, IN_URL.sub(lambda match: (match["name"] or "") + HIDDEN, text))
