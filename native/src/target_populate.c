/* SPDX-License-Identifier: MIT */
/*
 * Allocate memory for pages: before their data arrives, and for holes that the guest touches.  The first touch of a
 * huge page pays for zeroing it, and several threads do that while the network is busy with earlier pages.
 *
 * We use MADV_POPULATE_WRITE, not fallocate, which on hugetlbfs zeroes page after page under the file's lock.  Another
 * thread that needs a page early allocates it in the same way; the kernel makes sure that it is zeroed once.
 *
 * Requests are kept as one bit per page, however often the source repeats them.  The threads have low priority: where
 * processors are scarce, receiving goes first and allocates its memory itself.  After the switchover only stale pages
 * are worth it; no data will arrive for the rest, and a hole should stay one.
 */
#include "target.h"

#include <sys/mman.h>
#include <sys/resource.h>

#define LARGE_PAGE_BYTES (1ull << 30) /* from this size on a thread takes single pages, below it words of 64 */
#define NICE 10
#define MAX_THREADS 16
#define POOL_RETRY_MS 200

struct target_populator {
	struct mgd_target *target;
	pthread_mutex_t lock;
	pthread_cond_t requested;
	uint64_t requests; /* each thread searches the bitmaps once per request, or for several at once */
	uint32_t busy;
	_Atomic bool stop;
	struct mgd_error error; /* hit since the last POPULATED */
	pthread_t threads[MAX_THREADS];
	uint32_t started; /* used by the caller only */
	uint64_t *wanted[MGD_MAX_REGIONS]; /* one bit per page; atomic */
};

int target_back(struct mgd_target *target, struct target_region *region, uint64_t page, uint64_t count,
		struct mgd_error *err)
{
	uint8_t *memory = region->memory + page * region->page_bytes;

	while (madvise(memory, count * region->page_bytes, MADV_POPULATE_WRITE)) {
		int code = errno;

		if (code == EAGAIN || code == EINTR)
			continue;
		mgd_fail_errno(err, code,
			       "memory for page %" PRIu64 " of region %u (%" PRIu64 " KiB per page): the pool is empty",
			       page, region->index, (region->page_bytes >> 10));
		if (err && (code == EFAULT || code == ENOMEM || code == ENOSPC))
			err->kind = MGD_ERR_POOL;
		return -1;
	}
	for (uint64_t i = 0; i < count; i++)
		mgd_ledger_backed(&target->ledger, region->first + page + i);
	return 0;
}

/* ---- ahead of the data */

static bool worth_it(struct mgd_target *target, const struct target_region *region, uint64_t page)
{
	uint8_t byte = mgd_ledger_get(&target->ledger, region->first + page);

	if (mgd_ledger_phase(&target->ledger) == MGD_PHASE_SWITCHED && mgd_page_state(byte) != MGD_PAGE_STALE)
		return false;
	return !(byte & MGD_PAGE_BACKED);
}

/* Populate the pages of a word: small ones in runs, huge ones one by one, so that the ledger is checked again soon. */
static int populate_word(struct target_populator *populator, struct target_region *region, uint64_t first,
			 uint64_t bits, struct mgd_error *err)
{
	uint64_t most = region->page_bytes > MGD_BLOCK_BYTES ? 1 : 64;

	for (uint64_t i = 0, run; i < 64 && !populator->stop; i += run ? run : 1) {
		for (run = 0; run < most && i + run < 64 && bits >> (i + run) & 1; run++)
			if (!worth_it(populator->target, region, first + i + run))
				break;
		if (run && target_back(populator->target, region, first + i, run, err))
			return -1;
	}
	return 0;
}

/* Populate all wanted pages of a region that no other thread takes. */
static int populate_region(struct target_populator *populator, uint32_t index, struct mgd_error *err)
{
	struct target_region *region = &populator->target->regions[index];
	uint64_t *wanted = populator->wanted[index], page = 0, bits;

	while (!populator->stop) {
		page = mgd_bitmap_next_atomic(wanted, page, region->page_count);
		if (page >= region->page_count)
			return 0;
		if (region->page_bytes >= LARGE_PAGE_BYTES)
			bits = (uint64_t)mgd_bit_clear_atomic(wanted, page) << page % 64;
		else
			bits = mgd_word_take_atomic(&wanted[page / 64]);
		if (populate_word(populator, region, page / 64 * 64, bits, err))
			return -1;
	}
	return 0;
}

static void *run(void *argument)
{
	struct target_populator *populator = argument;
	struct mgd_target *target = populator->target;
	uint64_t seen = 0;

	/* Affects only this thread (Linux); without it the threads merely compete. */
	(void)setpriority(PRIO_PROCESS, (id_t)gettid(), getpriority(PRIO_PROCESS, 0) + NICE);
	MGD_HOLD(&populator->lock);
	for (;;) {
		struct mgd_error error = {0};
		int failed = 0;

		while (seen == populator->requests && !populator->stop)
			pthread_cond_wait(&populator->requested, &populator->lock);
		if (populator->stop)
			return NULL;
		seen = populator->requests;
		populator->busy++;
		pthread_mutex_unlock(&populator->lock);
		for (uint32_t i = 0; i < target->region_count && !failed; i++)
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
}

static size_t bitmap_bytes(const struct mgd_target *target, uint32_t index)
{
	return mgd_bitmap_words(target->regions[index].page_count) * 8;
}

static void destroy(struct target_populator *populator)
{
	for (uint32_t i = 0; i < populator->target->region_count; i++)
		mgd_unmap(populator->wanted[i], bitmap_bytes(populator->target, i));
	pthread_cond_destroy(&populator->requested);
	pthread_mutex_destroy(&populator->lock);
	free(populator);
}

static struct target_populator *create(struct mgd_target *target, struct mgd_error *err)
{
	struct target_populator *populator = calloc(1, sizeof(*populator));

	if (!populator) {
		mgd_fail_errno(err, ENOMEM, "populate");
		return NULL;
	}
	populator->target = target;
	pthread_mutex_init(&populator->lock, NULL);
	pthread_cond_init(&populator->requested, NULL);
	for (uint32_t i = 0; i < target->region_count; i++) {
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
			(void)mgd_word_set_atomic(word, value);
	}
}

int mgd_target_populate(struct mgd_target *target, uint32_t index, uint64_t first_page, const uint8_t *bits,
			size_t bytes, uint32_t threads, struct mgd_error *err)
{
	struct target_populator *populator;

	if (index >= target->region_count || first_page % 8 || threads == 0 || threads > MAX_THREADS)
		return mgd_misuse(err, "populate: region %u, first page %" PRIu64 ", %u threads", index, first_page,
				  threads);
	if (target_check_bits(target, index, first_page, bits, bytes, "populate", err))
		return -1;
	if (!target->populator)
		target->populator = create(target, err);
	populator = target->populator;
	if (!populator)
		return -1;
	want(populator->wanted[index], first_page, bits, bytes);
	MGD_LOCKED (&populator->lock) {
		populator->requests++;
		pthread_cond_broadcast(&populator->requested);
	}
	while (populator->started < threads) {
		if (mgd_thread_start(&populator->threads[populator->started], "mgd-populate", run, populator, err))
			return populator->started ? 0 : -1; /* fewer threads will do */
		populator->started++;
	}
	return 0;
}

void target_populate_stop(struct mgd_target *target)
{
	struct target_populator *populator = target->populator;

	if (!populator)
		return;
	MGD_LOCKED (&populator->lock) {
		populator->stop = true;
		pthread_cond_broadcast(&populator->requested);
	}
	for (uint32_t i = 0; i < populator->started; i++)
		pthread_join(populator->threads[i], NULL);
	destroy(populator);
	target->populator = NULL;
}

/* ---- holes that guest threads wait for */

/* Fill the holes that guest threads wait for; return whether all could be filled. */
static bool fill_holes(struct mgd_target *target, struct mgd_error *err)
{
	size_t waiters;
	struct mgd_waiter *list = mgd_waiting_list(&target->waiting, &waiters);
	bool filled = true;

	for (size_t i = 0; i < waiters && !target->fault_stop; i++) {
		struct target_region *region = target_region_of(target, list[i].page);

		if (list[i].why != MGD_WAITING_HOLE)
			continue;
		if (target_back(target, region, list[i].page - region->first, 1, err)) {
			filled = false;
			continue;
		}
		mgd_waiting_change(&target->waiting, list[i].page, MGD_WAITING_RETRY);
		target_fault_look_again(target);
	}
	free(list);
	return filled;
}

/* Zeroing a huge page takes 0.1 ms, a 1 GiB page 100 to 300 ms: too long for the fault thread, for which others
 * wait. */
void *target_holes_main(void *argument)
{
	struct mgd_target *target = argument;
	struct mgd_error error = {0};
	bool filled = true, told = false;

	mgd_thread_low_latency();
	while (!target->fault_stop) {
		if (filled) {
			while (sem_wait(&target->holes) && errno == EINTR)
				;
		} else {
			/* The pool is empty: the guest waits until it has memory. */
			struct timespec until;

			clock_gettime(CLOCK_REALTIME, &until);
			until.tv_nsec += POOL_RETRY_MS * 1000000;
			until.tv_sec += until.tv_nsec / 1000000000;
			until.tv_nsec %= 1000000000;
			(void)sem_timedwait(&target->holes, &until);
		}
		filled = fill_holes(target, &error);
		if (!filled && !told)
			mgd_event_post(&target->events, MGD_EVENT_FAILED, 0, 0, &error);
		told = told || !filled;
	}
	return NULL;
}
