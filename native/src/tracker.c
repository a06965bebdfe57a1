/* SPDX-License-Identifier: MIT */
/*
 * Dirty tracking of another process, from outside.  This file finds the pages that a guest has written.
 *
 * The guest's mappings are registered with userfaultfd for asynchronous write-protection: the first write to a
 * protected page removes the protection by itself, without a message.  PAGEMAP_SCAN on the guest's pagemap reports for
 * each page whether its page table entry is PRESENT, SWAPPED or neither (empty), and whether it is WRITTEN, that is,
 * unprotected.
 *
 * Four rules:
 *
 *   1.  Present or swapped, and WRITTEN: the page was written since the last scan.  The scan that finds it protects it
 *      again under the page table lock (PM_SCAN_WP_MATCHING), so no write falls between "reported" and "protected".
 *   2.  Empty, although we protected it: the page was zapped since then (MADV_DONTNEED, a punched hole, reclaim, a
 *      split or collapsed huge page).  The record of earlier writes is lost with the entry, so the page counts as
 *      written.  The scan protects it again while absent: that leaves a marker in the entry, which counts as SWAPPED
 *      and becomes the protection of whatever is populated there.  A page of shared memory that is zapped unwritten
 *      leaves a marker by itself: its contents are still in the file.
 *   3.  Protect first, report afterwards.  Whoever reads the page after the report sees every write before the
 *      protection, and the next scan reports every write after it.
 *   4.  When in doubt, this interface reports too much, even if a call fails halfway.
 *
 * Shared memory is protected as a whole, absent pages included, so only what was zapped is empty.  In a SPARSE mapping
 * absent pages hold zeros, and there may be far more of them than memory: markers would fill the page tables of memory
 * that the guest never used.  There we protect only what is present or swapped, and one bit per page records which
 * pages ever were.  A page populated afterwards is unprotected, so it is WRITTEN at the next scan.  Nobody has read it
 * before that: only protected pages are reported, and only reported pages are read.
 *
 * A step is scanned in two looks.  The first changes nothing: it asks for pages that are WRITTEN or not PRESENT, which
 * costs 3 ns for a small page that is neither, and 11 ns for one that is (6.18).  It handles empty pages at once.  The
 * second look covers only the part that has written pages, if any, and protects them: such a look invalidates all of
 * its range in KVM's page tables, and on hugetlb it takes the file's lock for each page.  If a page is written and
 * zapped between the two looks, the next scan finds it empty.
 *
 * The last scan has only the first look, and protects nothing: the guest is paused, and never runs with this tracking
 * again.  The same scan made once more reports the same pages, and those written since.
 *
 * A guest may use little of a large address space, and a walk over absent huge pages costs 50 ns for each.  So a scan of
 * known pages covers, of shared memory on huge pages, only those that were ever found present or reported, and counts
 * the present ones.  If the file holds no more pages than that, the others are in no page table either, and nothing
 * was written there.  The caller compares, and makes a complete scan if the file holds more.
 *
 * We use less of PAGEMAP_SCAN than it offers, because kernels differ in the rest:
 *   - Whether an empty entry counts as WRITTEN depends on kernel, page size and masks (07b4377bdbe7, 40de8160ca7f).  We
 *     never ask; and no look that protects matches an empty entry, which has hung kernels on hugetlb (14a2508b1bf6).
 *   - We protect gigantic pages again with UFFDIO_WRITEPROTECT, by rule 3: PM_SCAN_WP_MATCHING did not do so before
 *     645fc055fd92.
 *
 * The tracker does not see:
 *   - Writes that bypass this process's page tables (other processes, devices, buffers pinned before a scan and filled
 *     after it).  The caller handles those.
 *   - Memory whose contents are dropped without a write since the last scan.  It is reported in a SPARSE mapping, but
 *     not always on shared memory or huge pages, where a marker keeps the protection.
 *   - A process that has exited: a scan of it reports nothing and does not fail.  The caller watches the process.
 *
 * All of this runs while the guest maps and unmaps memory, and a guest that waits for its mmap_lock is stalled.  So no
 * ioctl covers more than a step, about a millisecond of work.  Threads share the steps of a walk, because the last scan
 * runs while the guest is paused.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "bitmap.h"
#include "pagemap.h"
#include "processors.h"
#include "thread.h"

/* The most that one ioctl covers. */
#define STEP_BYTES ((uint64_t)16 << 20)
#define STEP_BYTES_HUGE ((uint64_t)1 << 30)
/* One thread per so many pages; with fewer it costs more than it gains. */
#define THREAD_PAGES ((uint64_t)1 << 16)
#define THREADS_MAX 16
/* Known pages with at most so many others between them are scanned together. */
#define JOINED_PAGES 16
/* How often an ioctl may find the address space changing before it fails. */
#define CHANGING_TRIES 1000
/* The largest page that PM_SCAN_WP_MATCHING re-arms: it compares with the size of a transparent huge page. */
#define REARMED_BYTES_MAX ((uint64_t)2 << 20)

#define POPULATED (MGD_PAGE_IS_PRESENT | MGD_PAGE_IS_SWAPPED)

static const struct mgd_pagemap_query PRESENT_ONES = {.any_of = MGD_PAGE_IS_PRESENT, .answered = MGD_PAGE_IS_PRESENT};
static const struct mgd_pagemap_query POPULATED_ONES = {.any_of = POPULATED, .answered = POPULATED};
static const struct mgd_pagemap_query WRITTEN_OR_NOT_PRESENT = {
	.flags = MGD_PM_SCAN_CHECK_WPASYNC,
	.any_of = MGD_PAGE_IS_WRITTEN | MGD_PAGE_IS_PRESENT,
	.inverted = MGD_PAGE_IS_PRESENT,
	.answered = POPULATED | MGD_PAGE_IS_WRITTEN,
};
static const struct mgd_pagemap_query ALL_PAGES = {
	.flags = MGD_PM_SCAN_CHECK_WPASYNC,
	.answered = POPULATED | MGD_PAGE_IS_WRITTEN,
};
static const struct mgd_pagemap_query PROTECT_WRITTEN = {
	.flags = MGD_PM_SCAN_CHECK_WPASYNC | MGD_PM_SCAN_WP_MATCHING,
	.all_of = MGD_PAGE_IS_WRITTEN,
	.any_of = POPULATED,
	.answered = MGD_PAGE_IS_WRITTEN,
};

struct tracked {
	struct mgd_mapping mapping;
	uint64_t page_bytes;
	bool registered; /* by us */
	uint64_t *armed; /* SPARSE: one bit per page of the mapping, set if it was protected */
	uint64_t *known; /* shared huge pages: one bit per page, set if it was ever found present or reported */
	_Atomic uint64_t present; /* where `known` is: pages that this scan has found present */
};

struct mgd_tracker {
	int pagemap_fd, uffd;
	uint32_t count;
	struct tracked tracked[];
};

/* A piece of a mapping, in addresses of the guest process. */
struct step {
	struct tracked *tracked;
	uint64_t start, end;
};

/* A walk through all mappings, step by step, by several threads. */
struct walk {
	struct mgd_tracker *tracker;
	int (*visit)(struct walk *walk, const struct step *step, struct mgd_error *err);
	bool last; /* scan without protecting anything */
	uint64_t **bitmaps; /* per region: where pages are reported */
	_Atomic uint64_t bytes; /* reported */
	pthread_mutex_t lock; /* protects the following */
	uint32_t index;
	uint64_t offset; /* where the next step begins in mapping `index` */
	int result;
	struct mgd_error error; /* the first one */
};

/* ---- creation and destruction */

static int check_mapping(const struct mgd_mapping *mapping, const uint64_t *page_bytes, uint32_t region_count,
			 struct mgd_error *err)
{
	uint64_t page;

	if (mapping->region >= region_count)
		return mgd_misuse(err, "tracker: mapping of region %u of %u", mapping->region, region_count);
	page = page_bytes[mapping->region];
	if (page < MGD_BLOCK_BYTES || (page & (page - 1)))
		return mgd_misuse(err, "tracker: region %u: page size %" PRIu64, mapping->region, page);
	if (!mapping->length_bytes || ((mapping->address | mapping->offset | mapping->length_bytes) & (page - 1)) ||
	    mapping->address + mapping->length_bytes < mapping->address ||
	    mapping->offset + mapping->length_bytes < mapping->offset)
		return mgd_misuse(err,
				  "tracker: region %u: mapping %#" PRIx64 "+%#" PRIx64 " at offset %#" PRIx64
				  " does not fit its page size %" PRIu64,
				  mapping->region, mapping->address, mapping->length_bytes, mapping->offset, page);
	return 0;
}

static size_t bitmap_bytes(const struct tracked *tracked)
{
	return mgd_bitmap_words(tracked->mapping.length_bytes / tracked->page_bytes) * 8;
}

/* Return whether a mapping shows a part of a region that another one shows, too. */
static bool shares_pages(const struct mgd_mapping *mappings, uint32_t count, const struct mgd_mapping *mapping)
{
	for (uint32_t i = 0; i < count; i++)
		if (&mappings[i] != mapping && mappings[i].region == mapping->region &&
		    mappings[i].offset < mapping->offset + mapping->length_bytes &&
		    mapping->offset < mappings[i].offset + mappings[i].length_bytes)
			return true;
	return false;
}

int mgd_tracker_create(int pagemap_fd, int uffd, const struct mgd_mapping *mappings, uint32_t mapping_count,
		       const uint64_t *page_bytes, uint32_t region_count, struct mgd_tracker **out,
		       struct mgd_error *err)
{
	struct mgd_tracker *tracker;

	if (!mapping_count || !region_count || region_count > MGD_MAX_REGIONS)
		return mgd_misuse(err, "tracker: %u mappings of %u regions", mapping_count, region_count);
	for (uint32_t i = 0; i < mapping_count; i++)
		if (check_mapping(&mappings[i], page_bytes, region_count, err))
			return -1;
	tracker = calloc(1, sizeof(*tracker) + mapping_count * sizeof(tracker->tracked[0]));
	if (!tracker)
		return mgd_fail_errno(err, ENOMEM, "tracker");
	tracker->pagemap_fd = fcntl(pagemap_fd, F_DUPFD_CLOEXEC, 0);
	tracker->uffd = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
	if (tracker->pagemap_fd < 0 || tracker->uffd < 0) {
		mgd_fail_errno(err, errno, "tracker: duplicate descriptors");
		goto failed;
	}
	for (; tracker->count < mapping_count; tracker->count++) {
		struct tracked *tracked = &tracker->tracked[tracker->count];

		tracked->mapping = mappings[tracker->count];
		tracked->page_bytes = page_bytes[tracked->mapping.region];
		if (tracked->mapping.flags & MGD_MAPPING_SPARSE) {
			tracked->armed = mgd_map_zeros(bitmap_bytes(tracked), err);
			if (!tracked->armed)
				goto failed;
		} else if (tracked->page_bytes > MGD_BLOCK_BYTES &&
			   !shares_pages(mappings, mapping_count, &mappings[tracker->count])) {
			tracked->known = mgd_map_zeros(bitmap_bytes(tracked), err);
			if (!tracked->known)
				goto failed;
		}
	}
	*out = tracker;
	return 0;

failed:
	mgd_tracker_destroy(tracker);
	return -1;
}

void mgd_tracker_destroy(struct mgd_tracker *tracker)
{
	if (!tracker)
		return;
	mgd_close(tracker->pagemap_fd);
	mgd_close(tracker->uffd);
	for (uint32_t i = 0; i < tracker->count; i++) {
		mgd_unmap(tracker->tracked[i].armed, bitmap_bytes(&tracker->tracked[i]));
		mgd_unmap(tracker->tracked[i].known, bitmap_bytes(&tracker->tracked[i]));
	}
	free(tracker);
}

/* ---- walking */

/* Steps end at aligned addresses, so that they split no transparent huge page. */
static bool next_step(struct walk *walk, struct step *step)
{
	MGD_HOLD(&walk->lock);
	struct tracked *tracked = &walk->tracker->tracked[walk->index];
	uint64_t end, size;

	if (walk->index == walk->tracker->count)
		return false;
	end = tracked->mapping.address + tracked->mapping.length_bytes;
	size = tracked->page_bytes == MGD_BLOCK_BYTES ? STEP_BYTES : STEP_BYTES_HUGE;
	size = size < tracked->page_bytes ? tracked->page_bytes : size;
	*step = (struct step){.tracked = tracked, .start = tracked->mapping.address + walk->offset, .end = end};
	if (end - step->start > size)
		step->end = (step->start / size + 1) * size;
	walk->offset = step->end - tracked->mapping.address;
	if (step->end == end) {
		walk->index++;
		walk->offset = 0;
	}
	return true;
}

/* Try every step, whatever happens to the others; report the first failure. */
static void *walk_steps(void *argument)
{
	struct walk *walk = argument;
	struct mgd_error error = {0};
	struct step step;

	while (next_step(walk, &step)) {
		if (!walk->visit(walk, &step, &error))
			continue;
		MGD_HOLD(&walk->lock);
		if (!walk->result)
			walk->error = error;
		walk->result = -1;
	}
	return NULL;
}

static uint64_t threads_wanted(const struct mgd_tracker *tracker)
{
	uint64_t count = 0, most;

	for (uint32_t i = 0; i < tracker->count; i++)
		count += tracker->tracked[i].mapping.length_bytes / tracker->tracked[i].page_bytes;
	count /= THREAD_PAGES;
	if (count <= 1)
		return 1;
	most = mgd_processor_count();
	most = mgd_min(most, THREADS_MAX);
	return count > most ? most : count;
}

/* The calling thread is one of `threads`, and does the work of those that could not be started. */
static int walk_all(struct walk *walk, uint64_t threads, struct mgd_error *err)
{
	pthread_t started[THREADS_MAX];
	uint64_t count = 0;

	pthread_mutex_init(&walk->lock, NULL);
	while (count + 1 < threads && !mgd_thread_start(&started[count], "mgd-tracker", walk_steps, walk, NULL))
		count++;
	walk_steps(walk);
	while (count)
		pthread_join(started[--count], NULL);
	pthread_mutex_destroy(&walk->lock);
	if (walk->result && err)
		*err = walk->error;
	return walk->result;
}

/* ---- the parts of a step */

static int write_protect(const struct mgd_tracker *tracker, uint64_t start, uint64_t end, struct mgd_error *err)
{
	struct uffdio_writeprotect arg = {
		.range = {.start = start, .len = end - start},
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};

	for (int tries = 0; ioctl(tracker->uffd, UFFDIO_WRITEPROTECT, &arg); tries++) {
		/* EAGAIN: the address space is changing (mremap, madvise).  Repeating all of it is harmless. */
		if ((errno == EAGAIN || errno == EINTR) && tries < CHANGING_TRIES)
			continue;
		return mgd_fail_errno(err, errno, "UFFDIO_WRITEPROTECT: %#" PRIx64 "+%#" PRIx64, start, (end - start));
	}
	return 0;
}

/* Set bits [first, end).  Other threads may be setting bits, and clearing words of the bitmap. */
static void set_bits(uint64_t *bitmap, uint64_t first, uint64_t end)
{
	for (uint64_t word = first / 64; word * 64 < end; word++)
		(void)mgd_word_set_atomic(&bitmap[word], mgd_word_mask(word, first, end - first));
}

/* Return the number of a page within its mapping. */
static uint64_t page_of(const struct tracked *tracked, uint64_t address)
{
	return (address - tracked->mapping.address) / tracked->page_bytes;
}

/* Find the first run of pages in [*start, end) that were protected. */
static bool next_armed(const struct tracked *tracked, uint64_t *start, uint64_t *out_run_end, uint64_t end)
{
	uint64_t first = page_of(tracked, *start), last = page_of(tracked, end), page;

	if (tracked->armed) {
		first = mgd_bitmap_next_atomic(tracked->armed, first, last);
		for (page = first; page < last && mgd_bit_test_atomic(tracked->armed, page); page++)
			;
		last = page;
	}
	*start = tracked->mapping.address + first * tracked->page_bytes;
	*out_run_end = tracked->mapping.address + last * tracked->page_bytes;
	return first < last;
}

static void report(struct walk *walk, const struct tracked *tracked, uint64_t start, uint64_t end)
{
	uint64_t shift = tracked->mapping.offset / tracked->page_bytes;

	set_bits(walk->bitmaps[tracked->mapping.region], shift + page_of(tracked, start),
		 shift + page_of(tracked, end));
	if (tracked->known)
		set_bits(tracked->known, page_of(tracked, start), page_of(tracked, end));
	atomic_fetch_add(&walk->bytes, end - start);
}

/* Fetch runs from the start of the step on, and move that to where the next call continues. */
static int fetch(const struct mgd_tracker *tracker, struct step *step, const struct mgd_pagemap_query *query,
		 struct mgd_page_region runs[MGD_PAGEMAP_RUNS], int *out_count, struct mgd_error *err)
{
	return mgd_pagemap_fetch(tracker->pagemap_fd, query, &step->start, step->end, step->tracked->page_bytes, runs,
				 out_count, err);
}

/* ---- arming */

static int arm_step(struct walk *walk, const struct step *step, struct mgd_error *err)
{
	struct mgd_page_region runs[MGD_PAGEMAP_RUNS];
	struct tracked *tracked = step->tracked;
	struct step rest = *step;
	int count;

	if (!tracked->armed)
		return write_protect(walk->tracker, step->start, step->end, err);
	while (rest.start < rest.end) {
		if (fetch(walk->tracker, &rest, &POPULATED_ONES, runs, &count, err))
			return -1;
		for (int i = 0; i < count; i++) {
			if (write_protect(walk->tracker, runs[i].start, runs[i].end, err))
				return -1;
			set_bits(tracked->armed, page_of(tracked, runs[i].start), page_of(tracked, runs[i].end));
		}
	}
	return 0;
}

int mgd_tracker_arm(struct mgd_tracker *tracker, struct mgd_error *err)
{
	struct walk walk = {.tracker = tracker, .visit = arm_step};

	for (uint32_t i = 0; i < tracker->count; i++) {
		struct tracked *tracked = &tracker->tracked[i];

		if (mgd_uffd_register(tracker->uffd, tracked->mapping.address, tracked->mapping.length_bytes,
				      MGD_REGISTER_WP, err))
			goto failed;
		tracked->registered = true;
	}
	if (walk_all(&walk, threads_wanted(tracker), err))
		goto failed;
	return 0;

failed:
	mgd_tracker_disarm(tracker, NULL);
	return -1;
}

/* Unregistering lifts the protection and removes the markers. */
static int disarm_step(struct walk *walk, const struct step *step, struct mgd_error *err)
{
	if (!step->tracked->registered)
		return 0;
	if (!mgd_uffd_unregister(walk->tracker->uffd, step->start, step->end - step->start, err))
		return 0;
	/* A guest that has exited needs no release. */
	return err->kind == MGD_ERR_GUEST_GONE ? 0 : -1;
}

int mgd_tracker_disarm(struct mgd_tracker *tracker, struct mgd_error *err)
{
	struct walk walk = {.tracker = tracker, .visit = disarm_step};
	/* One thread: the kernel lets only one at a time change the address space. */
	int result = walk_all(&walk, 1, err);

	for (uint32_t i = 0; i < tracker->count; i++) {
		struct tracked *tracked = &tracker->tracked[i];

		tracked->registered = false;
		if (tracked->armed)
			memset(tracked->armed, 0, bitmap_bytes(tracked));
		if (tracked->known)
			memset(tracked->known, 0, bitmap_bytes(tracked));
	}
	return result;
}

/* ---- scanning */

/* Report pages whose entries are empty: rule 2. */
static int scan_empty(struct walk *walk, const struct tracked *tracked, uint64_t start, uint64_t end,
		      struct mgd_error *err)
{
	for (uint64_t run_end; next_armed(tracked, &start, &run_end, end); start = run_end) {
		int failed = walk->last ? 0 : write_protect(walk->tracker, start, run_end, err);

		report(walk, tracked, start, run_end);
		if (failed)
			return -1;
	}
	return 0;
}

/* Report pages that have been protected again: rule 1. */
static void scan_written(struct walk *walk, const struct tracked *tracked, uint64_t start, uint64_t end)
{
	if (tracked->armed)
		set_bits(tracked->armed, page_of(tracked, start), page_of(tracked, end));
	report(walk, tracked, start, end);
}

static void count_present(struct tracked *tracked, const struct mgd_page_region *run)
{
	uint64_t first = page_of(tracked, run->start), end = page_of(tracked, run->end);

	if (!tracked->known || !(run->categories & MGD_PAGE_IS_PRESENT))
		return;
	set_bits(tracked->known, first, end);
	atomic_fetch_add(&tracked->present, end - first);
}

/* The first look: handle empty pages, and find the range that contains written ones. */
static int look(struct walk *walk, const struct step *step, struct step *out_written, struct mgd_error *err)
{
	struct mgd_page_region runs[MGD_PAGEMAP_RUNS];
	struct tracked *tracked = step->tracked;
	const struct mgd_pagemap_query *query = tracked->known ? &ALL_PAGES : &WRITTEN_OR_NOT_PRESENT;
	struct step rest = *step;
	int count;

	*out_written = (struct step){.tracked = tracked, .start = step->end, .end = step->end};
	while (rest.start < rest.end) {
		if (fetch(walk->tracker, &rest, query, runs, &count, err))
			return -1;
		for (int i = 0; i < count; i++) {
			count_present(tracked, &runs[i]);
			if (!(runs[i].categories & POPULATED)) {
				if (scan_empty(walk, tracked, runs[i].start, runs[i].end, err))
					return -1;
			} else if (!(runs[i].categories & MGD_PAGE_IS_WRITTEN)) {
				continue;
			} else if (walk->last) {
				report(walk, tracked, runs[i].start, runs[i].end);
			} else if (tracked->page_bytes > REARMED_BYTES_MAX) {
				int failed = write_protect(walk->tracker, runs[i].start, runs[i].end, err);

				scan_written(walk, tracked, runs[i].start, runs[i].end);
				if (failed)
					return -1;
			} else {
				if (out_written->start == step->end)
					out_written->start = runs[i].start;
				out_written->end = runs[i].end;
			}
		}
	}
	return 0;
}

static int scan_step(struct walk *walk, const struct step *step, struct mgd_error *err)
{
	struct mgd_page_region runs[MGD_PAGEMAP_RUNS];
	struct tracked *tracked = step->tracked;
	struct step rest;
	int count;

	if (look(walk, step, &rest, err))
		return -1;
	while (rest.start < rest.end) {
		uint64_t start = rest.start;

		if (fetch(walk->tracker, &rest, &PROTECT_WRITTEN, runs, &count, err)) {
			/* What was protected before the failure is unknown: rule 4. */
			report(walk, tracked, start, rest.end);
			return -1;
		}
		for (int i = 0; i < count; i++)
			scan_written(walk, tracked, runs[i].start, runs[i].end);
	}
	return 0;
}

/* Find the first known pages in [*start, end), and others that are close to them. */
static bool next_known(const struct tracked *tracked, uint64_t *start, uint64_t *out_run_end, uint64_t end)
{
	uint64_t last = page_of(tracked, end), first, page, run_end;

	first = page = mgd_bitmap_next_atomic(tracked->known, page_of(tracked, *start), last);
	for (run_end = first; page < last && page <= run_end + JOINED_PAGES;
	     page = mgd_bitmap_next_atomic(tracked->known, page + 1, last))
		run_end = page + 1;
	*start = tracked->mapping.address + first * tracked->page_bytes;
	*out_run_end = tracked->mapping.address + run_end * tracked->page_bytes;
	return first < last;
}

static int scan_known_step(struct walk *walk, const struct step *step, struct mgd_error *err)
{
	struct step known = *step;

	if (!step->tracked->known)
		return scan_step(walk, step, err);
	for (; next_known(step->tracked, &known.start, &known.end, step->end); known.start = known.end)
		if (scan_step(walk, &known, err))
			return -1;
	return 0;
}

static int scan(struct walk *walk, uint64_t *out_bytes, struct mgd_error *err)
{
	int result;

	for (uint32_t i = 0; i < walk->tracker->count; i++)
		walk->tracker->tracked[i].present = 0;
	result = walk_all(walk, threads_wanted(walk->tracker), err);
	*out_bytes = walk->bytes;
	return result;
}

int mgd_tracker_scan(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err)
{
	struct walk walk = {.tracker = tracker, .visit = scan_step, .bitmaps = bitmaps};

	return scan(&walk, out_bytes, err);
}

int mgd_tracker_scan_last(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err)
{
	struct walk walk = {.tracker = tracker, .visit = scan_step, .bitmaps = bitmaps, .last = true};

	return scan(&walk, out_bytes, err);
}

/* With more known pages a complete scan is as fast. */
static bool few_are_known(const struct mgd_tracker *tracker)
{
	uint64_t known = 0, all = 0;

	for (uint32_t i = 0; i < tracker->count; i++) {
		const struct tracked *tracked = &tracker->tracked[i];

		for (size_t word = 0; tracked->known && word < bitmap_bytes(tracked) / 8; word++)
			known += mgd_popcount(tracked->known[word]);
		all += tracked->mapping.length_bytes / tracked->page_bytes;
	}
	return known < all / 4;
}

int mgd_tracker_scan_known(struct mgd_tracker *tracker, int last, uint64_t **bitmaps, uint64_t *out_bytes,
			   int *out_complete, struct mgd_error *err)
{
	struct walk walk = {.tracker = tracker, .visit = scan_step, .bitmaps = bitmaps, .last = last};

	*out_complete = !few_are_known(tracker);
	if (!*out_complete)
		walk.visit = scan_known_step;
	return scan(&walk, out_bytes, err);
}

uint64_t mgd_tracker_present_pages(const struct mgd_tracker *tracker, uint32_t region)
{
	uint64_t present = 0;

	for (uint32_t i = 0; i < tracker->count; i++) {
		const struct tracked *tracked = &tracker->tracked[i];

		if (tracked->mapping.region != region)
			continue;
		if (!tracked->known)
			return UINT64_MAX;
		present += tracked->present;
	}
	return present;
}

/*
 * On shared memory SWAPPED is a marker and no page: swapped pages are in the file's page cache, never in a page table.
 * The only page missed by ignoring it is one that is being migrated at this moment; the source engine detects such a
 * gap from the size of the file.
 *
 * A SPARSE page populated since arming is left to the next scan, like everything that is not protected.
 */
static int present_step(struct walk *walk, const struct step *step, struct mgd_error *err)
{
	struct tracked *tracked = step->tracked;
	const struct mgd_pagemap_query *query = tracked->armed ? &POPULATED_ONES : &PRESENT_ONES;
	struct mgd_page_region runs[MGD_PAGEMAP_RUNS];
	struct step rest = *step;
	int count;

	while (rest.start < rest.end) {
		if (fetch(walk->tracker, &rest, query, runs, &count, err))
			return -1;
		for (int i = 0; i < count; i++) {
			uint64_t start = runs[i].start, run_end;

			for (; next_armed(tracked, &start, &run_end, runs[i].end); start = run_end)
				report(walk, tracked, start, run_end);
		}
	}
	return 0;
}

int mgd_tracker_present(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err)
{
	struct walk walk = {.tracker = tracker, .visit = present_step, .bitmaps = bitmaps};

	return scan(&walk, out_bytes, err);
}
