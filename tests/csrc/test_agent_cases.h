/* SPDX-License-Identifier: MIT */
/*
 * The cases of test_agent, one function each; included by test_agent.c alone, whose helpers and
 * file-scope state they use.
 */

static void test_exec(void)
{
	char *shell[] = { "sh", "-c", "exec sh -c 'exec sh -c \"exit 7\"'", NULL };
	char *pipeline[] = { "sh", "-c", "echo hello | cat | tr h j; kill -9 $$", NULL };
	char *true_argv[] = { "/bin/true", NULL };
	struct program program = run(true_argv, -1);
	char text[256];
	int status;

	expect_quiet_end(&program);
	program = run(shell, -1);
	status = program_end(&program);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
	CHECK(stderr_lines(&program, text, sizeof text) == 0);
	program = run(pipeline, -1);
	line_read(program.out, text, sizeof text);
	CHECK(!strcmp(text, "jello"));
	status = program_end(&program);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	CHECK(stderr_lines(&program, text, sizeof text) == 0);
}

static void test_absent(void)
{
	struct program program = client_run(-1);
	char text[1024];

	ask(&program, "grow", "ok");
	wait_agent(program.pid, true);
	expect_quiet_end(&program);

	verbose = "1";
	program = client_run(-1);
	ask(&program, "grow", "ok");
	line_read(program.err, text, sizeof text);
	CHECK(strstr(text, "vswap[") && strstr(text, "no daemon") && strstr(text, socket_path));
	tell(&program, "exit 5");
	CHECK(WEXITSTATUS(program_end(&program)) == 5);
	CHECK(stderr_lines(&program, text, sizeof text) == 0);
}

static void test_refused(void)
{
	int listener = daemon_listen(socket_path);
	struct program program;
	struct peer *peer;
	char text[1024];

	verbose = "1";
	program = client_run(-1);
	ask(&program, "grow", "ok");
	peer = peer_accept(listener);
	peer_refuse(peer, VSWAP_REFUSED_LIMIT);
	free(peer);
	wait_agent(program.pid, false);
	CHECK(WEXITSTATUS(program_end(&program)) == 0);
	CHECK(stderr_lines(&program, text, sizeof text) == 1 && strstr(text, "too many clients"));
	close(listener);
}

/* The agent holds none of the program's descriptors, nor the program any of the agent's. */
static void test_descriptors(void)
{
	char path[64];
	struct program program;
	int ends[2], tasks;
	char byte;

	CHECK(pipe2(ends, O_CLOEXEC) == 0);
	program = client_run(ends[1]);
	close(ends[1]);
	wait_agent(program.pid, true);
	CHECK(ask(&program, "count", "ok") == 4); /* 0, 1, 2, 9 */
	snprintf(path, sizeof path, "/proc/%d/task/%d/fd", program.pid,
		 agent_find(program.pid, &tasks));
	CHECK(tasks == 2 && entries_of(path) <= 1); /* it may have statm open just now */
	ask(&program, "close", "ok");
	CHECK(read(ends[0], &byte, 1) == 0);
	close(ends[0]);
	expect_quiet_end(&program);
}

/* MOVE_OUT into staging, holes, bad commands, RELEASE; the program reads back what it wrote. */
static void test_move(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener);
	struct vswap_command command = { .operation = VSWAP_MOVE_OUT, .window = 2, .run_count = 2 };
	uint64_t staging = peer->arm.staging[0] + 2 * VSWAP_WINDOW_PAGES * TEST_PAGE;

	command.runs[0].address = program.buffer + 4 * TEST_PAGE;
	command.runs[0].pages = 3;
	command.runs[1].address = program.buffer + 20 * TEST_PAGE;
	command.runs[1].pages = 1;
	peer_execute(peer, &command);
	CHECK(command.runs[0].moved == 3 && command.runs[0].busy == 0);
	CHECK(command.runs[0].error == 0);
	CHECK(command.runs[1].moved == 1);
	for (uint64_t i = 0; i < 4; i++)
		CHECK(page_is_present(program.pid, staging + i * TEST_PAGE));
	CHECK(!page_is_present(program.pid, program.buffer + 4 * TEST_PAGE));
	/* Put them where the peer stores evicted pages: same run again is all holes. */
	CHECK(peer_evict(peer, program.buffer + 4 * TEST_PAGE, 3) == 0);
	command.operation = VSWAP_RELEASE;
	peer_execute(peer, &command);
	CHECK(command.error == 0 && !page_is_present(program.pid, staging));
	CHECK(!page_is_present(program.pid, peer->arm.trash[0]));
	ask(&program, "fill 30", "ok");

	CHECK(peer_evict(peer, program.buffer, 40) == 40);
	CHECK(peer_evict(peer, program.buffer + 30 * TEST_PAGE, 34) == 24); /* ten are holes */
	ask(&program, "check 30", "ok");

	command.operation = VSWAP_MOVE_OUT;
	command.runs[0].pages = VSWAP_WINDOW_PAGES + 1;
	peer_execute(peer, &command);
	CHECK(command.runs[0].error == EINVAL && command.runs[1].error == EINVAL);
	command.runs[0] = (struct vswap_run){ .address = 0x1000, .pages = 1 }; /* not mapped */
	peer_execute(peer, &command);
	CHECK(command.runs[0].error != 0 && command.runs[0].error != EBUSY);
	CHECK(command.runs[1].moved == 1);
	command.window = VSWAP_WINDOWS;
	peer_execute(peer, &command);
	CHECK(command.runs[0].error == EINVAL && command.runs[1].moved == 0);
	command.operation = VSWAP_RELEASE;
	peer_execute(peer, &command);
	CHECK(command.error == EINVAL);
	command.operation = VSWAP_PING;
	peer_execute(peer, &command);
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}

static void test_close_range(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener);

	CHECK(ask(&program, "count", "ok") == 3);
	ask(&program, "close", "ok");
	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	ask(&program, "check 10", "ok");
	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	ask(&program, "check 10", "ok");
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}

/* Have the program fork, and serve the child: beacon, FORKED, arm. From here on `ask` reaches the child. */
static struct peer *fork_managed(struct program *program, struct peer *peer, int listener)
{
	struct peer *child;

	tell(program, "fork");
	CHECK(peer_wait_forked(peer) != 0);
	child = peer_accept(listener);
	CHECK(child->hello.kind == VSWAP_HELLO_FORKED && child->pid != program->pid);
	CHECK(child->hello.token == peer->forked_token);
	peer_arm(child, peer);
	CHECK(expect(program, "child") == child->pid);
	return child;
}

/* EBUSY, POPULATE, then MOVE in the child; beacon and FORKED; both sides keep their bytes. */
static void test_fork_managed(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener), *child;
	struct vswap_command command = { .operation = VSWAP_MOVE_OUT, .run_count = 1 };
	struct vswap_run half = { .address = program.buffer, .pages = 32 };

	CHECK(peer_evict(peer, program.buffer + 32 * TEST_PAGE, 32) == 32);
	child = fork_managed(&program, peer, listener);
	command.runs[0] = half;
	peer_execute(child, &command);
	CHECK(command.runs[0].busy == 32 && command.runs[0].moved == 0);
	CHECK(command.runs[0].error == 0);
	command.operation = VSWAP_POPULATE;
	command.runs[0] = half;
	peer_execute(child, &command);
	CHECK(command.runs[0].error == 0 && command.runs[0].moved == 32);
	CHECK(peer_evict(child, program.buffer, 32) == 32);

	ask(&program, "check 10", "ok"); /* the child */
	ask(&program, "fill 77", "ok");
	CHECK(peer_evict(child, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	ask(&program, "check 77", "ok");
	tell(&program, "exit 3");
	CHECK(expect(&program, "ended") == 3);
	ask(&program, "check 10", "ok"); /* the parent */
	expect_quiet_end(&program);
	peer_close(child);
	peer_close(peer);
	close(listener);
}

/* Every other page of a run is busy: the others all move, however often the MOVE is cut short. */
static void test_fork_interleaved(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener);
	struct peer *child = fork_managed(&program, peer, listener);
	struct vswap_command command = { .operation = VSWAP_POPULATE, .run_count = CLIENT_PAGES / 2 };

	for (unsigned i = 0; i < CLIENT_PAGES / 2; i++)
		command.runs[i] = (struct vswap_run){ .address = program.buffer + 2 * i * TEST_PAGE, .pages = 1 };
	peer_execute(child, &command);
	command = (struct vswap_command){ .operation = VSWAP_MOVE_OUT, .run_count = 1 };
	command.runs[0] = (struct vswap_run){ .address = program.buffer, .pages = CLIENT_PAGES };
	peer_execute(child, &command);
	CHECK(command.runs[0].moved == CLIENT_PAGES / 2 && command.runs[0].busy == CLIENT_PAGES / 2);
	CHECK(command.runs[0].error == 0);
	tell(&program, "exit 0");
	CHECK(expect(&program, "ended") == 0);
	ask(&program, "check 10", "ok"); /* the parent */
	expect_quiet_end(&program);
	peer_close(child);
	peer_close(peer);
	close(listener);
}

/* A child that forks before anybody answered its HELLO: each generation gets its own token. */
static void test_fork_again(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener), *first, *second, *unarmed;

	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	ask(&program, "fork", "child");
	CHECK(peer_wait_forked(peer) != 0);
	first = peer_accept(listener); /* it has read its beacon, and waits for WELCOME */
	unarmed = peer->forked;
	CHECK(first->hello.token == unarmed->token);
	ask(&program, "fork", "child");
	CHECK(peer_wait_forked(unarmed) != 0);
	second = peer_accept(listener);
	CHECK(second->hello.kind == VSWAP_HELLO_FORKED);
	CHECK(second->hello.token == unarmed->forked_token);
	CHECK(second->hello.token != first->hello.token);
	peer_arm(second, unarmed);
	peer_arm(first, peer);
	ask(&program, "check 10", "ok");
	CHECK(peer_evict(second, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	ask(&program, "check 10", "ok");
	ask(&program, "exit 0", "ended");
	ask(&program, "check 10", "ok");
	ask(&program, "exit 0", "ended");
	ask(&program, "check 10", "ok");
	expect_quiet_end(&program);
	peer_close(second);
	peer_close(first);
	peer_close(peer);
	close(listener);
}

static void test_fork_unmanaged(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer;
	pid_t child = (pid_t)ask(&program, "fork", "child");

	ask(&program, "fill 10", "ok");
	ask(&program, "grow", "ok");
	peer = peer_accept(listener);
	CHECK(peer->hello.kind == VSWAP_HELLO_NEW && peer->pid == child);
	peer_arm(peer, NULL);
	peer_register(peer, program.buffer, CLIENT_PAGES);
	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	ask(&program, "check 10", "ok");
	CHECK(ask(&program, "exit 0", "ended") == 0);
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}

/* A managed child that is not taken cannot trust its memory: killed, with a line, even if quiet. */
static void test_fork_refused(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener), *child;
	char text[1024];

	ask(&program, "fork", "child");
	child = peer_accept(listener);
	peer_refuse(child, VSWAP_REFUSED_PEER);
	CHECK(expect(&program, "ended") == -SIGKILL);
	ask(&program, "check 10", "ok");
	CHECK(program_end(&program) == 0);
	CHECK(stderr_lines(&program, text, sizeof text) == 2 && strstr(text, "cannot be trusted"));
	free(child);
	peer_close(peer);
	close(listener);
}

static void test_last_thread(void)
{
	struct program program = client_run(-1);
	int listener, status;
	struct peer *peer;

	wait_agent(program.pid, true);
	tell(&program, "pthread_exit");
	CHECK(program_end(&program) == 0);
	close(program.err);

	program = client_run(-1);
	tell(&program, "raw_exit 6");
	status = program_end(&program);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 6);
	close(program.err);

	listener = daemon_listen(socket_path);
	program = client_run(-1);
	peer = managed(&program, listener);
	tell(&program, "raw_exit 4");
	status = program_end(&program);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 4);
	close(program.err);
	peer_close(peer);
	close(listener);
}

/* The agent steps aside and comes back with its descriptors: managed as before. */
static void test_unshare(void)
{
	struct program program = client_run(-1);
	int listener;
	struct peer *peer;

	wait_agent(program.pid, true);
	CHECK(ask(&program, "unshare", "ok") == 0);
	wait_agent(program.pid, true);
	expect_quiet_end(&program);

	listener = daemon_listen(socket_path);
	program = client_run(-1);
	peer = managed(&program, listener);
	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	CHECK(ask(&program, "unshare", "ok") == 0);
	CHECK(ask(&program, "count", "ok") == 3);
	ask(&program, "check 10", "ok");
	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	ask(&program, "check 10", "ok");
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}

static void test_setuid(void)
{
	static const char *const names[] = { "Uid:", "Gid:", "Groups:", "CapPrm:", "CapEff:" };
	int listener = daemon_listen(socket_path), tasks;
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener);
	char mine[256], theirs[256];

	status_line(agent_find(program.pid, &tasks), "CapPrm:", mine, sizeof mine);
	CHECK(strtoull(mine + 7, NULL, 16) == 0);
	ask(&program, "become 65534", "ok");
	wait_agent(program.pid, true);
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
		status_line(program.pid, names[i], theirs, sizeof theirs);
		status_line(agent_find(program.pid, &tasks), names[i], mine, sizeof mine);
		CHECK(!strcmp(mine, theirs));
	}
	CHECK(tasks == 2 && ask(&program, "count", "ok") == 3);
	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	ask(&program, "check 10", "ok");
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}

/* The agent is replaced while the daemon evicts without a break: nothing is lost, nobody waits. */
static void test_replace_storm(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener);
	struct pollfd answered = { .fd = program.out, .events = POLLIN };
	unsigned rounds = 0;

	tell(&program, "follow 500");
	while (poll(&answered, 1, 0) == 0) {
		/* While it is parked nothing is moved; that is not the point here. */
		(void)peer_evict(peer, program.buffer, CLIENT_PAGES);
		peer->stored_count = min_of(peer->stored_count, CLIENT_PAGES);
		rounds++;
		usleep(100); /* the gate is not fair: whoever answers faults is to get it, too */
	}
	CHECK(expect(&program, "ok") == 0 && rounds > 10);
	wait_agent(program.pid, true);
	CHECK(ask(&program, "count", "ok") == 3);
	ask(&program, "check 10", "ok");
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}

static void test_fork_storm(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener);

	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	/* Nobody accepts: the children die connecting, or waiting for a place in the backlog. */
	CHECK(ask(&program, "forks 100", "ok") == 0);
	ask(&program, "check 10", "ok");
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}

/* After a filter there is no agent; what was evicted comes back all the same. */
static void test_seccomp(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener);
	int tasks;

	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	CHECK(ask(&program, "seccomp", "ok") == 0);
	CHECK(agent_find(program.pid, &tasks) == 0 && tasks == 1);
	ask(&program, "check 10", "ok");
	ask(&program, "fork", "child");
	ask(&program, "check 10", "ok");
	CHECK(ask(&program, "exit 0", "ended") == 0);
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}

/* Staging and trash populated with the rest: RELEASE still frees. What is locked stays. */
static void test_mlockall(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener);

	struct vswap_command command = { .operation = VSWAP_RELEASE };

	CHECK(!page_is_present(program.pid, peer->arm.staging[0]));
	ask(&program, "mlockall", "ok"); /* populates staging and trash, too */
	CHECK(page_is_present(program.pid, peer->arm.staging[0]));
	peer_execute(peer, &command);
	CHECK(command.error == 0 && !page_is_present(program.pid, peer->arm.staging[0]));
	CHECK(!page_is_present(program.pid, peer->arm.trash[0]));
	CHECK(peer_evict(peer, program.buffer, 8) == 0);
	CHECK(page_is_present(program.pid, program.buffer));
	ask(&program, "check 10", "ok");
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}

/* The daemon dies: faults wait, the agent stays; a new epoch is acknowledged. */
static void test_hangup(void)
{
	int listener = daemon_listen(socket_path);
	struct program program;
	struct peer *peer;
	char text[1024];

	verbose = "1";
	program = client_run(-1);
	peer = managed(&program, listener);
	shutdown(peer->socket, SHUT_RDWR);
	line_read(program.err, text, sizeof text);
	CHECK(strstr(text, "the daemon is gone"));
	__atomic_store_n(&peer->ring->epoch, 5, __ATOMIC_SEQ_CST);
	for (int i = 0; i < PATIENCE_MS; i++) {
		if (__atomic_load_n(&peer->ring->epoch_seen, __ATOMIC_SEQ_CST) == 5)
			break;
		usleep(1000);
	}
	CHECK(peer->ring->epoch_seen == 5);
	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	ask(&program, "check 10", "ok");
	/* Without anybody to answer, a fault waits instead of reading zeros. */
	CHECK(peer_evict(peer, program.buffer, CLIENT_PAGES) == CLIENT_PAGES);
	peer_close(peer);
	tell(&program, "check 10");
	CHECK(poll(&(struct pollfd){ .fd = program.out, .events = POLLIN }, 1, 1500) == 0);
	CHECK(kill(program.pid, SIGKILL) == 0);
	CHECK(WTERMSIG(program_end(&program)) == SIGKILL);
	CHECK(stderr_lines(&program, text, sizeof text) == 0);
	close(listener);
}

static void wait_word(const uint32_t *word, uint32_t value)
{
	uint64_t deadline = test_now_ns() + PATIENCE_MS * 1000000ULL;

	while (__atomic_load_n(word, __ATOMIC_SEQ_CST) != value) {
		CHECK(test_now_ns() < deadline);
		sched_yield();
	}
}

/* It asks for memory that is managed, and its daemon dies in a detach. The next one buries it and says ESRCH: which no
 * program gets of UFFDIO_REGISTER, for it is there. What follows is that all is let go of. */
static void test_left_while_asking(void)
{
	int listener = daemon_listen(socket_path);
	struct program program = client_run(-1);
	struct peer *peer = managed(&program, listener);
	struct vswap_ring *ring = peer->ring;

	ring->features |= VSWAP_FEATURE_YIELD;
	tell(&program, "watch");
	wait_word(&ring->yield_asked, 1);
	CHECK(ring->yield_start == program.buffer && ring->yield_bytes == CLIENT_PAGES * TEST_PAGE);
	ring->yield_error = ESRCH;
	__atomic_store_n(&ring->yield_answered, 1, __ATOMIC_SEQ_CST);
	wait_word(&ring->yield_over, 1); /* it has the answer, and the range is not let go of yet */
	peer_unregister(peer, program.buffer, CLIENT_PAGES);
	CHECK(expect(&program, "ok") == 0);
	ask(&program, "check 10", "ok");
	expect_quiet_end(&program);
	peer_close(peer);
	close(listener);
}
