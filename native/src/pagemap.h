/* SPDX-License-Identifier: MIT */
/*
 * ioctl(/proc/PID/pagemap, PAGEMAP_SCAN) reports what the page tables of a process say about its pages, and can
 * write-protect them.  Linux has it since 6.7.
 */
#pragma once

#include <stdbool.h>

#include "migrated.h"
#include "uapi.h"

/* Runs fetched per call: 12 KiB of them.  A scattered guest costs one call per 512 runs. */
#define MGD_PAGEMAP_RUNS 512

/* Select pages for which all of, and any of, these categories are true; categories in `inverted` are negated.
 * answered: the categories reported for each run. */
struct mgd_pagemap_query {
	uint64_t flags; /* MGD_PM_SCAN_* */
	uint64_t all_of, any_of, inverted, answered; /* MGD_PAGE_IS_* */
};

/* Fetch runs of such pages in [*start, end), in order.  *start becomes the address at which the next call continues,
 * or `end` if there are no more.  Both are multiples of page_bytes, and so is every run. */
int mgd_pagemap_fetch(int pagemap_fd, const struct mgd_pagemap_query *query, uint64_t *start, uint64_t end,
		      uint64_t page_bytes, struct mgd_page_region runs[MGD_PAGEMAP_RUNS], int *out_count,
		      struct mgd_error *err);
/* Return whether this kernel supports it, by trying it on a page of our own. */
bool mgd_pagemap_works(void);
