/* SPDX-License-Identifier: MIT */
/* Tests of both engines against each other.  They pre-copy and switch over, and the guest reads while the drain
 * runs. */
#include "target_guest.h"
#include "tls_pair.h"

#define SIZE_BYTES (16 * MIB)
#define BLOCKS (SIZE_BYTES / MGD_BLOCK_BYTES)

static void source_event(struct mgd_source *source, uint32_t kind)
{
	struct pollfd poll_fd = {.fd = mgd_source_event_fd(source), .events = POLLIN};
	struct mgd_event event;

	while (!mgd_source_next_event(source, &event))
		CHECK(poll(&poll_fd, 1, PATIENCE_MS) == 1);
	CHECK_EQUAL(event.kind, kind);
}

static void fill_source(int memory, uint16_t *versions, int step, int version)
{
	uint64_t words[WORDS];

	for (uint64_t block = 0; block < BLOCKS; block += (uint64_t)step) {
		if (block / 1024 == 2)
			continue; /* 4 MiB of it are never populated */
		versions[block] = (uint16_t)version;
		rig_fill(words, block, version);
		CHECK_EQUAL(pwrite(memory, words, sizeof(words), (off_t)(block * MGD_BLOCK_BYTES)), sizeof(words));
	}
}

static void connect_over(const struct hosts *hosts, struct mgd_source *source, struct mgd_target *target,
			 uint32_t stream)
{
	struct mgd_channel *ends[2];
	struct mgd_error err = {0};

	hosts_connect(hosts, ends);
	CHECK_OK(mgd_target_add_stream(target, stream, ends[0], &err), err);
	CHECK_OK(mgd_source_add_stream(source, stream, ends[1], &err), err);
}

/* hosts: for TLS; NULL for plain connections. */
static void connect_source(const struct hosts *hosts, struct mgd_source *source, struct host *host)
{
	struct mgd_error err = {0};

	if (!hosts) {
		CHECK_OK(mgd_source_add_stream(source, 0, plain_channel(dup(host->bulk)), &err), err);
		CHECK_OK(mgd_source_add_stream(source, MGD_STREAM_URGENT, plain_channel(dup(host->urgent)), &err), err);
		return;
	}
	mgd_target_drop_streams(host->target);
	connect_over(hosts, source, host->target, 0);
	connect_over(hosts, source, host->target, MGD_STREAM_URGENT);
}

static void hand_over_stale_map(struct mgd_source *source, struct host *host)
{
	uint64_t pages = SIZE_BYTES / page_bytes_under_test;
	struct mgd_error err = {0};
	uint8_t map[BLOCKS / 8];

	CHECK_OK(mgd_source_stale_map(source, 0, 0, map, (pages + 7) / 8, &err), err);
	CHECK_OK(mgd_target_stale_map(host->target, 0, 0, map, (pages + 7) / 8, &err), err);
}

static void move_guest(const struct hosts *hosts)
{
	static uint16_t versions[BLOCKS];
	struct mgd_source_region region = {.size_bytes = SIZE_BYTES, .page_bytes = MGD_BLOCK_BYTES};
	struct mgd_source_stats source_stats;
	struct mgd_target_stats stats;
	struct mgd_source *source;
	struct mgd_error err = {0};
	uint64_t stale, here, there, payload;
	struct host host;

	memset(versions, 0, sizeof(versions));
	region.memory_fd = rig_memfd(MGD_BLOCK_BYTES, SIZE_BYTES);
	region.host_page_bytes = page_bytes_under_test;
	fill_source(region.memory_fd, versions, 1, 1);
	open_host_of(&host, SIZE_BYTES / page_bytes_under_test, 2);
	CHECK_OK(mgd_source_create(&region, 1, 1, rig_secret, &source, &err), err);
	connect_source(hosts, source, &host);

	CHECK_OK(mgd_source_mark_populated(source, NULL, &err), err);
	CHECK_OK(mgd_source_round(source, 1, &err), err);
	source_event(source, MGD_EVENT_ROUND_DONE);
	fill_source(region.memory_fd, versions, 7, 2);
	fill_source(region.memory_fd, versions, 70, 0);
	CHECK_OK(mgd_source_mark_populated(source, NULL, &err), err);
	CHECK_OK(mgd_source_barrier(source, 1, &err), err);
	rig_event(host.target, MGD_EVENT_BARRIER);
	CHECK_OK(mgd_source_freeze(source, &stale, &err), err);
	hand_over_stale_map(source, &host);
	mgd_source_stats(source, &source_stats);
	payload = source_stats.payload_bytes;
	CHECK_OK(mgd_target_switchover(host.target, &err), err);
	CHECK_OK(mgd_source_serve(source, 0, &err), err);

	/* Demand pages without the drain, and with it. */
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 14, 0), versions[14]);
	for (uint64_t i = 0; i < 8; i++)
		tell(&host.guest, READ_ALL, i * (BLOCKS / 8), BLOCKS / 8);
	CHECK_OK(mgd_source_serve(source, 1, &err), err);
	CHECK_OK(mgd_target_background(host.target, &err), err);
	for (int i = 0; i < 8; i++)
		CHECK(hear(&host.guest).value >= 0);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	source_event(source, MGD_EVENT_ALL_SENT);
	CHECK_OK(mgd_target_release(host.target, &err), err);

	CHECK_OK(mgd_digest(region.memory_fd, 0, SIZE_BYTES, rig_secret, &there, &err), err);
	CHECK_OK(mgd_digest(host.guest.memory, 0, SIZE_BYTES, rig_secret, &here, &err), err);
	CHECK(here == there);
	for (uint64_t block = 0; block < BLOCKS; block += 64) {
		int sum = 0;

		for (uint64_t i = block; i < block + 64; i++)
			sum += versions[i];
		CHECK_EQUAL(ask(&host.guest, READ_ALL, block, 64), sum);
	}
	mgd_source_stats(source, &source_stats);
	payload = source_stats.payload_bytes - payload;
	CHECK(payload <= (BLOCKS / 7 + 2) * MGD_BLOCK_BYTES);
	mgd_target_stats(host.target, &stats);
	CHECK_EQUAL(stats.stale_pages, 0);
	mgd_source_destroy(source);
	close(region.memory_fd);
	close_host(&host);
}

static void a_guest_moves_with_its_changed_blocks_only(void)
{
	move_guest(NULL);
}

static void a_guest_moves_over_tls(void)
{
	struct hosts hosts;

	hosts_create(&hosts);
	move_guest(&hosts);
	hosts_destroy(&hosts);
}

static void run(void)
{
	RUN(a_guest_moves_with_its_changed_blocks_only);
	RUN(a_guest_moves_over_tls);
}

int main(void)
{
	return run_on_page_sizes(run, SIZE_BYTES / (2 * MIB) + 2);
}
