/* SPDX-License-Identifier: MIT */
/* Tests of compression.  They check when it stays on, and what compressed frames, valid or not, do to the target's
 * memory. */
#include <zstd.h>

#include "packer.h"
#include "target_rig.h"

#define PAGES 1024u /* of 4 KiB */
#define STRETCH MGD_PAYOFF_STRETCH_BYTES

/* ---- when it pays, with numbers instead of a clock */

/* Send `stretches` that take so long with and without compression; return how many were compressed. */
static int packed_of(struct mgd_payoff *payoff, int stretches, uint64_t packed_ns, uint64_t plain_ns)
{
	int packed = 0;

	for (int i = 0; i < stretches; i++) {
		packed += payoff->packing;
		for (int part = 0; part < 16; part++)
			mgd_payoff_note(payoff, STRETCH / 16, (payoff->packing ? packed_ns : plain_ns) / 16);
	}
	return packed;
}

static void packing_goes_off_by_itself_where_it_does_not_pay(void)
{
	struct mgd_payoff payoff;

	mgd_payoff_init(&payoff);
	packed_of(&payoff, 50, 16000000, 4000000);
	CHECK(!payoff.packing || payoff.trying);
	/* The other mode is tried again, less and less often. */
	CHECK(packed_of(&payoff, 1000, 16000000, 4000000) <= 1000 / 50);
}

static void packing_goes_on_where_it_pays(void)
{
	struct mgd_payoff payoff;

	mgd_payoff_init(&payoff);
	packed_of(&payoff, 50, 16000000, 64000000);
	CHECK(packed_of(&payoff, 1000, 16000000, 64000000) >= 1000 - 1000 / 50);
}

static void a_gain_too_small_for_a_processor_is_not_taken(void)
{
	struct mgd_payoff payoff;

	mgd_payoff_init(&payoff);
	packed_of(&payoff, 50, 9800000, 10000000);
	CHECK(packed_of(&payoff, 1000, 9800000, 10000000) <= 1000 / 50);
}

/* The network becomes slow, and fast again: no decision is final. */
static void the_answer_follows_the_network(void)
{
	struct mgd_payoff payoff;

	mgd_payoff_init(&payoff);
	packed_of(&payoff, 500, 16000000, 4000000);
	packed_of(&payoff, 100, 16000000, 64000000);
	CHECK(packed_of(&payoff, 100, 16000000, 64000000) >= 90);
	packed_of(&payoff, 200, 16000000, 4000000);
	CHECK(packed_of(&payoff, 100, 16000000, 4000000) <= 10);
}

/* ---- compressed frames at the target */

struct bench {
	int memory, ledger, bulk;
	uint64_t *view;
	struct mgd_target_region region;
	struct mgd_target *target;
};

static void open_bench(struct bench *bench, uint64_t host_page_bytes)
{
	struct mgd_error err = {0};

	bench->memory = rig_memfd(MGD_BLOCK_BYTES, PAGES * MGD_BLOCK_BYTES);
	bench->region = (struct mgd_target_region){
		.memory_fd = bench->memory, .size_bytes = PAGES * MGD_BLOCK_BYTES, .host_page_bytes = host_page_bytes};
	bench->ledger = memfd_create("ledger", MFD_CLOEXEC);
	CHECK_EQUAL(ftruncate(bench->ledger, (off_t)mgd_ledger_bytes(&bench->region, 1)), 0);
	CHECK_OK(mgd_target_create(&bench->region, 1, 1, bench->ledger, 0, rig_secret, &bench->target, &err), err);
	bench->view = mmap(NULL, PAGES * MGD_BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, bench->memory, 0);
	CHECK(bench->view != MAP_FAILED);
	bench->bulk = rig_stream(bench->target, 0);
}

static void close_bench(struct bench *bench)
{
	mgd_target_destroy(bench->target);
	munmap(bench->view, PAGES * MGD_BLOCK_BYTES);
	close(bench->memory);
	close(bench->ledger);
	close(bench->bulk);
}

/* Encode the frame again with the compressed payload `packed`, and the check of its own blocks. */
static void repack(struct rig_frame *frame, const void *packed, size_t bytes)
{
	uint64_t hashes[MGD_CHUNK_BLOCKS];

	for (uint32_t i = 0; i < mgd_frame_present_count(&frame->frame); i++)
		hashes[i] = mgd_block_hash(frame->payload + i * WORDS, rig_secret);
	frame->frame.flags |= MGD_FRAME_COMPRESSED;
	frame->frame.payload_bytes = (uint32_t)bytes;
	frame->head_bytes = mgd_frame_encode(&frame->frame, hashes, rig_secret, frame->head);
	memmove(frame->payload, packed, bytes);
}

/* Send a frame of these versions whose payload is `packed_blocks` of its blocks as zstd, cut short by `cut`. */
static void send_packed(int fd, uint64_t first_block, uint32_t count, uint16_t flags, const int *versions,
			uint32_t packed_blocks, size_t cut)
{
	struct rig_frame *frame = calloc(1, sizeof(*frame));
	size_t bound = ZSTD_compressBound(sizeof(frame->payload)), bytes;
	void *packed = malloc(bound);

	CHECK(frame && packed);
	rig_build(frame, 0, first_block, count, flags, versions);
	if (!packed_blocks)
		packed_blocks = mgd_frame_present_count(&frame->frame);
	bytes = ZSTD_compress(packed, bound, frame->payload, (size_t)packed_blocks * MGD_BLOCK_BYTES, 1);
	CHECK(!ZSTD_isError(bytes) && bytes < frame->frame.payload_bytes);
	repack(frame, packed, bytes - cut);
	rig_send_built(fd, frame);
	free(packed);
	free(frame);
}

static void wait_current(struct bench *bench)
{
	CHECK_EQUAL(rig_event(bench->target, MGD_EVENT_ALL_CURRENT).error.kind, MGD_ERR_NONE);
}

static void switch_over(struct bench *bench, uint8_t first_stale)
{
	struct mgd_error err = {0};

	CHECK_OK(mgd_target_stale_map(bench->target, 0, 0, &first_stale, 1, &err), err);
	CHECK_OK(mgd_target_switchover(bench->target, &err), err);
}

static void check_versions(const struct bench *bench, const int *versions, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		CHECK_EQUAL(rig_version(bench->view + i * WORDS, i), versions[i] == UNCHANGED ? 0 : versions[i]);
}

static void packed_blocks_land_where_plain_ones_do(void)
{
	int whole[MGD_CHUNK_BLOCKS], some[MGD_CHUNK_BLOCKS];
	struct mgd_target_stats stats;
	struct bench bench;

	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++) {
		whole[i] = 1;
		some[i] = i % 5 == 1 ? 2 : i % 5 == 2 ? 0 : UNCHANGED;
	}
	open_bench(&bench, MGD_BLOCK_BYTES);
	send_packed(bench.bulk, 0, MGD_CHUNK_BLOCKS, 0, whole, 0, 0);
	send_packed(bench.bulk, 0, MGD_CHUNK_BLOCKS, 0, some, 0, 0);
	rig_send_barrier(bench.bulk, 1);
	CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_BARRIER).value, 1);
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++)
		whole[i] = some[i] == UNCHANGED ? whole[i] : some[i];
	check_versions(&bench, whole, MGD_CHUNK_BLOCKS);
	mgd_target_stats(bench.target, &stats);
	CHECK(stats.payload_bytes < 614ull * MGD_BLOCK_BYTES);
	close_bench(&bench);
}

static void packed_blocks_complete_a_stale_page(void)
{
	int before[MGD_CHUNK_BLOCKS], after[MGD_CHUNK_BLOCKS];
	struct bench bench;

	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++) {
		before[i] = 1;
		after[i] = i % 7 ? UNCHANGED : 2;
	}
	open_bench(&bench, 2 * MIB);
	send_packed(bench.bulk, 0, MGD_CHUNK_BLOCKS, 0, before, 0, 0);
	rig_send_barrier(bench.bulk, 1);
	CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_BARRIER).value, 1);
	switch_over(&bench, 3); /* a page that has arrived, and one that has not */
	send_packed(bench.bulk, 0, MGD_CHUNK_BLOCKS, MGD_FRAME_FINAL, after, 0, 0);
	send_packed(bench.bulk, MGD_CHUNK_BLOCKS, MGD_CHUNK_BLOCKS, MGD_FRAME_FINAL, before, 0, 0);
	wait_current(&bench);
	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++) {
		CHECK_EQUAL(rig_version(bench.view + i * WORDS, (uint64_t)i), i % 7 ? 1 : 2);
		CHECK_EQUAL(rig_version(bench.view + (MGD_CHUNK_BLOCKS + i) * WORDS, (uint64_t)MGD_CHUNK_BLOCKS + i),
			    1);
	}
	close_bench(&bench);
}

/* An invalid compressed payload ends its stream with an error that names it, and leaves the page unchanged. */
static void check_refused(uint32_t packed_blocks, size_t cut, const char *text)
{
	int before[MGD_CHUNK_BLOCKS], after[MGD_CHUNK_BLOCKS];
	struct mgd_event event;
	struct bench bench;

	for (int i = 0; i < MGD_CHUNK_BLOCKS; i++) {
		before[i] = 1;
		after[i] = i % 2 ? UNCHANGED : 2;
	}
	open_bench(&bench, 2 * MIB);
	rig_send(bench.bulk, 0, 0, MGD_CHUNK_BLOCKS, 0, before);
	rig_send_barrier(bench.bulk, 1);
	CHECK_EQUAL(rig_event(bench.target, MGD_EVENT_BARRIER).value, 1);
	switch_over(&bench, 1);
	send_packed(bench.bulk, 0, MGD_CHUNK_BLOCKS, MGD_FRAME_FINAL, after, packed_blocks, cut);
	event = rig_event(bench.target, MGD_EVENT_STREAM_LOST);
	CHECK_EQUAL(event.error.kind, MGD_ERR_PEER);
	if (!strstr(event.error.message, text)) {
		fprintf(stderr, "'%s' lacks '%s'\n", event.error.message, text);
		abort();
	}
	check_versions(&bench, before, MGD_CHUNK_BLOCKS);
	close_bench(&bench);
}

static void a_payload_that_is_not_what_it_says_is_refused(void)
{
	check_refused(255, 0, "compressed payload"); /* one block too few */
	check_refused(257, 0, "compressed payload"); /* one too many */
	check_refused(256, 1, "compressed payload"); /* cut short */
}

int main(void)
{
	alarm(110);
	rig_init();
	RUN(packing_goes_off_by_itself_where_it_does_not_pay);
	RUN(packing_goes_on_where_it_pays);
	RUN(a_gain_too_small_for_a_processor_is_not_taken);
	RUN(the_answer_follows_the_network);
	RUN(packed_blocks_land_where_plain_ones_do);
	RUN(packed_blocks_complete_a_stale_page);
	RUN(a_payload_that_is_not_what_it_says_is_refused);
	return 0;
}
