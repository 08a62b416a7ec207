"""Secrets are hidden whatever surrounds them, and hiding twice is hiding once."""

from __future__ import annotations

import re
import string
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.redact import redact, redact_text

LETTERS = string.ascii_letters + string.digits
SECRETS = st.text(LETTERS, min_size=20, max_size=40)
PASSWORDS = st.text(LETTERS + "-_.~!$'()*+,;=:@%^|{}[]\"<>`\\", min_size=6, max_size=20).map(lambda text: f"p{text}w")
TOKENS = st.one_of(
    SECRETS.map("hf_{}".format),
    SECRETS.map("ghp_{}".format),
    SECRETS.map("github_pat_{}".format),
    SECRETS.map("glpat-{}".format),
    SECRETS.map("sk-{}".format),
    st.text(string.ascii_uppercase + string.digits, min_size=16, max_size=16).map("AKIA{}".format),
    SECRETS.map("xoxb-{}".format),
)
BOUNDARIES = st.sampled_from(
    ["", " ", "\n", "'", '"', "/", "=", ":", "(", "[", ",", "-", "_", "\t", "é", "\0", "\ud800"]
)
AROUND = st.text(max_size=15)
NAMES = st.sampled_from(["token", "api_key", "access_token", "X-Amz-Signature", "password", "sig", "auth", "Secret"])


@given(text=st.text() | st.lists(TOKENS | AROUND | st.sampled_from(["https://", "@", "?token=", "&"])).map("".join))
@example("https://a@b@c")
@example("://x@" * 2000)
@example("://" + "x" * 100_000)
@example("?token=" * 10_000)
def test_hiding_is_idempotent(text: str) -> None:
    assert redact_text(redact_text(text)) == redact_text(text)


@given(token=TOKENS, before=AROUND, left=BOUNDARIES, right=BOUNDARIES, after=AROUND)
def test_a_token_is_hidden_wherever_it_stands(token: str, before: str, left: str, right: str, after: str) -> None:
    left = left if left or not before else " "  # letters before it make another word of it
    shown = redact_text(before + left + token + right + after)
    assert token not in shown and "***" in shown


@given(user=AROUND.map(lambda text: re.sub(r"[/@\s]", "", text)), password=PASSWORDS, before=AROUND, after=AROUND)
def test_the_password_of_a_url_is_hidden(user: str, password: str, before: str, after: str) -> None:
    shown = redact_text(f"{before}https://{user}:{password}@host/path{after}")
    assert f"{password}@host" not in shown and "host/path" in shown


@given(name=NAMES, secret=SECRETS, first=st.booleans(), after=st.sampled_from(["", "&x=1", " b", "#part"]))
def test_a_secret_parameter_of_a_url_is_hidden(name: str, secret: str, first: bool, after: str) -> None:
    shown = redact_text(f"https://host/path{'?' if first else '?page=2&'}{name}={secret}{after}")
    assert secret not in shown and f"{name}=***" in shown and shown.startswith("https://host/path?")


@given(secret=SECRETS, name=NAMES.map(lambda name: name.replace("X-Amz-Signature", "api_key")), data=st.data())
def test_a_secret_is_hidden_at_any_depth(secret: str, name: str, data: st.DataObject) -> None:
    tree: Any = {name: secret} if name not in ("sig", "auth") else {"url": f"https://u:{secret}@h"}
    for wrap in data.draw(st.lists(st.sampled_from("dlt"), max_size=5)):
        tree = {"d": {"a": tree, "b": 1}, "l": [tree, None], "t": (tree,)}[wrap]
    shown = redact(tree)
    assert secret not in repr(shown) and "***" in repr(shown) and redact(shown) == shown


@given(value=st.text(string.ascii_lowercase + string.digits + " ./_-", max_size=40), number=st.integers())
def test_what_holds_no_secret_stays_as_it_is(value: str, number: int) -> None:
    if not any(mark in value for mark in ("hf_", "gh", "sk-", "glpat", "xox", "github")):
        tree = {"path": value, "steps": number, "list": [value, None, 0.5], "deep": {"a": {"b": value}}}
        assert redact(tree) == tree and redact_text(value) == value and str(ConfigError(value)) == value
