/* SPDX-License-Identifier: MIT */
/*
 * Memory ahead of the data: a huge page costs its zeroing when it is first touched, and several threads do that while the
 * network is still busy with the pages before.
 *
 * MADV_POPULATE_WRITE, not fallocate: on hugetlbfs fallocate zeroes page after page under the file's lock.  Whoever else
 * needs a page before its turn takes it the same way; the kernel sees to it that it is zeroed once.
 *
 * The threads are of low priority: where processors are scarce, receiving goes first, and takes its memory itself.  After
 * the switch-over only stale pages are still worth it; the rest has no data to come, and a hole is better left one.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "error.h"
#include "target.h"

#ifndef MADV_POPULATE_WRITE /* 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

#define STEP_PAGES 64 /* one word of the bitmap: what a thread takes at a time */
#define LARGE_PAGE_BYTES (1ull << 30) /* from here on a page is a step of its own */
#define NICE 10
#define MAX_THREADS 16

struct piece {
	struct piece *next;
	struct mgd_alias *alias;
	uint64_t first_page;
	size_t words, next_word;
	uint64_t bits[];
};

struct mgd_populator {
	struct mgd_target *target;
	pthread_mutex_t lock;
	struct piece *pieces, **last;
	uint32_t running;
	_Atomic bool stop;
	bool failed;
	struct mgd_error error;
	pthread_t threads[MAX_THREADS];
	uint32_t started;
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

/* The next word of bits with something in it. */
static bool take_word(struct mgd_populator *populator, struct mgd_alias **out_alias, uint64_t *out_page,
		      uint64_t *out_bits)
{
	bool found = false;

	pthread_mutex_lock(&populator->lock);
	while (populator->pieces && !found) {
		struct piece *piece = populator->pieces;

		while (piece->next_word < piece->words && !piece->bits[piece->next_word])
			piece->next_word++;
		if (piece->next_word < piece->words) {
			*out_alias = piece->alias;
			*out_page = piece->first_page + STEP_PAGES * piece->next_word;
			*out_bits = piece->bits[piece->next_word];
			if (piece->alias->page_bytes >= LARGE_PAGE_BYTES)
				*out_bits &= -*out_bits;
			piece->bits[piece->next_word] &= ~*out_bits;
			found = true;
			break;
		}
		populator->pieces = piece->next;
		if (!populator->pieces)
			populator->last = &populator->pieces;
		free(piece);
	}
	pthread_mutex_unlock(&populator->lock);
	return found;
}

static bool wanted(struct mgd_target *target, const struct mgd_alias *alias, uint64_t page, uint64_t bits,
		   uint64_t index)
{
	uint8_t byte;

	if (index >= STEP_PAGES || !(bits >> index & 1))
		return false;
	byte = mgd_ledger_get(&target->ledger, alias->first + page + index);
	if (mgd_ledger_phase(&target->ledger) == MGD_PHASE_SWITCHED && mgd_page_state(byte) != MGD_PAGE_STALE)
		return false;
	return !(byte & MGD_PAGE_BACKED);
}

static int populate_word(struct mgd_populator *populator, struct mgd_alias *alias, uint64_t page, uint64_t bits,
			 struct mgd_error *err)
{
	struct mgd_target *target = populator->target;
	/* Small pages in runs, huge ones one by one: the next look at the ledger comes soon. */
	uint64_t most = alias->page_bytes > MGD_BLOCK_BYTES ? 1 : STEP_PAGES;

	for (uint64_t index = 0, run; index < STEP_PAGES && !atomic_load(&populator->stop); index += run ? run : 1) {
		for (run = 0; run < most && wanted(target, alias, page, bits, index + run); run++)
			;
		if (run && mgd_alias_back(target, alias, page + index, run, err) < 0)
			return -1;
	}
	return 0;
}

/* Whether this thread goes on; else it has left, and the last one to leave has told. */
static bool go_on(struct mgd_populator *populator, const struct mgd_error *error)
{
	bool going;

	pthread_mutex_lock(&populator->lock);
	if (error) {
		populator->failed = true;
		populator->error = *error;
		atomic_store(&populator->stop, true);
	}
	/* A piece may have been added since this thread found none. */
	going = populator->pieces && !atomic_load(&populator->stop);
	if (!going && --populator->running == 0 && (populator->failed || !atomic_load(&populator->stop)))
		mgd_event_post(&populator->target->events, MGD_EVENT_POPULATED, 0, 0,
			       populator->failed ? &populator->error : NULL);
	pthread_mutex_unlock(&populator->lock);
	return going;
}

static void *run(void *argument)
{
	struct mgd_populator *populator = argument;
	struct mgd_error error = {0};
	struct mgd_alias *alias;
	uint64_t page, bits;
	bool failed;

	/* Of this thread only (Linux); without it the threads merely compete. */
	(void)setpriority(PRIO_PROCESS, (id_t)gettid(), getpriority(PRIO_PROCESS, 0) + NICE);
	do {
		failed = false;
		while (!failed && !atomic_load(&populator->stop) && take_word(populator, &alias, &page, &bits))
			failed = populate_word(populator, alias, page, bits, &error) < 0;
	} while (go_on(populator, failed ? &error : NULL));
	return NULL;
}

static void join(struct mgd_populator *populator)
{
	for (uint32_t i = 0; i < populator->started; i++)
		pthread_join(populator->threads[i], NULL);
	populator->started = 0;
}

static struct mgd_populator *create(struct mgd_target *target)
{
	struct mgd_populator *populator = calloc(1, sizeof(*populator));

	if (!populator)
		return NULL;
	populator->target = target;
	populator->last = &populator->pieces;
	pthread_mutex_init(&populator->lock, NULL);
	return populator;
}

int mgd_target_populate(struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
			size_t bytes, uint32_t threads, struct mgd_error *err)
{
	struct mgd_populator *populator;
	struct piece *piece;
	bool idle;

	if (region >= target->alias_count || first_page % 8 || threads == 0 || threads > MAX_THREADS)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "populate: region %u, first page %llu, %u threads", region,
				(unsigned long long)first_page, threads);
	if (mgd_target_check_bits(target, region, first_page, bits, bytes, "populate", err) < 0)
		return -1;
	if (!target->populator)
		target->populator = create(target);
	piece = calloc(1, sizeof(*piece) + (bytes + 7) / 8 * 8);
	if (!target->populator || !piece) {
		free(piece);
		return mgd_fail_errno(err, ENOMEM, "populate");
	}
	populator = target->populator;
	piece->alias = &target->aliases[region];
	piece->first_page = first_page;
	piece->words = (bytes + 7) / 8;
	memcpy(piece->bits, bits, bytes);

	pthread_mutex_lock(&populator->lock);
	*populator->last = piece;
	populator->last = &piece->next;
	idle = populator->running == 0;
	pthread_mutex_unlock(&populator->lock);
	if (!idle)
		return 0; /* a thread leaves only when it has seen, under the lock, that nothing is left */
	join(populator);
	populator->failed = false;
	atomic_store(&populator->stop, false);
	while (populator->started < threads) {
		int result;

		pthread_mutex_lock(&populator->lock);
		populator->running++;
		pthread_mutex_unlock(&populator->lock);
		result =
			mgd_target_thread(&populator->threads[populator->started], run, populator, "mgd-populate", err);
		if (result == 0) {
			populator->started++;
			continue;
		}
		pthread_mutex_lock(&populator->lock);
		populator->running--;
		pthread_mutex_unlock(&populator->lock);
		return populator->started ? 0 : -1; /* fewer threads do it too */
	}
	return 0;
}

void mgd_populate_stop(struct mgd_target *target)
{
	struct mgd_populator *populator = target->populator;

	if (!populator)
		return;
	atomic_store(&populator->stop, true);
	join(populator);
	while (populator->pieces) {
		struct piece *piece = populator->pieces;

		populator->pieces = piece->next;
		free(piece);
	}
	pthread_mutex_destroy(&populator->lock);
	free(populator);
	target->populator = NULL;
}
