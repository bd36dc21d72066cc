# SPDX-License-Identifier: MIT
"""benchmarks — vswapd beside the kernel's own swap, at equal total memory: what scripts/bench is made of.

workloads.c  the programs that are measured           peers.py      the systems they run on
journal.py   what was changed, and how it goes back    cgroup.py     the limit of the kernel's systems
scenarios.py what runs                                 session.py    rounds, order, who gets how much memory
summary.py   medians, paired ratios                    table.py, plots.py   what people see
"""
