# SPDX-License-Identifier: MIT
"""benchmarks — vswapd beside the kernel's own swap, at equal total memory: what scripts/bench is made of.

workloads.c  the programs that are measured            applications.py  real ones
journal.py   what was changed, and how it goes back     cgroup.py     the limit of the kernel's systems
systems.py   what they run on                           execute.py    how one is run
scenarios.py what runs                                  session.py    rounds, order, who gets how much memory
summary.py   medians, paired ratios, goals              table.py, plots.py   what people see
build.py     compiles them                              vmstat.py     what the kernel counts
scaling.py   the cost of a fault as numbers grow        gil.py        with the daemon's GIL held
"""
