/* SPDX-License-Identifier: MIT */
/*
 * The SIGBUS handler, and the jump out of a guarded access.  Signals that are not ours go to the previous handler.
 */
#include "guard.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include "error.h"

/* Where this thread continues if its access raises SIGBUS. */
static _Thread_local sigjmp_buf *guard;
static struct sigaction others;
static pthread_once_t handler_once = PTHREAD_ONCE_INIT;
static int install_errno;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	if (guard) {
		/* Restore the signal mask: a return from the handler would do so, a jump does not. */
		pthread_sigmask(SIG_SETMASK, &((ucontext_t *)context)->uc_sigmask, NULL);
		siglongjmp(*guard, 1);
	}
	/* Not ours. */
	if (others.sa_flags & SA_SIGINFO) {
		others.sa_sigaction(number, info, context);
	} else if (others.sa_handler == SIG_DFL || others.sa_handler == SIG_IGN) {
		signal(SIGBUS, SIG_DFL);
		raise(SIGBUS);
	} else {
		others.sa_handler(number);
	}
}

static void install_handler(void)
{
	struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};

	sigemptyset(&ours.sa_mask);
	install_errno = sigaction(SIGBUS, &ours, &others) ? errno : 0;
}

int mgd_guard_install(struct mgd_error *err)
{
	pthread_once(&handler_once, install_handler);
	return install_errno ? mgd_fail_errno(err, install_errno, "sigaction: SIGBUS") : 0;
}

bool mgd_guarded(void (*look)(void *), void *argument)
{
	sigjmp_buf here;

	if (sigsetjmp(here, 0)) {
		guard = NULL;
		return false;
	}
	guard = &here;
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	look(argument);
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	guard = NULL;
	return true;
}
