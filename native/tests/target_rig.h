/* SPDX-License-Identifier: MIT */
/* The common part of the target engine's tests.  It provides memory, a sender of frames, waiting for events, and
 * patterns. */
#ifndef MGD_TEST_TARGET_RIG_H
#define MGD_TEST_TARGET_RIG_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "frame.h"

#define PATIENCE_MS 30000
#define UNCHANGED (-1)
#define WORDS (MGD_BLOCK_BYTES / 8)
#define MIB (1ull << 20)
#define GIB (1ull << 30)

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

static uint8_t rig_secret[MGD_SECRET_BYTES];

static void rig_init(void)
{
	fill_secret(rig_secret);
}

/* ---- memory */

static int rig_memfd(uint64_t page_bytes, uint64_t size_bytes)
{
	unsigned flags = MFD_CLOEXEC;
	int fd;

	if (page_bytes > MGD_BLOCK_BYTES)
		flags |= MFD_HUGETLB | (unsigned)__builtin_ctzll(page_bytes) << MAP_HUGE_SHIFT;
	fd = memfd_create("guest", flags);
	CHECK(fd >= 0);
	CHECK_EQUAL(ftruncate(fd, (off_t)size_bytes), 0);
	return fd;
}

static void rig_pool_path(uint64_t page_bytes, char *path, size_t bytes)
{
	snprintf(path, bytes, "/sys/kernel/mm/hugepages/hugepages-%llukB/nr_hugepages",
		 (unsigned long long)page_bytes >> 10);
}

static long rig_pool(uint64_t page_bytes)
{
	char path[128];
	long pages = -1;
	FILE *file;

	rig_pool_path(page_bytes, path, sizeof(path));
	file = fopen(path, "r");
	if (!file)
		return -1;
	if (fscanf(file, "%ld", &pages) != 1)
		pages = -1;
	fclose(file);
	return pages;
}

/* Add pages to the pool of this size (or remove them).  Returns whether all were obtained.  Other tests change the pool
 * at the same time, under the same lock (tests/rig/pages.py). */
static bool rig_pool_add(uint64_t page_bytes, long pages)
{
	int lock = open("/run/lock/migrated-tests-pool", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	long before;
	char path[128];
	FILE *file;
	bool all;

	if (lock < 0 || flock(lock, LOCK_EX) != 0)
		return false;
	before = rig_pool(page_bytes);
	rig_pool_path(page_bytes, path, sizeof(path));
	file = before < 0 ? NULL : fopen(path, "w");
	if (file) {
		fprintf(file, "%ld\n", before + pages);
		fclose(file);
	}
	all = file && rig_pool(page_bytes) >= before + pages;
	close(lock);
	return all;
}

/* ---- patterns: a block of version v > 0 holds its number and version in every word; version 0 is zeros */

static void rig_fill(uint64_t *words, uint64_t block, int version)
{
	for (uint64_t i = 0; i < WORDS; i++)
		words[i] = version ? (uint64_t)version << 48 | ((block << 9 | i) & 0xffffffffffffull) : 0;
}

/* Return the version of the block, or -1 if it is torn or a different block. */
static int rig_version(const volatile uint64_t *words, uint64_t block)
{
	int version = (int)(words[0] >> 48);

	for (uint64_t i = 0; i < WORDS; i++)
		if (words[i] != (version ? (uint64_t)version << 48 | ((block << 9 | i) & 0xffffffffffffull) : 0))
			return -1;
	return version;
}

/* ---- a sender */

struct rig_frame {
	struct mgd_frame frame;
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
	size_t head_bytes;
	uint64_t payload[MGD_CHUNK_BLOCKS * WORDS];
};

/* versions[i]: UNCHANGED, 0 (zero bit) or the version to send. */
static void rig_build(struct rig_frame *out, uint32_t region, uint64_t first_block, uint32_t block_count,
		      uint16_t flags, const int *versions)
{
	uint64_t hashes[MGD_CHUNK_BLOCKS];
	uint32_t present = 0;

	memset(&out->frame, 0, sizeof(out->frame));
	for (uint32_t i = 0; i < block_count; i++) {
		if (versions[i] == UNCHANGED)
			continue;
		if (versions[i] == 0) {
			out->frame.zero[i / 64] |= 1ull << (i % 64);
			continue;
		}
		out->frame.present[i / 64] |= 1ull << (i % 64);
		rig_fill(out->payload + present * WORDS, first_block + i, versions[i]);
		hashes[present] = mgd_block_hash(out->payload + present * WORDS, rig_secret);
		present++;
	}
	out->frame.kind = MGD_FRAME_PAGES;
	out->frame.flags = flags;
	out->frame.region = region;
	out->frame.first_block = first_block;
	out->frame.block_count = block_count;
	out->frame.payload_bytes = present * MGD_BLOCK_BYTES;
	out->head_bytes = mgd_frame_encode(&out->frame, hashes, rig_secret, out->head);
}

static void rig_write(int fd, const void *data, size_t bytes)
{
	while (bytes) {
		ssize_t sent = send(fd, data, bytes, MSG_NOSIGNAL);

		if (sent < 0 && (errno == EPIPE || errno == ECONNRESET))
			return; /* the engine has rejected earlier data: an event reports that */
		CHECK(sent > 0);
		data = (const char *)data + sent;
		bytes -= (size_t)sent;
	}
}

static void rig_send_built(int fd, const struct rig_frame *frame)
{
	rig_write(fd, frame->head, frame->head_bytes);
	rig_write(fd, frame->payload, frame->frame.payload_bytes);
}

static void rig_send(int fd, uint32_t region, uint64_t first_block, uint32_t block_count, uint16_t flags,
		     const int *versions)
{
	struct rig_frame *frame = malloc(sizeof(*frame));

	CHECK(frame != NULL);
	rig_build(frame, region, first_block, block_count, flags, versions);
	rig_send_built(fd, frame);
	free(frame);
}

/* Send one frame with the same version for all blocks. */
static void rig_send_all(int fd, uint32_t region, uint64_t first_block, uint32_t block_count, uint16_t flags,
			 int version)
{
	int versions[MGD_CHUNK_BLOCKS];

	for (uint32_t i = 0; i < block_count; i++)
		versions[i] = version;
	rig_send(fd, region, first_block, block_count, flags, versions);
}

static void rig_send_barrier(int fd, uint64_t number)
{
	struct mgd_frame frame = {.kind = MGD_FRAME_BARRIER, .first_block = number};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];

	rig_write(fd, head, mgd_frame_encode(&frame, NULL, rig_secret, head));
}

/* Wait for a demand on the source's end of the urgent connection. */
static struct mgd_frame rig_demand(int fd, const struct mgd_frame_bounds *bounds, uint32_t region_count)
{
	uint8_t head[MGD_FRAME_HEADER_BYTES];
	struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
	struct mgd_error err = {0};
	struct mgd_frame frame;

	CHECK(poll(&poll_fd, 1, PATIENCE_MS) == 1);
	CHECK_EQUAL(recv(fd, head, sizeof(head), MSG_WAITALL), sizeof(head));
	CHECK_OK(mgd_frame_decode_header(head, bounds, region_count, &frame, &err), err);
	CHECK_EQUAL(frame.kind, MGD_FRAME_DEMAND);
	CHECK(frame.check == mgd_frame_check(&frame, NULL, rig_secret));
	return frame;
}

/* ---- the engine */

static struct mgd_event rig_event(struct mgd_target *target, uint32_t kind)
{
	struct pollfd poll_fd = {.fd = mgd_target_event_fd(target), .events = POLLIN};
	struct mgd_event event;

	while (!mgd_target_next_event(target, &event))
		if (poll(&poll_fd, 1, PATIENCE_MS) != 1) {
			fprintf(stderr, "event %u did not arrive\n", kind);
			abort();
		}
	if (event.kind != kind) {
		fprintf(stderr, "event %u (%s), not %u\n", event.kind, event.error.message, kind);
		abort();
	}
	return event;
}

static int rig_stream(struct mgd_target *target, uint32_t stream)
{
	struct mgd_error err = {0};
	int ends[2];

	CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
	CHECK_OK(mgd_target_add_stream(target, stream, plain_channel(ends[1]), &err), err);
	return ends[0];
}

static uint64_t rig_now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Poll the statistics until `condition` (of `stats`) holds. */
#define RIG_UNTIL(target, stats, condition)                                                                            \
	do {                                                                                                           \
		uint64_t until_ = rig_now_ms() + PATIENCE_MS;                                                          \
		for (;;) {                                                                                             \
			mgd_target_stats(target, &(stats));                                                            \
			if (condition)                                                                                 \
				break;                                                                                 \
			if (rig_now_ms() > until_) {                                                                   \
				fprintf(stderr, "%s:%d: never: %s\n", __FILE__, __LINE__, #condition);                 \
				abort();                                                                               \
			}                                                                                              \
			sched_yield();                                                                                 \
		}                                                                                                      \
	} while (0)

#pragma GCC diagnostic pop
#endif
