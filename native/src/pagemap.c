/* SPDX-License-Identifier: MIT */
/*
 * Issue one PAGEMAP_SCAN at a time and check the answer before using it.  tracker.c explains the categories.
 */
#include "pagemap.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "error.h"

static int fail(int reason, uint64_t start, uint64_t end, struct mgd_error *err)
{
	uint64_t length = end - start;

	if (reason == ENOTTY)
		return mgd_fail(err, MGD_ERR_UNSUPPORTED,
				"PAGEMAP_SCAN: not supported by this kernel (needs Linux 6.7)");
	if (reason == EPERM)
		return mgd_fail_errno(err, reason,
				      "PAGEMAP_SCAN: %#" PRIx64 "+%#" PRIx64
				      " is not registered for asynchronous write-protection",
				      start, length);
	return mgd_fail_errno(err, reason, "PAGEMAP_SCAN: %#" PRIx64 "+%#" PRIx64, start, length);
}

int mgd_pagemap_fetch(int pagemap_fd, const struct mgd_pagemap_query *query, uint64_t *start, uint64_t end,
		      uint64_t page_bytes, struct mgd_page_region runs[MGD_PAGEMAP_RUNS], int *out_count,
		      struct mgd_error *err)
{
	struct mgd_pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = query->flags,
		.start = *start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)runs,
		.vec_len = MGD_PAGEMAP_RUNS,
		.category_inverted = query->inverted,
		.category_mask = query->all_of,
		.category_anyof_mask = query->any_of,
		.return_mask = query->answered,
	};
	uint64_t reached = *start;
	int count = ioctl(pagemap_fd, MGD_PAGEMAP_SCAN, &arg);

	if (count < 0)
		return fail(errno, *start, end, err); /* only fatal signals cause EINTR */
	for (int i = 0; i < count; i++) {
		if (runs[i].start < reached || runs[i].start >= runs[i].end || runs[i].end > end ||
		    (runs[i].start | runs[i].end) % page_bytes)
			return mgd_fail(err, MGD_ERR_OS,
					"PAGEMAP_SCAN: run %#" PRIx64 "-%#" PRIx64 " in %#" PRIx64 "-%#" PRIx64,
					(uint64_t)runs[i].start, (uint64_t)runs[i].end, reached, end);
		reached = runs[i].end;
	}
	/* If the runs did not all fit, the walk ended before the first one that did not. */
	reached = arg.walk_end > reached ? arg.walk_end : reached;
	if (reached == *start || reached > end)
		return mgd_fail(err, MGD_ERR_OS, "PAGEMAP_SCAN: %#" PRIx64 "-%#" PRIx64 ": walked to %#" PRIx64, *start,
				end, (uint64_t)arg.walk_end);
	*start = reached;
	*out_count = count;
	return 0;
}

bool mgd_pagemap_works(void)
{
	const struct mgd_pagemap_query present = {.any_of = MGD_PAGE_IS_PRESENT, .answered = MGD_PAGE_IS_PRESENT};
	char *page = mmap(NULL, MGD_BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct mgd_page_region runs[MGD_PAGEMAP_RUNS];
	uint64_t start = (uintptr_t)page;
	int fd, count = 0;

	if (page == MAP_FAILED)
		return false;
	*page = 1;
	fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)mgd_pagemap_fetch(fd, &present, &start, start + MGD_BLOCK_BYTES, MGD_BLOCK_BYTES, runs, &count,
					NULL);
		close(fd);
	}
	munmap(page, MGD_BLOCK_BYTES);
	return count == 1;
}
