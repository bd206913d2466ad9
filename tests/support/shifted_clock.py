"""A wall clock that a test can set: a few lines of C, preloaded into a process, that add an offset to its time.

Time since boot (`CLOCK_MONOTONIC`) is left alone, as it is when an administrator or NTP sets a clock. `faketime` does
the same and more, but few machines have it; a C compiler is on every machine that runs these tests for a living.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path
from types import TracebackType

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

/* Microseconds; shared with the test through a file. */
static volatile int64_t *offset_us;
static int (*real_clock_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("SHIFTED_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(0, sizeof *offset_us, PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) offset_us = page;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real_clock_gettime) begin();
    int result = real_clock_gettime(clock, now);
    if (result == 0 && offset_us && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t ns = now->tv_nsec + *offset_us % 1000000 * 1000;
        now->tv_sec += *offset_us / 1000000 + (ns < 0 ? -1 : ns >= 1000000000 ? 1 : 0);
        now->tv_nsec = ns < 0 ? ns + 1000000000 : ns >= 1000000000 ? ns - 1000000000 : ns;
    }
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return result;
}

time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}
"""


class ShiftedClock:
    """One offset, for every process that is started with `environ`. Linux only; skips the test without a compiler."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None or not Path("/proc/self/maps").exists():
            pytest.skip("a clock can only be shifted on Linux, with a C compiler")
        folder.mkdir(parents=True, exist_ok=True)
        source, self._library, self._file = folder / "shift.c", folder / "shift.so", folder / "offset"
        source.write_text(SOURCE)
        subprocess.run(
            [compiler, "-O1", "-shared", "-fPIC", "-o", str(self._library), str(source), "-ldl"], check=True, timeout=60
        )
        self._file.write_bytes(bytes(8))
        with self._file.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)

    def __enter__(self) -> ShiftedClock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._page.close()

    @property
    def environ(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "SHIFTED_CLOCK": str(self._file)}

    def set(self, offset_s: float) -> None:
        """The clock of those processes is off by so much from now on."""
        self._page[:8] = struct.pack("=q", round(offset_s * 1_000_000))

    def wrapper(self, program: str, path: Path) -> str:
        """A program that runs another one with this clock; its path."""
        variables = " ".join(f"{name}='{value}'" for name, value in self.environ.items())
        path.write_text(f'#!/bin/sh\nexec env {variables} "{program}" "$@"\n')
        path.chmod(0o755)
        return str(path)
