/* SPDX-License-Identifier: MIT */
#include "histogram.h"

/* Bucket i counts [2^i, 2^(i+1)) us, bucket 0 from 0 on, the last one without an end. */
static unsigned bucket_of(uint64_t ns)
{
	uint64_t us = ns / 1000;
	unsigned bucket = us ? 63 - (unsigned)__builtin_clzll(us) : 0;

	return bucket < MGD_HISTOGRAM_BUCKETS ? bucket : MGD_HISTOGRAM_BUCKETS - 1;
}

void mgd_histogram_add(struct mgd_histogram *histogram, uint64_t ns)
{
	uint64_t max = atomic_load_explicit(&histogram->max_ns, memory_order_relaxed);

	atomic_fetch_add_explicit(&histogram->count, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&histogram->total_ns, ns, memory_order_relaxed);
	atomic_fetch_add_explicit(&histogram->buckets[bucket_of(ns)], 1, memory_order_relaxed);
	while (ns > max && !atomic_compare_exchange_weak_explicit(&histogram->max_ns, &max, ns, memory_order_relaxed,
								  memory_order_relaxed))
		;
}

void mgd_histogram_read(const struct mgd_histogram *histogram, struct mgd_fault_histogram *out)
{
	out->count = atomic_load_explicit(&histogram->count, memory_order_relaxed);
	out->total_ns = atomic_load_explicit(&histogram->total_ns, memory_order_relaxed);
	out->max_ns = atomic_load_explicit(&histogram->max_ns, memory_order_relaxed);
	for (unsigned i = 0; i < MGD_HISTOGRAM_BUCKETS; i++)
		out->buckets[i] = atomic_load_explicit(&histogram->buckets[i], memory_order_relaxed);
}
