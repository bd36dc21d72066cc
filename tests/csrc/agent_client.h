/* SPDX-License-Identifier: MIT */
/*
 * agent_client — the program that runs under libvswap.so in test_agent: an interpreter of
 * one-line commands on stdin, one line of answer each on stdout. First of all it says "ready
 * ADDRESS", the address of CLIENT_PAGES pages.
 */
#ifndef VSWAP_TESTS_AGENT_CLIENT_H
#define VSWAP_TESTS_AGENT_CLIENT_H

#define CLIENT_PAGES 64
#define CLIENT_GROW_BYTES (8u << 20)

int agent_client_main(void);

#endif
