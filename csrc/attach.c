/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "attach.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <elf.h>
#include <fcntl.h>
#include <linux/rseq.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "base.h"
#include "agent_image.h"
#include "sys.h"

#define STOP_MS_MAX 10000   /* a thread in a system call that cannot be interrupted does not stop */
#define SEQUENCES_MAX 1000  /* times that it is found in a restartable sequence */
#define STOPS_MAX 10000     /* stops of one run: a system call more or less, a signal now and then */
#define IMAGE_BYTES_MAX (1UL << 20)
#define STACK_BYTES 16384UL
#define SYSCALL_STOP (SIGTRAP | 0x80) /* PTRACE_O_TRACESYSGOOD */

struct target {
	pid_t pid; /* of one thread */
	char *message;
	struct user_regs_struct registers; /* to be given back */
	uint64_t signals;
	uint64_t instruction; /* address of a `syscall` */
	bool gone;
	bool was_told_to_stop; /* SIGSTOP came: it gets it in the end */
};

static int fail(const struct target *target, int error, const char *what)
{
	(void)snprintf(target->message, ATTACH_MESSAGE_BYTES, "%s: %s", what, strerror(error));
	return -error;
}

/* ---- stops ---- */

static int resume(const struct target *target, enum __ptrace_request how, int signal)
{
	return ptrace(how, target->pid, 0, (long)signal) < 0 ? -errno : 0;
}

/* Wait until it stops. Its status, or -errno. */
static int wait_stop(struct target *target)
{
	int status;

	for (unsigned waited_ms = 0; waited_ms < STOP_MS_MAX; waited_ms++) {
		pid_t pid = waitpid(target->pid, &status, __WALL | WNOHANG);

		if (pid < 0 && errno != EINTR)
			return -errno;
		if (pid > 0 && WIFSTOPPED(status))
			return status;
		if (pid > 0) {
			target->gone = true;
			return -ESRCH;
		}
		sys_sleep_ms(1);
	}
	return -ETIMEDOUT;
}

static bool is_event(int status, int event) { return status >> 16 == event; }

/* Wait for the stop that PTRACE_INTERRUPT causes; signals on the way are delivered. */
static int wait_interrupted(struct target *target)
{
	for (;;) {
		int status = wait_stop(target), result;

		if (status < 0)
			return status;
		if (is_event(status, PTRACE_EVENT_STOP))
			return WSTOPSIG(status) == SIGTRAP ? 0 : -EBUSY;
		result = resume(target, PTRACE_CONT, WSTOPSIG(status) == SYSCALL_STOP ? 0 : WSTOPSIG(status));
		if (result < 0)
			return result;
	}
}

/* Whether it was stopped where it must begin anew after a stop, and would not notice one of ours. */
static bool is_in_sequence(const struct target *target)
{
	struct __ptrace_rseq_configuration configuration;
	struct rseq_cs sequence;
	uint64_t address = 0;
	struct iovec local = { &address, sizeof address }, remote;

	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, target->pid, sizeof configuration, &configuration) < 0 ||
	    !configuration.rseq_abi_pointer)
		return false;
	remote = (struct iovec){ (void *)(configuration.rseq_abi_pointer + offsetof(struct rseq, rseq_cs)),
				 sizeof address };
	if (process_vm_readv(target->pid, &local, 1, &remote, 1, 0) != sizeof address || !address)
		return false;
	local = (struct iovec){ &sequence, sizeof sequence };
	remote = (struct iovec){ (void *)address, sizeof sequence };
	return process_vm_readv(target->pid, &local, 1, &remote, 1, 0) == sizeof sequence &&
	       target->registers.rip - sequence.start_ip < sequence.post_commit_offset;
}

static int registers_get(struct target *target)
{
	struct iovec registers = { &target->registers, sizeof target->registers };

	if (ptrace(PTRACE_GETREGSET, target->pid, NT_PRSTATUS, &registers) < 0)
		return -errno;
	return registers.iov_len == sizeof target->registers ? 0 : -ENOEXEC;
}

static int registers_set(const struct target *target, const struct user_regs_struct *values)
{
	struct iovec registers = { (void *)values, sizeof *values };

	return ptrace(PTRACE_SETREGSET, target->pid, NT_PRSTATUS, &registers) < 0 ? -errno : 0;
}

/* Stop a running program between two instructions, or in a system call that can be begun again. */
static int stop_running(struct target *target)
{
	int result;

	for (unsigned i = 0; i < SEQUENCES_MAX; i++) {
		if (ptrace(PTRACE_INTERRUPT, target->pid, 0, 0) < 0)
			return -errno;
		if (i && (result = resume(target, PTRACE_CONT, 0)) < 0)
			return result;
		result = wait_interrupted(target);
		if (result == 0)
			result = registers_get(target);
		if (result < 0 || !is_in_sequence(target))
			return result;
	}
	return -EBUSY;
}

/* Stop a held program behind its execve, before its first instruction. */
static int stop_held(struct target *target)
{
	int status = wait_stop(target), result = 0;

	while (status >= 0 && result == 0 && !is_event(status, PTRACE_EVENT_EXEC)) {
		result = resume(target, PTRACE_CONT, status >> 16 ? 0 : WSTOPSIG(status));
		status = wait_stop(target);
	}
	if (result < 0 || status < 0)
		return result < 0 ? result : status;
	result = resume(target, PTRACE_SYSCALL, 0);
	status = result < 0 ? result : wait_stop(target);
	if (status < 0)
		return status;
	return WSTOPSIG(status) == SYSCALL_STOP ? registers_get(target) : -EBUSY;
}

/* ---- running something else in it ---- */

/*
 * Go on from `registers` until a system call returns: any one, or IMAGE_DONE, of which the argument is the
 * result.
 */
static int run(struct target *target, const struct user_regs_struct *registers, bool until_done, long *ret_result)
{
	struct __ptrace_syscall_info info, entry = { .op = PTRACE_SYSCALL_INFO_NONE };
	int result = registers_set(target, registers);

	for (unsigned i = 0; result == 0 && i < STOPS_MAX; i++) {
		int status;

		result = resume(target, PTRACE_SYSCALL, 0);
		status = result < 0 ? result : wait_stop(target);
		if (status < 0)
			return status;
		if (WSTOPSIG(status) == SIGSTOP && status >> 16 == 0)
			target->was_told_to_stop = true;
		else if (WSTOPSIG(status) != SYSCALL_STOP && !is_event(status, PTRACE_EVENT_STOP))
			return -EFAULT; /* all others are blocked: it made a mistake */
		if (WSTOPSIG(status) != SYSCALL_STOP)
			continue;
		if (ptrace(PTRACE_GET_SYSCALL_INFO, target->pid, sizeof info, &info) < 0)
			return -errno;
		if (info.op == PTRACE_SYSCALL_INFO_ENTRY) {
			entry = info;
		} else if (entry.op == PTRACE_SYSCALL_INFO_ENTRY && (!until_done || entry.entry.nr == IMAGE_DONE)) {
			*ret_result = until_done ? (long)entry.entry.args[0] : (long)info.exit.rval;
			return 0;
		}
	}
	return result < 0 ? result : -ETIMEDOUT;
}

/* A system call of the program; its result or -errno. */
static long call(struct target *target, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
	struct user_regs_struct registers = target->registers;
	long value;
	int result;

	registers.rip = target->instruction;
	registers.orig_rax = ~0UL; /* the one it was in, if any, is not to be begun again now */
	registers.rax = (unsigned long)number;
	registers.rdi = a;
	registers.rsi = b;
	registers.rdx = c;
	registers.r10 = d;
	registers.r8 = ~0UL; /* of mmap: no descriptor, offset 0 */
	registers.r9 = 0;
	result = run(target, &registers, false, &value);
	return result < 0 ? result : value;
}

/* ---- before and after ---- */

static int find_instruction(struct target *target)
{
	char path[32], *line = NULL;
	size_t room = 0;
	uint64_t start, end = 0;
	uint8_t code[4 * PAGE_BYTES];
	FILE *maps;

	(void)snprintf(path, sizeof path, "/proc/%d/maps", target->pid);
	maps = fopen(path, "re");
	if (!maps)
		return -errno;
	while (getline(&line, &room, maps) > 0)
		if (strstr(line, "[vdso]") && sscanf(line, "%lx-%lx", &start, &end) == 2)
			break;
	free(line);
	(void)fclose(maps);
	if (end) {
		struct iovec local = { code, min_of(sizeof code, end - start) };
		struct iovec remote = { (void *)start, local.iov_len };
		ssize_t bytes = process_vm_readv(target->pid, &local, 1, &remote, 1, 0);

		for (ssize_t i = 0; i + 1 < bytes; i++)
			if (code[i] == 0x0f && code[i + 1] == 0x05) {
				target->instruction = start + (uint64_t)i;
				return 0;
			}
	}
	return -ENOEXEC;
}

static int signals_block(struct target *target)
{
	uint64_t all = ~0ULL;

	if (ptrace(PTRACE_GETSIGMASK, target->pid, sizeof target->signals, &target->signals) < 0 ||
	    ptrace(PTRACE_SETSIGMASK, target->pid, sizeof all, &all) < 0)
		return -errno;
	return 0;
}

/*
 * As it was. The kernel begins an interrupted system call again on the way out of a stop of the kind that
 * PTRACE_INTERRUPT causes, and no other of those here.
 */
static void give_back(struct target *target, bool blocked)
{
	if (blocked) {
		(void)registers_set(target, &target->registers);
		(void)ptrace(PTRACE_SETSIGMASK, target->pid, sizeof target->signals, &target->signals);
		if (ptrace(PTRACE_INTERRUPT, target->pid, 0, 0) == 0 && resume(target, PTRACE_CONT, 0) == 0)
			(void)wait_interrupted(target);
	}
	(void)ptrace(PTRACE_DETACH, target->pid, 0, 0);
	if (target->was_told_to_stop)
		(void)kill(target->pid, SIGSTOP);
}

/* ---- the agent ---- */

struct image {
	uint8_t code[IMAGE_BYTES_MAX];
	uint64_t code_bytes; /* whole pages */
	uint64_t address;    /* in the target: code, configuration, stack */
};

static int image_read(struct image *image, const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t bytes;

	if (fd < 0)
		return -errno;
	bytes = read(fd, image->code, sizeof image->code);
	close(fd);
	if (bytes <= 0 || bytes == sizeof image->code)
		return -ENOEXEC;
	image->code_bytes = ((uint64_t)bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
	return 0;
}

static void configure(const struct attach_request *request, struct agent_config *ret_config)
{
	char path[32];
	struct stat status;

	memset(ret_config, 0, sizeof *ret_config);
	(void)snprintf(ret_config->socket_path, sizeof ret_config->socket_path, "%s", request->socket_path);
	(void)snprintf(ret_config->group, sizeof ret_config->group, "%s", request->group);
	ret_config->minimum_bytes = request->minimum_bytes;
	ret_config->look_ns = request->look_us * 1000;
	ret_config->is_injected = 1;
	(void)snprintf(path, sizeof path, "/proc/%d/fd/2", request->pid);
	if (stat(path, &status) == 0) {
		ret_config->stderr_device = status.st_dev;
		ret_config->stderr_inode = status.st_ino;
	}
}

/* Code and configuration are in the target: start it there. */
static int image_start(struct target *target, const struct image *image, const struct agent_config *config)
{
	struct iovec local[2] = { { (void *)image->code, image->code_bytes }, { (void *)config, sizeof *config } };
	struct iovec remote = { (void *)image->address, image->code_bytes + sizeof *config };
	uint64_t data = image->address + image->code_bytes;
	struct user_regs_struct registers = target->registers;
	long result;
	int error;

	if (process_vm_writev(target->pid, local, 2, &remote, 1, 0) != (ssize_t)remote.iov_len)
		return fail(target, EFAULT, "the agent could not be written into its memory");
	result = call(target, SYS_mprotect, image->address, image->code_bytes, PROT_READ | PROT_EXEC, 0);
	if (result < 0)
		return fail(target, (int)-result, "it may not execute memory that was written to");
	registers.rip = image->address;
	registers.rsp = data + PAGE_BYTES + STACK_BYTES;
	registers.rdi = data;
	registers.rax = 0;
	registers.orig_rax = ~0UL;
	error = run(target, &registers, true, &result);
	result = error < 0 ? error : result;
	return result < 0 ? fail(target, (int)-result, "the agent did not start in it") : 0;
}

/* The target is stopped: have the agent in it. Nothing stays behind on failure. */
static int inject(struct target *target, const struct attach_request *request, struct image *image)
{
	struct agent_config config;
	uint64_t data_bytes = PAGE_BYTES + STACK_BYTES, bytes = image->code_bytes + data_bytes;
	long address = call(target, SYS_mmap, 0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS);
	int result;

	if (address < 0)
		return fail(target, (int)-address, "no memory for the agent in it");
	image->address = (uint64_t)address;
	configure(request, &config);
	result = image_start(target, image, &config);
	if (result < 0 && target->gone)
		return result;
	if (result < 0)
		(void)call(target, SYS_munmap, image->address, bytes, 0, 0);
	else
		(void)call(target, SYS_munmap, image->address + image->code_bytes, data_bytes, 0, 0);
	return result;
}

int attach_hold(int pid)
{
	return ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC) < 0 ? -errno : 0;
}

static int stop(struct target *target, const struct attach_request *request)
{
	int result;

	if (request->held)
		result = stop_held(target);
	else if (ptrace(PTRACE_SEIZE, target->pid, 0, PTRACE_O_TRACESYSGOOD) < 0)
		return fail(target, errno, "it cannot be traced");
	else
		result = stop_running(target);
	if (result == 0)
		result = find_instruction(target);
	return result < 0 ? fail(target, -result, "it cannot be stopped") : 0;
}

int attach_inject(const struct attach_request *request, char *message)
{
	sigset_t all, signals;
	struct target target = { .pid = sys_live_thread(request->pid), .message = message };
	struct image *image = malloc(sizeof *image);
	int result;
	bool blocked = false;

	/* Whoever ends us now would leave the program in what we have it execute. */
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_BLOCK, &all, &signals);
	message[0] = 0;
	result = image ? image_read(image, request->image) : -ENOMEM;
	if (result < 0)
		result = fail(&target, -result, request->image);
	else
		result = stop(&target, request);
	if (result == 0) {
		result = signals_block(&target);
		blocked = result == 0;
		result = blocked ? inject(&target, request, image) : fail(&target, -result, "its signals");
	}
	if (!target.gone)
		give_back(&target, blocked);
	(void)pthread_sigmask(SIG_SETMASK, &signals, NULL);
	free(image);
	return result;
}
#else
int attach_hold(int pid)
{
	(void)pid;
	return -ENOSYS;
}

int attach_inject(const struct attach_request *request, char *message)
{
	(void)request;
	(void)snprintf(message, ATTACH_MESSAGE_BYTES, "not on this architecture: %s", strerror(ENOSYS));
	return -ENOSYS;
}
#endif
