/* SPDX-License-Identifier: MIT */
/*
 * Dirty tracking of another process, from outside.
 *
 * The guest's mapping is registered with userfaultfd for asynchronous write-protection: the first write to a protected
 * page lifts the protection by itself, without a message, and the page counts as written.  PAGEMAP_SCAN on the guest's
 * pagemap fetches the written pages and protects them again in one step under the page table lock, so that no write
 * falls between "reported" and "armed".
 *
 * What it relies on, and what is ugly about it:
 *   - Arming protects the whole range first, pages not there yet included (WP_UNPOPULATED leaves a marker in the page
 *     table), and scans ask for PAGE_IS_WRITTEN only: re-arming hugetlb ranges that were never armed has hung kernels.
 *   - A page with neither protection nor marker counts as written, so the error of this interface is always to report too
 *     much: a page that was dropped from the page table (reclaim, MADV_DONTNEED, a new mapping) is reported once more.
 *   - It sees writes through this process's page tables.  Other processes, devices and pinned buffers are the caller's
 *     affair (invariant 7 of the design).
 *   - Scanning a process that has exited reports nothing and fails not: the caller watches the process.
 *
 * Walking page tables costs 0.1 µs a huge page and 15 ns a small one, present or not: 60 ms for 1 TiB or 16 GiB, while the
 * guest is paused.  So large mappings are walked in parts, by as many threads as there are processors.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "error.h"
#include "uapi.h"

/* Runs fetched by one ioctl: 12 KiB of them; a scattered guest costs a call for each 512. */
#define SCAN_RUNS 512
/* A part of a mapping has at least so many pages, below which a thread costs more than it brings. */
#define PART_PAGES_MIN ((uint64_t)1 << 16)
#define PARTS_MAX 16
/* How often an ioctl may find the address space changing before it counts as failed. */
#define CHANGING_TRIES 1000

enum registration { NOT_REGISTERED, REGISTERED_BY_US, REGISTERED_BEFORE };

/* What one thread does of a walk. */
struct part {
	struct mgd_tracker *tracker;
	struct mgd_mapping mapping; /* or the part of one */
	int (*walk)(struct part *part, struct mgd_error *err);
	uint64_t flags, any_of, *bitmap; /* of a scan */
	uint64_t bytes; /* found by it */
	struct mgd_page_region runs[SCAN_RUNS];
	pthread_t thread;
	bool started;
	int result;
	struct mgd_error error;
};

struct mgd_tracker {
	int pagemap_fd, uffd;
	uint32_t mapping_count, region_count;
	struct mgd_mapping *mappings;
	enum registration *registered; /* [mapping_count] */
	uint64_t *page_bytes; /* [region_count] */
	struct part *parts; /* [part_count] */
	uint64_t part_count;
};

static int check_mapping(const struct mgd_mapping *mapping, const uint64_t *page_bytes, uint32_t region_count,
			 struct mgd_error *err)
{
	uint64_t page;

	if (mapping->region >= region_count)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "tracker: mapping of region %u of %u", mapping->region,
				region_count);
	page = page_bytes[mapping->region];
	if (page < MGD_BLOCK_BYTES || (page & (page - 1)))
		return mgd_fail(err, MGD_ERR_ARGUMENT, "tracker: region %u: page size %llu", mapping->region,
				(unsigned long long)page);
	if (!mapping->length_bytes || ((mapping->address | mapping->offset | mapping->length_bytes) & (page - 1)) ||
	    mapping->address + mapping->length_bytes < mapping->address ||
	    mapping->offset + mapping->length_bytes < mapping->offset)
		return mgd_fail(
			err, MGD_ERR_ARGUMENT,
			"tracker: region %u: mapping %#llx+%#llx at offset %#llx does not fit its page size %llu",
			mapping->region, (unsigned long long)mapping->address,
			(unsigned long long)mapping->length_bytes, (unsigned long long)mapping->offset,
			(unsigned long long)page);
	return 0;
}

static uint64_t processors(void)
{
	long count = sysconf(_SC_NPROCESSORS_ONLN);

	return count < 1 ? 1 : count > PARTS_MAX ? PARTS_MAX : (uint64_t)count;
}

int mgd_tracker_create(int pagemap_fd, int uffd, const struct mgd_mapping *mappings, uint32_t mapping_count,
		       const uint64_t *page_bytes, uint32_t region_count, struct mgd_tracker **out,
		       struct mgd_error *err)
{
	struct mgd_tracker *tracker;

	if (!mapping_count || !region_count || region_count > MGD_MAX_REGIONS)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "tracker: %u mappings of %u regions", mapping_count,
				region_count);
	for (uint32_t i = 0; i < mapping_count; i++) {
		if (check_mapping(&mappings[i], page_bytes, region_count, err))
			return -1;
	}
	tracker = calloc(1, sizeof(*tracker));
	if (!tracker)
		return mgd_fail_errno(err, ENOMEM, "tracker");
	tracker->pagemap_fd = fcntl(pagemap_fd, F_DUPFD_CLOEXEC, 0);
	tracker->uffd = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
	if (tracker->pagemap_fd < 0 || tracker->uffd < 0) {
		mgd_fail_errno(err, errno, "tracker: duplicate descriptors");
		goto failed;
	}
	tracker->mapping_count = mapping_count;
	tracker->region_count = region_count;
	tracker->mappings = malloc(mapping_count * sizeof(*mappings));
	tracker->registered = calloc(mapping_count, sizeof(*tracker->registered));
	tracker->page_bytes = malloc(region_count * sizeof(*page_bytes));
	tracker->part_count = processors();
	tracker->parts = calloc(tracker->part_count, sizeof(*tracker->parts));
	if (!tracker->mappings || !tracker->registered || !tracker->page_bytes || !tracker->parts) {
		mgd_fail_errno(err, ENOMEM, "tracker");
		goto failed;
	}
	memcpy(tracker->mappings, mappings, mapping_count * sizeof(*mappings));
	memcpy(tracker->page_bytes, page_bytes, region_count * sizeof(*page_bytes));
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
	if (tracker->pagemap_fd >= 0)
		close(tracker->pagemap_fd);
	if (tracker->uffd >= 0)
		close(tracker->uffd);
	free(tracker->mappings);
	free(tracker->registered);
	free(tracker->page_bytes);
	free(tracker->parts);
	free(tracker);
}

/* ---------------------------------------------------------------- walking in parts */

static void *walk_part(void *argument)
{
	struct part *part = argument;

	part->result = part->walk(part, &part->error);
	return NULL;
}

/* The last part is what the calling thread does itself, with all that no thread could be had for. */
static int walk_all(struct part *parts, uint64_t count, struct mgd_error *err)
{
	sigset_t all, before;
	int result = 0;

	sigfillset(&all); /* signals are for the caller's threads */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	for (uint64_t i = 0; i + 1 < count; i++)
		parts[i].started = !pthread_create(&parts[i].thread, NULL, walk_part, &parts[i]);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	for (uint64_t i = count; i-- > 0;)
		if (!parts[i].started)
			walk_part(&parts[i]);
	for (uint64_t i = 0; i < count; i++) {
		if (parts[i].started)
			pthread_join(parts[i].thread, NULL);
		if (parts[i].result && !result) {
			result = -1;
			if (err)
				*err = parts[i].error;
		}
	}
	return result;
}

/* Have every part of a mapping walked as `what` says; the bytes found are added to its own. */
static int walk_mapping(struct mgd_tracker *tracker, const struct mgd_mapping *mapping, struct part *what,
			struct mgd_error *err)
{
	uint64_t page = tracker->page_bytes[mapping->region], pages = mapping->length_bytes / page, done = 0;
	uint64_t count = pages / PART_PAGES_MIN;
	int result;

	count = count < 1 ? 1 : count > tracker->part_count ? tracker->part_count : count;
	for (uint64_t i = 0; i < count; i++) {
		struct part *part = &tracker->parts[i];
		uint64_t share = (pages - done) / (count - i);

		part->tracker = tracker;
		part->walk = what->walk;
		part->flags = what->flags;
		part->any_of = what->any_of;
		part->bitmap = what->bitmap;
		part->mapping = *mapping;
		part->mapping.address += done * page;
		part->mapping.offset += done * page;
		part->mapping.length_bytes = share * page;
		part->bytes = 0;
		part->started = false;
		part->result = 0;
		done += share;
	}
	result = walk_all(tracker->parts, count, err);
	for (uint64_t i = 0; i < count; i++)
		what->bytes += tracker->parts[i].bytes;
	return result;
}

/* ---------------------------------------------------------------- arming */

static int write_protect(const struct mgd_tracker *tracker, const struct mgd_mapping *mapping, int on,
			 struct mgd_error *err)
{
	struct uffdio_writeprotect arg = {
		.range = {.start = mapping->address, .len = mapping->length_bytes},
		.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};

	for (int tries = 0; ioctl(tracker->uffd, UFFDIO_WRITEPROTECT, &arg); tries++) {
		/* EAGAIN: the address space is being changed (mremap, madvise).  Doing it all again is harmless. */
		if ((errno == EAGAIN || errno == EINTR) && tries < CHANGING_TRIES)
			continue;
		return mgd_fail_errno(err, errno, "UFFDIO_WRITEPROTECT: %#llx+%#llx",
				      (unsigned long long)mapping->address, (unsigned long long)mapping->length_bytes);
	}
	return 0;
}

static int protect_part(struct part *part, struct mgd_error *err)
{
	return write_protect(part->tracker, &part->mapping, 1, err);
}

int mgd_tracker_arm(struct mgd_tracker *tracker, int already_registered, struct mgd_error *err)
{
	struct part what = {.walk = protect_part};

	for (uint32_t i = 0; i < tracker->mapping_count; i++) {
		const struct mgd_mapping *mapping = &tracker->mappings[i];

		if (already_registered)
			tracker->registered[i] = REGISTERED_BEFORE;
		if (tracker->registered[i] == NOT_REGISTERED) {
			if (mgd_uffd_register(tracker->uffd, mapping->address, mapping->length_bytes, MGD_REGISTER_WP,
					      err))
				goto failed;
			tracker->registered[i] = REGISTERED_BY_US;
		}
		if (walk_mapping(tracker, mapping, &what, err))
			goto failed;
	}
	return 0;

failed:
	mgd_tracker_disarm(tracker, NULL);
	return -1;
}

int mgd_tracker_disarm(struct mgd_tracker *tracker, struct mgd_error *err)
{
	int result = 0;

	/* All of it is tried; the first failure is told. */
	for (uint32_t i = 0; i < tracker->mapping_count; i++) {
		const struct mgd_mapping *mapping = &tracker->mappings[i];
		enum registration before = tracker->registered[i];
		struct mgd_error failure = {0};
		int failed = 0;

		tracker->registered[i] = NOT_REGISTERED;
		/* Unregistering lifts the protection, and takes the markers away. */
		if (before == REGISTERED_BY_US)
			failed = mgd_uffd_unregister(tracker->uffd, mapping->address, mapping->length_bytes, &failure);
		else if (before == REGISTERED_BEFORE)
			failed = write_protect(tracker, mapping, 0, &failure);
		/* A guest that has ended needs no freeing. */
		if (failed && failure.kind != MGD_ERR_GUEST_GONE && !result) {
			result = -1;
			if (err)
				*err = failure;
		}
	}
	return result;
}

/* ---------------------------------------------------------------- scanning */

/* Set bits [first, end).  Other parts may be setting, and senders taking words of the bitmap away at the same time. */
static void set_bits(uint64_t *bitmap, uint64_t first, uint64_t end)
{
	while (first < end) {
		uint64_t word = first / 64, low = first % 64;
		uint64_t count = end - first < 64 - low ? end - first : 64 - low;
		uint64_t mask = (count == 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1) << low;

		__atomic_fetch_or(&bitmap[word], mask, __ATOMIC_RELAXED);
		first += count;
	}
}

static int fail_scan(const struct mgd_mapping *mapping, int reason, struct mgd_error *err)
{
	if (reason == ENOTTY)
		return mgd_fail(err, MGD_ERR_UNSUPPORTED, "PAGEMAP_SCAN: this kernel has none (Linux 6.7)");
	if (reason == EPERM)
		return mgd_fail_errno(err, reason,
				      "PAGEMAP_SCAN: %#llx+%#llx is not registered for asynchronous write-protection",
				      (unsigned long long)mapping->address, (unsigned long long)mapping->length_bytes);
	return mgd_fail_errno(err, reason, "PAGEMAP_SCAN: %#llx+%#llx", (unsigned long long)mapping->address,
			      (unsigned long long)mapping->length_bytes);
}

/* The pages that match part->any_of become bits. */
static int scan_part(struct part *part, struct mgd_error *err)
{
	const struct mgd_tracker *tracker = part->tracker;
	const struct mgd_mapping *mapping = &part->mapping;
	uint64_t page = tracker->page_bytes[mapping->region], next_page = 0;
	uint64_t end = mapping->address + mapping->length_bytes;
	struct mgd_pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = part->flags,
		.start = mapping->address,
		.end = end,
		.vec = (uint64_t)(uintptr_t)part->runs,
		.vec_len = SCAN_RUNS,
		.category_anyof_mask = part->any_of,
		.return_mask = part->any_of,
	};
	int tries = 0;

	while (arg.start < end) {
		int count = ioctl(tracker->pagemap_fd, MGD_PAGEMAP_SCAN, &arg);
		int reason = errno;

		if (count < 0 && reason != EINTR && reason != EAGAIN)
			return fail_scan(mapping, reason, err);
		/*
		 * Runs collected before an interruption have been armed again, but the kernel tells how many there are
		 * only on success.  EINTR comes for fatal signals alone; should it ever come otherwise, what was written
		 * in the range is no longer known, and everything in it counts as written.
		 */
		if (count < 0) {
			set_bits(part->bitmap, (arg.start - mapping->address + mapping->offset) / page,
				 (mapping->offset + mapping->length_bytes) / page);
			part->bytes += end - arg.start;
			return 0;
		}
		for (int i = 0; i < count; i++) {
			const struct mgd_page_region *run = &part->runs[i];
			uint64_t first, last;

			if (run->start < mapping->address || run->end > end || run->start >= run->end)
				return mgd_fail(err, MGD_ERR_OS, "PAGEMAP_SCAN: run %#llx-%#llx out of range",
						(unsigned long long)run->start, (unsigned long long)run->end);
			first = (run->start - mapping->address + mapping->offset) / page;
			last = (run->end - 1 - mapping->address + mapping->offset) / page;
			set_bits(part->bitmap, first, last + 1);
			/* Two runs may share a huge page where the array was full in between. */
			if (first < next_page)
				first = next_page;
			if (first <= last)
				part->bytes += (last + 1 - first) * page;
			next_page = last + 1;
		}
		if (arg.walk_end <= arg.start && ++tries > CHANGING_TRIES)
			return mgd_fail(err, MGD_ERR_OS, "PAGEMAP_SCAN: no progress at %#llx",
					(unsigned long long)arg.start);
		/* Stopped inside a huge page: look at all of it again. */
		if (arg.walk_end > arg.start) {
			uint64_t aligned = arg.walk_end & ~(page - 1);

			arg.start = aligned > arg.start || arg.walk_end >= end ? aligned : arg.walk_end;
		}
	}
	return 0;
}

static int scan_all(struct mgd_tracker *tracker, uint64_t flags, uint64_t any_of, uint64_t **bitmaps,
		    uint64_t *out_bytes, struct mgd_error *err)
{
	struct part what = {.walk = scan_part, .flags = flags, .any_of = any_of};
	int result = 0;

	for (uint32_t i = 0; i < tracker->mapping_count && !result; i++) {
		what.bitmap = bitmaps[tracker->mappings[i].region];
		result = walk_mapping(tracker, &tracker->mappings[i], &what, err);
	}
	if (out_bytes)
		*out_bytes = what.bytes;
	return result;
}

int mgd_tracker_scan(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err)
{
	return scan_all(tracker, MGD_PM_SCAN_WP_MATCHING | MGD_PM_SCAN_CHECK_WPASYNC, MGD_PAGE_IS_WRITTEN, bitmaps,
			out_bytes, err);
}

int mgd_tracker_present(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err)
{
	/*
	 * Not PAGE_IS_SWAPPED: the markers that arming leaves on pages not there yet count as that.  Shared pages on swap are
	 * in the file's page cache, never in a page table, so nothing else would be seen by it but a page that is being
	 * migrated at this moment; the source engine finds such a gap by the size of the file.
	 */
	return scan_all(tracker, 0, MGD_PAGE_IS_PRESENT, bitmaps, out_bytes, err);
}
