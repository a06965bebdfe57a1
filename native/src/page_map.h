/* SPDX-License-Identifier: MIT */
/*
 * A page map shows the states of a guest's memory in a fixed number of cells, however large the guest is.  The engines
 * walk their regions in order and name the state of each piece; this file splits the pieces into cells.
 */
#pragma once

#include <stdint.h>

#include "migrated.h"

struct page_map {
	struct mgd_page_map *out;
	uint8_t *shares; /* of the current cell */
	uint64_t cell[MGD_MAP_STATES]; /* bytes of the current cell, by state */
	uint64_t cell_left; /* bytes of it that have no state yet */
};

/* shares: cell_count * MGD_MAP_STATES bytes.  total_bytes: of all regions. */
int page_map_begin(struct page_map *map, uint64_t total_bytes, uint32_t cell_count, uint8_t *shares,
		   struct mgd_page_map *out, struct mgd_error *err);
/* The next `bytes` of memory are in this state. */
void page_map_add(struct page_map *map, unsigned int state, uint64_t bytes);
void page_map_end(struct page_map *map);
