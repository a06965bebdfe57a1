/* SPDX-License-Identifier: MIT */
/*
 * All time limits, rates and latencies use CLOCK_MONOTONIC, in nanoseconds.  This file also provides short sleeps.
 */
#pragma once

#include <stdint.h>
#include <time.h>

#define MGD_SECOND_NS 1000000000ull

static inline uint64_t mgd_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * MGD_SECOND_NS + (uint64_t)now.tv_nsec;
}
static inline void mgd_pause_ns(long ns)
{
	nanosleep(&(struct timespec){.tv_nsec = ns}, NULL);
}
