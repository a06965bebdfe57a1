/* SPDX-License-Identifier: MIT */
#include "processors.h"

#include <sched.h>
#include <unistd.h>

uint32_t mgd_processor_count(void)
{
	cpu_set_t allowed;
	long online;

	if (!sched_getaffinity(0, sizeof(allowed), &allowed))
		return (uint32_t)CPU_COUNT(&allowed);
	online = sysconf(_SC_NPROCESSORS_ONLN); /* more of them than a cpu_set_t has bits */
	return online > 0 ? (uint32_t)online : 1;
}
