"""Detect secrets in a cluster file, by the name of a variable or option and by the form of a value.

A false positive costs the user a line of ``pass_environment``; a false negative writes a secret to scripts and logs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# A word of a name: HF_TOKEN, PGPASSWORD, WANDB_KEY, but not TOKENIZERS_PARALLELISM or MAX_TOKENS.
_SECRET_WORD = re.compile(
    r"\w*(?:token|secrets?|password|passwd|passphrase|credentials?|apikey|accesskey|privatekey)"
    r"|(?:pg|db|my|ssh)?(?:pass|pwd)|key|auth|authorization|bearer|cookie",
    re.IGNORECASE,
)
_PUBLIC_NAME = re.compile(r"pwd|oldpwd|\w+[_-](?:file|path|dir|type|region|profile|timeout|sock)", re.IGNORECASE)
_ASSIGNED = re.compile(r"([A-Za-z_][\w-]*)=(?=[\"']?[^\s\"'$`])")
_OPTION = re.compile(r"--([A-Za-z][\w-]*)[= ]\s*(?=[\"']?[^\s\"'$-])")
_LOGIN = re.compile(r"\b(?:wandb login|docker login .*-p|password|bearer)\s+(?=[\"']?[^\s\"'$-])", re.IGNORECASE)
_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_(?:[A-Za-z0-9]{16,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6,})"
    r"|sk-[\w-]{8,}|nvapi-[\w-]{8,}|gh[pousr]_\w{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}|xox[a-z]-[\w-]{8,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{8,}|AIza[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|\w+://[^/\s:@]*:[^/\s@$]+@"
    r")"
)


def is_secret_name(name: str) -> bool:
    """Return whether a variable or option of this name holds a secret, judged by the words of the name."""
    if _PUBLIC_NAME.fullmatch(name):
        return False
    words = re.split(r"[_-]", name)
    return words[0].upper() == "AWS" or any(_SECRET_WORD.fullmatch(word) for word in words)


def assigned_secrets(text: str) -> Iterator[str]:
    """Yield names of secrets that a shell line or SLURM option assigns a literal value."""
    for pattern in (_ASSIGNED, _OPTION):
        yield from (found[1] for found in pattern.finditer(text) if is_secret_name(found[1].strip("-")))
    if login := _LOGIN.search(text):
        yield login[0].split()[0]


def line_of_secret_value(text: str) -> int | None:
    """Return the number of the first line, from 1, with a value in the form of a token or key."""
    found = _VALUE.search(text)
    return text.count("\n", 0, found.start()) + 1 if found else None
