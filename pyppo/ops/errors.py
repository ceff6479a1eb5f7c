"""What kernels on a GPU note instead of raising."""

from __future__ import annotations

import torch

from pyppo import library


def check_errors(device: torch.device | str = "cuda") -> None:
    """Raises if a kernel on this CUDA device met an impossible action, distribution or index since the last check.

    Synchronises with the device. On the CPU the calls themselves raise, and this does nothing.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    flags = library.error_flags.get(device)
    if flags is None:
        return
    action, row, slot = flags.tolist()
    flags.fill_(-1)
    if action >= 0:
        raise ValueError(f"actions has an impossible action in row {action}; each must be in range and allowed")
    if row >= 0:
        raise ValueError(f"logits, mean or log_std allow no action in row {row}: all masked, or NaN")
    if slot >= 0:
        raise ValueError(f"rows, order, count or part was out of range for slot {slot} of a minibatch")
