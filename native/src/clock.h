/* SPDX-License-Identifier: MIT */
#ifndef MGD_CLOCK_H
#define MGD_CLOCK_H

#include <stdint.h>
#include <time.h>

#define MGD_SECOND_NS 1000000000ull

/* CLOCK_MONOTONIC, nanoseconds: the clock of all time limits, rates and latencies. */
static inline uint64_t mgd_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * MGD_SECOND_NS + (uint64_t)now.tv_nsec;
}

#endif
