// SPDX-License-Identifier: MIT
/* Who sends which stale page: a page is sent by whoever clears its bit in `unclaimed`. */
#include "source_state.h"

/* The longest run of claimable pages around `page` is taken, within one window: contiguous, since one FINAL frame makes
 * every page it covers current. */
bool source_claim(struct mgd_source *source, struct source_region *region, uint64_t page, uint64_t window_blocks,
		  struct source_claim *out)
{
	uint64_t window_pages = window_blocks / region->host_page_blocks;
	uint64_t low = page, high = page + 1, first = page, end = page + 1;

	if (!mgd_bit_clear_atomic(region->unclaimed, page))
		return false;
	if (window_pages > 1) {
		low = page / window_pages * window_pages;
		high = low + window_pages < region->host_page_count ? low + window_pages : region->host_page_count;
	}
	while (end < high && mgd_bit_clear_atomic(region->unclaimed, end))
		end++;
	while (first > low && mgd_bit_clear_atomic(region->unclaimed, first - 1))
		first--;
	__atomic_fetch_sub(&source->unclaimed_bytes, (end - first) * region->host_page_blocks * MGD_BLOCK_BYTES,
			   __ATOMIC_RELAXED);
	__atomic_fetch_sub(&source->unclaimed_pages, end - first, __ATOMIC_ACQ_REL);
	*out = (struct source_claim){.region = region, .page = first, .count = end - first};
	return true;
}

static uint32_t region_of(const struct mgd_source *source, uint64_t numbered_page)
{
	uint32_t index = source->region_count - 1;

	while (index && source->regions[index].first_host_page > numbered_page)
		index--;
	return index;
}

bool source_claim_next(struct mgd_source *source, struct source_claim *out)
{
	uint64_t cursor = __atomic_load_n(&source->cursor, __ATOMIC_ACQUIRE);
	uint32_t start = region_of(source, cursor);

	/* Once round all regions, and the beginning of the first one at the end. */
	for (uint32_t turn = 0; turn <= source->region_count; turn++) {
		struct source_region *region = &source->regions[(start + turn) % source->region_count];
		uint64_t page = turn == 0 ? cursor - region->first_host_page : 0;

		if (!__atomic_load_n(&source->unclaimed_pages, __ATOMIC_ACQUIRE))
			return false;
		for (;; page++) {
			uint64_t next;

			page = mgd_bitmap_next_atomic(region->unclaimed, page, region->host_page_count);
			if (page >= region->host_page_count)
				break;
			if (!source_claim(source, region, page, MGD_CHUNK_BLOCKS, out))
				continue;
			next = region->first_host_page + out->page + out->count;
			/* Unless a demand has moved it meanwhile: that knows better. */
			__atomic_compare_exchange_n(&source->cursor, &cursor, next % source->host_page_count, false,
						    __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
			return true;
		}
	}
	return false;
}

void source_tell_all_sent(struct mgd_source *source)
{
	bool tell;

	pthread_mutex_lock(&source->lock);
	tell = source->serving && !source->stopping && !source->all_sent_told &&
	       !__atomic_load_n(&source->unfinished_pages, __ATOMIC_ACQUIRE);
	if (tell)
		source->all_sent_told = true;
	pthread_mutex_unlock(&source->lock);
	if (tell)
		mgd_event_post(&source->events, MGD_EVENT_ALL_SENT, 0, 0, NULL);
}

void source_claim_done(struct mgd_source *source, uint64_t count)
{
	if (__atomic_sub_fetch(&source->unfinished_pages, count, __ATOMIC_ACQ_REL) == 0)
		source_tell_all_sent(source);
}
