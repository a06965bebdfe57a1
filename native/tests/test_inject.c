/* SPDX-License-Identifier: MIT */
/* Tests of system calls made in other processes.  They return as if the process had made them, and the process never
 * notices. */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

#define ROUNDS 50

/* Shared between child and test. */
struct board {
	atomic_uint futex;
	atomic_ulong turns;
	atomic_bool stop;
	atomic_ulong signals, sum_of_values;
	atomic_int ready;
	atomic_ulong thread_turns[4];
};

static struct board *board;

typedef int (*child_function)(int pipe_fd);

struct child {
	pid_t pid;
	int pipe_fd; /* the write end of a pipe that it may read */
};

static struct child start(child_function function)
{
	struct child child;
	int ends[2];

	memset(board, 0, sizeof(*board));
	CHECK(pipe2(ends, O_CLOEXEC) == 0);
	child.pid = fork();
	CHECK(child.pid >= 0);
	if (child.pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(ends[1]);
		_exit(function(ends[0]));
	}
	close(ends[0]);
	child.pipe_fd = ends[1];
	return child;
}

/* It must exit by itself and find everything in order. */
static void finish(struct child *child)
{
	int status;

	atomic_store(&board->stop, true);
	close(child->pipe_fd);
	CHECK_EQUAL(waitpid(child->pid, &status, 0), child->pid);
	CHECK(WIFEXITED(status));
	CHECK_EQUAL(WEXITSTATUS(status), 0);
}

/* Wait until the process sleeps in this system call. */
static void wait_for_syscall(pid_t pid, long number)
{
	char path[48], text[64];

	snprintf(path, sizeof(path), "/proc/%d/syscall", (int)pid);
	for (;;) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t length;

		CHECK(fd >= 0);
		length = read(fd, text, sizeof(text) - 1);
		close(fd);
		text[length > 0 ? length : 0] = '\0';
		if (text[0] >= '0' && text[0] <= '9' && strtol(text, NULL, 10) == number)
			return;
		sched_yield();
	}
}

static int64_t inject(pid_t pid, long number, uint64_t first, uint64_t second, uint64_t third)
{
	uint64_t arguments[6] = {first, second, third};
	uint64_t stopped_ns = 0;
	struct mgd_error err = {0};
	int64_t result = 0;

	CHECK_OK(mgd_inject_syscall(pid, number, arguments, &result, &stopped_ns, &err), err);
	CHECK(stopped_ns > 0);
	return result;
}

static void inject_often(pid_t pid)
{
	for (int i = 0; i < ROUNDS; i++)
		CHECK_EQUAL(inject(pid, SYS_getppid, 0, 0, 0), getpid());
}

/* ---- blocked in a system call */

static int read_once(int pipe_fd)
{
	char byte = 0;

	return !(read(pipe_fd, &byte, 1) == 1 && byte == 'x');
}

static void a_blocked_read_goes_on(void)
{
	struct child child = start(read_once);

	wait_for_syscall(child.pid, SYS_read);
	inject_often(child.pid);
	wait_for_syscall(child.pid, SYS_read);
	CHECK(write(child.pipe_fd, "x", 1) == 1);
	finish(&child);
}

static int sleep_once(int pipe_fd)
{
	struct timespec begin, end, time = {.tv_nsec = 400000000};

	(void)pipe_fd;
	clock_gettime(CLOCK_MONOTONIC, &begin);
	if (nanosleep(&time, NULL))
		return 1;
	clock_gettime(CLOCK_MONOTONIC, &end);
	/* It slept for the full time, not less. */
	return (end.tv_sec - begin.tv_sec) * 1000000000L + end.tv_nsec - begin.tv_nsec < 400000000;
}

static void a_sleep_is_restarted_for_what_is_left(void)
{
	struct child child = start(sleep_once);

	wait_for_syscall(child.pid, SYS_clock_nanosleep);
	for (int i = 0; i < 5; i++)
		CHECK_EQUAL(inject(child.pid, SYS_getppid, 0, 0, 0), getpid());
	finish(&child);
}

static int wait_on_futex(int pipe_fd)
{
	(void)pipe_fd;
	return syscall(SYS_futex, &board->futex, FUTEX_WAIT, 0, NULL, NULL, 0) != 0;
}

static void a_futex_wait_goes_on(void)
{
	struct child child = start(wait_on_futex);

	wait_for_syscall(child.pid, SYS_futex);
	inject_often(child.pid);
	/*
	 * A process that /proc shows in futex(2) may not have queued itself yet, and then the wake-up is lost.  The
	 * word keeps its value, so the child sleeps however late it arrives.
	 */
	while (syscall(SYS_futex, &board->futex, FUTEX_WAKE, 1, NULL, NULL, 0) == 0) {
		siginfo_t info = {0};

		CHECK_EQUAL(waitid(P_PID, (id_t)child.pid, &info, WEXITED | WNOHANG | WNOWAIT), 0);
		CHECK_EQUAL(info.si_pid, 0); /* or the wait was interrupted */
		sched_yield();
	}
	finish(&child);
}

static void note_signal(int number)
{
	(void)number;
	atomic_fetch_add(&board->signals, 1);
}

/* The temporary mask of sigsuspend lets the signal in, and the earlier mask is restored afterwards. */
static int suspend_for_signal(int pipe_fd)
{
	struct sigaction action = {.sa_handler = note_signal};
	sigset_t blocked, empty, now;

	(void)pipe_fd;
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	sigaction(SIGUSR1, &action, NULL);
	sigemptyset(&empty);
	if (sigsuspend(&empty) != -1 || errno != EINTR)
		return 1;
	sigprocmask(SIG_SETMASK, NULL, &now);
	return !sigismember(&now, SIGUSR1) || atomic_load(&board->signals) != 1;
}

static void a_sigsuspend_keeps_both_its_masks(void)
{
	struct child child = start(suspend_for_signal);

	wait_for_syscall(child.pid, SYS_rt_sigsuspend);
	inject_often(child.pid);
	wait_for_syscall(child.pid, SYS_rt_sigsuspend);
	kill(child.pid, SIGUSR1);
	finish(&child);
}

/* ---- running */

/* Only integer and floating point registers hold the counters. */
static int count(int pipe_fd)
{
	unsigned long turns = 0, mixed = 1;
	double sum = 0;

	(void)pipe_fd;
	do {
		for (int i = 0; i < 1000; i++) {
			turns++;
			sum += 0.5;
			mixed = mixed * 6364136223846793005UL + 1442695040888963407UL;
		}
		atomic_store(&board->turns, turns);
	} while (!atomic_load(&board->stop));
	unsigned long expected = 1;
	for (unsigned long i = 0; i < turns; i++)
		expected = expected * 6364136223846793005UL + 1442695040888963407UL;
	return sum != (double)turns * 0.5 || mixed != expected;
}

static void a_busy_process_computes_on(void)
{
	struct child child = start(count);

	while (!atomic_load(&board->turns))
		sched_yield();
	inject_often(child.pid);
	finish(&child);
}

static void *count_in_thread(void *argument)
{
	atomic_ulong *turns = argument;

	while (!atomic_load(&board->stop))
		atomic_fetch_add(turns, 1);
	return NULL;
}

static int run_threads(int pipe_fd)
{
	pthread_t threads[4];
	char byte;

	for (int i = 0; i < 4; i++) {
		if (pthread_create(&threads[i], NULL, count_in_thread, &board->thread_turns[i]))
			return 1;
	}
	if (read(pipe_fd, &byte, 1) != 0)
		return 2;
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	return 0;
}

static void only_one_thread_of_many_stops(void)
{
	struct child child = start(run_threads);

	for (int i = 0; i < 4; i++) {
		while (!atomic_load(&board->thread_turns[i]))
			sched_yield();
	}
	inject_often(child.pid);
	for (int i = 0; i < 4; i++) {
		unsigned long before = atomic_load(&board->thread_turns[i]);

		while (atomic_load(&board->thread_turns[i]) == before)
			sched_yield();
	}
	finish(&child);
}

static void add_value(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	atomic_fetch_add(&board->sum_of_values, (unsigned long)info->si_value.sival_int);
	atomic_fetch_add(&board->signals, 1);
}

static void note_timer(int number)
{
	(void)number;
	atomic_fetch_add(&board->turns, 1);
}

/* A timer that fires all the time, and queued signals that carry values: none may be lost, duplicated or stripped. */
static int take_signals(int pipe_fd)
{
	struct sigaction queued = {.sa_sigaction = add_value, .sa_flags = SA_SIGINFO | SA_RESTART};
	struct sigaction timer = {.sa_handler = note_timer, .sa_flags = SA_RESTART};
	struct itimerval every = {.it_interval.tv_usec = 200, .it_value.tv_usec = 200};
	char byte;

	sigaction(SIGRTMIN, &queued, NULL);
	sigaction(SIGALRM, &timer, NULL);
	setitimer(ITIMER_REAL, &every, NULL);
	atomic_store(&board->ready, 1);
	return read(pipe_fd, &byte, 1) != 0;
}

/* The ThreadSanitizer runtime delays signals while a thread is in read(2), and keeps one per number. */
#ifdef __SANITIZE_THREAD__
#define SIGNALS_ARE_HELD_BACK true
#else
#define SIGNALS_ARE_HELD_BACK false
#endif

static void no_signal_is_lost_or_doubled(void)
{
	unsigned long sent = 0, sum = 0;
	struct child child;

	if (SIGNALS_ARE_HELD_BACK) {
		printf("  skipped: ThreadSanitizer loses signals by itself\n");
		return;
	}
	child = start(take_signals);
	while (!atomic_load(&board->ready))
		sched_yield();
	for (int i = 0; i < 200; i++) {
		for (int j = 0; j < 4; j++) {
			CHECK(sigqueue(child.pid, SIGRTMIN, (union sigval){.sival_int = i + j}) == 0);
			sent++;
			sum += (unsigned long)(i + j);
		}
		CHECK_EQUAL(inject(child.pid, SYS_getppid, 0, 0, 0), getpid());
	}
	while (atomic_load(&board->signals) < sent)
		sched_yield();
	finish(&child);
	CHECK_EQUAL(board->signals, sent);
	CHECK_EQUAL(board->sum_of_values, sum);
}

/* ---- results */

static void arguments_and_errors_come_through(void)
{
	struct child child = start(read_once);
	int64_t fd;
	char path[48], link[64] = "";

	wait_for_syscall(child.pid, SYS_read);
	CHECK_EQUAL(inject(child.pid, SYS_close, 999, 0, 0), -EBADF);
	fd = inject(child.pid, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK, 0, 0);
	CHECK(fd >= 0);
	snprintf(path, sizeof(path), "/proc/%d/fd/%lld", (int)child.pid, (long long)fd);
	CHECK(readlink(path, link, sizeof(link) - 1) > 0);
	CHECK(strcmp(link, "anon_inode:[userfaultfd]") == 0);
	CHECK_EQUAL(inject(child.pid, SYS_close, (uint64_t)fd, 0, 0), 0);
	CHECK(write(child.pipe_fd, "x", 1) == 1);
	finish(&child);
}

static void a_call_that_ends_the_process_is_told(void)
{
	struct child child = start(read_once);
	uint64_t arguments[6] = {7};
	struct mgd_error err = {0};
	int64_t result;
	int status;

	wait_for_syscall(child.pid, SYS_read);
	CHECK_FAILS(mgd_inject_syscall(child.pid, SYS_exit_group, arguments, &result, NULL, &err), err,
		    MGD_ERR_GUEST_GONE);
	CHECK_EQUAL(waitpid(child.pid, &status, 0), child.pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
	CHECK_FAILS(mgd_inject_syscall(child.pid, SYS_getpid, arguments, &result, NULL, &err), err, MGD_ERR_GUEST_GONE);
	close(child.pipe_fd);
}

static void a_stopped_process_stays_stopped(void)
{
	struct child child = start(read_once);
	siginfo_t info = {0};
	int status;

	wait_for_syscall(child.pid, SYS_read);
	kill(child.pid, SIGSTOP);
	CHECK_EQUAL(waitpid(child.pid, &status, WUNTRACED), child.pid);
	CHECK(WIFSTOPPED(status));
	for (int i = 0; i < 5; i++)
		CHECK_EQUAL(inject(child.pid, SYS_getppid, 0, 0, 0), getpid());
	CHECK(write(child.pipe_fd, "x", 1) == 1);
	CHECK_EQUAL(waitid(P_PID, (id_t)child.pid, &info, WEXITED | WNOHANG | WNOWAIT), 0);
	CHECK_EQUAL(info.si_pid, 0);
	kill(child.pid, SIGCONT);
	finish(&child);
}

static void a_traced_process_is_refused(void)
{
	struct child child = start(read_once);
	uint64_t arguments[6] = {0};
	struct mgd_error err = {0};
	int64_t result;
	int status;

	CHECK(ptrace(PTRACE_SEIZE, child.pid, NULL, NULL) == 0);
	CHECK_FAILS(mgd_inject_syscall(child.pid, SYS_getpid, arguments, &result, NULL, &err), err, MGD_ERR_OS);
	CHECK_EQUAL(err.os_errno, EPERM);
	CHECK(strstr(err.message, "already being traced"));
	kill(child.pid, SIGKILL);
	CHECK_EQUAL(waitpid(child.pid, &status, 0), child.pid);
	close(child.pipe_fd);
}

/* The filter kills for userfaultfd(2): either it is suspended, or the process is refused; the process never dies. */
static int confine(int pipe_fd)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {.len = sizeof(code) / sizeof(code[0]), .filter = code};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		return 2;
	return read_once(pipe_fd);
}

static void seccomp_never_kills_for_our_call(void)
{
	struct child child = start(confine);
	uint64_t arguments[6] = {O_CLOEXEC};
	struct mgd_error err = {0};
	int64_t result = -1;

	wait_for_syscall(child.pid, SYS_read);
	if (mgd_inject_syscall(child.pid, SYS_userfaultfd, arguments, &result, NULL, &err) == 0)
		CHECK(result >= 0);
	else
		CHECK(strstr(err.message, "seccomp"));
	CHECK(write(child.pipe_fd, "x", 1) == 1);
	finish(&child);
}

static atomic_int ends_seen;

static void note_child(int number)
{
	int status;

	(void)number;
	/* Like an event loop: any report about the guest counts as its exit. */
	if (waitpid(-1, &status, WNOHANG) > 0)
		atomic_fetch_add(&ends_seen, 1);
}

static void our_own_wait_for_children_sees_nothing(void)
{
	struct sigaction action = {.sa_handler = note_child, .sa_flags = SA_RESTART}, before;
	struct child child = start(read_once);

	wait_for_syscall(child.pid, SYS_read);
	sigaction(SIGCHLD, &action, &before);
	inject_often(child.pid);
	note_child(0);
	CHECK_EQUAL(ends_seen, 0);
	sigaction(SIGCHLD, &before, NULL);
	CHECK(write(child.pipe_fd, "x", 1) == 1);
	finish(&child);
}

/* ---- frozen by a cgroup */

/* How to freeze with each cgroup version, and where that version may be mounted. */
struct freezer {
	const char *name, *mounts[3], *file, *freeze, *thaw;
	const char *state_file, *frozen; /* a line of state_file once every thread has stopped */
};

static const struct freezer freezers[] = {
	{"cgroup v2",
	 {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"},
	 "cgroup.freeze",
	 "1",
	 "0",
	 "cgroup.events",
	 "frozen 1"},
	{"cgroup v1", {"/sys/fs/cgroup/freezer"}, "freezer.state", "FROZEN", "THAWED", "freezer.state", "FROZEN"},
};

struct group {
	const struct freezer *freezer;
	char path[128];
};

static void group_write(const struct group *group, const char *file, const char *text)
{
	char path[192];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", group->path, file);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
}

/* Create a group that can be frozen; return false if that is impossible here. */
static bool group_make(struct group *group, const struct freezer *freezer)
{
	char path[192];

	group->freezer = freezer;
	for (int i = 0; freezer->mounts[i]; i++) {
		snprintf(group->path, sizeof(group->path), "%s/mgd-test-%d", freezer->mounts[i], (int)getpid());
		if (mkdir(group->path, 0755))
			continue;
		snprintf(path, sizeof(path), "%s/%s", group->path, freezer->file);
		if (!access(path, W_OK))
			return true;
		rmdir(group->path);
	}
	printf("%s: cannot be created here: skipped\n", freezer->name);
	return false;
}

static void group_remove(const struct group *group)
{
	while (rmdir(group->path))
		CHECK(errno == EBUSY && !sched_yield()); /* its process has exited and is being removed */
}

static void freeze(const struct group *group)
{
	char path[192], text[128];

	group_write(group, group->freezer->file, group->freezer->freeze);
	snprintf(path, sizeof(path), "%s/%s", group->path, group->freezer->state_file);
	for (;;) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t length;

		CHECK(fd >= 0);
		length = read(fd, text, sizeof(text) - 1);
		close(fd);
		text[length > 0 ? length : 0] = '\0';
		if (strstr(text, group->freezer->frozen))
			return;
		sched_yield();
	}
}

static void thaw(const struct group *group)
{
	group_write(group, group->freezer->file, group->freezer->thaw);
}

static struct child start_in(const struct group *group, child_function function)
{
	struct child child = start(function);
	char text[16];

	snprintf(text, sizeof(text), "%d", (int)child.pid);
	group_write(group, "cgroup.procs", text);
	wait_for_syscall(child.pid, SYS_read);
	return child;
}

/* It cannot make the call, and must not make it later. */
static void a_frozen_process_is_left_as_it_was(void)
{
	for (size_t i = 0; i < sizeof(freezers) / sizeof(freezers[0]); i++) {
		uint64_t arguments[6] = {0};
		struct mgd_error err = {0};
		struct group group;
		struct child child;
		int64_t result;

		if (!group_make(&group, &freezers[i]))
			continue;
		child = start_in(&group, read_once);
		freeze(&group);
		CHECK_FAILS(mgd_inject_syscall(child.pid, SYS_getppid, arguments, &result, NULL, &err), err,
			    MGD_ERR_OS);
		CHECK_EQUAL(err.os_errno, ETIMEDOUT);
		thaw(&group);
		wait_for_syscall(child.pid, SYS_read);
		inject_often(child.pid);
		CHECK(write(child.pipe_fd, "x", 1) == 1);
		finish(&child);
		group_remove(&group);
	}
}

static void *inject_pause(void *argument)
{
	const struct child *child = argument;
	uint64_t arguments[6] = {0};
	struct mgd_error err = {0};
	int64_t result = 0;

	/* Either the freeze ended the call, or it took too long and was interrupted. */
	do {
		if (mgd_inject_syscall(child->pid, SYS_pause, arguments, &result, NULL, &err) == 0)
			CHECK_EQUAL(result, -EINTR);
		else
			CHECK_EQUAL(err.os_errno, ETIMEDOUT);
	} while (!atomic_load(&board->stop));
	return NULL;
}

/* Frozen in the middle of our call: the call ends, and whenever the thread runs again it has its own registers.  A
 * connection that we close during the call closes at once, not after it. */
static void a_process_frozen_in_our_call_goes_on(void)
{
	for (size_t i = 0; i < sizeof(freezers) / sizeof(freezers[0]); i++) {
		struct group group;
		struct child child;
		pthread_t thread;
		int ends[2];
		char byte;

		if (!group_make(&group, &freezers[i]))
			continue;
		child = start_in(&group, read_once);
		CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
		CHECK(!pthread_create(&thread, NULL, inject_pause, &child));
		wait_for_syscall(child.pid, SYS_pause);
		close(ends[1]);
		CHECK_EQUAL(recv(ends[0], &byte, 1, MSG_DONTWAIT), 0);
		close(ends[0]);
		atomic_store(&board->stop, true);
		freeze(&group);
		thaw(&group);
		CHECK(!pthread_join(thread, NULL));
		wait_for_syscall(child.pid, SYS_read);
		CHECK(write(child.pipe_fd, "x", 1) == 1);
		finish(&child);
		group_remove(&group);
	}
}

int main(void)
{
#ifndef __x86_64__
	printf("skipped: x86-64 only\n");
	return SKIPPED;
#endif
	board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(board != MAP_FAILED);
	RUN(a_blocked_read_goes_on);
	RUN(a_sleep_is_restarted_for_what_is_left);
	RUN(a_futex_wait_goes_on);
	RUN(a_sigsuspend_keeps_both_its_masks);
	RUN(a_busy_process_computes_on);
	RUN(only_one_thread_of_many_stops);
	RUN(no_signal_is_lost_or_doubled);
	RUN(arguments_and_errors_come_through);
	RUN(a_call_that_ends_the_process_is_told);
	RUN(a_stopped_process_stays_stopped);
	RUN(a_traced_process_is_refused);
	RUN(seccomp_never_kills_for_our_call);
	RUN(our_own_wait_for_children_sees_nothing);
	RUN(a_frozen_process_is_left_as_it_was);
	RUN(a_process_frozen_in_our_call_goes_on);
	return 0;
}
