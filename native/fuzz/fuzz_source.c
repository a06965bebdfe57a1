/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes what a hostile target sends: demands, on the urgent connection of a frozen source.  Input: frames as on the
 * wire, except that magic, version and check are corrected.  Whatever is demanded, and however often, a page is sent
 * once.
 */
#include <assert.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frame.h"

#define REGIONS 3
#define SIZE_BYTES (8u << 20)

static const uint64_t page_bytes[REGIONS] = {MGD_BLOCK_BYTES, 2u << 20, 8u << 20};
static struct mgd_source_region regions[REGIONS];
static uint8_t secret[MGD_SECRET_BYTES];
static uint64_t pages;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void set_up(void)
{
	for (int i = 0; i < REGIONS; i++) {
		regions[i] = (struct mgd_source_region){.memory_fd = memfd_create("memory", MFD_CLOEXEC),
							.size_bytes = SIZE_BYTES,
							.page_bytes = MGD_BLOCK_BYTES,
							.host_page_bytes = page_bytes[i]};
		assert(!ftruncate(regions[i].memory_fd, SIZE_BYTES));
		for (off_t at = 0; at < SIZE_BYTES; at += 64 * MGD_BLOCK_BYTES)
			assert(pwrite(regions[i].memory_fd, "x", 1, at) == 1);
		pages += SIZE_BYTES / page_bytes[i];
	}
	for (int i = 0; i < MGD_SECRET_BYTES; i++)
		secret[i] = (uint8_t)(i * 73 + i / 256);
}

/* The other end reads whatever arrives. */
static void *drain(void *argument)
{
	static uint8_t buffer[1 << 16];

	while (recv(*(int *)argument, buffer, sizeof(buffer), 0) > 0)
		;
	return NULL;
}

static void send_demands(int fd, const uint8_t *data, size_t size)
{
	for (; size >= MGD_FRAME_HEADER_BYTES; data += MGD_FRAME_HEADER_BYTES, size -= MGD_FRAME_HEADER_BYTES) {
		uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
		struct mgd_frame frame = {.kind = data[5]};
		uint32_t magic = MGD_FRAME_MAGIC;
		uint64_t check;

		memcpy(head, data, MGD_FRAME_HEADER_BYTES);
		memcpy(head, &magic, sizeof(magic));
		head[4] = MGD_FRAME_VERSION;
		memcpy(&frame.flags, data + 6, 2);
		memcpy(&frame.region, data + 8, 4);
		memcpy(&frame.block_count, data + 12, 4);
		memcpy(&frame.first_block, data + 16, 8);
		memcpy(&frame.payload_bytes, data + 24, 4);
		memcpy(&frame.sequence, data + 28, 4);
		if (frame.kind == MGD_FRAME_DEMAND) {
			check = mgd_frame_check(&frame, NULL, secret);
			memcpy(head + 32, &check, sizeof(check));
		}
		if (send(fd, head, MGD_FRAME_HEADER_BYTES, MSG_NOSIGNAL) < 0)
			return;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct pollfd poll_fd = {.events = POLLIN};
	struct mgd_event event = {0};
	struct mgd_source_stats stats;
	struct mgd_channel *channel;
	struct mgd_source *source;
	struct mgd_error err;
	pthread_t thread;
	int pair[2];

	if (!pages)
		set_up();
	assert(!mgd_source_create(regions, REGIONS, 1, secret, &source, &err));
	assert(!mgd_source_freeze_whole(source, &err));
	assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	assert(!mgd_channel_create(pair[1], &channel, &err));
	assert(!mgd_source_add_stream(source, MGD_STREAM_URGENT, channel, &err));
	assert(!mgd_source_serve(source, 0, &err));
	assert(!pthread_create(&thread, NULL, drain, &pair[0]));
	send_demands(pair[0], data, size);
	shutdown(pair[0], SHUT_WR);
	poll_fd.fd = mgd_source_event_fd(source);
	while (event.kind != MGD_EVENT_STREAM_LOST)
		if (!mgd_source_next_event(source, &event))
			assert(poll(&poll_fd, 1, 30000) == 1);
	assert(event.error.kind == MGD_ERR_PEER || event.error.kind == MGD_ERR_CLOSED);
	mgd_source_stats(source, &stats);
	assert(stats.demanded_pages + stats.stale_pages_left <= pages);
	mgd_source_destroy(source);
	pthread_join(thread, NULL);
	close(pair[0]);
	return 0;
}
