/* SPDX-License-Identifier: MIT */
#include "latency.h"

#include <sched.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NICE_BETTER 10
#define SLICE_NS 100000 /* the least there is */

/* struct sched_attr of sched_setattr(2), for which glibc has no name before 2.41. */
struct attributes {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime_ns, deadline_ns, period_ns;
};

void mgd_latency_matters(void)
{
	int nice = getpriority(PRIO_PROCESS, 0);
	struct attributes attributes = {
		.size = sizeof(attributes),
		.policy = SCHED_OTHER,
		.nice = nice - NICE_BETTER,
		.runtime_ns = SLICE_NS,
	};

	/* Both are refinements: without them everything works, later. */
	if (syscall(SYS_sched_setattr, 0, &attributes, 0) == 0)
		return;
	attributes.nice = nice;
	(void)syscall(SYS_sched_setattr, 0, &attributes, 0);
}
