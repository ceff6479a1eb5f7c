"""Functions on tensors that stay where they are, captured as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

__all__ = ["CaptureError", "Graphs", "Step"]

Step = Callable[[], object]


class CaptureError(Exception):
    """Says in one sentence why a step cannot be captured."""


class Graphs:
    """Captures steps on one device, all in one memory pool. Each may use that memory as it likes, since they run one
    after the other, on one stream, and what a step leaves behind lies in tensors that were there before it.

    On the CPU there is nothing to capture: steps run as they are, on the same tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # one for good: libraries keep workspaces for each
        self.forget()

    def forget(self) -> None:
        """Capture into another pool from here on: once no graph is left of one, it cannot be gone on with."""
        if self.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Step, start: Step) -> Step:
        """What runs `step` again, on the current stream.

        Args:
            step: reads and writes static tensors, keeps nothing else, and waits for nothing. It is called three times
                on a stream of its own: so that libraries set up what they need, so that whatever would wait for the
                device fails before a capture is there to break, and to be captured, which computes nothing.
            start: brings the static tensors to where a first call must do no harm.

        Raises:
            CaptureError: a call failed.
        """
        if self.device.type != "cuda":
            return step
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            # Entered here as well: torch's capture leaves its stream the current one where its end fails.
            with torch.cuda.stream(self._stream):
                start()
                step()
                with _no_waiting():
                    start()
                    step()
                start()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    step()
        except Exception as error:
            pool = self._pool
            self.forget()
            self._clean_up(graph, pool)
            raise CaptureError(_first_cause(error)) from error
        finally:
            current.wait_stream(self._stream)
        return graph.replay

    def _clean_up(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        """What torch leaves undone where the end of a capture fails.

        Its allocator goes on taking the capture for one under way, so that its cache cannot be emptied, which the next
        capture begins with; and its random numbers may wait for a capture to end well.
        """
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        try:
            torch._C._cuda_endAllocateToPool(index, pool)
        except RuntimeError:
            return  # no capture was begun, or its end did not fail
        _broken.append(graph)
        with suppress(RuntimeError):
            torch._C._cuda_releasePool(index, pool)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=self._pool, stream=self._stream):
                torch.zeros(1, device=self.device)
        self.forget()


# torch's allocator of page-locked memory has no way to be told, and asks the graph itself from then on.
_broken: list[torch.cuda.CUDAGraph] = []


@contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype, and does not notice everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _first_cause(error: BaseException) -> str:
    """Where a capture breaks, its end fails too and says less."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
