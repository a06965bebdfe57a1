/* SPDX-License-Identifier: MIT */
/*
 * The cells of a page map: sums of bytes by state, and the shares that they are of their cell.
 */
#include "page_map.h"

#include <string.h>

#include "bitmap.h"

int page_map_begin(struct page_map *map, uint64_t total_bytes, uint32_t cell_count, uint8_t *shares,
		   struct mgd_page_map *out, struct mgd_error *err)
{
	uint64_t blocks = total_bytes / MGD_BLOCK_BYTES;

	if (!cell_count || !blocks)
		return mgd_misuse(err, "page map: %u cells for %llu bytes", cell_count,
				  (unsigned long long)total_bytes);
	*out = (struct mgd_page_map){0};
	out->cell_bytes = (blocks + cell_count - 1) / cell_count * MGD_BLOCK_BYTES;
	*map = (struct page_map){.out = out, .shares = shares, .cell_left = out->cell_bytes};
	memset(shares, 0, (size_t)cell_count * MGD_MAP_STATES);
	return 0;
}

static void end_cell(struct page_map *map)
{
	uint64_t cell_bytes = map->out->cell_bytes - map->cell_left;

	for (unsigned int state = 0; state < MGD_MAP_STATES; state++) {
		/* A single page among many stays visible. */
		uint64_t share = map->cell[state] / MGD_BLOCK_BYTES * 255 / (cell_bytes / MGD_BLOCK_BYTES);

		map->shares[state] = (uint8_t)(share || !map->cell[state] ? share : 1);
		map->out->bytes[state] += map->cell[state];
		map->cell[state] = 0;
	}
	map->shares += MGD_MAP_STATES;
	map->out->cell_count++;
	map->cell_left = map->out->cell_bytes;
}

void page_map_add(struct page_map *map, unsigned int state, uint64_t bytes)
{
	while (bytes) {
		uint64_t now = mgd_min(bytes, map->cell_left);

		map->cell[state] += now;
		map->cell_left -= now;
		bytes -= now;
		if (!map->cell_left)
			end_cell(map);
	}
}

void page_map_end(struct page_map *map)
{
	if (map->cell_left < map->out->cell_bytes)
		end_cell(map);
}
