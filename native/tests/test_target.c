/* SPDX-License-Identifier: MIT */
/* Tests of the target engine without a guest.  They check what valid frames do to memory and ledger, and what
 * invalid ones do not. */
#include "target_rig.h"

#include <linux/sockios.h>
#include <malloc.h>
#include <sys/ioctl.h>

#include "target.h"

#define PAGES 1024u /* of 4 KiB: two chunks */

struct bench {
	int memory, ledger, bulk[2], urgent;
	uint64_t *view; /* the test's own mapping of the file */
	struct mgd_target_region region;
	struct mgd_target *target;
};

static void open_bench(struct bench *bench, uint64_t host_page_bytes, uint64_t size_bytes)
{
	struct mgd_error err = {0};

	/* Any host page size works on shmem as long as nothing is armed. */
	bench->memory = rig_memfd(MGD_BLOCK_BYTES, size_bytes);
	bench->region = (struct mgd_target_region){
		.memory_fd = bench->memory, .size_bytes = size_bytes, .host_page_bytes = host_page_bytes};
	bench->ledger = memfd_create("ledger", MFD_CLOEXEC);
	CHECK_EQUAL(ftruncate(bench->ledger, (off_t)mgd_ledger_bytes(&bench->region, 1)), 0);
	CHECK_OK(mgd_target_create(&bench->region, 1, 2, bench->ledger, 0, rig_secret, &bench->target, &err), err);
	bench->view = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, bench->memory, 0);
	CHECK(bench->view != MAP_FAILED);
	bench->bulk[0] = rig_stream(bench->target, 0);
	bench->bulk[1] = rig_stream(bench->target, 1);
	bench->urgent = rig_stream(bench->target, MGD_STREAM_URGENT);
}

static void close_bench(struct bench *bench)
{
	mgd_target_destroy(bench->target);
	munmap(bench->view, bench->region.size_bytes);
	close(bench->memory);
	close(bench->ledger);
	close(bench->bulk[0]);
	close(bench->bulk[1]);
	close(bench->urgent);
}

static int version_at(const struct bench *bench, uint64_t block)
{
	return rig_version(bench->view + block * WORDS, block);
}

static uint8_t ledger_byte(const struct bench *bench, uint32_t page)
{
	uint8_t byte;

	/* The pages' bytes are the end of the required size, after the header. */
	CHECK_EQUAL(pread(bench->ledger, &byte, 1,
			  (off_t)(mgd_ledger_bytes(&bench->region, 1) -
				  bench->region.size_bytes / bench->region.host_page_bytes + page)),
		    1);
	return byte;
}

static void barrier(struct bench *bench, uint64_t number)
{
	rig_send_barrier(bench->bulk[0], number);
	rig_send_barrier(bench->bulk[1], number);
	CHECK_EQUAL(rig_event(bench->target, MGD_EVENT_BARRIER).value, number);
}

/* Switch over with exactly these pages stale. */
static void switch_over(struct bench *bench, const uint32_t *stale, size_t count)
{
	uint64_t pages = bench->region.size_bytes / bench->region.host_page_bytes;
	uint8_t bits[PAGES / 8 * 4] = {0};
	struct mgd_error err = {0};

	for (size_t i = 0; i < count; i++)
		bits[stale[i] / 8] |= (uint8_t)(1u << stale[i] % 8);
	CHECK_OK(mgd_target_stale_map(bench->target, 0, 0, bits, (pages + 7) / 8, &err), err);
	CHECK_OK(mgd_target_switchover(bench->target, &err), err);
}

static bool lacks(const struct bench *bench, uint32_t page)
{
	uint64_t pages = bench->region.size_bytes / bench->region.host_page_bytes;
	uint8_t bits[PAGES / 8 * 4];
	struct mgd_error err = {0};

	CHECK_OK(mgd_target_lacking(bench->target, 0, 0, bits, (pages + 7) / 8, &err), err);
	return bits[page / 8] >> page % 8 & 1;
}

static void lost(struct bench *bench, uint32_t stream, int kind, const char *text)
{
	struct mgd_event event = rig_event(bench->target, MGD_EVENT_STREAM_LOST);

	CHECK_EQUAL(event.stream, stream);
	CHECK_EQUAL(event.error.kind, kind);
	if (!strstr(event.error.message, text)) {
		fprintf(stderr, "'%s' lacks '%s'\n", event.error.message, text);
		abort();
	}
}

static void precopy_writes_present_and_zero_blocks_in_place(void)
{
	int versions[MGD_CHUNK_BLOCKS];
	struct mgd_target_stats stats;
	struct bench bench;

	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		versions[i] = i % 3 == 0 ? 1 : i % 3 == 1 ? 0 : UNCHANGED;
	rig_send_all(bench.bulk[0], 0, 0, 7, 0, 5);
	rig_send(bench.bulk[0], 0, 0, MGD_CHUNK_BLOCKS, 0, versions);
	barrier(&bench, 1);
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		CHECK_EQUAL(version_at(&bench, i), versions[i] == UNCHANGED ? (i < 7 ? 5 : 0) : versions[i]);
	mgd_target_stats(bench.target, &stats);
	CHECK_EQUAL(stats.frames, 2);
	CHECK_EQUAL(stats.payload_bytes, (7 + 171) * MGD_BLOCK_BYTES);
	close_bench(&bench);
}

static void a_page_of_zeros_never_sent_takes_no_memory(void)
{
	struct bench bench;
	struct mgd_target_stats stats;
	uint32_t stale[1] = {3};

	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	switch_over(&bench, stale, 1);
	rig_send_all(bench.bulk[0], 0, 3, 1, MGD_FRAME_FINAL, 0);
	CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_ALL_CURRENT).kind, MGD_EVENT_ALL_CURRENT);
	mgd_target_stats(bench.target, &stats);
	CHECK_EQUAL(stats.current_pages, PAGES);
	CHECK_EQUAL(lseek(bench.memory, 0, SEEK_DATA), -1);
	close_bench(&bench);
}

static void barrier_waits_for_every_bulk_stream(void)
{
	struct mgd_event event;
	struct bench bench;

	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	/* One stream is ahead: each barrier is reported when the last stream has it. */
	rig_send_barrier(bench.bulk[0], 1);
	rig_send_barrier(bench.bulk[0], 2);
	rig_send_barrier(bench.bulk[1], 1);
	CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_BARRIER).value, 1);
	CHECK_EQUAL(mgd_target_next_event(bench.target, &event), 0);
	rig_send_barrier(bench.bulk[1], 2);
	CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_BARRIER).value, 2);
	rig_send_barrier(bench.bulk[1], 2);
	lost(&bench, 1, MGD_ERR_PEER, "barrier: number 2 after 2");
	close_bench(&bench);
}

static void changed_blocks_of_a_stale_page_complete_it(void)
{
	int versions[MGD_CHUNK_BLOCKS];
	struct bench bench;
	uint32_t stale[1] = {0};

	open_bench(&bench, 2 * MIB, 4 * MIB);
	rig_send_all(bench.bulk[0], 0, 0, MGD_CHUNK_BLOCKS, 0, 1);
	rig_send_all(bench.bulk[1], 0, MGD_CHUNK_BLOCKS, MGD_CHUNK_BLOCKS, 0, 1);
	barrier(&bench, 1);
	switch_over(&bench, stale, 1);
	CHECK(lacks(&bench, 0) && !lacks(&bench, 1));
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		versions[i] = i == 7 ? 2 : i == 8 ? 0 : i == 500 ? 3 : UNCHANGED;
	rig_send(bench.urgent, 0, 0, MGD_CHUNK_BLOCKS, MGD_FRAME_FINAL, versions);
	rig_event(bench.target, MGD_EVENT_ALL_CURRENT);
	CHECK(!lacks(&bench, 0));
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		CHECK_EQUAL(version_at(&bench, i), versions[i] == UNCHANGED ? 1 : versions[i]);
	close_bench(&bench);
}

static void a_page_sent_twice_is_written_once(void)
{
	struct mgd_target_stats stats;
	struct bench bench;
	uint32_t stale[2] = {1, 2};

	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	switch_over(&bench, stale, 2);
	rig_send_all(bench.bulk[0], 0, 1, 1, MGD_FRAME_FINAL, 1);
	RIG_UNTIL(bench.target, stats, stats.stale_pages == 1);
	/* Only page 2 of the second frame is needed, and nothing of the third. */
	rig_send_all(bench.bulk[1], 0, 1, 2, MGD_FRAME_FINAL, 9);
	rig_event(bench.target, MGD_EVENT_ALL_CURRENT);
	rig_send_all(bench.urgent, 0, 0, 4, MGD_FRAME_FINAL, 9);
	RIG_UNTIL(bench.target, stats, stats.frames == 3);
	CHECK_EQUAL(stats.discarded_frames, 1);
	CHECK_EQUAL(version_at(&bench, 0), 0);
	CHECK_EQUAL(version_at(&bench, 1), 1);
	CHECK_EQUAL(version_at(&bench, 2), 9);
	close_bench(&bench);
}

static void a_page_claimed_by_one_connection_is_not_written_by_another(void)
{
	struct rig_frame *first = malloc(sizeof(*first));
	struct mgd_target_stats stats;
	struct bench bench;
	uint32_t stale[1] = {0};
	int versions[MGD_CHUNK_BLOCKS];

	CHECK(first != NULL);
	open_bench(&bench, 2 * MIB, 4 * MIB);
	rig_send_all(bench.bulk[0], 0, 0, 64, 0, 1);
	barrier(&bench, 1);
	switch_over(&bench, stale, 1);
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		versions[i] = i < 4 ? 2 : UNCHANGED;
	rig_build(first, 0, 0, MGD_CHUNK_BLOCKS, MGD_FRAME_FINAL, versions);
	/* Half of it on the first connection: the page is claimed as soon as the head is read. */
	rig_write(bench.bulk[0], first->head, first->head_bytes);
	rig_write(bench.bulk[0], first->payload, MGD_BLOCK_BYTES);
	RIG_UNTIL(bench.target, stats, ledger_byte(&bench, 0) & MGD_PAGE_RECEIVING);
	rig_send_built(bench.bulk[1], first);
	RIG_UNTIL(bench.target, stats, stats.frames == 2);
	CHECK_EQUAL(stats.discarded_frames, 1);
	rig_write(bench.bulk[0], first->payload + WORDS, 3 * MGD_BLOCK_BYTES);
	rig_event(bench.target, MGD_EVENT_ALL_CURRENT);
	RIG_UNTIL(bench.target, stats, stats.frames == 3);
	CHECK_EQUAL(stats.discarded_frames, 1);
	for (int i = 0; i < 64; i++)
		CHECK_EQUAL(version_at(&bench, i), i < 4 ? 2 : 1);
	close_bench(&bench);
	free(first);
}

/* The page was pre-copied and only changed blocks are resent, so a damaged frame must not have touched the others. */
static void a_damaged_frame_leaves_a_precopied_page_as_it_was(void)
{
	struct rig_frame *bad = malloc(sizeof(*bad));
	struct mgd_target_stats stats;
	struct bench bench;
	uint32_t stale[1] = {0};
	int versions[MGD_CHUNK_BLOCKS];

	CHECK(bad != NULL);
	open_bench(&bench, 2 * MIB, 4 * MIB);
	rig_send_all(bench.bulk[0], 0, 0, 64, 0, 1);
	barrier(&bench, 1);
	switch_over(&bench, stale, 1);
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		versions[i] = i < 32 ? 2 : UNCHANGED;
	rig_build(bad, 0, 0, MGD_CHUNK_BLOCKS, MGD_FRAME_FINAL, versions);
	bad->payload[31 * WORDS + 17] ^= 1;
	rig_send_built(bench.bulk[0], bad);
	lost(&bench, 0, MGD_ERR_PEER, "check is wrong");
	CHECK(lacks(&bench, 0));
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		CHECK_EQUAL(version_at(&bench, i), i < 64 ? 1 : 0);
	/* Cut short, on another connection. */
	bad->payload[31 * WORDS + 17] ^= 1;
	rig_write(bench.bulk[1], bad->head, bad->head_bytes);
	rig_write(bench.bulk[1], bad->payload, 9 * MGD_BLOCK_BYTES);
	shutdown(bench.bulk[1], SHUT_RDWR);
	lost(&bench, 1, MGD_ERR_CLOSED, "");
	CHECK(lacks(&bench, 0));
	CHECK_EQUAL(version_at(&bench, 0), 1);
	/* Then completed after a reconnect. */
	mgd_target_drop_streams(bench.target);
	close(bench.bulk[0]);
	bench.bulk[0] = rig_stream(bench.target, 0);
	rig_send_built(bench.bulk[0], bad);
	rig_event(bench.target, MGD_EVENT_ALL_CURRENT);
	for (int i = 0; i < 64; i++)
		CHECK_EQUAL(version_at(&bench, i), i < 32 ? 2 : 1);
	mgd_target_stats(bench.target, &stats);
	CHECK_EQUAL(stats.stale_pages, 0);
	close_bench(&bench);
	free(bad);
}

static void a_damaged_frame_leaves_a_blank_page_blank(void)
{
	struct rig_frame *bad = malloc(sizeof(*bad));
	struct bench bench;
	uint32_t stale[1] = {1};
	int versions[MGD_CHUNK_BLOCKS];

	CHECK(bad != NULL);
	open_bench(&bench, 2 * MIB, 4 * MIB);
	switch_over(&bench, stale, 1);
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		versions[i] = i % 2 ? 2 : UNCHANGED;
	rig_build(bad, 0, MGD_CHUNK_BLOCKS, MGD_CHUNK_BLOCKS, MGD_FRAME_FINAL, versions);
	bad->payload[5] ^= 1;
	rig_send_built(bench.bulk[0], bad);
	lost(&bench, 0, MGD_ERR_PEER, "check is wrong");
	for (uint64_t i = 0; i < MGD_CHUNK_BLOCKS; i++)
		CHECK_EQUAL(version_at(&bench, MGD_CHUNK_BLOCKS + i), 0);
	bad->payload[5] ^= 1;
	rig_send_built(bench.bulk[1], bad);
	rig_event(bench.target, MGD_EVENT_ALL_CURRENT);
	for (uint64_t i = 0; i < MGD_CHUNK_BLOCKS; i++)
		CHECK_EQUAL(version_at(&bench, MGD_CHUNK_BLOCKS + i), i % 2 ? 2 : 0);
	close_bench(&bench);
	free(bad);
}

static void frames_out_of_their_time_end_the_stream(void)
{
	const uint8_t bit_of_page_0 = 1;
	struct mgd_error err = {0};
	struct bench bench;
	uint32_t stale[1] = {0};

	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	rig_send_all(bench.bulk[0], 0, 0, 1, MGD_FRAME_FINAL, 1);
	lost(&bench, 0, MGD_ERR_PEER, "FINAL before the switchover");
	rig_send_all(bench.urgent, 0, 0, 1, 0, 1);
	lost(&bench, MGD_STREAM_URGENT, MGD_ERR_PEER, "pre-copy frame on the urgent connection");
	mgd_target_drop_streams(bench.target);
	close(bench.bulk[0]);
	bench.bulk[0] = rig_stream(bench.target, 0);
	close(bench.bulk[1]);
	bench.bulk[1] = rig_stream(bench.target, 1);
	CHECK_OK(mgd_target_stale_map(bench.target, 0, 0, &bit_of_page_0, 1, &err), err);
	rig_send_all(bench.bulk[0], 0, 0, 1, 0, 1);
	lost(&bench, 0, MGD_ERR_PEER, "comes after the stale map");
	switch_over(&bench, stale, 1);
	rig_send_all(bench.bulk[1], 0, 0, 1, 0, 1);
	lost(&bench, 1, MGD_ERR_PEER, "late frame after the switchover");
	CHECK_EQUAL(version_at(&bench, 0), 0);
	CHECK(lacks(&bench, 0));
	close_bench(&bench);
}

/* Wait until everything written to this end has been read. */
static void all_read(int fd)
{
	int left = 1;

	while (left) {
		CHECK(ioctl(fd, SIOCOUTQ, &left) == 0);
		sched_yield();
	}
}

/* The guest discards a page while it is being received, and there is no other: here, its file has become too short.
 * The connection ends, the page is stale, and it arrives once there is memory. */
static void memory_that_goes_away_ends_only_the_stream(void)
{
	struct rig_frame *frame = malloc(sizeof(*frame));
	struct mgd_target_stats stats;
	struct bench bench;
	uint32_t stale[2] = {0, 1};
	int versions[MGD_CHUNK_BLOCKS];

	CHECK(frame != NULL);
	open_bench(&bench, 2 * MIB, 4 * MIB);
	rig_send_all(bench.bulk[0], 0, 0, MGD_CHUNK_BLOCKS, 0, 1); /* page 0 exists, page 1 is BLANK */
	barrier(&bench, 1);
	switch_over(&bench, stale, 2);
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		versions[i] = i < 2 ? 7 : i < 4 ? 0 : UNCHANGED;
	for (uint32_t page = 0; page < 2; page++) {
		rig_build(frame, 0, page * MGD_CHUNK_BLOCKS, MGD_CHUNK_BLOCKS, MGD_FRAME_FINAL, versions);
		rig_write(bench.bulk[page], frame->head, frame->head_bytes);
		rig_write(bench.bulk[page], frame->payload, MGD_BLOCK_BYTES);
		all_read(bench.bulk[page]); /* so its memory is allocated */
		CHECK_EQUAL(ftruncate(bench.memory, 0), 0);
		rig_write(bench.bulk[page], frame->payload + WORDS, MGD_BLOCK_BYTES);
		CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_STREAM_LOST).error.kind, MGD_ERR_POOL);
		CHECK_EQUAL(ftruncate(bench.memory, 4 * MIB), 0);
		CHECK(lacks(&bench, page));
	}
	for (uint32_t page = 0; page < 2; page++)
		rig_send_all(bench.urgent, 0, page * MGD_CHUNK_BLOCKS, MGD_CHUNK_BLOCKS, MGD_FRAME_FINAL, 8);
	rig_event(bench.target, MGD_EVENT_ALL_CURRENT);
	RIG_UNTIL(bench.target, stats, stats.stale_pages == 0);
	CHECK_EQUAL(version_at(&bench, 1023), 8);
	close_bench(&bench);
	free(frame);
}

static void garbage_ends_only_its_stream(void)
{
	uint8_t garbage[200];
	struct bench bench;

	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	memset(garbage, 0x5a, sizeof(garbage));
	rig_write(bench.bulk[0], garbage, sizeof(garbage));
	lost(&bench, 0, MGD_ERR_PEER, "magic");
	rig_send_all(bench.bulk[1], 0, PAGES - 1, 1, 0, 4);
	rig_send_barrier(bench.bulk[1], 1);
	shutdown(bench.bulk[1], SHUT_WR);
	lost(&bench, 1, MGD_ERR_CLOSED, "frame boundary");
	CHECK_EQUAL(version_at(&bench, PAGES - 1), 4);
	close_bench(&bench);
}

/* Send one of several frames of page 0; one block of it is present. */
static void send_part(int fd, struct rig_frame *frame, uint32_t part, bool end, const int *versions)
{
	uint64_t hash;

	rig_build(frame, 0, part * MGD_CHUNK_BLOCKS, MGD_CHUNK_BLOCKS,
		  (uint16_t)(MGD_FRAME_FINAL | (end ? MGD_FRAME_PAGE_END : 0)), versions);
	frame->frame.sequence = part;
	hash = mgd_block_hash(frame->payload, rig_secret);
	mgd_frame_encode(&frame->frame, &hash, rig_secret, frame->head);
	rig_send_built(fd, frame);
}

static void a_page_larger_than_a_chunk_comes_in_order_on_one_connection(void)
{
	struct rig_frame *frame = malloc(sizeof(*frame));
	struct mgd_target_stats stats;
	struct bench bench;
	uint32_t stale[2] = {0, 1};
	int versions[MGD_CHUNK_BLOCKS];

	CHECK(frame != NULL);
	open_bench(&bench, 8 * MIB, 16 * MIB); /* 4 chunks per page */
	switch_over(&bench, stale, 2);
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		versions[i] = i == 1 ? 7 : UNCHANGED;
	for (uint32_t part = 0; part < 3; part++)
		send_part(bench.bulk[0], frame, part, false, versions);
	RIG_UNTIL(bench.target, stats, stats.frames == 3);
	CHECK_EQUAL(stats.stale_pages, 2);
	/* Another connection sends the same page: dropped.  That one is cut short, without harm. */
	for (uint32_t part = 0; part < 2; part++)
		send_part(bench.bulk[1], frame, part, false, versions);
	RIG_UNTIL(bench.target, stats, stats.frames == 5);
	CHECK_EQUAL(stats.discarded_frames, 2);
	/* A barrier or another page in between violates the protocol, and releases the page. */
	rig_send_barrier(bench.bulk[0], 1);
	lost(&bench, 0, MGD_ERR_PEER, "in the middle of a page");
	CHECK(lacks(&bench, 0));
	for (uint32_t part = 0; part < 4; part++)
		send_part(bench.urgent, frame, part, part == 3, versions);
	RIG_UNTIL(bench.target, stats, stats.stale_pages == 1);
	for (uint64_t part = 0; part < 4; part++)
		CHECK_EQUAL(version_at(&bench, part * MGD_CHUNK_BLOCKS + 1), 7);
	close_bench(&bench);
	free(frame);
}

static void a_ledger_is_taken_over(void)
{
	struct mgd_target_region other;
	struct rig_frame *frame = malloc(sizeof(*frame));
	struct mgd_target_stats stats;
	struct mgd_error err = {0};
	struct bench bench;
	uint32_t stale[3] = {0, 5, 700};

	CHECK(frame != NULL);
	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	rig_send_all(bench.bulk[0], 0, 5, 1, 0, 1);
	barrier(&bench, 1);
	switch_over(&bench, stale, 3);
	rig_send_all(bench.bulk[0], 0, 5, 1, MGD_FRAME_FINAL, 2);
	RIG_UNTIL(bench.target, stats, stats.stale_pages == 2);
	mgd_target_destroy(bench.target);
	other = bench.region;
	other.size_bytes /= 2;
	CHECK_FAILS(mgd_target_create(&other, 1, 2, bench.ledger, 1, rig_secret, &bench.target, &err), err,
		    MGD_ERR_ARGUMENT);
	CHECK_OK(mgd_target_create(&bench.region, 1, 2, bench.ledger, 1, rig_secret, &bench.target, &err), err);
	mgd_target_stats(bench.target, &stats);
	CHECK_EQUAL(stats.stale_pages, 2);
	CHECK_EQUAL(stats.stale_bytes, 2 * MGD_BLOCK_BYTES);
	CHECK(lacks(&bench, 0) && lacks(&bench, 700) && !lacks(&bench, 5));
	close(bench.urgent);
	bench.urgent = rig_stream(bench.target, MGD_STREAM_URGENT);
	rig_send_all(bench.urgent, 0, 0, 1, MGD_FRAME_FINAL, 3);
	rig_send_all(bench.urgent, 0, 700, 1, MGD_FRAME_FINAL, 3);
	rig_event(bench.target, MGD_EVENT_ALL_CURRENT);
	CHECK_EQUAL(version_at(&bench, 700), 3);
	close_bench(&bench);
	free(frame);
}

static void as_many_regions_as_there_may_be(void)
{
	struct mgd_target_region regions[MGD_MAX_REGIONS + 1];
	const uint32_t last = MGD_MAX_REGIONS - 1;
	struct mgd_target *target;
	struct mgd_error err = {0};
	uint8_t stale = 2, lacking = 0;
	uint64_t words[WORDS];
	int ledger = memfd_create("ledger", MFD_CLOEXEC), bulk;

	for (uint32_t i = 0; i <= MGD_MAX_REGIONS; i++)
		regions[i] = (struct mgd_target_region){.memory_fd = rig_memfd(MGD_BLOCK_BYTES, 2 * MGD_BLOCK_BYTES),
							.size_bytes = 2 * MGD_BLOCK_BYTES,
							.host_page_bytes = MGD_BLOCK_BYTES};
	CHECK_EQUAL(ftruncate(ledger, (off_t)mgd_ledger_bytes(regions, MGD_MAX_REGIONS)), 0);
	CHECK_FAILS(mgd_target_create(regions, MGD_MAX_REGIONS + 1, 1, ledger, 0, rig_secret, &target, &err), err,
		    MGD_ERR_ARGUMENT);
	CHECK_OK(mgd_target_create(regions, MGD_MAX_REGIONS, 1, ledger, 0, rig_secret, &target, &err), err);
	bulk = rig_stream(target, 0);
	rig_send_all(bulk, last, 0, 1, 0, 1);
	rig_send_barrier(bulk, 1);
	rig_event(target, MGD_EVENT_BARRIER);
	CHECK_EQUAL(pread(regions[last].memory_fd, words, sizeof(words), 0), sizeof(words));
	CHECK_EQUAL(rig_version(words, 0), 1);
	CHECK_OK(mgd_target_stale_map(target, last, 0, &stale, 1, &err), err);
	CHECK_OK(mgd_target_switchover(target, &err), err);
	mgd_target_destroy(target);
	CHECK_OK(mgd_target_create(regions, MGD_MAX_REGIONS, 1, ledger, 1, rig_secret, &target, &err), err);
	CHECK_OK(mgd_target_lacking(target, last, 0, &lacking, 1, &err), err);
	CHECK_EQUAL(lacking, 2);
	mgd_target_destroy(target);
	for (uint32_t i = 0; i <= MGD_MAX_REGIONS; i++)
		close(regions[i].memory_fd);
	close(ledger);
	close(bulk);
}

static void what_the_agent_asks_wrongly_is_refused(void)
{
	uint8_t bits[PAGES / 8 + 1] = {0};
	struct mgd_error err = {0};
	struct bench bench;
	int ends[2];

	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	CHECK_FAILS(mgd_target_stale_map(bench.target, 1, 0, bits, 1, &err), err, MGD_ERR_PEER);
	CHECK_FAILS(mgd_target_stale_map(bench.target, 0, 0, bits, PAGES / 8 + 1, &err), err, MGD_ERR_PEER);
	CHECK_FAILS(mgd_target_stale_map(bench.target, 0, PAGES + 8, bits, 1, &err), err, MGD_ERR_PEER);
	CHECK_FAILS(mgd_target_release(bench.target, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_target_background(bench.target, &err), err, MGD_ERR_ARGUMENT);
	CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
	CHECK_FAILS(mgd_target_add_stream(bench.target, 0, plain_channel(ends[0]), &err), err, MGD_ERR_ARGUMENT);
	close(ends[1]);
	CHECK_OK(mgd_target_switchover(bench.target, &err), err);
	CHECK_FAILS(mgd_target_switchover(bench.target, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_target_stale_map(bench.target, 0, 0, bits, 1, &err), err, MGD_ERR_ARGUMENT);
	close_bench(&bench);
}

static void a_pool_too_small_is_named_at_the_start(void)
{
	struct mgd_target_region region = {.size_bytes = 16 * 1024 * GIB, .host_page_bytes = 2 * MIB};
	struct mgd_target *target = NULL;
	struct mgd_error err = {0};
	int ledger = memfd_create("ledger", MFD_CLOEXEC);

	if (rig_pool(2 * MIB) < 0)
		return; /* no such pages on this machine */
	region.memory_fd = rig_memfd(2 * MIB, region.size_bytes);
	CHECK_EQUAL(ftruncate(ledger, (off_t)mgd_ledger_bytes(&region, 1)), 0);
	CHECK_FAILS(mgd_target_create(&region, 1, 1, ledger, 0, rig_secret, &target, &err), err, MGD_ERR_POOL);
	close(region.memory_fd);
	close(ledger);
}

static void populated_pages_have_memory(void)
{
	uint8_t bits[PAGES / 8];
	struct mgd_error err = {0};
	struct bench bench;

	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	memset(bits, 0, sizeof(bits));
	memset(bits + 8, 0xff, 16); /* pages 64 … 191 */
	CHECK_OK(mgd_target_populate(bench.target, 0, 0, bits, sizeof(bits), 8, &err), err);
	CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_POPULATED).error.kind, MGD_ERR_NONE);
	CHECK_EQUAL(lseek(bench.memory, 0, SEEK_DATA), 64 * MGD_BLOCK_BYTES);
	CHECK_EQUAL(lseek(bench.memory, 64 * MGD_BLOCK_BYTES, SEEK_HOLE), 192 * MGD_BLOCK_BYTES);
	/* Again, but the engine is destroyed in the middle. */
	memset(bits, 0xff, sizeof(bits));
	CHECK_OK(mgd_target_populate(bench.target, 0, 0, bits, sizeof(bits), 8, &err), err);
	close_bench(&bench);
}

/* A source may ask as often as it likes, and faster than memory is zeroed: here nothing is zeroed meanwhile. */
static void populating_takes_no_memory_for_its_requests(void)
{
	enum { PIECE_BYTES = 1 << 20, PIECES = 100 };
	uint8_t *bits = calloc(PIECE_BYTES, 1);
	struct mgd_error err = {0};
	struct mallinfo2 before;
	struct pollfd poll_fd;
	struct bench bench;
	struct target_region *region;
	int uffd;

	CHECK(bits);
	if (mgd_uffd_open(0, &uffd, &err) < 0) {
		printf("  (no right to use userfaultfd for kernel faults)\n");
		free(bits);
		return;
	}
	open_bench(&bench, MGD_BLOCK_BYTES, 8ull * PIECE_BYTES * MGD_BLOCK_BYTES);
	region = &bench.target->regions[0];
	CHECK_OK(mgd_uffd_api(uffd, 1, 0, &err), err);
	CHECK_OK(mgd_uffd_register(uffd, (uintptr_t)region->memory, region->size_bytes, MGD_REGISTER_MISSING, &err),
		 err);
	bits[0] = 1;
	CHECK_OK(mgd_target_populate(bench.target, 0, 0, bits, PIECE_BYTES, 1, &err), err);
	poll_fd = (struct pollfd){.fd = uffd, .events = POLLIN};
	CHECK(poll(&poll_fd, 1, PATIENCE_MS) == 1);
	before = mallinfo2();
	for (int i = 0; i < PIECES; i++)
		CHECK_OK(mgd_target_populate(bench.target, 0, 0, bits, PIECE_BYTES, 1, &err), err);
	CHECK(mallinfo2().uordblks + mallinfo2().hblkhd < before.uordblks + before.hblkhd + PIECE_BYTES);
	CHECK_OK(mgd_uffd_unregister(uffd, (uintptr_t)region->memory, region->size_bytes, &err), err);
	CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_POPULATED).error.kind, MGD_ERR_NONE);
	close(uffd);
	close_bench(&bench);
	free(bits);
}

/* Once the stale map is known, only pages that will arrive get memory: a page that is current as a hole stays one. */
static void after_the_switchover_only_stale_pages_are_populated(void)
{
	uint8_t bits[PAGES / 8], stale[PAGES / 8] = {0};
	struct mgd_error err = {0};
	struct bench bench;

	open_bench(&bench, MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	memset(bits, 0xff, sizeof(bits));
	stale[2] = 0xff; /* pages 16 … 23 */
	CHECK_OK(mgd_target_stale_map(bench.target, 0, 0, stale, sizeof(stale), &err), err);
	CHECK_OK(mgd_target_switchover(bench.target, &err), err);
	CHECK_OK(mgd_target_populate(bench.target, 0, 0, bits, sizeof(bits), 8, &err), err);
	CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_POPULATED).error.kind, MGD_ERR_NONE);
	CHECK_EQUAL(lseek(bench.memory, 0, SEEK_DATA), 16 * MGD_BLOCK_BYTES);
	CHECK_EQUAL(lseek(bench.memory, 16 * MGD_BLOCK_BYTES, SEEK_HOLE), 24 * MGD_BLOCK_BYTES);
	CHECK_EQUAL(lseek(bench.memory, 24 * MGD_BLOCK_BYTES, SEEK_DATA), -1);
	close_bench(&bench);
}

int main(void)
{
	alarm(110);
	rig_init();
	RUN(precopy_writes_present_and_zero_blocks_in_place);
	RUN(a_page_of_zeros_never_sent_takes_no_memory);
	RUN(barrier_waits_for_every_bulk_stream);
	RUN(changed_blocks_of_a_stale_page_complete_it);
	RUN(a_page_sent_twice_is_written_once);
	RUN(a_page_claimed_by_one_connection_is_not_written_by_another);
	RUN(a_damaged_frame_leaves_a_precopied_page_as_it_was);
	RUN(a_damaged_frame_leaves_a_blank_page_blank);
	RUN(frames_out_of_their_time_end_the_stream);
	RUN(memory_that_goes_away_ends_only_the_stream);
	RUN(garbage_ends_only_its_stream);
	RUN(a_page_larger_than_a_chunk_comes_in_order_on_one_connection);
	RUN(a_ledger_is_taken_over);
	RUN(as_many_regions_as_there_may_be);
	RUN(what_the_agent_asks_wrongly_is_refused);
	RUN(a_pool_too_small_is_named_at_the_start);
	RUN(populated_pages_have_memory);
	RUN(populating_takes_no_memory_for_its_requests);
	RUN(after_the_switchover_only_stale_pages_are_populated);
	return 0;
}
