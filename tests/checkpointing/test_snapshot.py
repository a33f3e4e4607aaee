"""Host memory of snapshots: one allocation, pinned once, and buffers that are written alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rmega.checkpointing import snapshot


def writer(buffers=None) -> snapshot.SnapshotWriter:
    made = object.__new__(snapshot.SnapshotWriter)
    made.buffers = {} if buffers is None else buffers
    return made


def test_buffers_lie_side_by_side():
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "none": torch.empty(0, 4),
        "step": torch.tensor(3.0),
        "c": torch.randn(2, 2, 2).double(),
    }
    made = writer()
    made._allocate(tensors)
    for name, source in tensors.items():
        buffer = made.buffers[name].copy_(source)
        assert buffer.shape == source.shape and buffer.dtype == source.dtype
        assert buffer.untyped_storage().nbytes() == buffer.nbytes  # written without its neighbors
    assert all(torch.equal(made.buffers[name], x) for name, x in tensors.items())
    starts = [x.data_ptr() for name, x in made.buffers.items() if name != "none"]
    assert starts == [starts[0] + i * snapshot.ALIGN for i in range(len(starts))]
    made._allocate({})
    assert set(made.buffers) == set(tensors)


def test_a_full_disk_is_the_reason(tmp_path, small_files):
    """torch.save fails twice, the second time with a sentence about positions in a zip file."""
    made = object.__new__(snapshot.Snapshot)
    with small_files(), open(tmp_path / "x", "wb") as file:
        try:
            torch.save(torch.zeros(10_000), file)
        except RuntimeError as error:
            made.fail(error)
            assert "unexpected pos" in str(error)
    assert made.error == "OSError: [Errno 27] File too large"


def test_pinned_once(monkeypatch):
    calls, code = [], [0]

    def register(address, nbytes, flags):
        calls.append((address, nbytes, flags))
        return code[0]

    cudart = SimpleNamespace(cudaHostRegister=register)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = snapshot.host_memory(1000, pinned=True)
    assert calls == [(memory.data_ptr(), 1000, 0)]
    snapshot.host_memory(1000, pinned=False), snapshot.host_memory(0, pinned=True)
    assert len(calls) == 1
    code[0] = 2
    with pytest.raises(RuntimeError, match="cudaHostRegister of 1,000 bytes: CUDA error 2"):
        snapshot.host_memory(1000, pinned=True)
