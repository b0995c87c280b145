"""The argument of a launch, as the kernel sees it. Field order and types are the ABI of every target."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

STOP_TOKENS = 16  # stop tokens that one launch can watch for
REPORT_WORDS = 16
THREADS = 288  # of a CUDA block: 8 consumer warps and the producer

POINTERS = (
    "slabs", "embedding", "norms", "qk_norms", "qkv_bias", "rope", "kv", "exchange", "prompt", "tokens", "logits",
    "stop_word", "report",
)  # fmt: skip


class KernelArgs(ctypes.Structure):
    """Natural C alignment. Pointers are addresses in the memory of the device; 0 stands for null."""

    _fields_ = [
        *[(name, ctypes.c_uint64) for name in POINTERS],
        ("start", ctypes.c_int32),
        ("n_prompt", ctypes.c_int32),
        ("max_new", ctypes.c_int32),
        ("n_stop", ctypes.c_int32),
        ("stop", ctypes.c_int32 * STOP_TOKENS),
        ("trace", ctypes.c_uint64),
    ]


def kernel_args(
    pointers: dict[str, int],
    start: int,
    n_prompt: int,
    max_new: int,
    stop: Sequence[int] = (),
) -> KernelArgs:
    """Fill the structure; a pointer not in `pointers` is null. ValueError for an unknown name or too many stops."""
    unknown = set(pointers) - {*POINTERS, "trace"}
    if unknown:
        raise ValueError(f"no such kernel argument: {', '.join(sorted(unknown))}")
    if len(stop) > STOP_TOKENS:
        raise ValueError(f"{len(stop)} stop tokens: the kernel watches for at most {STOP_TOKENS}")
    args = KernelArgs(**pointers)
    args.start, args.n_prompt, args.max_new, args.n_stop = start, n_prompt, max_new, len(stop)
    args.stop[: len(stop)] = list(stop)
    return args
