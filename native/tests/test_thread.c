/* SPDX-License-Identifier: MIT */
/* Tests of the scheduling hints: for threads that a guest waits for, and for those whose work can wait.  They are set
 * where permitted, and harmless elsewhere. */
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/resource.h>
#include <unistd.h>

#include "check.h"
#include "thread.h"

static int before, after;

static void *hint(void *argument)
{
	(void)argument;
	before = getpriority(PRIO_PROCESS, 0);
	mgd_thread_low_latency();
	after = getpriority(PRIO_PROCESS, 0);
	return NULL;
}

static void in_a_thread(void)
{
	pthread_t thread;

	CHECK(!pthread_create(&thread, NULL, hint, NULL));
	CHECK(!pthread_join(thread, NULL));
}

static void test_it_is_of_that_thread_alone(void)
{
	int ours = getpriority(PRIO_PROCESS, 0);

	in_a_thread();
	CHECK_EQUAL(before, ours);
	CHECK(after <= before);
	CHECK_EQUAL(getpriority(PRIO_PROCESS, 0), ours);
}

static sem_t idles, ends;

static void *idle(void *argument)
{
	(void)argument;
	mgd_thread_idle();
	sem_post(&idles);
	while (sem_wait(&ends))
		;
	return NULL;
}

static int policy_of(pthread_t thread)
{
	struct sched_param param;
	int policy;

	CHECK(!pthread_getschedparam(thread, &policy, &param));
	return policy;
}

static void test_a_thread_gives_way_until_it_has_to_end(void)
{
	pthread_t thread;

	CHECK(!sem_init(&idles, 0, 0) && !sem_init(&ends, 0, 0));
	CHECK(!pthread_create(&thread, NULL, idle, NULL));
	while (sem_wait(&idles))
		;
	CHECK_EQUAL(policy_of(thread), SCHED_IDLE);
	CHECK_EQUAL(policy_of(pthread_self()), SCHED_OTHER);
	mgd_thread_hurry(thread);
	if (geteuid() == 0)
		CHECK_EQUAL(policy_of(thread), SCHED_OTHER);
	sem_post(&ends);
	CHECK(!pthread_join(thread, NULL));
}

static void test_without_rights_nothing_happens(void)
{
	if (setgid(65534) || setuid(65534)) {
		printf("  skipped: cannot become another user\n");
		return;
	}
	in_a_thread();
	CHECK_EQUAL(after, before);
}

int main(void)
{
	RUN(test_it_is_of_that_thread_alone);
	RUN(test_a_thread_gives_way_until_it_has_to_end);
	RUN(test_without_rights_nothing_happens);
	return 0;
}
