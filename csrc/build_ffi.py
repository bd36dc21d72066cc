# SPDX-License-Identifier: MIT
"""build_ffi — write the C file of the extension vswapd._engine (run by meson; not installed).

    build_ffi.py engine.h OUTPUT.c -- CC [ARGUMENT]...

The declarations are engine.h itself, as the preprocessor leaves it with VSWAP_CFFI defined; integer
macros named ENGINE_* become constants. So nothing is declared twice.

cffi releases the GIL around every call. hold_gil_ms() is the one exception, made by taking it again
inside: the test that no Python runs on the hot path needs a C call that keeps it. And
fork_sharing_descriptors() is supervise_fork() with what the interpreter has to do around a fork.
"""

from __future__ import annotations

import re
import subprocess
import sys

from cffi import FFI

_EXTRA_DECLARATIONS = """
void hold_gil_ms(int milliseconds);
int fork_sharing_descriptors(void);
int supervise_take_descriptors(int pid, int below);
int shelve_memory(int fd);
int shelve_again(int fd);
void shelve_wait(const int *fds, unsigned count);
int shelve_wait_signal(const int *signals, unsigned count);
void shelve_page_out(int fd);
struct attach_request {
    int pid;
    int held;
    const char *image;
    const char *socket_path;
    const char *group;
    unsigned long minimum_bytes, look_us;
};
int attach_inject(const struct attach_request *request, char *message);
int attach_hold(int pid);
"""

_SOURCE = """
#include <stdint.h>
#include "attach.h"
#include "engine.h"
#include "shelve.h"
#include "supervise.h"

static int fork_sharing_descriptors(void)
{
	PyGILState_STATE state = PyGILState_Ensure();
	int pid;

	PyOS_BeforeFork();
	pid = supervise_fork();
	if (pid == 0)
		PyOS_AfterFork_Child();
	else
		PyOS_AfterFork_Parent();
	PyGILState_Release(state);
	return pid;
}

static void hold_gil_ms(int milliseconds)
{
	PyGILState_STATE state = PyGILState_Ensure();
	engine_sleep_ms(milliseconds);
	PyGILState_Release(state);
}
"""

_INTEGER_MACRO = re.compile(r"^#define (ENGINE_[A-Z0-9_]+) (?:0[xX][0-9a-fA-F]+|[0-9]+)[uUlL]*$", re.MULTILINE)


def _preprocess(compiler: list[str], header: str, *options: str) -> str:
    command = [*compiler, "-E", "-DVSWAP_CFFI", *options, header]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _declarations(compiler: list[str], header: str) -> str:
    """engine.h as cffi can read it."""
    constants = sorted(set(_INTEGER_MACRO.findall(_preprocess(compiler, header, "-dM"))))
    lines = [f"#define {name} ..." for name in constants]
    return "\n".join([*lines, _preprocess(compiler, header, "-P"), _EXTRA_DECLARATIONS])


def main(arguments: list[str]) -> int:
    """Entry point."""
    if len(arguments) < 4 or arguments[2] != "--":
        sys.stderr.write("usage: build_ffi.py engine.h OUTPUT.c -- CC [ARGUMENT]...\n")
        return 2
    header, output, _, *compiler = arguments
    builder = FFI()
    builder.cdef(_declarations(compiler, header))
    builder.set_source("vswapd._engine", _SOURCE)
    builder.emit_c_code(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
