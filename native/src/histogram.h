/* SPDX-License-Identifier: MIT */
/* Latencies by powers of two of a microsecond: written by threads without a lock, read at any time. */
#ifndef MGD_HISTOGRAM_H
#define MGD_HISTOGRAM_H

#include <stdatomic.h>

#include "migrated.h"

struct mgd_histogram {
	_Atomic uint64_t count, total_ns, max_ns;
	_Atomic uint64_t buckets[MGD_HISTOGRAM_BUCKETS];
};

void mgd_histogram_add(struct mgd_histogram *histogram, uint64_t ns);
void mgd_histogram_read(const struct mgd_histogram *histogram, struct mgd_fault_histogram *out);

#endif
