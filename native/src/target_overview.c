/* SPDX-License-Identifier: MIT */
/*
 * The page map of the target: the states of the ledger.  It reads every byte of the ledger that is not in a hole, so
 * that a sparse guest costs little: about a nanosecond per host page.
 */
#include "page_map.h"
#include "target.h"

static unsigned int shown_state(uint8_t byte, bool switched)
{
	switch (mgd_page_state(byte)) {
	case MGD_PAGE_RECEIVED:
		return switched ? MGD_MAP_CURRENT : MGD_MAP_RECEIVED;
	case MGD_PAGE_STALE:
		return byte & MGD_PAGE_REQUESTED ? MGD_MAP_REQUESTED : MGD_MAP_STALE;
	case MGD_PAGE_CURRENT:
		return MGD_MAP_CURRENT;
	case MGD_PAGE_MAPPED:
		return MGD_MAP_MAPPED;
	case MGD_PAGE_POISONED:
		return MGD_MAP_POISONED;
	case MGD_PAGE_ABSENT:
		break;
	}
	return MGD_MAP_ABSENT;
}

int mgd_target_page_map(const struct mgd_target *target, uint32_t cell_count, uint8_t *shares, struct mgd_page_map *out,
			struct mgd_error *err)
{
	const struct mgd_ledger *ledger = &target->ledger;
	bool switched = mgd_ledger_phase(ledger) == MGD_PHASE_SWITCHED;
	struct page_map map;
	uint64_t total = 0;

	for (uint32_t i = 0; i < target->region_count; i++)
		total += target->regions[i].size_bytes;
	if (page_map_begin(&map, total, cell_count, shares, out, err))
		return -1;
	for (uint32_t i = 0; i < target->region_count; i++) {
		const struct target_region *region = &target->regions[i];
		uint64_t page = region->first, end = page + region->page_count;

		while (page < end) {
			/* It looks before it reads: reading a hole of the ledger would fill it. */
			uint64_t known = mgd_ledger_next_known(ledger, page, end), next = known;

			page_map_add(&map, MGD_MAP_ABSENT, (known - page) * region->page_bytes);
			if (known == end)
				break;
			do
				page_map_add(&map, shown_state(mgd_ledger_get(ledger, next++), switched),
					     region->page_bytes);
			while (next < end && next % MGD_LEDGER_STEP_PAGES);
			page = next;
		}
	}
	page_map_end(&map);
	return 0;
}
