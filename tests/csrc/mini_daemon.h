/* SPDX-License-Identifier: MIT */
/*
 * mini_daemon — just enough of a daemon to speak wire.h with a real agent in a test.
 *
 * One peer is one client; serving it (faults, fork events) is a thread of its own. The gate of a
 * peer is held while a command runs and while its userfaultfd is read, as in the real daemon.
 * Evicted pages are kept as they are, in a list that a forked child copies.
 * Any failure ends the test program: CHECK.
 */
#ifndef VSWAP_TESTS_MINI_DAEMON_H
#define VSWAP_TESTS_MINI_DAEMON_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

#include "check.h"
#include "wire.h"

#define TEST_PAGE 4096UL
#define PATIENCE_MS 10000
#define STORED_MAX 256

struct stored_page {
	uint64_t address;
	unsigned char bytes[TEST_PAGE];
};

struct peer {
	int socket, events, trash, ring_fd;
	pid_t pid;
	uint64_t token;
	uint64_t forked_token; /* of the last child, 0: none yet */
	struct peer *forked;
	struct vswap_hello hello;
	struct vswap_arm arm;
	struct vswap_ring *ring;
	struct stored_page *stored;
	unsigned stored_count;
	pthread_mutex_t gate;
	pthread_t server;
	bool stopping;
};

/* Listen at `path`; returns the listening descriptor. */
int daemon_listen(const char *path);
/* The next connection and its HELLO. */
struct peer *peer_accept(int listener);
/* WELCOME to READY. For FORKED, `parent` is the peer whose fork event told of it. */
void peer_arm(struct peer *peer, struct peer *parent);
void peer_refuse(struct peer *peer, uint16_t status);
/* Wait until the peer's process forked; returns the child's token. */
uint64_t peer_wait_forked(struct peer *peer);
void peer_register(struct peer *peer, uint64_t address, uint64_t pages);
void peer_unregister(struct peer *peer, uint64_t address, uint64_t pages);
/* Execute one command; answered when it returns. */
void peer_execute(struct peer *peer, struct vswap_command *command);
/* MOVE_OUT of one run to a window, which is stored and released. Returns pages stored. */
unsigned peer_evict(struct peer *peer, uint64_t address, uint32_t pages);
bool page_is_present(pid_t pid, uint64_t address);
/* Stop serving and close all, as a daemon that dies without a successor. */
void peer_close(struct peer *peer);

#endif
