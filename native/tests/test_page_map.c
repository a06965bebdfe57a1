/* SPDX-License-Identifier: MIT */
/* Tests of the page maps of both engines: every byte of memory is in one cell and one state. */
#include <sys/mman.h>
#include <sys/stat.h>

#include "ledger.h"
#include "page_map.h"
#include "source_peer.h"
#include "target.h"

#define CELLS 1024

static uint8_t shares[CELLS * MGD_MAP_STATES];

static uint8_t share(uint32_t cell, unsigned int state)
{
	return shares[cell * MGD_MAP_STATES + state];
}

static uint64_t all_bytes(const struct mgd_page_map *map)
{
	uint64_t sum = 0;

	for (unsigned int state = 0; state < MGD_MAP_STATES; state++)
		sum += map->bytes[state];
	return sum;
}

static void a_piece_spans_cells_and_a_cell_holds_pieces(void)
{
	struct mgd_page_map out;
	struct mgd_error err = {0};
	struct page_map map;

	/* 10 blocks in 4 cells: 3 blocks each, the last one has 1. */
	CHECK_OK(page_map_begin(&map, 10 * BLOCK, 4, shares, &out, &err), err);
	page_map_add(&map, MGD_MAP_SENT, 7 * BLOCK);
	page_map_add(&map, MGD_MAP_DIRTY, 2 * BLOCK);
	page_map_add(&map, MGD_MAP_ABSENT, 1 * BLOCK);
	page_map_end(&map);
	CHECK_EQUAL(out.cell_bytes, 3 * BLOCK);
	CHECK_EQUAL(out.cell_count, 4);
	CHECK_EQUAL(out.bytes[MGD_MAP_SENT], 7 * BLOCK);
	CHECK_EQUAL(all_bytes(&out), 10 * BLOCK);
	CHECK_EQUAL(share(0, MGD_MAP_SENT), 255);
	CHECK_EQUAL(share(2, MGD_MAP_SENT), 85);
	CHECK_EQUAL(share(2, MGD_MAP_DIRTY), 170);
	CHECK_EQUAL(share(3, MGD_MAP_ABSENT), 255);
	CHECK_FAILS(page_map_begin(&map, 10 * BLOCK, 0, shares, &out, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(page_map_begin(&map, 0, 4, shares, &out, &err), err, MGD_ERR_ARGUMENT);
}

/* A guest of 1 TiB in pages of 4 KiB, which nobody has to allocate. */
static void the_target_shows_its_ledger(void)
{
	struct mgd_target_region region = {
		.flags = MGD_TARGET_UNRESERVED, .size_bytes = 1ull << 40, .host_page_bytes = MGD_BLOCK_BYTES};
	uint64_t per_cell = (1ull << 40) / CELLS / MGD_BLOCK_BYTES;
	struct mgd_target *target;
	struct mgd_page_map map;
	struct mgd_error err = {0};
	struct stat file;
	uint8_t before;
	int ledger;

	region.memory_fd = memfd_create("guest", MFD_CLOEXEC);
	ledger = memfd_create("ledger", MFD_CLOEXEC);
	CHECK(region.memory_fd >= 0 && ledger >= 0);
	CHECK_EQUAL(ftruncate(region.memory_fd, (off_t)region.size_bytes), 0);
	CHECK_EQUAL(ftruncate(ledger, (off_t)mgd_ledger_bytes(&region, 1)), 0);
	CHECK_OK(mgd_target_create(&region, 1, 1, ledger, 0, peer_secret, &target, &err), err);

	mgd_ledger_received(&target->ledger, 0);
	for (uint64_t page = per_cell; page < 2 * per_cell; page++)
		mgd_ledger_received(&target->ledger, page);
	CHECK(mgd_ledger_make_stale(&target->ledger, 7 * per_cell));
	CHECK(mgd_ledger_make_stale(&target->ledger, 7 * per_cell + 1));
	CHECK(mgd_ledger_request(&target->ledger, 7 * per_cell + 1, &before));
	CHECK_OK(mgd_target_page_map(target, CELLS, shares, &map, &err), err);
	CHECK_EQUAL(map.cell_count, CELLS);
	CHECK_EQUAL(all_bytes(&map), region.size_bytes);
	CHECK_EQUAL(map.bytes[MGD_MAP_RECEIVED], (per_cell + 1) * MGD_BLOCK_BYTES);
	CHECK_EQUAL(map.bytes[MGD_MAP_STALE], MGD_BLOCK_BYTES);
	CHECK_EQUAL(map.bytes[MGD_MAP_REQUESTED], MGD_BLOCK_BYTES);
	CHECK_EQUAL(share(0, MGD_MAP_RECEIVED), 1); /* one page of many shows */
	CHECK_EQUAL(share(1, MGD_MAP_RECEIVED), 255);
	CHECK_EQUAL(share(7, MGD_MAP_REQUESTED), 1);
	CHECK_EQUAL(share(8, MGD_MAP_ABSENT), 255);

	/* After the switchover, what has arrived is current. */
	mgd_ledger_set_phase(&target->ledger, MGD_PHASE_SWITCHED);
	CHECK(mgd_ledger_mapped(&target->ledger, 0));
	CHECK_OK(mgd_target_page_map(target, CELLS, shares, &map, &err), err);
	CHECK_EQUAL(map.bytes[MGD_MAP_MAPPED], MGD_BLOCK_BYTES);
	CHECK_EQUAL(map.bytes[MGD_MAP_CURRENT], per_cell * MGD_BLOCK_BYTES);
	CHECK_EQUAL(map.bytes[MGD_MAP_RECEIVED], 0);

	/* Looking does not fill the holes of the ledger. */
	CHECK_EQUAL(fstat(ledger, &file), 0);
	CHECK((uint64_t)file.st_blocks * 512 < 4 * per_cell);
	mgd_target_destroy(target);
	close(ledger);
	close(region.memory_fd);
}

static void the_source_shows_what_is_left_to_send(void)
{
	struct peer *peer = peer_create(8 * MIB, 4 * KIB, 64 * KIB, 1);
	struct mgd_page_map map;
	struct mgd_error err = {0};
	uint64_t stale;

	peer_connect(peer);
	guest_write(peer, 3, 1);
	guest_write(peer, 700, 1);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_mark_populated(peer->source, NULL, &err), err);
	CHECK_OK(mgd_source_page_map(peer->source, 4, shares, &map, &err), err);
	CHECK_EQUAL(all_bytes(&map), 8 * MIB);
	CHECK_EQUAL(map.bytes[MGD_MAP_DIRTY], 2 * BLOCK);
	CHECK_EQUAL(map.bytes[MGD_MAP_ABSENT], 4 * MIB); /* two chunks have nothing in them */
	CHECK_EQUAL(share(0, MGD_MAP_DIRTY), 1);
	CHECK_EQUAL(share(3, MGD_MAP_ABSENT), 255);
	peer_round(peer, 1);
	CHECK_OK(mgd_source_page_map(peer->source, 4, shares, &map, &err), err);
	CHECK_EQUAL(map.bytes[MGD_MAP_SENT], 4 * MIB);
	CHECK_EQUAL(map.bytes[MGD_MAP_DIRTY], 0);
	guest_write(peer, 17, 2);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	CHECK_OK(mgd_source_page_map(peer->source, 4, shares, &map, &err), err);
	CHECK_EQUAL(map.bytes[MGD_MAP_STALE], 64 * KIB);
	CHECK_EQUAL(map.bytes[MGD_MAP_SENT], 4 * MIB - 64 * KIB);
	peer_destroy(peer);
}

/* Host pages larger than a chunk. */
static void a_gigantic_page_is_stale_in_every_cell(void)
{
	struct peer *peer = peer_create(8 * MIB, 4 * KIB, 4 * MIB, 1);
	struct mgd_page_map map;
	struct mgd_error err = {0};
	uint64_t stale;

	peer_connect(peer);
	guest_write(peer, 3, 1);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	CHECK_OK(mgd_source_page_map(peer->source, 8, shares, &map, &err), err);
	CHECK_EQUAL(map.bytes[MGD_MAP_STALE], 4 * MIB);
	for (uint32_t cell = 0; cell < 8; cell++)
		CHECK_EQUAL(share(cell, MGD_MAP_STALE), cell < 4 ? 255 : 0);
	peer_destroy(peer);
}

int main(void)
{
	alarm(110);
	RUN(a_piece_spans_cells_and_a_cell_holds_pieces);
	RUN(the_target_shows_its_ledger);
	RUN(the_source_shows_what_is_left_to_send);
	RUN(a_gigantic_page_is_stale_in_every_cell);
	return 0;
}
