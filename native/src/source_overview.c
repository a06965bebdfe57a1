/* SPDX-License-Identifier: MIT */
/*
 * The page map of the source.  In pre-copy it shows the marks: what the current or the next round sends.  From the
 * freeze on it shows the stale pages that no thread has claimed.  Memory in chunks that were never marked is absent:
 * nothing of it was ever sent.
 */
#include "page_map.h"
#include "source.h"

/* Bits `first` … first+count-1 of the words, each for `bytes` of memory. */
static void add_bits(struct page_map *map, const uint64_t *words, uint64_t first, uint64_t count, uint64_t bytes,
		     unsigned int if_set, unsigned int if_clear)
{
	while (count) {
		uint64_t here = mgd_min(64 - first % 64, count);
		uint64_t all = here == 64 ? ~0ull : (1ull << here) - 1;
		uint64_t value = mgd_word_load_atomic(&words[first / 64]) >> (first % 64) & all;

		if (!value || value == all)
			page_map_add(map, value ? if_set : if_clear, here * bytes);
		else
			for (uint64_t bit = 0; bit < here; bit++)
				page_map_add(map, value >> bit & 1 ? if_set : if_clear, bytes);
		first += here;
		count -= here;
	}
}

static void add_chunk(struct page_map *map, const struct source_region *region, uint64_t chunk, bool frozen, bool whole)
{
	uint64_t first = chunk * MGD_CHUNK_BLOCKS, per_page = region->host_page_blocks;
	uint64_t count = mgd_min(MGD_CHUNK_BLOCKS, region->block_count - first);
	unsigned int rest = whole || mgd_bit_test_atomic(region->seen_chunks, chunk) ? MGD_MAP_SENT : MGD_MAP_ABSENT;

	if (!frozen && mgd_bit_test_atomic(region->marked_chunks, chunk))
		add_bits(map, region->marks, first, count, MGD_BLOCK_BYTES, MGD_MAP_DIRTY, rest);
	else if (frozen && per_page <= MGD_CHUNK_BLOCKS)
		add_bits(map, region->unclaimed, first / per_page, count / per_page, per_page * MGD_BLOCK_BYTES,
			 MGD_MAP_STALE, rest);
	else if (frozen && mgd_bit_test_atomic(region->unclaimed, first / per_page))
		page_map_add(map, MGD_MAP_STALE, count * MGD_BLOCK_BYTES);
	else
		page_map_add(map, rest, count * MGD_BLOCK_BYTES);
}

int mgd_source_page_map(const struct mgd_source *source, uint32_t cell_count, uint8_t *shares, struct mgd_page_map *out,
			struct mgd_error *err)
{
	bool frozen = source->phase == SOURCE_FROZEN;
	struct page_map map;
	uint64_t total = 0;

	for (uint32_t i = 0; i < source->region_count; i++)
		total += source->regions[i].size_bytes;
	if (page_map_begin(&map, total, cell_count, shares, out, err))
		return -1;
	for (uint32_t i = 0; i < source->region_count; i++)
		for (uint64_t chunk = 0; chunk < source->regions[i].chunk_count; chunk++)
			add_chunk(&map, &source->regions[i], chunk, frozen, source->whole);
	page_map_end(&map);
	return 0;
}
