/* SPDX-License-Identifier: MIT */
/*
 * Source engine, dirty tracker and target engine together: two regions of our own memory migrate while a thread writes
 * them, and the digests agree.  Runs over ordinary pages, over 2 MiB pages if the pool has them, from private memory
 * to either, and over TLS.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/mman.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tls_pair.h"

#define REGIONS 2
#define STREAMS 3
#define MIB (1024ull * 1024)
#define PATIENCE_MS 60000

static const uint64_t sizes[REGIONS] = {24 * MIB, 10 * MIB};

struct move {
	uint64_t page_bytes[REGIONS], host_page_bytes[REGIONS];
	const struct hosts *hosts; /* NULL: plain connections */
	bool is_private; /* the first region: private memory with transparent huge pages */
	int from[REGIONS], to[REGIONS], ledger, uffd, pagemap;
	uint8_t *memory[REGIONS];
	struct mgd_tracker *tracker;
	struct mgd_source *source;
	struct mgd_target *target;
	uint8_t secret[MGD_SECRET_BYTES];
	uint64_t version; /* the last version written */
	bool stop;
};

static int memory_of(uint64_t bytes, uint64_t page_bytes)
{
	int fd = memfd_create("memory", MFD_CLOEXEC | (page_bytes > 4096 ? MFD_HUGETLB | MFD_HUGE_2MB : 0));

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes));
	return fd;
}

static void write_word(struct move *move, uint64_t random, uint64_t version)
{
	uint32_t region = random % 7 < 5 ? 0 : 1;
	uint64_t *words = (uint64_t *)move->memory[region];

	/* The upper half of a region stays almost empty. */
	__atomic_store_n(&words[(random >> 8) % (sizes[region] / 8 / (random % 64 ? 2 : 1))], version,
			 __ATOMIC_RELAXED);
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void *keep_writing(void *argument)
{
	struct move *move = argument;
	uint64_t state = 88172645463325252ull;

	while (!__atomic_load_n(&move->stop, __ATOMIC_RELAXED)) {
		uint64_t random = next_random(&state);

		write_word(move, random, move->version + 1);
		if (move->is_private && (random >> 32) % 256 == 0) /* a balloon inflates */
			CHECK(!madvise(move->memory[0] + (random >> 40) % (sizes[0] / 4096) * 4096, 4096,
				       MADV_DONTNEED));
		__atomic_fetch_add(&move->version, 1, __ATOMIC_RELEASE);
	}
	return NULL;
}

/* Wait for a write that begins after this call: the second one that ends from now on. */
static void await_a_write(const struct move *move)
{
	uint64_t version = __atomic_load_n(&move->version, __ATOMIC_ACQUIRE);

	while (__atomic_load_n(&move->version, __ATOMIC_ACQUIRE) < version + 2)
		sched_yield();
}

static void start_tracking(struct move *move)
{
	struct mgd_mapping mappings[REGIONS];
	struct mgd_error err;

	for (uint32_t i = 0; i < REGIONS; i++)
		mappings[i] = (struct mgd_mapping){.region = i,
						   .flags = i == 0 && move->is_private ? MGD_MAPPING_SPARSE : 0,
						   .address = (uint64_t)move->memory[i],
						   .length_bytes = sizes[i]};
	CHECK_OK(mgd_uffd_open(0, &move->uffd, &err), err);
	CHECK_OK(mgd_uffd_api(move->uffd, 0, 1, &err), err);
	move->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	CHECK(move->pagemap >= 0);
	CHECK_OK(mgd_tracker_create(move->pagemap, move->uffd, mappings, REGIONS, move->page_bytes, REGIONS,
				    &move->tracker, &err),
		 err);
	CHECK_OK(mgd_tracker_arm(move->tracker, &err), err);
}

static void connect_engines(struct move *move)
{
	struct mgd_error err;

	for (uint32_t i = 0; i <= STREAMS; i++) {
		uint32_t stream = i == STREAMS ? MGD_STREAM_URGENT : i;
		struct mgd_channel *ends[2];
		int pair[2];

		if (move->hosts) {
			hosts_connect(move->hosts, ends);
		} else {
			CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
			ends[0] = plain_channel(pair[0]);
			ends[1] = plain_channel(pair[1]);
		}
		CHECK_OK(mgd_target_add_stream(move->target, stream, ends[0], &err), err);
		CHECK_OK(mgd_source_add_stream(move->source, stream, ends[1], &err), err);
	}
}

static uint64_t offset_of(const struct move *move, int region)
{
	return region == 0 && move->is_private ? (uint64_t)move->memory[0] : 0;
}

static void create_engines(struct move *move)
{
	struct mgd_source_region from[REGIONS];
	struct mgd_target_region to[REGIONS];
	struct mgd_error err;

	for (int i = 0; i < REGIONS; i++) {
		from[i] = (struct mgd_source_region){.memory_fd = move->from[i],
						     .flags = i == 0 && move->is_private ? MGD_SOURCE_PRIVATE : 0,
						     .file_offset = offset_of(move, i),
						     .size_bytes = sizes[i],
						     .page_bytes = move->page_bytes[i],
						     .host_page_bytes = move->host_page_bytes[i]};
		to[i] = (struct mgd_target_region){
			.memory_fd = move->to[i], .size_bytes = sizes[i], .host_page_bytes = move->host_page_bytes[i]};
	}
	move->ledger = memory_of((mgd_ledger_bytes(to, REGIONS) + 4095) / 4096 * 4096, 4096);
	CHECK_OK(mgd_source_create(from, REGIONS, STREAMS, move->secret, &move->source, &err), err);
	CHECK_OK(mgd_target_create(to, REGIONS, STREAMS, move->ledger, 0, move->secret, &move->target, &err), err);
}

static void await_source(struct move *move, uint32_t kind)
{
	struct pollfd poll_fd = {.fd = mgd_source_event_fd(move->source), .events = POLLIN};
	struct mgd_event event;

	while (!mgd_source_next_event(move->source, &event))
		CHECK(poll(&poll_fd, 1, PATIENCE_MS) == 1);
	if (event.error.kind)
		fprintf(stderr, "source: %s\n", event.error.message);
	CHECK_EQUAL(event.kind, kind);
}

static void await_target(struct move *move, uint32_t kind)
{
	struct pollfd poll_fd = {.fd = mgd_target_event_fd(move->target), .events = POLLIN};
	struct mgd_event event;

	while (!mgd_target_next_event(move->target, &event))
		CHECK(poll(&poll_fd, 1, PATIENCE_MS) == 1);
	if (event.error.kind)
		fprintf(stderr, "target: %s\n", event.error.message);
	CHECK_EQUAL(event.kind, kind);
}

static void round_of(struct move *move, uint64_t round)
{
	struct mgd_error err;
	uint64_t bytes;

	CHECK_OK(mgd_source_round(move->source, round, &err), err);
	await_source(move, MGD_EVENT_ROUND_DONE);
	CHECK_OK(mgd_source_scan(move->source, move->tracker, 0, &bytes, &err), err);
}

static void switch_over(struct move *move)
{
	uint64_t stale, bytes;
	struct mgd_error err;

	CHECK_OK(mgd_source_scan(move->source, move->tracker, 1, &bytes, &err), err);
	CHECK_OK(mgd_source_barrier(move->source, 1, &err), err);
	await_target(move, MGD_EVENT_BARRIER);
	CHECK_OK(mgd_source_freeze(move->source, &stale, &err), err);
	CHECK(stale > 0);
	for (uint32_t i = 0; i < REGIONS; i++) {
		uint8_t map[24 * MIB / 4096 / 8];
		size_t map_bytes = (sizes[i] / move->host_page_bytes[i] + 7) / 8;

		CHECK_OK(mgd_source_stale_map(move->source, i, 0, map, map_bytes, &err), err);
		CHECK_OK(mgd_target_stale_map(move->target, i, 0, map, map_bytes, &err), err);
	}
	CHECK_OK(mgd_target_switchover(move->target, &err), err);
	CHECK_OK(mgd_source_serve(move->source, 1, &err), err);
	await_source(move, MGD_EVENT_ALL_SENT);
	await_target(move, MGD_EVENT_ALL_CURRENT);
}

static void check_digests(struct move *move)
{
	for (int i = 0; i < REGIONS; i++) {
		struct mgd_error err;
		uint64_t from, to;

		CHECK_OK(mgd_digest(move->from[i], offset_of(move, i), sizes[i], move->secret, &from, &err), err);
		CHECK_OK(mgd_digest(move->to[i], 0, sizes[i], move->secret, &to, &err), err);
		CHECK(from == to);
	}
}

static uint8_t *map_private(uint64_t bytes)
{
	uint8_t *at = mmap(NULL, bytes + 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t skip = -(uintptr_t)at % (2 * MIB);

	CHECK(at != MAP_FAILED);
	munmap(at, skip);
	munmap(at + skip + bytes, 2 * MIB - skip);
	madvise(at + skip, bytes, MADV_HUGEPAGE);
	return at + skip;
}

static void open_memory(struct move *move)
{
	fill_secret(move->secret);
	move->page_bytes[1] = move->host_page_bytes[1] = 4096;
	for (int i = 0; i < REGIONS; i++) {
		bool is_private = i == 0 && move->is_private;

		move->from[i] = is_private ? open("/proc/self/mem", O_RDONLY | O_CLOEXEC)
					   : memory_of(sizes[i], move->page_bytes[i]);
		move->to[i] = memory_of(sizes[i], move->host_page_bytes[i]);
		move->memory[i] = is_private
					  ? map_private(sizes[i])
					  : mmap(NULL, sizes[i], PROT_READ | PROT_WRITE, MAP_SHARED, move->from[i], 0);
		CHECK(move->from[i] >= 0 && move->memory[i] != MAP_FAILED);
	}
}

static void close_memory(struct move *move)
{
	for (int i = 0; i < REGIONS; i++) {
		munmap(move->memory[i], sizes[i]);
		close(move->from[i]);
		close(move->to[i]);
	}
	close(move->ledger);
	close(move->pagemap);
	close(move->uffd);
}

static void move_memory(struct move move, int compression_level)
{
	uint64_t state = 7;
	struct mgd_source_stats stats;
	struct mgd_error err;
	pthread_t writer;

	open_memory(&move);
	for (uint64_t version = 1; version < 2000; version++) /* before anybody reads them */
		write_word(&move, next_random(&state), version);
	start_tracking(&move);
	create_engines(&move);
	CHECK_OK(mgd_source_set_compression(move.source, compression_level, &err), err);
	connect_engines(&move);
	CHECK(!pthread_create(&writer, NULL, keep_writing, &move));
	CHECK_OK(mgd_source_mark_populated(move.source, move.tracker, &err), err);
	mgd_source_stats(move.source, &stats);
	CHECK(stats.dirty_bytes > 0);
	for (uint64_t round = 1; round <= 4; round++)
		round_of(&move, round);
	await_a_write(&move); /* or the last round might leave nothing stale */
	__atomic_store_n(&move.stop, true, __ATOMIC_RELAXED);
	pthread_join(writer, NULL);
	switch_over(&move);
	check_digests(&move);
	mgd_source_stats(move.source, &stats);
	CHECK_EQUAL(stats.payload_bytes + stats.compression_saved_bytes, stats.sent_blocks * MGD_BLOCK_BYTES);
	CHECK_EQUAL(stats.wire_bytes, stats.payload_bytes + stats.header_bytes);
	CHECK(compression_level ? stats.compression_saved_bytes > 0 : !stats.compression_saved_bytes);
	CHECK_OK(mgd_tracker_disarm(move.tracker, &err), err);
	mgd_source_destroy(move.source);
	mgd_target_destroy(move.target);
	mgd_tracker_destroy(move.tracker);
	close_memory(&move);
}

static const struct move ordinary = {.page_bytes = {4096}, .host_page_bytes = {4096}};
static const struct move huge = {.page_bytes = {2 * MIB}, .host_page_bytes = {2 * MIB}};
static const struct move private = {.is_private = true, .page_bytes = {4096}, .host_page_bytes = {4096}};
static const struct move private_to_huge = {.is_private = true, .page_bytes = {4096}, .host_page_bytes = {2 * MIB}};

static void test_memory_moves_over_ordinary_pages(void)
{
	move_memory(ordinary, 0);
}

static void test_memory_moves_compressed(void)
{
	move_memory(ordinary, 1);
	move_memory(ordinary, 3);
}

static void test_memory_moves_over_tls(void)
{
	struct move move = ordinary;
	struct hosts hosts;

	hosts_create(&hosts);
	move.hosts = &hosts;
	move_memory(move, 0);
	hosts_destroy(&hosts);
}

static void test_private_memory_moves(void)
{
	move_memory(private, 0);
}

/* Test by reserving them: pages that count as free may be promised to others. */
static bool pool_has(uint64_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB,
			-1, 0);

	if (at == MAP_FAILED)
		return false;
	munmap(at, bytes);
	return true;
}

static void test_memory_moves_over_huge_pages(void)
{
	move_memory(huge, 0);
	move_memory(huge, 1);
}

static void test_private_memory_moves_to_huge_pages(void)
{
	move_memory(private_to_huge, 0);
}

/* hugetlbfs does not report where its data is: the mapped pages are all, unless the file holds more than that. */
static void test_only_populated_huge_pages_are_marked(void)
{
	struct move move = huge;
	struct mgd_source_stats stats;
	struct mgd_error err;

	open_memory(&move);
	move.memory[0][3 * 2 * MIB] = 1;
	move.memory[0][9 * 2 * MIB + 4711] = 1;
	start_tracking(&move);
	create_engines(&move);
	CHECK_OK(mgd_source_mark_populated(move.source, move.tracker, &err), err);
	mgd_source_stats(move.source, &stats);
	CHECK_EQUAL(stats.dirty_bytes, 2 * 2 * MIB);
	/* A page of the file that nobody has mapped: it might hold data. */
	CHECK(!fallocate(move.from[0], 0, 5 * 2 * MIB, 2 * MIB));
	CHECK_OK(mgd_source_mark_populated(move.source, move.tracker, &err), err);
	mgd_source_stats(move.source, &stats);
	CHECK_EQUAL(stats.dirty_bytes, sizes[0]);
	CHECK_OK(mgd_tracker_disarm(move.tracker, &err), err);
	mgd_source_destroy(move.source);
	mgd_target_destroy(move.target);
	mgd_tracker_destroy(move.tracker);
	close_memory(&move);
}

int main(void)
{
	struct mgd_features features;
	struct mgd_error err;

	CHECK_OK(mgd_probe(&features, &err), err);
	if (!features.has_userfaultfd || !features.pagemap_scan || !features.wp_async) {
		printf("no dirty tracking on this kernel, or no right to userfaultfd\n");
		return SKIPPED;
	}
	RUN(test_memory_moves_over_ordinary_pages);
	RUN(test_memory_moves_compressed);
	RUN(test_memory_moves_over_tls);
	RUN(test_private_memory_moves);
	if (pool_has(2 * sizes[0])) {
		RUN(test_memory_moves_over_huge_pages);
		RUN(test_private_memory_moves_to_huge_pages);
		RUN(test_only_populated_huge_pages_are_marked);
	} else {
		printf("the pool has no %llu MiB in 2 MiB pages: not over huge pages\n", 2 * sizes[0] / MIB);
	}
	return 0;
}
