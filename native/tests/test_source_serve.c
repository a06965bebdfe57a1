/* SPDX-License-Identifier: MIT */
/* Tests of the source engine after the freeze.  They cover the stale map, demands, drain, claims and reconnect. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>

#include "processors.h"
#include "source.h"
#include "source_peer.h"

/* Replaces the core's function: start as many helpers as on a large machine, whatever this one has. */
uint32_t mgd_processor_count(void)
{
	return 8;
}

/* Write all of the guest's blocks `step` apart and send them, write some of them (`again` apart) once more and
 * freeze.  Returns the number of stale pages. */
static uint64_t freeze_some(struct peer *peer, uint64_t step, uint64_t again)
{
	struct mgd_error err;
	uint64_t stale;

	peer_connect(peer);
	for (uint64_t block = 0; block < peer_block_count(peer); block += step)
		guest_write(peer, block, 1);
	peer_scan(peer, 1);
	peer_round(peer, 1);
	for (uint64_t block = 0; block < peer_block_count(peer); block += again)
		guest_write(peer, block, 2);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	return stale;
}

static uint8_t *stale_map(struct peer *peer, size_t *out_bytes)
{
	uint64_t pages = peer->bytes / peer->host_page_bytes;
	struct mgd_error err;
	uint8_t *map;

	*out_bytes = (pages + 7) / 8;
	map = calloc(*out_bytes, 1);
	CHECK(map);
	/* In two pieces, as sent to the target. */
	CHECK_OK(mgd_source_stale_map(peer->source, 0, 0, map, *out_bytes / 2, &err), err);
	CHECK_OK(mgd_source_stale_map(peer->source, 0, *out_bytes / 2 * 8, map + *out_bytes / 2,
				      *out_bytes - *out_bytes / 2, &err),
		 err);
	return map;
}

static void check_each_stale_page_came(const struct peer *peer, const uint8_t *map, int times)
{
	for (uint64_t page = 0; page < peer->bytes / peer->host_page_bytes; page++)
		CHECK_EQUAL(peer->finals[page], map[page / 8] >> (page % 8) & 1 ? times : 0);
}

static void serve(struct peer *peer, int drain)
{
	struct mgd_error err;

	CHECK_OK(mgd_source_serve(peer->source, drain, &err), err);
}

struct grain {
	uint64_t bytes, page_bytes, host_page_bytes;
	uint64_t step, again;
};

static const struct grain grains[] = {
	{16 * MIB, 2 * MIB, 2 * MIB, 1, 700},	 {16 * MIB, 4 * KIB, 2 * MIB, 3, 350},
	{8 * MIB, 4 * KIB, 4 * KIB, 1, 3},	 {8 * MIB, 2 * MIB, 4 * KIB, 5, 700},
	{8 * MIB, 4 * KIB, 64 * KIB, 2, 50},	 {2 * GIB, 2 * MIB, 1 * GIB, 100000, 150000},
	{2 * GIB, 4 * KIB, 1 * GIB, 999, 30000},
};
#define GRAIN_COUNT (sizeof(grains) / sizeof(grains[0]))

static struct peer *grain_create(const struct grain *grain)
{
	return peer_create(grain->bytes, grain->page_bytes, grain->host_page_bytes, 2);
}

static void test_the_drain_brings_each_stale_page_once(void)
{
	for (size_t i = 0; i < GRAIN_COUNT; i++) {
		struct peer *peer = grain_create(&grains[i]);
		uint64_t stale = freeze_some(peer, grains[i].step, grains[i].again);
		uint64_t sent_before = peer_stats(peer).sent_blocks;
		size_t bytes;
		uint8_t *map = stale_map(peer, &bytes);

		CHECK(stale > 0);
		CHECK_EQUAL(peer_stats(peer).stale_pages_left, stale);
		CHECK_EQUAL(peer_stats(peer).stale_bytes_left, stale * peer->host_page_bytes);
		serve(peer, 1);
		peer_event(peer, MGD_EVENT_ALL_SENT);
		peer_wait(peer, &peer->final_pages, stale);
		peer_disconnect(peer);
		CHECK_EQUAL(peer->final_pages, stale);
		CHECK_EQUAL(peer_stats(peer).stale_pages_left, 0);
		CHECK_EQUAL(peer_stats(peer).stale_bytes_left, 0);
		check_each_stale_page_came(peer, map, 1);
		/* Changed blocks, and no others. */
		CHECK_EQUAL(peer_stats(peer).sent_blocks - sent_before,
			    (peer_block_count(peer) + grains[i].again - 1) / grains[i].again);
		peer_check_same(peer);
		free(map);
		peer_destroy(peer);
	}
}

static void test_demands_alone_bring_everything(void)
{
	for (size_t i = 0; i < GRAIN_COUNT; i++) {
		struct peer *peer = grain_create(&grains[i]);
		uint64_t stale = freeze_some(peer, grains[i].step, grains[i].again);
		size_t bytes;
		uint8_t *map = stale_map(peer, &bytes);

		serve(peer, 0);
		for (uint64_t page = 0; page < peer->bytes / peer->host_page_bytes; page++)
			if (map[page / 8] >> (page % 8) & 1)
				peer_demand(peer, page);
		peer_event(peer, MGD_EVENT_ALL_SENT);
		peer_wait(peer, &peer->final_pages, stale);
		peer_disconnect(peer);
		CHECK_EQUAL(peer->urgent_pages, stale);
		CHECK_EQUAL(peer_stats(peer).demanded_pages, stale);
		CHECK_EQUAL(peer_stats(peer).drain_bytes, 0);
		check_each_stale_page_came(peer, map, 1);
		peer_check_same(peer);
		free(map);
		peer_destroy(peer);
	}
}

/* Demands while the drain runs: only one of the two claims each page. */
static void test_demands_and_drain_do_not_send_a_page_twice(void)
{
	for (size_t i = 0; i < GRAIN_COUNT; i++) {
		struct peer *peer = grain_create(&grains[i]);
		uint64_t stale = freeze_some(peer, grains[i].step, grains[i].again);
		size_t bytes;
		uint8_t *map = stale_map(peer, &bytes);

		/* Some demands arrive before the order to serve. */
		for (uint64_t page = peer->bytes / peer->host_page_bytes; page-- > 0;) {
			if (map[page / 8] >> (page % 8) & 1)
				peer_demand(peer, page);
			if (page == peer->bytes / peer->host_page_bytes * 9 / 10)
				serve(peer, 1);
		}
		peer_event(peer, MGD_EVENT_ALL_SENT);
		peer_wait(peer, &peer->final_pages, stale);
		peer_disconnect(peer);
		CHECK_EQUAL(peer->final_pages, stale);
		check_each_stale_page_came(peer, map, 1);
		peer_check_same(peer);
		free(map);
		peer_destroy(peer);
	}
}

/* Only dirty, not changed: the page must still be sent, or it would never become current. */
static void test_a_stale_page_without_changes_is_told(void)
{
	struct peer *peer = peer_create(8 * MIB, 2 * MIB, 2 * MIB, 1);
	struct mgd_error err;
	uint64_t stale;

	peer_connect(peer);
	guest_write(peer, 600, 1);
	peer_scan(peer, 1);
	peer_round(peer, 1);
	guest_report(peer, 600);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	CHECK_EQUAL(stale, 1);
	serve(peer, 1);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, 1);
	CHECK_EQUAL(peer->finals[1], 1);
	CHECK_EQUAL(peer_stats(peer).sent_blocks, 1);
	peer_destroy(peer);
}

static void test_nothing_stale_is_all_sent_at_once(void)
{
	struct peer *peer = peer_create(8 * MIB, 2 * MIB, 2 * MIB, 1);
	uint64_t stale;
	struct mgd_error err;

	peer_connect(peer);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	serve(peer, 0);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_destroy(peer);
}

/* The user may limit the drain as much as they like: that does not delay a page the guest waits for. */
static void test_a_demanded_page_is_exempt_from_the_limits(void)
{
	struct peer *peer = peer_create(4 * MIB, 2 * MIB, 2 * MIB, 1);
	uint64_t stale = freeze_some(peer, 1, 1);

	CHECK_EQUAL(stale, 2);
	mgd_source_set_bandwidth(peer->source, 0, 1); /* one byte per second */
	serve(peer, 1);
	/* Whichever of the two the drain has claimed is expedited; the other is sent on the urgent connection. */
	peer_demand(peer, 0);
	peer_demand(peer, 1);
	peer_wait(peer, &peer->final_pages, 2);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_check_same(peer);
	peer_destroy(peer);
}

static void test_a_limit_is_lifted_live(void)
{
	struct peer *peer = peer_create(4 * MIB, 2 * MIB, 2 * MIB, 2);

	freeze_some(peer, 1, 1);
	mgd_source_set_bandwidth(peer->source, 1, 1);
	serve(peer, 1);
	mgd_source_set_bandwidth(peer->source, 0, 0);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, 2);
	peer_check_same(peer);
	peer_destroy(peer);
}

static void test_a_throttled_source_ends_at_once(void)
{
	struct peer *peer = peer_create(4 * MIB, 2 * MIB, 2 * MIB, 2);

	freeze_some(peer, 1, 1);
	mgd_source_set_bandwidth(peer->source, 1, 0);
	serve(peer, 1);
	peer_destroy(peer); /* the test's time limit is the check */
}

/* Tell the source what is missing, as the target would: stale pages that did not become current. */
static uint64_t tell_lacking(struct peer *peer, const uint8_t *map, size_t bytes)
{
	uint8_t *lacking = calloc(bytes, 1);
	struct mgd_error err;
	uint64_t count = 0;

	CHECK(lacking);
	for (uint64_t page = 0; page < peer->bytes / peer->host_page_bytes; page++) {
		if (!(map[page / 8] >> (page % 8) & 1) || peer->finals[page])
			continue;
		lacking[page / 8] |= (uint8_t)(1 << page % 8);
		count++;
	}
	CHECK_OK(mgd_source_lacking_begin(peer->source, &err), err);
	CHECK_OK(mgd_source_lacking(peer->source, 0, 0, lacking, bytes / 2, &err), err);
	CHECK_OK(mgd_source_lacking(peer->source, 0, bytes / 2 * 8, lacking + bytes / 2, bytes - bytes / 2, &err), err);
	free(lacking);
	return count;
}

/* Everything may have been written, though not received, before the cut. */
static void forget_events(struct peer *peer)
{
	struct mgd_event event;

	while (mgd_source_next_event(peer->source, &event))
		CHECK(event.kind == MGD_EVENT_STREAM_LOST || event.kind == MGD_EVENT_ALL_SENT);
}

static void test_reconnect_goes_on_from_what_is_lacking(void)
{
	for (size_t i = 0; i < GRAIN_COUNT; i++) {
		struct peer *peer = grain_create(&grains[i]);
		uint64_t stale = freeze_some(peer, grains[i].step, grains[i].again);
		uint64_t lacking;
		size_t bytes;
		uint8_t *map = stale_map(peer, &bytes);

		/* The network fails halfway, wherever that is. */
		peer_stop_after(peer, (stale + 1) / 2);
		serve(peer, 1);
		peer_wait(peer, &peer->final_pages, (stale + 1) / 2);
		peer_disconnect(peer);
		forget_events(peer);
		peer_stop_after(peer, 0);
		lacking = tell_lacking(peer, map, bytes);
		CHECK_EQUAL(peer_stats(peer).stale_pages_left, lacking);
		CHECK_EQUAL(peer_stats(peer).stale_bytes_left, lacking * peer->host_page_bytes);
		CHECK_EQUAL(peer->final_pages + lacking, stale);
		peer_connect(peer);
		serve(peer, 1);
		peer_event(peer, MGD_EVENT_ALL_SENT);
		peer_wait(peer, &peer->final_pages, stale);
		peer_disconnect(peer);
		check_each_stale_page_came(peer, map, 1);
		peer_check_same(peer);
		free(map);
		peer_destroy(peer);
	}
}

/* The source agent has crashed: a new engine has no hashes, and sends all contents of what is missing. */
static void test_freeze_whole_sends_all_and_tells_zeros(void)
{
	struct peer *peer = peer_create(8 * MIB, 2 * MIB, 2 * MIB, 1);
	uint64_t stale = freeze_some(peer, 1, 512);
	struct mgd_error err;
	size_t bytes;
	uint8_t *map = stale_map(peer, &bytes);

	CHECK_EQUAL(stale, 4);
	memset(peer->memory + 600 * BLOCK, 0, BLOCK);
	peer_disconnect(peer);
	mgd_source_destroy(peer->source);
	peer_new_source(peer);
	CHECK_OK(mgd_source_freeze_whole(peer->source, &err), err);
	map[0] &= (uint8_t)~1; /* page 0 has already arrived */
	CHECK_EQUAL(tell_lacking(peer, map, bytes), 3);
	peer_connect(peer);
	serve(peer, 1);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, 3);
	CHECK_EQUAL(peer_stats(peer).sent_blocks, 3 * 512 - 1);
	CHECK_EQUAL(peer_stats(peer).zero_blocks, 1);
	CHECK(!memcmp(peer->memory + 2 * MIB, peer->mirror + 2 * MIB, 6 * MIB));
	free(map);
	peer_destroy(peer);
}

static void test_a_bad_lacking_map_is_refused(void)
{
	struct peer *peer = peer_create(4 * MIB, 2 * MIB, 2 * MIB, 1);
	const uint8_t beyond = 4;
	struct mgd_error err;

	freeze_some(peer, 1, 1);
	CHECK_FAILS(mgd_source_lacking_begin(peer->source, &err), err, MGD_ERR_ARGUMENT); /* still connected */
	peer_disconnect(peer);
	CHECK_OK(mgd_source_lacking_begin(peer->source, &err), err);
	CHECK_FAILS(mgd_source_lacking(peer->source, 0, 0, &beyond, 1, &err), err, MGD_ERR_PEER);
	CHECK_FAILS(mgd_source_lacking(peer->source, 0, 8, &beyond, 1, &err), err, MGD_ERR_ARGUMENT);
	CHECK_FAILS(mgd_source_lacking(peer->source, 0, UINT64_MAX - 7, &beyond, 1, &err), err, MGD_ERR_ARGUMENT);
	peer_destroy(peer);
}

/* An invalid message on the urgent connection ends that connection, with an error that names it, and nothing else. */
static void check_urgent_refuses(const void *bytes, size_t length)
{
	struct peer *peer = peer_create(4 * MIB, 2 * MIB, 2 * MIB, 1);
	struct iovec iov = {(void *)bytes, length};
	struct mgd_error err;
	struct mgd_event event;

	peer_connect(peer);
	guest_write(peer, 600, 1);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_freeze(peer->source, &(uint64_t){0}, &err), err);
	serve(peer, 0);
	CHECK_OK(mgd_channel_send(peer_slot(peer, MGD_STREAM_URGENT)->channel, &iov, 1, &err), err);
	event = peer_event(peer, MGD_EVENT_STREAM_LOST);
	CHECK_EQUAL(event.stream, MGD_STREAM_URGENT);
	CHECK_EQUAL(event.error.kind, MGD_ERR_PEER);
	serve(peer, 1); /* the drain continues */
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, 1);
	peer_destroy(peer);
}

static void test_what_is_no_demand_is_refused(void)
{
	struct mgd_frame demand = {.kind = MGD_FRAME_DEMAND, .first_block = 512};
	struct mgd_frame barrier = {.kind = MGD_FRAME_BARRIER};
	struct mgd_frame current = {.kind = MGD_FRAME_DEMAND, .first_block = 0};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
	size_t bytes;

	check_urgent_refuses("garbage garbage garbage garbage garbage!", 40);
	bytes = mgd_frame_encode(&barrier, NULL, peer_secret, head);
	check_urgent_refuses(head, bytes);
	bytes = mgd_frame_encode(&current, NULL, peer_secret, head); /* a page that is not stale */
	check_urgent_refuses(head, bytes);
	bytes = mgd_frame_encode(&demand, NULL, peer_secret, head);
	head[35]++; /* the check */
	check_urgent_refuses(head, bytes);
}

/* All of a page larger than a chunk is marked, but little has changed: several threads find it, and it is sent once
 * and complete. */
static void test_a_large_page_is_searched_for_its_changes(void)
{
	struct peer *peer = peer_create(64 * MIB, 2 * MIB, 32 * MIB, 2);
	uint64_t stale, sent, read;
	struct mgd_error err;

	peer_connect(peer);
	for (uint64_t block = 0; block < peer_block_count(peer); block += 3)
		guest_write(peer, block, 1);
	peer_scan(peer, 1);
	peer_round(peer, 1);
	for (uint64_t block = 0; block < peer_block_count(peer); block += 100)
		guest_write(peer, block, 2);
	for (uint64_t block = 0; block < peer_block_count(peer); block += 512)
		guest_report(peer, block);
	guest_zero(peer, 9 * 512 + 3);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	CHECK_EQUAL(stale, 2);
	sent = peer_stats(peer).sent_blocks;
	read = peer_stats(peer).read_bytes;
	serve(peer, 0);
	peer_demand(peer, 1);
	peer_demand(peer, 0);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, 2);
	peer_disconnect(peer);
	CHECK_EQUAL(peer_stats(peer).sent_blocks - sent, (peer_block_count(peer) + 99) / 100);
	/* All of it is read once, and twice only where two threads met. */
	read = peer_stats(peer).read_bytes - read;
	CHECK(read >= 64 * MIB && read <= 64 * MIB + 2 * 7 * 2 * MIB);
	peer_check_same(peer);
	peer_destroy(peer);
}

/* The helpers finish a page before its sender is past the first chunk. */
static void test_helpers_stop_where_the_sender_is(void)
{
	struct peer *peer = peer_create(64 * MIB, 2 * MIB, 32 * MIB, 1);
	uint64_t stale, unchanged;
	struct mgd_error err;

	peer_connect(peer);
	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_write(peer, block, 1);
	peer_scan(peer, 1);
	peer_round(peer, 1);
	for (uint64_t block = 0; block < MGD_CHUNK_BLOCKS; block++)
		guest_write(peer, block, 2);
	for (uint64_t block = 0; block < 16 * MGD_CHUNK_BLOCKS; block += MGD_CHUNK_BLOCKS)
		guest_report(peer, block);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	CHECK_EQUAL(stale, 1);
	unchanged = peer_stats(peer).unchanged_blocks;
	mgd_source_set_bandwidth(peer->source, 0, 1); /* one byte per second: the sender is blocked at once */
	serve(peer, 1);
	while (peer_stats(peer).unchanged_blocks - unchanged < 15 * MGD_CHUNK_BLOCKS)
		sched_yield();
	mgd_source_set_bandwidth(peer->source, 0, 0);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, 1);
	CHECK_EQUAL(peer_stats(peer).unchanged_blocks - unchanged, 15 * MGD_CHUNK_BLOCKS);
	peer_check_same(peer);
	peer_destroy(peer);
}

/* Small pages wait in a batch for the limit, and the guest wants them now.  Claimed pages are expedited with
 * everything in their batch; the others are sent on the urgent connection. */
static void test_demanded_pages_in_a_batch_hurry(void)
{
	struct peer *peer = peer_create(8 * MIB, 4 * KIB, 4 * KIB, 1);
	uint64_t stale = freeze_some(peer, 1, 8);
	size_t bytes;
	uint8_t *map = stale_map(peer, &bytes);

	CHECK_EQUAL(stale, 256);
	mgd_source_set_bandwidth(peer->source, 0, 1); /* one byte per second */
	serve(peer, 1);
	for (uint64_t page = 0; page < peer_block_count(peer); page += 8)
		peer_demand(peer, page);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, stale);
	check_each_stale_page_came(peer, map, 1);
	peer_check_same(peer);
	free(map);
	peer_destroy(peer);
}

static int readable(int fd)
{
	int bytes = 0;

	CHECK(!ioctl(fd, FIONREAD, &bytes));
	return bytes;
}

/* Connect a stream that nobody reads yet, with a short queue; return the peer's descriptor. */
static int connect_unread(struct peer *peer, uint32_t number)
{
	struct peer_stream *stream = peer_slot(peer, number);
	struct mgd_error err;
	int pair[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &(int){96 * 1024}, sizeof(int)));
	*stream = (struct peer_stream){.peer = peer, .number = number, .channel = plain_channel(pair[1])};
	CHECK_OK(mgd_source_add_stream(peer->source, number, plain_channel(pair[0]), &err), err);
	return pair[1];
}

static void read_from_now_on(struct peer_stream *stream)
{
	CHECK(!pthread_create(&stream->thread, NULL, peer_main, stream));
	stream->running = true;
}

/* Make every page stale, all of it changed. */
static uint64_t freeze_all(struct peer *peer)
{
	struct mgd_error err;
	uint64_t stale;

	for (uint64_t block = 0; block < peer_block_count(peer); block++)
		guest_write(peer, block, 1);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	return stale;
}

/* While the guest waits for more than the urgent connection takes at once, the drain sends nothing. */
static void test_the_drain_gives_way_to_demands(void)
{
	struct peer *peer = peer_create(8 * MIB, 2 * MIB, 2 * MIB, 1);
	uint64_t stale;
	int fd;

	peer_connect_one(peer, 0);
	fd = connect_unread(peer, MGD_STREAM_URGENT);
	stale = freeze_all(peer);
	serve(peer, 0);
	peer_demand(peer, 1);
	while (readable(fd) <= 128 * 1024)
		usleep(1000);
	serve(peer, 1);
	usleep(20000); /* what it would send would be on its way */
	CHECK_EQUAL(peer_stats(peer).drain_bytes, 0);
	read_from_now_on(peer_slot(peer, MGD_STREAM_URGENT));
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, stale);
	peer_check_same(peer);
	peer_destroy(peer);
}

#define PIECE (256 * KIB) /* what the drain writes at once */

/* Return the page that the peer can read next on a connection. */
static uint64_t page_on(const struct peer *peer, int fd)
{
	uint8_t header[MGD_FRAME_HEADER_BYTES];
	struct mgd_frame frame;
	struct mgd_error err;

	CHECK_EQUAL(recv(fd, header, sizeof(header), MSG_PEEK | MSG_WAITALL), sizeof(header));
	CHECK_OK(mgd_frame_decode_header(header, &peer->bounds, 1, &frame, &err), err);
	return frame.first_block / MGD_CHUNK_BLOCKS;
}

/*
 * Four pages, all changed, and two bulk connections that nobody reads: each has claimed a page, which are returned, and
 * is stuck in its first piece.
 */
static struct peer *two_stuck_drains(uint64_t pages[2])
{
	struct peer *peer = peer_create(8 * MIB, 2 * MIB, 2 * MIB, 2);

	for (uint32_t i = 0; i < 2; i++)
		connect_unread(peer, i);
	peer_connect_one(peer, MGD_STREAM_URGENT);
	CHECK_EQUAL(freeze_all(peer), 4);
	serve(peer, 1);
	for (uint32_t i = 0; i < 2; i++)
		pages[i] = page_on(peer, mgd_channel_fd(peer->streams[i].channel));
	CHECK_EQUAL(peer_stats(peer).drain_bytes, 2 * PIECE);
	return peer;
}

/* Demand the page, and then one that no connection has claimed: once that arrives, both demands have been handled. */
static void demand_and_wait(struct peer *peer, uint64_t page, const uint64_t claimed[2])
{
	uint64_t other = 0;

	while (other == claimed[0] || other == claimed[1])
		other++;
	peer_demand(peer, page);
	peer_demand(peer, other);
	peer_wait(peer, &peer->urgent_pages, 1);
}

/* The page that the guest waits for was claimed before: what else the drain has to send waits for its connection. */
static void test_the_drain_gives_way_to_a_demanded_page_on_another_connection(void)
{
	for (uint32_t holder = 0; holder < 2; holder++) {
		uint64_t pages[2];
		struct peer *peer = two_stuck_drains(pages);

		demand_and_wait(peer, pages[holder], pages);
		read_from_now_on(&peer->streams[!holder]);
		usleep(20000); /* what it would send would be on its way */
		CHECK_EQUAL(peer_stats(peer).drain_bytes, 2 * PIECE);
		read_from_now_on(&peer->streams[holder]);
		peer_event(peer, MGD_EVENT_ALL_SENT);
		peer_wait(peer, &peer->final_pages, 4);
		CHECK_EQUAL(peer->final_pages, 4);
		peer_check_same(peer);
		peer_destroy(peer);
	}
}

/* The guest waits for a page on both: neither waits for the other. */
static void test_connections_with_demanded_pages_do_not_wait_for_each_other(void)
{
	uint64_t pages[2];
	struct peer *peer = two_stuck_drains(pages);

	peer_demand(peer, pages[0]);
	peer_demand(peer, pages[0]); /* again */
	demand_and_wait(peer, pages[1], pages);
	read_from_now_on(&peer->streams[1]);
	peer_wait(peer, &peer->final_pages, 2);
	read_from_now_on(&peer->streams[0]);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, 4);
	peer_check_same(peer);
	peer_destroy(peer);
}

/* A demand that crosses its page makes nobody wait. */
static void test_a_page_demanded_after_it_was_written_stops_nothing(void)
{
	uint64_t pages[2];
	struct peer *peer = two_stuck_drains(pages);
	struct mgd_error err;
	struct iovec iov = {"garbage garbage garbage garbage garbage!", MGD_FRAME_HEADER_BYTES};

	read_from_now_on(&peer->streams[0]);
	peer_wait(peer, &peer->final_pages, 3);
	peer_demand(peer, pages[0]);
	CHECK_OK(mgd_channel_send(peer_slot(peer, MGD_STREAM_URGENT)->channel, &iov, 1, &err), err);
	CHECK_EQUAL(peer_event(peer, MGD_EVENT_STREAM_LOST).stream, MGD_STREAM_URGENT); /* after the demand */
	read_from_now_on(&peer->streams[1]);
	peer_event(peer, MGD_EVENT_ALL_SENT);
	peer_wait(peer, &peer->final_pages, 4);
	peer_check_same(peer);
	peer_destroy(peer);
}

/* The connection with the demanded page fails: the other one waits for it no longer. */
static void test_the_drain_does_not_wait_for_a_connection_that_has_failed(void)
{
	uint64_t pages[2];
	struct peer *peer = two_stuck_drains(pages);

	demand_and_wait(peer, pages[0], pages);
	mgd_channel_shutdown(peer->streams[0].channel);
	CHECK_EQUAL(peer_event(peer, MGD_EVENT_STREAM_LOST).stream, 0);
	read_from_now_on(&peer->streams[1]);
	peer_wait(peer, &peer->final_pages, 3); /* all but the lost one */
	CHECK_EQUAL(peer->finals[pages[0]], 0);
	read_from_now_on(&peer->streams[0]);
	peer_destroy(peer);
}

/* Connect bulk stream 0 over TCP; return the source's descriptor. */
static int connect_tcp(struct peer *peer)
{
	struct peer_stream *stream = peer_slot(peer, 0);
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	socklen_t length = sizeof(address);
	int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct mgd_error err;

	CHECK(!bind(server, (struct sockaddr *)&address, sizeof(address)) && !listen(server, 1));
	CHECK(!getsockname(server, (struct sockaddr *)&address, &length));
	CHECK(!connect(fd, (struct sockaddr *)&address, sizeof(address)));
	*stream = (struct peer_stream){.peer = peer};
	stream->channel = plain_channel(accept4(server, NULL, NULL, SOCK_CLOEXEC));
	close(server);
	CHECK_OK(mgd_source_add_stream(peer->source, 0, plain_channel(fd), &err), err);
	read_from_now_on(stream);
	return fd;
}

static int unsent_limit(int fd)
{
	socklen_t length = sizeof(int);
	int bytes = 0;

	CHECK(!getsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &bytes, &length));
	return bytes;
}

/* What a slow link takes in a millisecond, and no more, is between a demanded page and the link. */
static void test_the_drain_keeps_little_ahead_of_a_demand(void)
{
	struct peer *peer = peer_create(2 * MIB, 2 * MIB, 2 * MIB, 1);
	int fd = connect_tcp(peer);
	struct mgd_error err;
	uint64_t stale;

	CHECK_EQUAL(source_drain_piece(0, 1), 16 * KIB);
	CHECK_EQUAL(source_drain_piece(125000, 1000000), 64 * KIB);
	CHECK_EQUAL(source_drain_piece(62500, 2000000), 16 * KIB);
	CHECK_EQUAL(source_drain_piece(1250000, 1000000), 256 * KIB);
	CHECK_EQUAL(source_drain_piece(UINT64_MAX, 1), 256 * KIB);
	peer_connect_one(peer, MGD_STREAM_URGENT);
	guest_write(peer, 5, 1);
	peer_scan(peer, 1);
	peer_round(peer, 1);
	CHECK_EQUAL(unsent_limit(fd), 512 * KIB);
	guest_write(peer, 5, 2);
	peer_scan(peer, 1);
	CHECK_OK(mgd_source_freeze(peer->source, &stale, &err), err);
	serve(peer, 1);
	peer_wait(peer, &peer->final_pages, 1);
	CHECK_EQUAL(unsent_limit(fd), 2 * 16 * KIB); /* its rate is not known yet */
	peer_check_same(peer);
	peer_destroy(peer);
}

int main(void)
{
	RUN(test_the_drain_brings_each_stale_page_once);
	RUN(test_demands_alone_bring_everything);
	RUN(test_demands_and_drain_do_not_send_a_page_twice);
	RUN(test_a_stale_page_without_changes_is_told);
	RUN(test_nothing_stale_is_all_sent_at_once);
	RUN(test_a_demanded_page_is_exempt_from_the_limits);
	RUN(test_demanded_pages_in_a_batch_hurry);
	RUN(test_the_drain_gives_way_to_demands);
	RUN(test_the_drain_gives_way_to_a_demanded_page_on_another_connection);
	RUN(test_connections_with_demanded_pages_do_not_wait_for_each_other);
	RUN(test_a_page_demanded_after_it_was_written_stops_nothing);
	RUN(test_the_drain_does_not_wait_for_a_connection_that_has_failed);
	RUN(test_the_drain_keeps_little_ahead_of_a_demand);
	RUN(test_a_large_page_is_searched_for_its_changes);
	RUN(test_helpers_stop_where_the_sender_is);
	RUN(test_a_limit_is_lifted_live);
	RUN(test_a_throttled_source_ends_at_once);
	RUN(test_reconnect_goes_on_from_what_is_lacking);
	RUN(test_freeze_whole_sends_all_and_tells_zeros);
	RUN(test_a_bad_lacking_map_is_refused);
	RUN(test_what_is_no_demand_is_refused);
	return 0;
}
