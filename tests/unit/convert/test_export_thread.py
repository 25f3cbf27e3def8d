"""The thread of an export, which uses the device and the stream of the rank on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from prism_megatron.config import ParallelConfig
from prism_megatron.convert import transfer
from prism_megatron.convert.rules import Rule
from prism_megatron.parallel import groups


@pytest.fixture
def one_process() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=1)
    yield
    groups.shutdown()


@pytest.mark.usefixtures("one_process")
def test_the_thread_sets_the_rank_s_stream_before_it_gathers(
    one_parameter: tuple[nn.Module, list[Rule]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record the calls to CUDA, without a GPU. A stream belongs to a device: setting it sets both."""
    model, table = one_parameter
    streams = {threading.get_ident(): "of the rank"}
    gathered_on: list[str | None] = []
    gather = transfer.gather_bucket

    def watched(*arguments: object) -> object:
        gathered_on.append(streams.get(threading.get_ident()))
        return gather(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "gather_bucket", watched)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.get(threading.get_ident()))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.update({threading.get_ident(): stream}))
    exported = dict(transfer.export_weights(model, table))
    assert torch.equal(exported["a.weight"], model.weight)
    assert gathered_on == ["of the rank"]
