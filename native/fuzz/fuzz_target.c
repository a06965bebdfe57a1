/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes what a hostile source sends, through the whole target engine: frames before the switchover, the stale map, and
 * frames after it.  Input: byte 0: the number of frames before it; byte 1: the stale pages; then frames as on the wire,
 * except for what would stop them too early: magic, version and check are corrected, and one byte stands for the
 * payload.
 */
#include <assert.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "target.h"

#define REGIONS 3
#define SIZE_BYTES (8u << 20)

static const uint64_t page_bytes[REGIONS] = {MGD_BLOCK_BYTES, 2u << 20, 8u << 20};
static struct mgd_target_region regions[REGIONS];
static struct mgd_frame_bounds bounds[REGIONS];
static uint8_t secret[MGD_SECRET_BYTES];
static int ledger_fd;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void set_up(void)
{
	for (int i = 0; i < REGIONS; i++) {
		regions[i] = (struct mgd_target_region){.memory_fd = memfd_create("memory", MFD_CLOEXEC),
							.size_bytes = SIZE_BYTES,
							.host_page_bytes = page_bytes[i]};
		bounds[i] = (struct mgd_frame_bounds){SIZE_BYTES / MGD_BLOCK_BYTES, page_bytes[i] / MGD_BLOCK_BYTES};
		assert(!ftruncate(regions[i].memory_fd, SIZE_BYTES));
	}
	for (int i = 0; i < MGD_SECRET_BYTES; i++)
		secret[i] = (uint8_t)(i * 73 + i / 256);
	ledger_fd = memfd_create("ledger", MFD_CLOEXEC);
	assert(!ftruncate(ledger_fd, (off_t)mgd_ledger_bytes(regions, REGIONS)));
}

static bool send_all(int fd, const void *bytes, size_t count)
{
	return !count || send(fd, bytes, count, MSG_NOSIGNAL) == (ssize_t)count;
}

/* Send the next frame; return how much of the input it used, 0 if there is no more or the engine has rejected it. */
static size_t send_frame(int fd, const uint8_t *data, size_t size)
{
	static uint8_t payload[MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES];
	uint64_t hashes[MGD_CHUNK_BLOCKS];
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
	struct mgd_frame frame;
	size_t bytes = MGD_FRAME_HEADER_BYTES;
	uint32_t magic = MGD_FRAME_MAGIC;

	if (size < bytes)
		return 0;
	memcpy(head, data, bytes);
	memcpy(head, &magic, sizeof(magic));
	head[4] = MGD_FRAME_VERSION;
	if (mgd_frame_decode_header(head, bounds, REGIONS, &frame, NULL))
		return send_all(fd, head, bytes) ? bytes : 0;
	if (frame.kind == MGD_FRAME_PAGES) {
		bytes += mgd_frame_bitmap_bytes(frame.block_count);
		if (size < bytes + 1)
			return 0;
		memcpy(head, data, bytes);
		if (mgd_frame_decode_bitmaps(head + MGD_FRAME_HEADER_BYTES, &frame, NULL))
			return 0;
		memset(payload, data[bytes], frame.payload_bytes);
		for (uint32_t i = 0; i < mgd_frame_present_count(&frame); i++)
			hashes[i] = mgd_block_hash(payload, secret);
	}
	assert(mgd_frame_encode(&frame, hashes, secret, head) == bytes);
	return send_all(fd, head, bytes) && send_all(fd, payload, frame.payload_bytes)
		       ? bytes + (frame.kind == MGD_FRAME_PAGES)
		       : 0;
}

static void wait_lost(struct mgd_target *target)
{
	struct pollfd poll_fd = {.fd = mgd_target_event_fd(target), .events = POLLIN};
	struct mgd_event event = {0};

	while (event.kind != MGD_EVENT_STREAM_LOST)
		if (!mgd_target_next_event(target, &event))
			assert(poll(&poll_fd, 1, 30000) == 1);
}

static int connect_to(struct mgd_target *target)
{
	struct mgd_channel *channel;
	struct mgd_error err;
	int pair[2];

	assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	assert(!mgd_channel_create(pair[1], &channel, &err));
	assert(!mgd_target_add_stream(target, 0, channel, &err));
	return pair[0];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const uint8_t *end = data + size;
	struct mgd_target *target;
	struct mgd_error err;
	uint8_t stale[SIZE_BYTES / MGD_BLOCK_BYTES / 8];
	int before, fd;
	size_t taken;

	if (!regions[0].size_bytes)
		set_up();
	if (size < 2)
		return 0;
	assert(!mgd_target_create(regions, REGIONS, 1, ledger_fd, 0, secret, &target, &err));
	before = data[0] % 16;
	memset(stale, data[1], sizeof(stale));
	data += 2;
	fd = connect_to(target);
	for (; before && (taken = send_frame(fd, data, (size_t)(end - data))); before--)
		data += taken;
	close(fd);
	wait_lost(target);
	mgd_target_drop_streams(target);
	for (uint32_t i = 0; i < REGIONS; i++) {
		uint64_t pages = SIZE_BYTES / page_bytes[i];
		uint8_t first = stale[0] & (uint8_t)((1u << (pages < 8 ? pages : 8)) - 1);

		assert(!mgd_target_stale_map(target, i, 0, pages < 8 ? &first : stale, (pages + 7) / 8, &err));
	}
	assert(!mgd_target_switchover(target, &err));
	fd = connect_to(target);
	while ((taken = send_frame(fd, data, (size_t)(end - data))))
		data += taken;
	close(fd);
	wait_lost(target);
	mgd_target_drop_streams(target);
	/* Nothing of an incomplete frame remains. */
	for (uint64_t page = 0; page < target->ledger.page_count; page++)
		assert(!(mgd_ledger_get(&target->ledger, page) & MGD_PAGE_RECEIVING));
	mgd_target_destroy(target);
	return 0;
}
