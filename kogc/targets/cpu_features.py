"""What instruction sets this processor has and the system has switched on, in the names /proc/cpuinfo uses."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
from collections.abc import Callable
from pathlib import Path

# feature: (leaf, subleaf, register, bit) of CPUID, and the register state the system must keep for it.
AVX, AVX512 = 0b110, 0b11100110
EBX, ECX, EAX = 1, 2, 0
FEATURES = {
    "fma": (1, 0, ECX, 12, AVX),
    "f16c": (1, 0, ECX, 29, AVX),
    "avx2": (7, 0, EBX, 5, AVX),
    "avx512f": (7, 0, EBX, 16, AVX512),
    "avx512dq": (7, 0, EBX, 17, AVX512),
    "avx512bw": (7, 0, EBX, 30, AVX512),
    "avx512vl": (7, 0, EBX, 31, AVX512),
    "avx512_bf16": (7, 1, EAX, 5, AVX512),
}
OSXSAVE = 1 << 27  # leaf 1, ECX: the system has enabled XGETBV

# void cpuid(leaf edi, subleaf esi, u32* out rdx): push rbx; mov eax,edi; mov ecx,esi; mov r8,rdx; cpuid;
# mov [r8],eax; mov [r8+4],ebx; mov [r8+8],ecx; mov [r8+12],edx; pop rbx; ret
CPUID_CODE = bytes.fromhex("53 89f8 89f1 4989d0 0fa2 418900 41895804 41894808 4189500c 5b c3")
# u64 xgetbv(): xor ecx,ecx; xgetbv; shl rdx,32; or rax,rdx; ret
XGETBV_CODE = bytes.fromhex("31c9 0f01d0 48c1e220 4809d0 c3")

Cpuid = Callable[[int, int], tuple[int, int, int, int]]


@functools.cache
def cpu_features() -> frozenset[str]:
    """The features of this machine among those that profiles ask for; empty on other architectures."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        return ask_processor()
    except OSError:  # a system that lets no program make code
        return read_cpuinfo(Path("/proc/cpuinfo"))


def ask_processor() -> frozenset[str]:
    """The features as CPUID and XGETBV tell them. OSError where the system refuses executable memory."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as memory:
        memory[: len(CPUID_CODE)] = CPUID_CODE
        offset = 64
        memory[offset : offset + len(XGETBV_CODE)] = XGETBV_CODE
        start = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(start)
        try:
            raw_cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(address)
            xgetbv = ctypes.CFUNCTYPE(ctypes.c_uint64)(address + offset)
            return features_of(lambda leaf, subleaf: _cpuid(raw_cpuid, leaf, subleaf), xgetbv)
        finally:
            del start  # the mapping cannot be closed while it is referred to


def features_of(cpuid: Cpuid, xgetbv: Callable[[], int]) -> frozenset[str]:
    """The features that `cpuid(leaf, subleaf) -> (eax, ebx, ecx, edx)` and the state `xgetbv()` allow."""
    highest = cpuid(0, 0)[0]
    if highest < 7 or not cpuid(1, 0)[ECX] & OSXSAVE:
        return frozenset()
    state = xgetbv()
    subleaves = cpuid(7, 0)[0]

    def has(leaf: int, subleaf: int, register: int, bit: int, needs: int) -> bool:
        if leaf == 7 and subleaf > subleaves:
            return False
        return state & needs == needs and bool(cpuid(leaf, subleaf)[register] >> bit & 1)

    return frozenset(name for name, where in FEATURES.items() if has(*where))


def read_cpuinfo(path: Path) -> frozenset[str]:
    """The same from the kernel's list; empty where there is none."""
    try:
        text = path.read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    words = next((value.split() for key, _, value in lines if key.strip() == "flags"), [])
    return frozenset(words) & frozenset(FEATURES)


def _cpuid(function: Callable[..., None], leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    out = (ctypes.c_uint32 * 4)()
    function(leaf, subleaf, ctypes.addressof(out))
    return out[0], out[1], out[2], out[3]
