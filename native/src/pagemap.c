/* SPDX-License-Identifier: MIT */
#include "pagemap.h"

#include <errno.h>
#include <sys/ioctl.h>

#include "error.h"

static int fail(int reason, uint64_t start, uint64_t end, struct mgd_error *err)
{
	unsigned long long address = start, length = end - start;

	if (reason == ENOTTY)
		return mgd_fail(err, MGD_ERR_UNSUPPORTED, "PAGEMAP_SCAN: this kernel has none (Linux 6.7)");
	if (reason == EPERM)
		return mgd_fail_errno(err, reason,
				      "PAGEMAP_SCAN: %#llx+%#llx is not registered for asynchronous write-protection",
				      address, length);
	return mgd_fail_errno(err, reason, "PAGEMAP_SCAN: %#llx+%#llx", address, length);
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
		return fail(errno, *start, end, err); /* EINTR comes for fatal signals alone */
	for (int i = 0; i < count; i++) {
		if (runs[i].start < reached || runs[i].start >= runs[i].end || runs[i].end > end ||
		    (runs[i].start | runs[i].end) % page_bytes)
			return mgd_fail(err, MGD_ERR_OS, "PAGEMAP_SCAN: run %#llx-%#llx in %#llx-%#llx",
					(unsigned long long)runs[i].start, (unsigned long long)runs[i].end,
					(unsigned long long)reached, (unsigned long long)end);
		reached = runs[i].end;
	}
	/* Where the runs did not all fit, the walk has ended before the first that did not. */
	reached = arg.walk_end > reached ? arg.walk_end : reached;
	if (reached == *start || reached > end)
		return mgd_fail(err, MGD_ERR_OS, "PAGEMAP_SCAN: %#llx-%#llx: walked to %#llx",
				(unsigned long long)*start, (unsigned long long)end, (unsigned long long)arg.walk_end);
	*start = reached;
	*out_count = count;
	return 0;
}
