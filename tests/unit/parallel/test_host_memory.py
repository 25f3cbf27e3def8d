"""Ranks share memory only with a rank whose open files they see; ``tests/parity/test_bridge.py`` gathers through it."""

from __future__ import annotations

import os

from prism_megatron.parallel.host_memory import _holds


def test_only_the_file_that_was_written_is_the_owner_s() -> None:
    files, token = f"/proc/{os.getpid()}/fd", os.urandom(16)
    written, other = os.memfd_create("written"), os.memfd_create("other")
    os.write(written, token)
    os.write(other, os.urandom(16))
    assert _holds(f"{files}/{written}", token)
    assert not _holds(f"{files}/{other}", token), "another process's file of the same number"
    os.close(written)
    os.close(other)
    assert not _holds(f"{files}/{written}", token), "none there, as on another host"
