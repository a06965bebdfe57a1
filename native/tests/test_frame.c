/* SPDX-License-Identifier: MIT */
/* Tests of the page frame and its hashes.  Decoding returns what was encoded, and rejects every invalid field. */
#include <string.h>

#include "check.h"
#include "frame.h"
#include "hash.h"

static const struct mgd_frame_bounds bounds[] = {
	{.block_count = 4 * 512, .host_page_blocks = 512}, /* 2 MiB pages */
	{.block_count = 2 * 262144, .host_page_blocks = 262144}, /* 1 GiB pages */
	{.block_count = 1000, .host_page_blocks = 1}, /* 4 KiB pages */
	{.block_count = 1024, .host_page_blocks = 16}, /* 64 KiB pages */
};
static uint8_t secret[MGD_SECRET_BYTES];

static struct mgd_frame sample(void)
{
	return (struct mgd_frame){.kind = MGD_FRAME_PAGES,
				  .region = 0,
				  .block_count = 130,
				  .first_block = 512 + 64,
				  .payload_bytes = 3 * MGD_BLOCK_BYTES,
				  .present = {1, 1ull << 63, 2},
				  .zero = {6, 0, 1}};
}

static int decode(const uint8_t *head, struct mgd_frame *out, struct mgd_error *err)
{
	if (mgd_frame_decode_header(head, bounds, 4, out, err))
		return -1;
	return out->kind == MGD_FRAME_PAGES ? mgd_frame_decode_bitmaps(head + MGD_FRAME_HEADER_BYTES, out, err) : 0;
}

static int encode_decode(struct mgd_frame frame, struct mgd_frame *out, struct mgd_error *err)
{
	uint64_t hashes[MGD_CHUNK_BLOCKS] = {11, 22, 33};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES] = {0};
	uint32_t block_count = frame.block_count;

	if (frame.block_count > MGD_CHUNK_BLOCKS)
		frame.block_count = MGD_CHUNK_BLOCKS; /* more does not fit a frame: only a forged header can claim it */
	mgd_frame_encode(&frame, hashes, secret, head);
	memcpy(head + 12, &block_count, sizeof(block_count));
	return decode(head, out, err);
}

static void test_round_trip(void)
{
	struct mgd_frame frame = sample(), out;
	uint64_t hashes[3] = {11, 22, 33};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
	struct mgd_error err;

	CHECK_EQUAL(mgd_frame_encode(&frame, hashes, secret, head), MGD_FRAME_HEADER_BYTES + 2 * 8 * 3);
	CHECK_OK(decode(head, &out, &err), err);
	CHECK_EQUAL(out.first_block, frame.first_block);
	CHECK_EQUAL(out.block_count, frame.block_count);
	CHECK_EQUAL(out.payload_bytes, frame.payload_bytes);
	CHECK(!memcmp(out.present, frame.present, sizeof(out.present)));
	CHECK(!memcmp(out.zero, frame.zero, sizeof(out.zero)));
	CHECK_EQUAL(mgd_frame_present_count(&out), 3);
	CHECK(out.check == frame.check && out.check == mgd_frame_check(&out, hashes, secret));
}

static void test_check_covers_everything(void)
{
	struct mgd_frame frame = sample();
	uint64_t hashes[3] = {11, 22, 33};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES], other[MGD_SECRET_BYTES];
	size_t bytes = mgd_frame_encode(&frame, hashes, secret, head);

	/* Flip any bit of header or bitmaps: the decoder rejects it, or the check no longer matches. */
	for (size_t bit = 0; bit < bytes * 8; bit++) {
		struct mgd_frame out;

		head[bit / 8] ^= (uint8_t)(1 << bit % 8);
		if (!decode(head, &out, NULL) && mgd_frame_present_count(&out) == 3)
			CHECK(out.check != mgd_frame_check(&out, hashes, secret));
		head[bit / 8] ^= (uint8_t)(1 << bit % 8);
	}
	hashes[2]++;
	CHECK(frame.check != mgd_frame_check(&frame, hashes, secret));
	hashes[2]--;
	memcpy(other, secret, sizeof(other));
	other[MGD_SECRET_BYTES - 1]++;
	CHECK(frame.check != mgd_frame_check(&frame, hashes, other));
}

static void test_other_kinds(void)
{
	struct mgd_frame barrier = {.kind = MGD_FRAME_BARRIER, .first_block = 7}, out;
	struct mgd_frame demand = {.kind = MGD_FRAME_DEMAND, .region = 1, .first_block = 262144};
	struct mgd_error err;

	CHECK_OK(encode_decode(barrier, &out, &err), err);
	CHECK_EQUAL(out.first_block, 7);
	CHECK_OK(encode_decode(demand, &out, &err), err);
	CHECK_EQUAL(out.region, 1);
	barrier.block_count = 1;
	CHECK_FAILS(encode_decode(barrier, &out, &err), err, MGD_ERR_PEER);
	demand.first_block++;
	CHECK_FAILS(encode_decode(demand, &out, &err), err, MGD_ERR_PEER); /* not the start of a page */
	demand.first_block = 2 * 262144;
	CHECK_FAILS(encode_decode(demand, &out, &err), err, MGD_ERR_PEER); /* beyond the region */
	demand.first_block = 0;
	demand.flags = MGD_FRAME_FINAL;
	CHECK_FAILS(encode_decode(demand, &out, &err), err, MGD_ERR_PEER);
}

#define REFUSED(change)                                                                                                \
	do {                                                                                                           \
		struct mgd_frame frame = sample(), out;                                                                \
		struct mgd_error err;                                                                                  \
		change;                                                                                                \
		CHECK_FAILS(encode_decode(frame, &out, &err), err, MGD_ERR_PEER);                                      \
		CHECK(err.message[0]);                                                                                 \
	} while (0)

static void test_bad_fields(void)
{
	REFUSED(frame.kind = 0);
	REFUSED(frame.kind = 4);
	REFUSED(frame.flags = 8);
	REFUSED(frame.region = 4);
	REFUSED(frame.region = UINT32_MAX);
	REFUSED(frame.block_count = 0);
	REFUSED(frame.block_count = 513);
	REFUSED(frame.block_count = UINT32_MAX);
	REFUSED(frame.first_block = 4 * 512);
	REFUSED(frame.first_block = UINT64_MAX);
	REFUSED(frame.first_block = UINT64_MAX - 100);
	REFUSED(frame.first_block = 512 + 400); /* crosses a chunk */
	REFUSED((frame.region = 2, frame.first_block = 900)); /* crosses the region's end */
	REFUSED(frame.payload_bytes--);
	REFUSED(frame.payload_bytes += MGD_BLOCK_BYTES);
	REFUSED(frame.payload_bytes = UINT32_MAX);
	REFUSED(frame.sequence = 1);
	REFUSED(frame.flags = MGD_FRAME_PAGE_END);
	REFUSED(frame.present[0] |= 2); /* present and zero */
	REFUSED(frame.zero[2] |= 1 << 2); /* beyond block_count */
	REFUSED((frame.present[2] |= 1 << 5, frame.payload_bytes += MGD_BLOCK_BYTES));
	REFUSED((frame.flags = MGD_FRAME_COMPRESSED)); /* as long as the blocks */
	REFUSED((frame.flags = MGD_FRAME_COMPRESSED, frame.payload_bytes = 0));
}

static void test_magic_and_version(void)
{
	struct mgd_frame frame = sample(), out;
	uint64_t hashes[3] = {0};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES];
	struct mgd_error err;

	mgd_frame_encode(&frame, hashes, secret, head);
	head[0]++;
	CHECK_FAILS(decode(head, &out, &err), err, MGD_ERR_PEER);
	head[0]--;
	head[4]++;
	CHECK_FAILS(decode(head, &out, &err), err, MGD_ERR_PEER);
}

static void test_final_frames_cover_whole_pages(void)
{
	struct mgd_frame out, whole = {.kind = MGD_FRAME_PAGES, .flags = MGD_FRAME_FINAL, .block_count = 512};
	struct mgd_error err;

	CHECK_OK(encode_decode(whole, &out, &err), err);
	whole.block_count = 511;
	CHECK_FAILS(encode_decode(whole, &out, &err), err, MGD_ERR_PEER);
	whole.region = 3;
	whole.first_block = 32;
	whole.block_count = 48;
	CHECK_OK(encode_decode(whole, &out, &err), err);
	whole.first_block = 33;
	CHECK_FAILS(encode_decode(whole, &out, &err), err, MGD_ERR_PEER);
}

static void test_large_page_sequence(void)
{
	struct mgd_frame out, last = {.kind = MGD_FRAME_PAGES,
				      .flags = MGD_FRAME_FINAL | MGD_FRAME_PAGE_END,
				      .region = 1,
				      .block_count = 512,
				      .first_block = 2 * 262144 - 512,
				      .sequence = 511};
	struct mgd_error err;

	CHECK_OK(encode_decode(last, &out, &err), err);
	last.sequence = 510;
	CHECK_FAILS(encode_decode(last, &out, &err), err, MGD_ERR_PEER);
	last.sequence = 511;
	last.flags = MGD_FRAME_FINAL; /* end not marked */
	CHECK_FAILS(encode_decode(last, &out, &err), err, MGD_ERR_PEER);
	last.first_block -= 512;
	last.sequence = 510;
	CHECK_OK(encode_decode(last, &out, &err), err);
	last.flags |= MGD_FRAME_PAGE_END; /* too early */
	CHECK_FAILS(encode_decode(last, &out, &err), err, MGD_ERR_PEER);
}

static void test_zero_and_hash(void)
{
	uint8_t block[MGD_BLOCK_BYTES] = {0};
	uint64_t zeros = mgd_block_hash(block, secret);

	CHECK(mgd_block_is_zero(block));
	for (size_t at = 0; at < sizeof(block); at++) {
		block[at] = 1;
		CHECK(!mgd_block_is_zero(block));
		CHECK(mgd_block_hash(block, secret) != zeros);
		block[at] = 0;
	}
}

/* Two hosts with different processors must agree, and one must be able to read the other's table. */
static void test_every_build_of_the_hash_says_the_same(void)
{
	uint8_t secret[MGD_SECRET_BYTES], block[MGD_BLOCK_BYTES];
	uint64_t words[MGD_BLOCK_WORDS], state = 1;

	fill_secret(secret);
	for (int turn = 0; turn < 100; turn++) {
		const struct mgd_hash_build *build = mgd_hash_builds;
		uint64_t hash, polynomial;

		for (size_t i = 0; i < sizeof(block); i++) {
			state = state * 6364136223846793005ull + 1442695040888963407ull;
			block[i] = turn < 50 ? (uint8_t)(state >> 56) : (uint8_t)(i % (size_t)turn);
		}
		memcpy(words, block, sizeof(words));
		hash = mgd_block_hash(block, secret);
		polynomial = mgd_words_hash(state, words, (size_t)turn * 5, secret);
		for (;; build++) {
			uint64_t point;

			memcpy(&point, secret + MGD_BLOCK_BYTES, sizeof(point));
			if (build->usable()) {
				CHECK(build->inner_product(block, secret) == hash);
				CHECK(build->polynomial(state, words, (size_t)turn * 5, point) == polynomial);
			}
			if (!strcmp(build->name, "portable"))
				break;
		}
	}
}

/* a · b, bit by bit, straight from the definition. */
static uint64_t product(uint64_t a, uint64_t b)
{
	uint64_t sum = 0;

	for (; b; b >>= 1) {
		if (b & 1)
			sum ^= a;
		a = a << 1 ^ (a >> 63 ? 0x1b : 0);
	}
	return sum;
}

static void test_the_hash_is_what_it_says(void)
{
	uint64_t key[MGD_SECRET_BYTES / 8], words[MGD_BLOCK_WORDS], inner = 0, polynomial = 0, state = 7;

	for (size_t i = 0; i < MGD_SECRET_BYTES / 8; i++)
		key[i] = state = state * 6364136223846793005ull + 1442695040888963407ull;
	for (size_t i = 0; i < MGD_BLOCK_WORDS; i++)
		words[i] = state = state * 6364136223846793005ull + 1442695040888963407ull;
	for (size_t i = 0; i < MGD_BLOCK_WORDS; i += 2)
		inner ^= product(words[i] ^ key[i], words[i + 1] ^ key[i + 1]);
	for (size_t i = 0; i < MGD_BLOCK_WORDS; i++)
		polynomial = product(polynomial ^ words[i], key[MGD_BLOCK_WORDS]);
	CHECK(mgd_block_hash(words, (const uint8_t *)key) == inner);
	CHECK(mgd_words_hash(0, words, MGD_BLOCK_WORDS, (const uint8_t *)key) == polynomial);
	/* A block that equals its key has only zeros to multiply, and 0 is reserved. */
	CHECK(mgd_block_hash(key, (const uint8_t *)key) == 1);
}

/* The older hash missed this with odds of 2^-33: one word grows by what another one, 64 bytes on, loses. */
static void test_moves_between_words_of_a_lane_are_seen(void)
{
	uint64_t words[MGD_BLOCK_WORDS], before;

	for (size_t i = 0; i < MGD_BLOCK_WORDS; i++)
		words[i] = 0x500000000ull;
	before = mgd_block_hash(words, secret);
	for (size_t from = 0; from + 8 < MGD_BLOCK_WORDS; from++) {
		for (size_t to = from + 8; to < MGD_BLOCK_WORDS; to += 8) {
			words[from]++, words[to]--;
			CHECK(mgd_block_hash(words, secret) != before);
			words[from]--, words[to]++;
		}
	}
}

int main(void)
{
	RUN(test_every_build_of_the_hash_says_the_same);
	RUN(test_the_hash_is_what_it_says);
	fill_secret(secret);
	RUN(test_moves_between_words_of_a_lane_are_seen);
	RUN(test_round_trip);
	RUN(test_check_covers_everything);
	RUN(test_other_kinds);
	RUN(test_bad_fields);
	RUN(test_magic_and_version);
	RUN(test_final_frames_cover_whole_pages);
	RUN(test_large_page_sequence);
	RUN(test_zero_and_hash);
	return 0;
}
