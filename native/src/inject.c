/* SPDX-License-Identifier: MIT */
/*
 * Make one system call in a thread of another, unmodified process.  The process does not notice, and is never left
 * running with our registers.
 *
 * We seize and interrupt the thread with ptrace and point its registers at a `syscall` instruction that the process
 * already contains (vDSO, else any executable file mapping).  The thread runs from system-call-entry stop to
 * system-call-exit stop, and we restore everything.  What makes this safe:
 *
 *  - A thread inside a system call has -ERESTART... in rax and the call's number in orig_rax.  The kernel rewinds such
 *    a thread when it leaves the signal-delivery code.  So orig_rax is -1 while we set up our call (nothing to
 *    restart), and we restore the saved registers at a stop *inside the signal-delivery code* (a second
 *    PTRACE_INTERRUPT), where the restart still happens.  Restoring them at the exit stop would leak -ERESTARTSYS to
 *    the program.  Calls that fail with EINTR after any stop, whatever SA_RESTART says, do so here too: epoll_wait,
 *    io_uring_enter, rt_sigtimedwait, semop, msgrcv (signal(7)).  Programs must handle that anyway to survive SIGSTOP
 *    and SIGCONT.
 *  - While the thread has our registers we do not detach: if its cgroup is frozen, the helper waits for the thaw.
 *  - We block all signals meanwhile (PTRACE_SETSIGMASK), so that no handler runs with our registers.  A signal that
 *    arrives before that is delivered as usual.  SIGSTOP cannot be blocked: the group stop takes effect when we detach.
 *  - The kernel would drop a restartable sequence (rseq) of the thread when it sees our instruction pointer.  We save
 *    the address of its descriptor and restore it.
 *  - Seccomp might kill the process for our call.  We suspend it if we may (CAP_SYS_ADMIN); otherwise we refuse a
 *    process that has a filter.
 *
 * A helper *process* that shares our memory (CLONE_VM | CLONE_VFORK) does the tracing, for two reasons.  wait() reports
 * ptrace stops: if we were the tracer and the guest were also our child, any other code in this process that waits for
 * children (an event loop) could take our stop for the guest's exit.  And if this daemon is killed halfway, the helper,
 * being another process, finishes; if the helper exits for any reason, the kernel detaches.  The helper must not touch
 * anything that the suspended thread's libc may hold, so it makes system calls only.
 */
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "error.h"

#ifdef __x86_64__

#include <elf.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "uapi.h"

#define STOP_LIMIT_NS                                                                                                  \
	2000000000LL /* quoted in meaning(); to reach a stop: a thread in uninterruptible sleep needs time */
#define CALL_LIMIT_NS 5000000000LL /* also quoted there; for the system call itself */
#define NEVER INT64_MAX
#define HELPER_STACK_BYTES (64 * 1024)
#define CODE_CHUNK_BYTES 4096
#define CODE_SEARCH_BYTES (4 << 20)
#define USER_CS_64 0x33
#define SYSCALL_STOP (SIGTRAP | 0x80)
#define EFLAGS_TRAP 0x100
/* Used only inside the kernel: include/linux/errno.h. */
#define ERESTART_FIRST 512
#define ERESTART_LAST 516

enum step {
	STEP_NONE,
	STEP_SEIZE,
	STEP_SEIZE_SECCOMP,
	STEP_STOP,
	STEP_REGISTERS,
	STEP_32_BIT,
	STEP_MASK,
	STEP_SET_UP,
	STEP_ENTRY,
	STEP_EXIT,
	STEP_WAIT,
	STEP_GONE,
	STEP_STOP_LIMIT,
	STEP_CALL_LIMIT,
	STEP_RESTORE,
};

/* The helper's input and output. */
struct injection {
	pid_t tid;
	int memory_fd; /* /proc/TID/mem */
	int suspend_seccomp;
	uint64_t instruction; /* address of a `syscall` instruction */
	long number;
	const uint64_t *arguments;

	enum step failed;
	int reason; /* errno of step `failed` */
	int64_t result;
	uint64_t stopped_ns;
};

/* ---- in the helper */

static int fail_step(struct injection *injection, enum step step, int reason)
{
	/* Report the first failure. */
	if (injection->failed == STEP_NONE) {
		injection->failed = step;
		injection->reason = reason;
	}
	return -1;
}

/* Make a ptrace(2) request that must succeed. */
static int trace(struct injection *injection, int request, uintptr_t address, uintptr_t data, enum step step)
{
	if (!syscall(SYS_ptrace, request, injection->tid, address, data))
		return 0;
	return fail_step(injection, errno == ESRCH ? STEP_GONE : step, errno);
}

/* Wait for the next stop and return its wait status.  Sleeps on SIGCHLD, which is blocked. */
static int wait_stop(struct injection *injection, int64_t deadline_ns, enum step limit, int *out_status)
{
	sigset_t child;

	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	for (;;) {
		pid_t got = waitpid(injection->tid, out_status, __WALL | WNOHANG);
		int64_t left = deadline_ns - (int64_t)mgd_now_ns();
		struct timespec timeout = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};

		if (got == injection->tid && WIFSTOPPED(*out_status))
			return 0;
		if (got == injection->tid)
			return fail_step(injection, STEP_GONE, ESRCH);
		if (got < 0 && errno != EINTR)
			return fail_step(injection, errno == ECHILD ? STEP_GONE : STEP_WAIT, errno);
		if (left <= 0)
			return fail_step(injection, limit, ETIMEDOUT);
		sigtimedwait(&child, NULL, &timeout);
	}
}

/*
 * Stop the running thread inside the signal-delivery code, between two instructions of the program.  With a deadline of
 * NEVER the thread has our registers, and only its exit ends the wait.
 */
static int interrupt(struct injection *injection, int64_t deadline_ns)
{
	int status;

	if (trace(injection, PTRACE_INTERRUPT, 0, 0, STEP_STOP))
		return -1;
	for (;;) {
		int deliver = 0;

		if (wait_stop(injection, deadline_ns, STEP_STOP_LIMIT, &status))
			return -1;
		/* Our stop, or a group stop: both happen in the signal-delivery code. */
		if (status >> 16 == PTRACE_EVENT_STOP)
			return 0;
		/* A signal for the program came first.  Request the stop again before the thread continues, so that
		 * it follows at once. */
		if (status >> 16 == 0 && WSTOPSIG(status) != SYSCALL_STOP)
			deliver = WSTOPSIG(status);
		if (trace(injection, PTRACE_INTERRUPT, 0, 0, STEP_STOP) ||
		    trace(injection, PTRACE_CONT, 0, (uintptr_t)deliver, STEP_STOP))
			return -1;
	}
}

/*
 * Run to the next system call stop: the entry or the exit.  If the thread does not get there in time, interrupt it and
 * wait until it stops, however long that takes.  A call that blocks then still ends with an exit stop.  If the call was
 * not made because the thread is frozen (cgroup v2), the stop is in the signal-delivery code: *out_made.
 */
static int run_to_syscall_stop(struct injection *injection, int64_t deadline_ns, bool *out_made)
{
	bool interrupted = false;
	int deliver = 0, status;

	*out_made = true;
	for (;;) {
		if (trace(injection, PTRACE_SYSCALL, 0, (uintptr_t)deliver, STEP_ENTRY))
			return -1;
		while (wait_stop(injection, deadline_ns, STEP_CALL_LIMIT, &status)) {
			if (injection->failed != STEP_CALL_LIMIT || interrupted)
				return -1;
			interrupted = true;
			deadline_ns = NEVER;
			if (trace(injection, PTRACE_INTERRUPT, 0, 0, STEP_GONE))
				return -1;
		}
		if (status >> 16 == 0 && WSTOPSIG(status) == SYSCALL_STOP)
			return 0;
		if (interrupted && status >> 16 == PTRACE_EVENT_STOP) {
			*out_made = false;
			return 0;
		}
		/* SIGSTOP passes every mask.  Deliver it; the group stop that follows holds the thread after we
		 * detach. */
		deliver = status >> 16 == 0 ? WSTOPSIG(status) : 0;
	}
}

static int get_registers(struct injection *injection, struct user_regs_struct *registers)
{
	struct iovec vector = {.iov_base = registers, .iov_len = sizeof(*registers)};

	if (trace(injection, PTRACE_GETREGSET, NT_PRSTATUS, (uintptr_t)&vector, STEP_REGISTERS))
		return -1;
	if (vector.iov_len != sizeof(*registers) || registers->cs != USER_CS_64)
		return fail_step(injection, STEP_32_BIT, ENOTSUP);
	return 0;
}

static int set_registers(struct injection *injection, struct user_regs_struct *registers, enum step step)
{
	struct iovec vector = {.iov_base = registers, .iov_len = sizeof(*registers)};

	return trace(injection, PTRACE_SETREGSET, NT_PRSTATUS, (uintptr_t)&vector, step);
}

/* Return the address and content of the thread's rseq_cs field; content 0: it is in no restartable sequence. */
static uint64_t active_rseq(const struct injection *injection, uint64_t *out_address)
{
	struct mgd_ptrace_rseq_configuration configuration = {0};
	uint64_t sequence = 0;

	*out_address = 0;
	if (syscall(SYS_ptrace, MGD_PTRACE_GET_RSEQ_CONFIGURATION, injection->tid, sizeof(configuration),
		    &configuration) <= 0 ||
	    !configuration.rseq_abi_pointer)
		return 0;
	*out_address = configuration.rseq_abi_pointer + 8; /* offsetof(struct rseq, rseq_cs) */
	if (pread(injection->memory_fd, &sequence, sizeof(sequence), (off_t)*out_address) != sizeof(sequence))
		return 0;
	return sequence;
}

/*
 * Make the call, with signals blocked and `saved` filled in, and stop where `saved` can be restored.  Once the thread
 * has our registers we do not detach: a helper that waits forever is cheaper than a guest that runs with them.
 */
static void make_call(struct injection *injection, const struct user_regs_struct *saved)
{
	struct user_regs_struct registers = *saved;
	bool made;

	registers.rip = injection->instruction;
	registers.rax = (unsigned long)injection->number;
	registers.orig_rax = (unsigned long)-1;
	registers.rdi = injection->arguments[0];
	registers.rsi = injection->arguments[1];
	registers.rdx = injection->arguments[2];
	registers.r10 = injection->arguments[3];
	registers.r8 = injection->arguments[4];
	registers.r9 = injection->arguments[5];
	registers.eflags &= ~(unsigned long)EFLAGS_TRAP;
	if (set_registers(injection, &registers, STEP_SET_UP) ||
	    run_to_syscall_stop(injection, (int64_t)mgd_now_ns() + STOP_LIMIT_NS, &made) || !made)
		return;
	if (!get_registers(injection, &registers) &&
	    (registers.orig_rax != (unsigned long)injection->number || registers.rip != injection->instruction + 2))
		fail_step(injection, STEP_ENTRY, EPROTO);
	if (run_to_syscall_stop(injection, (int64_t)mgd_now_ns() + CALL_LIMIT_NS, &made))
		return;
	if (!get_registers(injection, &registers)) {
		injection->result = (int64_t)registers.rax;
		if (injection->result >= -ERESTART_LAST && injection->result <= -ERESTART_FIRST)
			injection->result = -EINTR;
	}
	/* Enter the signal-delivery code; the result of the call (no -ERESTART...) keeps the kernel from restarting
	 * it. */
	if (!trace(injection, PTRACE_INTERRUPT, 0, 0, STEP_EXIT) && !trace(injection, PTRACE_CONT, 0, 0, STEP_EXIT))
		interrupt(injection, NEVER);
}

static void inject_stopped(struct injection *injection)
{
	struct user_regs_struct saved;
	uint64_t mask, all = ~(uint64_t)0, rseq_address, rseq;

	if (get_registers(injection, &saved))
		return;
	if (trace(injection, PTRACE_GETSIGMASK, sizeof(mask), (uintptr_t)&mask, STEP_MASK) ||
	    trace(injection, PTRACE_SETSIGMASK, sizeof(all), (uintptr_t)&all, STEP_MASK))
		return;
	rseq = active_rseq(injection, &rseq_address);
	make_call(injection, &saved);
	if (injection->failed == STEP_GONE)
		return;
	/* Restore everything, whatever happened. */
	set_registers(injection, &saved, STEP_RESTORE);
	trace(injection, PTRACE_SETSIGMASK, sizeof(mask), (uintptr_t)&mask, STEP_RESTORE);
	if (rseq && pwrite(injection->memory_fd, &rseq, sizeof(rseq), (off_t)rseq_address) != sizeof(rseq))
		fail_step(injection, STEP_RESTORE, errno);
}

static int helper(void *argument)
{
	struct injection *injection = argument;
	struct sigaction by_default = {.sa_handler = SIG_DFL};
	uintptr_t options = PTRACE_O_TRACESYSGOOD;
	int64_t begin_ns;

	/* An ignored SIGCHLD would not be sent; ours is blocked, and we wait for it. */
	sigaction(SIGCHLD, &by_default, NULL);
	if (injection->suspend_seccomp)
		options |= MGD_PTRACE_O_SUSPEND_SECCOMP;
	if (trace(injection, PTRACE_SEIZE, 0, options, injection->suspend_seccomp ? STEP_SEIZE_SECCOMP : STEP_SEIZE))
		return 0;
	begin_ns = (int64_t)mgd_now_ns();
	if (interrupt(injection, begin_ns + STOP_LIMIT_NS) == 0)
		inject_stopped(injection);
	/* If the thread could not be stopped, the exit of this process detaches from it. */
	syscall(SYS_ptrace, PTRACE_DETACH, injection->tid, 0, 0);
	injection->stopped_ns = (uint64_t)((int64_t)mgd_now_ns() - begin_ns);
	return 0;
}

/* ---- around the helper */

/* Find `syscall` (0f 05) in [start, end) of the process's memory. */
static uint64_t find_in_range(int memory_fd, uint64_t start, uint64_t end)
{
	unsigned char code[CODE_CHUNK_BYTES + 1];

	if (end - start > CODE_SEARCH_BYTES)
		end = start + CODE_SEARCH_BYTES;
	for (uint64_t at = start; at < end; at += CODE_CHUNK_BYTES) {
		ssize_t length = pread(memory_fd, code, sizeof(code), (off_t)at);

		for (ssize_t i = 0; i + 1 < length; i++) {
			if (code[i] == 0x0f && code[i + 1] == 0x05 && at + (uint64_t)i + 2 <= end)
				return at + (uint64_t)i;
		}
	}
	return 0;
}

/* Try the vDSO first: it is small, always present and never unmapped.  Then try executable file mappings. */
static int find_instruction(struct injection *injection, struct mgd_error *err)
{
	char path[48], line[512];
	uint64_t found = 0;
	FILE *maps;

	snprintf(path, sizeof(path), "/proc/%d/maps", (int)injection->tid);
	maps = fopen(path, "re");
	if (!maps)
		return mgd_fail_errno(err, errno == ENOENT ? ESRCH : errno, "open %s", path);
	while (fgets(line, sizeof(line), maps)) {
		uint64_t start, end, inode;
		char rights[8];
		int is_vdso = strstr(line, "[vdso]") != NULL;

		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %7s %*s %*s %" SCNu64, &start, &end, rights, &inode) != 4 ||
		    rights[0] != 'r' || rights[2] != 'x' || (!is_vdso && (!inode || found)))
			continue;
		start = find_in_range(injection->memory_fd, start, end);
		if (start)
			found = start;
		if (start && is_vdso)
			break;
	}
	fclose(maps);
	if (!found)
		return mgd_fail(err, MGD_ERR_UNSUPPORTED, "inject: process %d: no syscall instruction in readable code",
				(int)injection->tid);
	injection->instruction = found;
	return 0;
}

/* Return whether the kernel may kill the thread for a system call. */
static int has_seccomp(pid_t tid)
{
	char path[48], line[256];
	int mode = 0;
	FILE *status;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)tid);
	status = fopen(path, "re");
	if (!status)
		return 0;
	while (fgets(line, sizeof(line), status)) {
		if (sscanf(line, "Seccomp: %d", &mode) == 1)
			break;
	}
	fclose(status);
	return mode != 0;
}

static const char *meaning(const struct injection *injection)
{
	switch (injection->failed) {
	case STEP_SEIZE:
		return injection->reason == EPERM ? "it is already being traced, or CAP_SYS_PTRACE is missing"
						  : "it cannot be seized";
	case STEP_SEIZE_SECCOMP:
		if (has_seccomp(getpid()))
			return "it has a seccomp filter that this agent cannot suspend, having one itself: start the "
			       "agent without a filter (`migrated check` says how)";
		return "it has a seccomp filter, which could kill it for our call; suspending it needs CAP_SYS_ADMIN "
		       "and a kernel with CONFIG_CHECKPOINT_RESTORE, and no other tracer";
	case STEP_32_BIT:
		return "it is not a 64-bit x86 process";
	case STEP_GONE:
		return "it has exited";
	case STEP_STOP_LIMIT:
		return "it did not stop within 2 s";
	case STEP_CALL_LIMIT:
		return "the system call was not made or did not return within 5 s: is the process frozen?";
	case STEP_RESTORE:
		return "its registers could not be restored";
	default:
		return "a step of the system call failed";
	}
}

static int fail_injection(const struct injection *injection, struct mgd_error *err)
{
	int pid = (int)injection->tid;

	if (injection->failed == STEP_32_BIT)
		return mgd_fail(err, MGD_ERR_UNSUPPORTED, "ptrace: process %d: %s", pid, meaning(injection));
	/* A process that has exited is ESRCH, hence GUEST_GONE. */
	return mgd_fail_errno(err, injection->failed == STEP_GONE ? ESRCH : injection->reason,
			      "ptrace: process %d: system call %ld: %s", pid, injection->number, meaning(injection));
}

/* Run the helper until it exits, with all our signals blocked: no handler may run in the helper, on our memory. */
static int run_helper(struct injection *injection, struct mgd_error *err)
{
	sigset_t all, before;
	char *stack;
	pid_t child;
	int reason;

	stack = mmap(NULL, HELPER_STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	if (stack == MAP_FAILED)
		return mgd_fail_errno(err, errno, "inject: stack");
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	/* No exit signal: nobody else may see the helper exit.  CLONE_FILES: with copies of our files, a connection
	 * that we close meanwhile would stay open. */
	child = clone(helper, stack + HELPER_STACK_BYTES, CLONE_VM | CLONE_VFORK | CLONE_FILES, injection);
	reason = errno;
	if (child > 0) {
		while (waitpid(child, NULL, __WALL) < 0 && errno == EINTR)
			;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	munmap(stack, HELPER_STACK_BYTES);
	if (child < 0)
		return mgd_fail_errno(err, reason, "inject: clone");
	return 0;
}

int mgd_inject_syscall(int pid, long number, const uint64_t arguments[6], int64_t *out_result, uint64_t *out_stopped_ns,
		       struct mgd_error *err)
{
	struct injection injection = {.tid = pid, .number = number, .arguments = arguments};
	char path[48];
	int result;

	if (pid <= 0 || number < 0)
		return mgd_misuse(err, "inject: process %d, system call %ld", pid, number);
	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	injection.memory_fd = open(path, O_RDWR | O_CLOEXEC);
	if (injection.memory_fd < 0)
		return mgd_fail_errno(err, errno == ENOENT ? ESRCH : errno, "open %s", path);
	injection.suspend_seccomp = has_seccomp(pid);
	result = find_instruction(&injection, err);
	if (!result)
		result = run_helper(&injection, err);
	close(injection.memory_fd);
	if (result)
		return -1;
	if (injection.failed != STEP_NONE)
		return fail_injection(&injection, err);
	*out_result = injection.result;
	if (out_stopped_ns)
		*out_stopped_ns = injection.stopped_ns;
	return 0;
}

#else

int mgd_inject_syscall(int pid, long number, const uint64_t arguments[6], int64_t *out_result, uint64_t *out_stopped_ns,
		       struct mgd_error *err)
{
	(void)number, (void)arguments, (void)out_result, (void)out_stopped_ns;
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "inject: process %d: injecting a system call works only on x86-64",
			pid);
}

#endif
