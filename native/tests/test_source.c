/* SPDX-License-Identifier: MIT */
/* Tests of the source engine in pre-copy.  They check what it sends and skips, and that the contents are the
 * guest's. */
#include "source_peer.h"

static void mark_populated(struct peer *peer)
{
	struct mgd_error err;

	CHECK_OK(mgd_source_mark_populated(peer->source, NULL, &err), err);
}

/* A guest with blocks 3, 700 and 1500 written, sent once. */
static struct peer *sent_once(uint32_t streams)
{
	struct peer *peer = peer_create(8 * MIB, 4 * KIB, 2 * MIB, streams);

	peer_connect(peer);
	guest_write(peer, 3, 1);
	guest_write(peer, 700, 1);
	guest_write(peer, 1500, 1);
	peer_scan(peer, 1);
	mark_populated(peer);
	peer_round(peer, 1);
	return peer;
}

static void test_zero_and_absent_blocks_are_not_sent(void)
{
	struct peer *peer = peer_create(8 * MIB, 4 * KIB, 2 * MIB, 2);

	peer_connect(peer);
	guest_write(peer, 3, 1);
	guest_write(peer, 2047, 1);
	guest_zero(peer, 10); /* present, but zero */
	mark_populated(peer);
	CHECK_EQUAL(peer_stats(peer).dirty_bytes, 3 * BLOCK);
	peer_round(peer, 1);
	CHECK_EQUAL(peer_stats(peer).read_bytes, 3 * BLOCK); /* the rest is holes: not even read */
	CHECK_EQUAL(peer_stats(peer).sent_blocks, 2);
	CHECK_EQUAL(peer_stats(peer).zero_blocks, 0);
	CHECK_EQUAL(peer_stats(peer).dirty_bytes, 0);
	peer_check_same(peer);
	peer_destroy(peer);
}

static void test_reading_populates_nothing(void)
{
	struct peer *peer = peer_create(64 * MIB, 2 * MIB, 2 * MIB, 1);
	off_t data;

	peer_connect(peer);
	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_report(peer, block);
	peer_scan(peer, 0);
	peer_round(peer, 1);
	CHECK_EQUAL(peer_stats(peer).read_bytes, 64 * MIB);
	data = lseek(peer->memory_fd, 0, SEEK_DATA);
	CHECK_EQUAL(data, -1);
	peer_destroy(peer);
}

/* The sample is exact if all blocks are examined, close if some are, and changes nothing. */
static void test_a_sample_tells_how_much_has_changed(void)
{
	struct peer *peer = peer_create(16 * MIB, 2 * MIB, 2 * MIB, 1);
	uint64_t examined, changed, stale;
	struct mgd_error err;

	peer_connect(peer);
	for (uint64_t block = 0; block < 3072; block++)
		guest_write_quietly(peer, block, 1);
	CHECK_OK(mgd_source_sample(peer->source, 8, &examined, &changed, &err), err);
	CHECK_EQUAL(examined, 0);
	mark_populated(peer);
	CHECK_OK(mgd_source_sample(peer->source, 1 << 20, &examined, &changed, &err), err);
	CHECK_EQUAL(examined, 3072);
	CHECK_EQUAL(changed, 3072);
	peer_round(peer, 1);
	CHECK_OK(mgd_source_sample(peer->source, 1 << 20, &examined, &changed, &err), err);
	CHECK_EQUAL(examined, 0);
	/* Every eighth block of four pages: all of their blocks are marked. */
	for (uint64_t block = 0; block < 2048; block += 8)
		guest_write(peer, block, 2);
	peer_scan(peer, 0);
	CHECK_OK(mgd_source_sample(peer->source, 1 << 20, &examined, &changed, &err), err);
	CHECK_EQUAL(examined, 2048);
	CHECK_EQUAL(changed, 256);
	CHECK_OK(mgd_source_sample(peer->source, 512, &examined, &changed, &err), err);
	CHECK_EQUAL(examined, 512);
	CHECK(changed > 64 / 4 && changed < 64 * 4);
	peer_round(peer, 2);
	CHECK_EQUAL(peer_stats(peer).sent_blocks, 3072 + 256);
	CHECK_FAILS(mgd_source_sample(peer->source, 0, &examined, &changed, &err), err, MGD_ERR_ARGUMENT);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	CHECK_FAILS(mgd_source_sample(peer->source, 8, &examined, &changed, &err), err, MGD_ERR_ARGUMENT);
	peer_destroy(peer);
}

/* The target learns which pages to populate: every page with a mark, no others, and none once the marks are gone. */
static void test_marked_pages_are_told_before_they_are_sent(void)
{
	const uint64_t host_pages[] = {4 * KIB, 64 * KIB, 2 * MIB, 4 * MIB};
	const uint64_t blocks[] = {0, 17, 511, 1030, 1535, 3071};

	for (size_t i = 0; i < sizeof(host_pages) / sizeof(host_pages[0]); i++) {
		struct peer *peer = peer_create(12 * MIB, 4 * KIB, host_pages[i], 2);
		uint8_t map[12 * MIB / (4 * KIB) / 8] = {0}, expected[sizeof(map)] = {0};
		size_t bytes = (12 * MIB / host_pages[i] + 7) / 8, half = bytes / 2;
		struct mgd_error err;

		peer_connect(peer);
		for (size_t block = 0; block < sizeof(blocks) / sizeof(blocks[0]); block++) {
			uint64_t page = blocks[block] * BLOCK / host_pages[i];

			guest_write(peer, blocks[block], 1);
			expected[page / 8] |= (uint8_t)(1 << page % 8);
		}
		memset(peer->tracker.report, 0, peer->tracker.words * 8);
		mark_populated(peer);
		CHECK_OK(mgd_source_marked_map(peer->source, 0, 0, map, half, &err), err);
		CHECK_OK(mgd_source_marked_map(peer->source, 0, half * 8, map + half, bytes - half, &err), err);
		CHECK(!memcmp(map, expected, bytes));
		peer_round(peer, 1);
		CHECK_OK(mgd_source_marked_map(peer->source, 0, 0, map, bytes, &err), err);
		memset(expected, 0, sizeof(expected));
		CHECK(!memcmp(map, expected, bytes));
		CHECK_FAILS(mgd_source_marked_map(peer->source, 0, 4, map, 1, &err), err, MGD_ERR_ARGUMENT);
		CHECK_FAILS(mgd_source_marked_map(peer->source, 0, 0, map, bytes + 1, &err), err, MGD_ERR_ARGUMENT);
		CHECK_FAILS(mgd_source_marked_map(peer->source, 1, 0, map, 1, &err), err, MGD_ERR_ARGUMENT);
		CHECK_OK(mgd_source_freeze(peer->source, &(uint64_t){0}, &err), err);
		CHECK_FAILS(mgd_source_marked_map(peer->source, 0, 0, map, bytes, &err), err, MGD_ERR_ARGUMENT);
		peer_destroy(peer);
	}
}

static void test_unchanged_blocks_are_not_sent(void)
{
	struct peer *peer = sent_once(2);
	struct mgd_source_stats before = peer_stats(peer), after;

	guest_report(peer, 3);
	guest_report(peer, 700);
	peer_scan(peer, 0);
	peer_round(peer, 2);
	after = peer_stats(peer);
	CHECK_EQUAL(after.sent_blocks, before.sent_blocks);
	CHECK_EQUAL(after.unchanged_blocks - before.unchanged_blocks, 2);
	/* Two barriers and no frame. */
	CHECK_EQUAL(after.wire_bytes - before.wire_bytes, 2 * MGD_FRAME_HEADER_BYTES);
	peer_destroy(peer);
}

static void test_only_changed_blocks_of_a_huge_page_are_sent(void)
{
	struct peer *peer = peer_create(8 * MIB, 2 * MIB, 2 * MIB, 1);

	peer_connect(peer);
	for (uint64_t block = 0; block < 1024; block++)
		guest_write_quietly(peer, block, 1);
	mark_populated(peer);
	peer_round(peer, 1);
	CHECK_EQUAL(peer_stats(peer).sent_blocks, 1024);
	guest_write(peer, 5, 2);
	guest_write(peer, 700, 2);
	peer_scan(peer, 0);
	peer_round(peer, 2);
	CHECK_EQUAL(peer_stats(peer).sent_blocks, 1026);
	CHECK_EQUAL(peer_stats(peer).unchanged_blocks, 1022);
	peer_check_same(peer);
	peer_destroy(peer);
}

static void test_a_block_that_becomes_zero_is_told(void)
{
	struct peer *peer = sent_once(1);

	guest_zero(peer, 700);
	peer_scan(peer, 0);
	peer_round(peer, 2);
	CHECK_EQUAL(peer_stats(peer).zero_blocks, 1);
	peer_check_same(peer);
	guest_write(peer, 700, 3);
	peer_scan(peer, 0);
	peer_round(peer, 3);
	peer_check_same(peer);
	peer_destroy(peer);
}

/* Invariant 7: a disk read fills a buffer after the scan that armed its page; no later scan reports the page. */
static void test_a_quiesced_scan_finds_pinned_buffers(void)
{
	struct peer *peer = sent_once(1);

	guest_report(peer, 700); /* pinned for the read: counts as written */
	peer_scan(peer, 0);
	peer_round(peer, 2);
	guest_write_quietly(peer, 700, 2); /* the read completes */
	peer_scan(peer, 0);
	peer_round(peer, 3);
	CHECK(memcmp(peer->memory + 700 * BLOCK, peer->mirror + 700 * BLOCK, BLOCK)); /* missed, as expected */
	peer_scan(peer, 1);
	CHECK_EQUAL(peer_stats(peer).dirty_bytes, BLOCK);
	peer_round(peer, 4);
	peer_check_same(peer);
	peer_scan(peer, 1);
	CHECK_EQUAL(peer_stats(peer).dirty_bytes, 0); /* the set is empty again */
	peer_destroy(peer);
}

/* Whatever the last scan has not marked must not be written any more; what it has marked is sent as it is then. */
static void test_writes_after_the_last_scan_are_found(void)
{
	struct peer *peer = sent_once(1);
	struct mgd_late_writes late;
	struct mgd_error err;
	uint64_t stale;

	guest_report(peer, 300);
	peer_scan(peer, MGD_SCAN_RUNNING);
	guest_report(peer, 700);
	peer_scan(peer, MGD_SCAN_LAST);
	CHECK_EQUAL(peer_stats(peer).dirty_bytes, 2 * BLOCK);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	CHECK_OK(mgd_source_late_writes(peer->source, &peer->tracker, &late, &err), err);
	CHECK_EQUAL(late.bytes, 0);
	guest_report(peer, 300);
	guest_report(peer, 700);
	CHECK_OK(mgd_source_late_writes(peer->source, &peer->tracker, &late, &err), err);
	CHECK_EQUAL(late.bytes, 0);
	/* Read for the first time, or written as it was. */
	guest_report(peer, 1500);
	guest_report(peer, 1600);
	CHECK_OK(mgd_source_late_writes(peer->source, &peer->tracker, &late, &err), err);
	CHECK_EQUAL(late.bytes, 0);
	guest_write(peer, 701, 2);
	guest_write(peer, 1500, 2);
	for (int again = 0; again < 2; again++) {
		CHECK_OK(mgd_source_late_writes(peer->source, &peer->tracker, &late, &err), err);
		CHECK_EQUAL(late.bytes, 2 * BLOCK);
		CHECK_EQUAL(late.region, 0);
		CHECK_EQUAL(late.offset, 701 * BLOCK);
	}
	CHECK_EQUAL(peer_stats(peer).dirty_bytes, 2 * BLOCK);
	peer_destroy(peer);
}

/* A guest may write memory in any regular pattern: every stream gets its part of it. */
static void test_regular_patterns_use_all_streams(void)
{
	static const uint32_t stream_counts[] = {2, 3, 4};
	static const uint64_t strides[] = {1, 2, 3, 4, 6, 8, 16, 64};
	enum { WRITTEN = 96 };

	for (size_t i = 0; i < sizeof(stream_counts) / sizeof(stream_counts[0]); i++) {
		for (size_t j = 0; j < sizeof(strides) / sizeof(strides[0]); j++) {
			uint32_t streams = stream_counts[i];
			struct peer *peer = peer_create(WRITTEN * strides[j] * 2 * MIB, 4 * KIB, 4 * KIB, streams);

			peer_connect(peer);
			for (int round = 1; round <= 2; round++) {
				for (uint64_t chunk = 0; chunk < WRITTEN; chunk++)
					guest_write(peer, chunk * strides[j] * MGD_CHUNK_BLOCKS, (uint64_t)round);
				peer_scan(peer, MGD_SCAN_QUIESCED);
				peer_round(peer, (uint64_t)round);
			}
			for (uint32_t stream = 0; stream < streams; stream++)
				CHECK(peer->chunks_on[stream] >= WRITTEN / streams / 2);
			peer_destroy(peer);
		}
	}
}

struct scribbler {
	struct peer *peer;
	bool stop;
};

static void *scribble(void *argument)
{
	struct scribbler *scribbler = argument;
	uint64_t random = 88172645463325252ull, version = 100;

	while (!__atomic_load_n(&scribbler->stop, __ATOMIC_RELAXED)) {
		uint64_t *word;

		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		/* Write one word at a time, whatever the engine is doing with the block. */
		word = (uint64_t *)(scribbler->peer->memory + random % scribbler->peer->bytes / 8 * 8);
		__atomic_store_n(word, ++version, __ATOMIC_RELAXED);
	}
	return NULL;
}

static void test_hash_and_send_see_the_same_bytes(void)
{
	struct peer *peer = peer_create(4 * MIB, 2 * MIB, 2 * MIB, 2);
	struct scribbler scribbler = {.peer = peer};
	pthread_t thread;

	peer_connect(peer);
	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_write(peer, block, 1);
	CHECK(!pthread_create(&thread, NULL, scribble, &scribbler));
	for (uint64_t round = 1; round <= 20; round++) {
		for (uint64_t block = 0; block < peer_block_count(peer); block++)
			guest_report(peer, block);
		peer_scan(peer, 0);
		peer_round(peer, round);
	}
	__atomic_store_n(&scribbler.stop, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
	peer_scan(peer, 1);
	peer_round(peer, 21);
	peer_check_same(peer);
	peer_destroy(peer);
}

static void test_many_streams_and_a_region_that_ends_inside_a_chunk(void)
{
	struct peer *peer = peer_create(33 * MIB + 64 * KIB, 4 * KIB, 4 * KIB, 5);

	peer_connect(peer);
	for (uint64_t version = 1; version < 4; version++) {
		for (uint64_t block = version; block < peer_block_count(peer); block += version * 3)
			guest_write(peer, block, version);
		guest_write(peer, peer_block_count(peer) - 1, version);
		peer_scan(peer, 0);
		peer_round(peer, version);
		peer_check_same(peer);
	}
	peer_destroy(peer);
}

/* 1 TiB of which only two blocks exist. */
static void test_sparse_memory_costs_nothing(void)
{
	struct mgd_source_region region = {.page_bytes = 4 * KIB, .host_page_bytes = 2 * MIB, .size_bytes = 1024 * GIB};
	struct mgd_source_stats stats;
	struct mgd_source *source;
	struct mgd_error err;
	uint64_t word = 1;

	region.memory_fd = memfd_create("sparse", MFD_CLOEXEC);
	CHECK(!ftruncate(region.memory_fd, (off_t)region.size_bytes));
	CHECK(pwrite(region.memory_fd, &word, 8, 512 * (off_t)GIB) == 8);
	CHECK(pwrite(region.memory_fd, &word, 8, 1024 * (off_t)GIB - 8) == 8);
	CHECK_OK(mgd_source_create(&region, 1, 1, peer_secret, &source, &err), err);
	CHECK_OK(mgd_source_mark_populated(source, NULL, &err), err);
	mgd_source_stats(source, &stats);
	CHECK_EQUAL(stats.dirty_bytes, 2 * BLOCK);
	CHECK(stats.table_bytes < region.size_bytes / 200); /* 0.5 % even if all of it existed */
	mgd_source_destroy(source);
	close(region.memory_fd);
}

static void test_wrong_calls_are_refused(void)
{
	struct peer *peer = peer_create(4 * MIB, 4 * KIB, 2 * MIB, 1);
	struct mgd_source_region region = {
		.memory_fd = peer->memory_fd, .page_bytes = 4 * KIB, .host_page_bytes = 2 * MIB};
	struct mgd_source *other;
	struct mgd_error err;
	uint64_t stale;
	uint8_t map[8];

	CHECK_FAILS(mgd_source_round(peer->source, 1, &err), err, MGD_ERR_ARGUMENT); /* no streams */
	CHECK_FAILS(mgd_source_serve(peer->source, 1, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_stale_map(peer->source, 0, 0, map, 1, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_lacking_begin(peer->source, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_add_stream(peer->source, 1, plain_channel(dup(peer->memory_fd)), &err), err,
		    MGD_ERR_ARGUMENT);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	CHECK_EQUAL(stale, 0);
	CHECK_FAILS(mgd_source_freeze(peer->source, &stale, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_round(peer->source, 1, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_mark_populated(peer->source, NULL, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_stale_map(peer->source, 0, 4, map, 1, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_stale_map(peer->source, 0, 0, map, 2, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_stale_map(peer->source, 1, 0, map, 1, &err), err, MGD_ERR_ARGUMENT);
	for (int wrong = 0; wrong < 3; wrong++) {
		const uint64_t sizes[] = {0, 3 * MIB, 4 * MIB + 1};

		region.size_bytes = sizes[wrong];
		CHECK_FAILS(mgd_source_create(&region, 1, 1, peer_secret, &other, &err), err, MGD_ERR_ARGUMENT);
	}
	peer_destroy(peer);
}

/* Invariant 1: once a connection is lost in pre-copy, the table claims more than is true. */
static void test_lost_connections_in_precopy_end_it(void)
{
	struct peer *peer = sent_once(2);
	struct mgd_error err;
	uint64_t stale;

	peer_disconnect(peer);
	peer_connect(peer);
	CHECK_FAILS(mgd_source_round(peer->source, 2, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_freeze(peer->source, &stale, &err), err, MGD_ERR_ARGUMENT);
	peer_destroy(peer);
}

static void test_a_lost_stream_is_told(void)
{
	struct peer *peer = sent_once(1);
	struct mgd_error err;
	struct mgd_event event;
	uint64_t stale;

	mgd_channel_shutdown(peer_slot(peer, 0)->channel);
	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_write(peer, block, 2);
	peer_scan(peer, 0);
	CHECK_OK(mgd_source_round(peer->source, 2, &err), err);
	event = peer_event(peer, MGD_EVENT_STREAM_LOST);
	CHECK_EQUAL(event.stream, 0);
	CHECK_EQUAL(event.error.kind, MGD_ERR_CLOSED);
	CHECK_FAILS(mgd_source_freeze(peer->source, &stale, &err), err, MGD_ERR_ARGUMENT);
	peer_destroy(peer);
}

static void test_memory_that_ends_is_told(void)
{
	struct peer *peer = sent_once(1);
	struct mgd_error err;

	guest_report(peer, 1500);
	peer_scan(peer, 0);
	CHECK(!ftruncate(peer->memory_fd, 4096));
	CHECK_OK(mgd_source_round(peer->source, 2, &err), err);
	CHECK_EQUAL(peer_event(peer, MGD_EVENT_FAILED).error.kind, MGD_ERR_OS);
	peer_destroy(peer);
}

/* What the guest keeps rewriting is sent at the end of a round, wherever it is. */
static void test_hot_memory_comes_last(void)
{
	struct peer *peer = peer_create(8 * MIB, 4 * KIB, 2 * MIB, 1);
	static const uint64_t last[] = {3, 3, 1, 1,
					3}; /* chunk 1 is hot in rounds 2 to 4: the source knows it in 3 to 5 */

	peer_connect(peer);
	for (uint64_t round = 1; round <= 5; round++) {
		bool hot = round >= 2 && round <= 4;

		for (uint64_t chunk = 0; chunk < 4; chunk++)
			if (round < 5 || chunk != 1)
				for (uint64_t block = 0; block < (round == 1 || (hot && chunk == 1) ? 512 : 2); block++)
					guest_write(peer, chunk * 512 + block, round);
		peer_scan(peer, 1);
		peer_round(peer, round);
		CHECK_EQUAL(peer->last_chunk, last[round - 1]);
	}
	peer_check_same(peer);
	peer_destroy(peer);
}

int main(void)
{
	RUN(test_zero_and_absent_blocks_are_not_sent);
	RUN(test_reading_populates_nothing);
	RUN(test_a_sample_tells_how_much_has_changed);
	RUN(test_marked_pages_are_told_before_they_are_sent);
	RUN(test_unchanged_blocks_are_not_sent);
	RUN(test_only_changed_blocks_of_a_huge_page_are_sent);
	RUN(test_a_block_that_becomes_zero_is_told);
	RUN(test_a_quiesced_scan_finds_pinned_buffers);
	RUN(test_writes_after_the_last_scan_are_found);
	RUN(test_regular_patterns_use_all_streams);
	RUN(test_hash_and_send_see_the_same_bytes);
	RUN(test_many_streams_and_a_region_that_ends_inside_a_chunk);
	RUN(test_sparse_memory_costs_nothing);
	RUN(test_wrong_calls_are_refused);
	RUN(test_lost_connections_in_precopy_end_it);
	RUN(test_a_lost_stream_is_told);
	RUN(test_memory_that_ends_is_told);
	RUN(test_hot_memory_comes_last);
	return 0;
}
