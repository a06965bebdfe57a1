/* SPDX-License-Identifier: MIT */
/* Tests of the scheduling hint for threads that a guest waits for.  It is set where permitted, and harmless
 * elsewhere. */
#include <pthread.h>
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
	RUN(test_without_rights_nothing_happens);
	return 0;
}
