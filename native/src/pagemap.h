/* SPDX-License-Identifier: MIT */
/*
 * ioctl(/proc/PID/pagemap, PAGEMAP_SCAN) asks what the page tables of a process say of its pages, and may write-protect
 * them.  Linux has it since 6.7.
 */
#pragma once

#include <stdbool.h>

#include "migrated.h"
#include "uapi.h"

/* Runs fetched by one call: 12 KiB of them; a scattered guest costs a call for each 512. */
#define MGD_PAGEMAP_RUNS 512

/* Pages of which all of, and any of, these categories are true; those in `inverted` count as their opposite there.
 * answered: the categories that a run tells. */
struct mgd_pagemap_query {
	uint64_t flags; /* MGD_PM_SCAN_* */
	uint64_t all_of, any_of, inverted, answered; /* MGD_PAGE_IS_* */
};

/* Fetch runs of such pages in [*start, end), in order; *start becomes the address where the next call has to go on, `end`
 * when there are no more.  Both are whole pages of page_bytes, and so is every run. */
int mgd_pagemap_fetch(int pagemap_fd, const struct mgd_pagemap_query *query, uint64_t *start, uint64_t end,
		      uint64_t page_bytes, struct mgd_page_region runs[MGD_PAGEMAP_RUNS], int *out_count,
		      struct mgd_error *err);
/* Whether this kernel has it: tried on a page of our own. */
bool mgd_pagemap_works(void);
