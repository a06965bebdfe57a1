/* SPDX-License-Identifier: MIT */
/*
 * Start threads, and set their scheduling.  A thread that cannot be started is an error; anything less is not.
 */
#include "thread.h"

#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "error.h"

#define NICE_BETTER 10
#define SLICE_NS 100000 /* the minimum */

int mgd_thread_start(pthread_t *thread, const char *name, void *(*run)(void *), void *argument, struct mgd_error *err)
{
	sigset_t blocked, before;
	int code;

	sigfillset(&blocked);
	sigdelset(&blocked, SIGSEGV);
	sigdelset(&blocked, SIGBUS);
	sigdelset(&blocked, SIGFPE);
	sigdelset(&blocked, SIGILL);
	pthread_sigmask(SIG_SETMASK, &blocked, &before);
	code = pthread_create(thread, NULL, run, argument);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (code)
		return mgd_fail_errno(err, code, "pthread_create: %s", name);
	(void)pthread_setname_np(*thread, name);
	return 0;
}

/* struct sched_attr of sched_setattr(2), which glibc before 2.41 does not define. */
struct attributes {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime_ns, deadline_ns, period_ns;
};

void mgd_thread_low_latency(void)
{
	int nice = getpriority(PRIO_PROCESS, 0);
	struct attributes attributes = {
		.size = sizeof(attributes),
		.policy = SCHED_OTHER,
		.nice = nice - NICE_BETTER,
		.runtime_ns = SLICE_NS,
	};

	/* Both are optimizations: without them everything works, but later. */
	if (syscall(SYS_sched_setattr, 0, &attributes, 0) == 0)
		return;
	attributes.nice = nice;
	(void)syscall(SYS_sched_setattr, 0, &attributes, 0);
}
