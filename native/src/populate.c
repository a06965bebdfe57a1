/* SPDX-License-Identifier: MIT */
/*
 * Memory ahead of the data: a huge page costs its zeroing when it is first touched, and several threads do that while the
 * network is still busy with the pages before.
 *
 * MADV_POPULATE_WRITE, not fallocate: on hugetlbfs fallocate zeroes page after page under the file's lock.  Whoever else
 * needs a page before its turn takes it the same way; the kernel sees to it that it is zeroed once.
 *
 * What is wanted is one bit a page, however often the source asks for it.
 *
 * They are of low priority: where processors are scarce, receiving goes first, and takes its memory itself.  After the
 * switch-over only stale pages are still worth it; the rest has no data to come, and a hole is better left one.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "bitmap.h"
#include "error.h"
#include "target.h"

#ifndef MADV_POPULATE_WRITE /* 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

#define LARGE_PAGE_BYTES (1ull << 30) /* from here on a page is taken by itself, below it a word of 64 */
#define NICE 10
#define MAX_THREADS 16

struct mgd_populator {
	struct mgd_target *target;
	pthread_mutex_t lock;
	pthread_cond_t requested;
	uint64_t requests; /* each thread looks through the bitmaps once for each, or for several */
	uint32_t busy;
	_Atomic bool stop;
	struct mgd_error error; /* met since the last POPULATED */
	pthread_t threads[MAX_THREADS];
	uint32_t started; /* the caller's */
	uint64_t *wanted[MGD_MAX_REGIONS]; /* a bit a page; atomic */
};

int mgd_alias_back(struct mgd_target *target, struct mgd_alias *alias, uint64_t page, uint64_t count,
		   struct mgd_error *err)
{
	uint8_t *memory = alias->memory + page * alias->page_bytes;

	while (madvise(memory, count * alias->page_bytes, MADV_POPULATE_WRITE)) {
		int code = errno;

		if (code == EAGAIN || code == EINTR)
			continue;
		mgd_fail_errno(err, code, "memory for page %llu of region %u (%llu KiB a page): the pool is empty",
			       (unsigned long long)page, (uint32_t)(alias - target->aliases),
			       (unsigned long long)(alias->page_bytes >> 10));
		if (err && (code == EFAULT || code == ENOMEM || code == ENOSPC))
			err->kind = MGD_ERR_POOL;
		return -1;
	}
	for (uint64_t i = 0; i < count; i++)
		mgd_ledger_backed(&target->ledger, alias->first + page + i);
	return 0;
}

static bool worth_it(struct mgd_target *target, const struct mgd_alias *alias, uint64_t page)
{
	uint8_t byte = mgd_ledger_get(&target->ledger, alias->first + page);

	if (mgd_ledger_phase(&target->ledger) == MGD_PHASE_SWITCHED && mgd_page_state(byte) != MGD_PAGE_STALE)
		return false;
	return !(byte & MGD_PAGE_BACKED);
}

/* The pages of a word: small ones in runs, huge ones one by one, so that the next look at the ledger comes soon. */
static int populate_word(struct mgd_populator *populator, struct mgd_alias *alias, uint64_t first, uint64_t bits,
			 struct mgd_error *err)
{
	uint64_t most = alias->page_bytes > MGD_BLOCK_BYTES ? 1 : 64;

	for (uint64_t i = 0, run; i < 64 && !atomic_load(&populator->stop); i += run ? run : 1) {
		for (run = 0; run < most && i + run < 64 && bits >> (i + run) & 1; run++)
			if (!worth_it(populator->target, alias, first + i + run))
				break;
		if (run && mgd_alias_back(populator->target, alias, first + i, run, err) < 0)
			return -1;
	}
	return 0;
}

/* All that is wanted in a region and that no other thread takes. */
static int populate_region(struct mgd_populator *populator, uint32_t region, struct mgd_error *err)
{
	struct mgd_alias *alias = &populator->target->aliases[region];
	uint64_t *wanted = populator->wanted[region], page = 0, bits;

	while (!atomic_load(&populator->stop)) {
		page = mgd_bitmap_next_atomic(wanted, page, alias->page_count);
		if (page >= alias->page_count)
			return 0;
		if (alias->page_bytes >= LARGE_PAGE_BYTES)
			bits = (uint64_t)mgd_bit_clear_atomic(wanted, page) << page % 64;
		else
			bits = __atomic_exchange_n(&wanted[page / 64], 0, __ATOMIC_ACQ_REL);
		if (populate_word(populator, alias, page / 64 * 64, bits, err) < 0)
			return -1;
	}
	return 0;
}

static void *run(void *argument)
{
	struct mgd_populator *populator = argument;
	struct mgd_target *target = populator->target;
	uint64_t seen = 0;

	/* Of this thread only (Linux); without it the threads merely compete. */
	(void)setpriority(PRIO_PROCESS, (id_t)gettid(), getpriority(PRIO_PROCESS, 0) + NICE);
	pthread_mutex_lock(&populator->lock);
	for (;;) {
		struct mgd_error error = {0};
		int failed = 0;

		while (seen == populator->requests && !atomic_load(&populator->stop))
			pthread_cond_wait(&populator->requested, &populator->lock);
		if (atomic_load(&populator->stop))
			break;
		seen = populator->requests;
		populator->busy++;
		pthread_mutex_unlock(&populator->lock);
		for (uint32_t i = 0; i < target->alias_count && !failed; i++)
			failed = populate_region(populator, i, &error);
		pthread_mutex_lock(&populator->lock);
		if (failed)
			populator->error = error;
		if (--populator->busy || seen != populator->requests)
			continue;
		mgd_event_post(&target->events, MGD_EVENT_POPULATED, 0, 0,
			       populator->error.kind != MGD_ERR_NONE ? &populator->error : NULL);
		populator->error.kind = MGD_ERR_NONE;
	}
	pthread_mutex_unlock(&populator->lock);
	return NULL;
}

static size_t bitmap_bytes(const struct mgd_target *target, uint32_t region)
{
	return mgd_bitmap_words(target->aliases[region].page_count) * 8;
}

static void destroy(struct mgd_populator *populator)
{
	for (uint32_t i = 0; i < populator->target->alias_count; i++)
		mgd_unmap(populator->wanted[i], bitmap_bytes(populator->target, i));
	pthread_cond_destroy(&populator->requested);
	pthread_mutex_destroy(&populator->lock);
	free(populator);
}

static struct mgd_populator *create(struct mgd_target *target, struct mgd_error *err)
{
	struct mgd_populator *populator = calloc(1, sizeof(*populator));

	if (!populator) {
		mgd_fail_errno(err, ENOMEM, "populate");
		return NULL;
	}
	populator->target = target;
	pthread_mutex_init(&populator->lock, NULL);
	pthread_cond_init(&populator->requested, NULL);
	for (uint32_t i = 0; i < target->alias_count; i++) {
		populator->wanted[i] = mgd_map_zeros(bitmap_bytes(target, i), err);
		if (!populator->wanted[i]) {
			destroy(populator);
			return NULL;
		}
	}
	return populator;
}

static void want(uint64_t *wanted, uint64_t first_page, const uint8_t *bits, size_t bytes)
{
	uint64_t byte = first_page / 8, end = byte + bytes;

	while (byte < end) {
		uint64_t *word = &wanted[byte / 8], value = 0;

		do
			value |= (uint64_t)*bits++ << byte % 8 * 8;
		while (++byte < end && byte % 8);
		if (value)
			__atomic_fetch_or(word, value, __ATOMIC_RELEASE);
	}
}

int mgd_target_populate(struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
			size_t bytes, uint32_t threads, struct mgd_error *err)
{
	struct mgd_populator *populator;

	if (region >= target->alias_count || first_page % 8 || threads == 0 || threads > MAX_THREADS)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "populate: region %u, first page %llu, %u threads", region,
				(unsigned long long)first_page, threads);
	if (mgd_target_check_bits(target, region, first_page, bits, bytes, "populate", err) < 0)
		return -1;
	if (!target->populator)
		target->populator = create(target, err);
	populator = target->populator;
	if (!populator)
		return -1;
	want(populator->wanted[region], first_page, bits, bytes);
	pthread_mutex_lock(&populator->lock);
	populator->requests++;
	pthread_cond_broadcast(&populator->requested);
	pthread_mutex_unlock(&populator->lock);
	while (populator->started < threads) {
		if (mgd_target_thread(&populator->threads[populator->started], run, populator, "mgd-populate", err) < 0)
			return populator->started ? 0 : -1; /* fewer threads do it too */
		populator->started++;
	}
	return 0;
}

void mgd_populate_stop(struct mgd_target *target)
{
	struct mgd_populator *populator = target->populator;

	if (!populator)
		return;
	pthread_mutex_lock(&populator->lock);
	atomic_store(&populator->stop, true);
	pthread_cond_broadcast(&populator->requested);
	pthread_mutex_unlock(&populator->lock);
	for (uint32_t i = 0; i < populator->started; i++)
		pthread_join(populator->threads[i], NULL);
	destroy(populator);
	target->populator = NULL;
}
