/* SPDX-License-Identifier: MIT */
/*
 * Estimate how much of the marked memory has really changed, by comparing a sample.  This sends nothing and changes no
 * mark.
 *
 * The kernel reports pages: if one block of a huge page was written, all 512 are marked.  So a few hundred of the
 * marked blocks, one at a random place in each equal share of them, are hashed and compared.
 *
 * The guest may be writing meanwhile, so the result is an estimate.  It helps to decide whether another round is
 * worthwhile.
 */
#include "source.h"

struct sample {
	struct mgd_source *source;
	uint64_t share; /* marked blocks per examined block */
	uint64_t share_end, chosen; /* numbers of marked blocks, counted across all regions */
	uint64_t random;
	uint64_t examined, changed;
};

/* xorshift64 (Marsaglia): random enough that a guest which writes every 64th block does not distort the sample. */
static uint64_t next_random(struct sample *sample)
{
	sample->random ^= sample->random << 13;
	sample->random ^= sample->random >> 7;
	sample->random ^= sample->random << 17;
	return sample->random;
}

static void next_share(struct sample *sample)
{
	sample->chosen = sample->share_end + next_random(sample) % sample->share;
	sample->share_end += sample->share;
}

static int compare_one(struct sample *sample, const struct source_region *region, uint64_t block, struct mgd_error *err)
{
	uint8_t copy[MGD_BLOCK_BYTES];
	uint64_t differing;

	if (source_compare(sample->source, region, block, 1, &differing)) {
		sample->examined++;
		sample->changed += differing;
		return 0;
	}
	if (source_read(sample->source, region, block, 1, copy, err))
		return -1;
	sample->examined++;
	sample->changed += source_hash(sample->source, copy) != region->table[block];
	return 0;
}

static uint64_t nth_bit(uint64_t word, uint64_t n)
{
	while (n--)
		word &= word - 1;
	return mgd_first_bit(word);
}

static int sample_region(struct sample *sample, const struct source_region *region, uint64_t *number,
			 struct mgd_error *err)
{
	mgd_bitmap_for_each_atomic (chunk, region->marked_chunks, 0, region->chunk_count) {
		for (uint64_t word = chunk * SOURCE_CHUNK_WORDS; word < (chunk + 1) * SOURCE_CHUNK_WORDS; word++) {
			uint64_t marks = mgd_word_load_atomic(&region->marks[word]);

			for (; sample->chosen < *number + mgd_popcount(marks); next_share(sample))
				if (compare_one(sample, region, word * 64 + nth_bit(marks, sample->chosen - *number),
						err))
					return -1;
			*number += mgd_popcount(marks);
		}
	}
	return 0;
}

int mgd_source_sample(struct mgd_source *source, uint64_t wanted, uint64_t *out_examined, uint64_t *out_changed,
		      struct mgd_error *err)
{
	struct sample sample = {.source = source, .random = 0x9e3779b97f4a7c15u ^ mgd_now_ns()};
	uint64_t marked = source->marked_blocks, number = 0;

	*out_examined = *out_changed = 0;
	if (source_require_precopy(source, "sample", err))
		return -1;
	if (!wanted)
		return mgd_misuse(err, "sample: no blocks requested");
	MGD_LOCKED (&source->lock) {
		if (source->round_left)
			return mgd_misuse(err, "sample: a round is running");
	}
	sample.share = marked > wanted ? marked / wanted : 1;
	next_share(&sample);
	for (uint32_t i = 0; i < source->region_count; i++)
		if (sample_region(&sample, &source->regions[i], &number, err))
			return -1;
	*out_examined = sample.examined;
	*out_changed = sample.changed;
	return 0;
}
