/* SPDX-License-Identifier: MIT */
/* Test of a 1 GiB host page.  Only its changed blocks are sent, in frames of one chunk each, and none is visible
 * before the end. */
#include "target_guest.h"

#define CHUNKS (GIB / (2 * MIB))

/* Send chunks [from, to) of the page; every hundredth has two changed blocks. */
static void send_chunks(int fd, struct rig_frame *frame, uint32_t from, uint32_t to, int version)
{
	int versions[MGD_CHUNK_BLOCKS];

	for (uint32_t chunk = from; chunk < to; chunk++) {
		uint64_t hashes[2];

		for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
			versions[i] = chunk % 100 == 0 && (i == 3 || i == 4) ? version : UNCHANGED;
		rig_build(frame, 0, (uint64_t)chunk * MGD_CHUNK_BLOCKS, MGD_CHUNK_BLOCKS,
			  (uint16_t)(MGD_FRAME_FINAL | (chunk + 1 == CHUNKS ? MGD_FRAME_PAGE_END : 0)), versions);
		frame->frame.sequence = chunk;
		for (uint32_t i = 0; i < frame->frame.payload_bytes / MGD_BLOCK_BYTES; i++)
			hashes[i] = mgd_block_hash(frame->payload + i * WORDS, rig_secret);
		mgd_frame_encode(&frame->frame, hashes, rig_secret, frame->head);
		rig_send_built(fd, frame);
	}
}

static void a_page_of_1_gib_comes_by_its_changed_blocks(void)
{
	struct rig_frame *frame = malloc(sizeof(*frame));
	const uint64_t far = 100 * MGD_CHUNK_BLOCKS;
	struct mgd_target_stats stats;
	struct mgd_error err = {0};
	struct host host;
	uint8_t stale = 1;

	CHECK(frame != NULL);
	open_host_of(&host, 1, 1);
	rig_send_all(host.bulk, 0, 0, MGD_CHUNK_BLOCKS, 0, 1);
	rig_send_all(host.bulk, 0, far, MGD_CHUNK_BLOCKS, 0, 1);
	rig_send_barrier(host.bulk, 1);
	rig_event(host.target, MGD_EVENT_BARRIER);
	CHECK_OK(mgd_target_stale_map(host.target, 0, 0, &stale, 1, &err), err);
	CHECK_OK(mgd_target_switchover(host.target, &err), err);
	tell(&host.guest, READ_BLOCK, far + 3, 0);
	CHECK_EQUAL(rig_demand(host.urgent, &host.bounds, 1).first_block, 0);

	/* Half of it arrives, then the connection is lost. */
	send_chunks(host.urgent, frame, 0, CHUNKS / 2, 2);
	RIG_UNTIL(host.target, stats, stats.frames == 2 + CHUNKS / 2);
	close(host.urgent);
	CHECK_EQUAL(rig_event(host.target, MGD_EVENT_STREAM_LOST).error.kind, MGD_ERR_CLOSED);
	mgd_target_drop_streams(host.target);
	close(host.bulk);
	host.bulk = rig_stream(host.target, 0);
	host.urgent = rig_stream(host.target, MGD_STREAM_URGENT);
	CHECK_EQUAL(rig_demand(host.urgent, &host.bounds, 1).first_block, 0);
	mgd_target_stats(host.target, &stats);
	CHECK_EQUAL(stats.stale_pages, 1);
	CHECK_EQUAL(stats.faults_held, 1);

	send_chunks(host.urgent, frame, 0, CHUNKS, 2);
	CHECK_EQUAL(hear(&host.guest).value, 2);
	rig_event(host.target, MGD_EVENT_ALL_CURRENT);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, far + 2, 0), 1);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, far + 4, 0), 2);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 5, 0), 1);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 500 * MGD_CHUNK_BLOCKS + 3, 0), 2);
	CHECK_EQUAL(ask(&host.guest, READ_BLOCK, 300 * MGD_CHUNK_BLOCKS, 0), 0);
	CHECK_OK(mgd_target_release(host.target, &err), err);
	close_host(&host);
	free(frame);
}

static void run(void)
{
	RUN(a_page_of_1_gib_comes_by_its_changed_blocks);
}

int main(void)
{
	int probe, status;

	signal(SIGPIPE, SIG_IGN);
	rig_init();
	if (mgd_uffd_open(0, &probe, NULL) < 0) {
		printf("no right to use userfaultfd for kernel faults: skipped\n");
		return SKIPPED;
	}
	close(probe);
	if (!rig_pool_add(GIB, 1)) {
		printf("no 1 GiB page available here: skipped\n");
		return SKIPPED;
	}
	status = run_with(GIB, run);
	rig_pool_add(GIB, -1);
	return status;
}
