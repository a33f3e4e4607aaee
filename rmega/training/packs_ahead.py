"""The packs of the next step, prepared while the GPU computes this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from rmega.data.batching import Batcher
from rmega.data.packing import PackedBatch
from rmega.models.varlen import varlen_plan

Packs = tuple[np.ndarray, list[PackedBatch]]


class PacksAhead:
    """Hands out (comparisons, packs on ``device``) of the step that starts after a count of
    comparisons.

    Packs are a function of that count alone, so preparing some early changes nothing. An error in
    preparing a step is raised by ``take`` of that step. On a CPU nothing is prepared ahead (unless
    ``ahead`` says so): the thread would take time from the step that runs.
    """

    def __init__(
        self, batcher: Batcher, device: torch.device, *, ahead: bool | None = None
    ) -> None:
        self.batcher, self.device = batcher, device
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[Packs]] | None = None
        if ahead if ahead is not None else device.type == "cuda":
            self._thread = ThreadPoolExecutor(1, "packs", initializer=self._use_device)

    def _use_device(self) -> None:
        if self.device.type == "cuda":  # of this thread; pinning would start CUDA on GPU 0
            torch.cuda.set_device(self.device)

    def _prepare(self, consumed: int) -> Packs:
        documents = self.batcher.documents(consumed)
        packs = [pack.to(self.device) for pack in self.batcher.packs(documents, consumed)]
        if self.device.type == "cuda":
            for pack in packs:
                for segments in (pack.segments, pack.pooled_segments):
                    varlen_plan(segments, self.device, pack.num_tokens)
        return documents, packs

    def take(self, consumed: int) -> Packs:
        """The step that starts after ``consumed`` comparisons; begins with the one after it."""
        if self._thread is None:
            return self._prepare(consumed)
        pending, self._next = self._next, None
        if pending is None or pending[0] != consumed:
            pending = (consumed, self._thread.submit(self._prepare, consumed))
        documents, packs = pending[1].result()
        consumed += len(documents)
        last = self.batcher.max_consumed  # the run ends there
        if last is None or consumed < last:
            self._next = (consumed, self._thread.submit(self._prepare, consumed))
        return documents, packs

    def close(self) -> None:
        """Discard what is prepared, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
