"""A meeting point for processes that one process starts, at a port that no other program can take in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore


def open_rendezvous() -> tuple[TCPStore, dict[str, str]]:
    """Listen on a free port for processes whose ``torch.distributed`` starts from the environment.

    Returns the store, to be referenced until these processes have ended, and the variables that lead them to it. They
    also need RANK, WORLD_SIZE and LOCAL_RANK. Processes that leave their group and form another one need another store.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
