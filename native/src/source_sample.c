// SPDX-License-Identifier: MIT
/*
 * How much of what is marked has really changed: the kernel reports pages, and of a huge page of which one block was
 * written all 512 are marked.  A few hundred of the marked blocks, one at a random place of each equal share of them, are
 * hashed and compared; nothing is sent, noted or unmarked.
 *
 * The guest may be writing them meanwhile: what comes out is an estimate, for whoever has to decide whether another round
 * is worth it.
 */
#include "source_view.h"

#include "clock.h"

struct sample {
	struct mgd_source *source;
	uint64_t share; /* marked blocks for each one that is looked at */
	uint64_t share_end, chosen; /* numbers of marked blocks, counted through all regions */
	uint64_t random;
	uint64_t examined, changed;
};

/* xorshift64 (Marsaglia): that a guest writes every 64th block must not matter, no more than that. */
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

static int look_at(struct sample *sample, const struct source_region *region, uint64_t block, struct mgd_error *err)
{
	uint8_t copy[MGD_BLOCK_BYTES];
	uint64_t differing;

	if (source_view_compare(sample->source, region, block, 1, &differing)) {
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
	return (uint64_t)__builtin_ctzll(word);
}

static int sample_region(struct sample *sample, const struct source_region *region, uint64_t *number,
			 struct mgd_error *err)
{
	for (uint64_t chunk = 0;; chunk++) {
		chunk = mgd_bitmap_next_atomic(region->marked_chunks, chunk, region->chunk_count);
		if (chunk >= region->chunk_count)
			return 0;
		for (uint64_t word = chunk * SOURCE_CHUNK_WORDS; word < (chunk + 1) * SOURCE_CHUNK_WORDS; word++) {
			uint64_t marks = __atomic_load_n(&region->marks[word], __ATOMIC_RELAXED);
			uint64_t count = (uint64_t)__builtin_popcountll(marks);

			for (; sample->chosen < *number + count; next_share(sample))
				if (look_at(sample, region, word * 64 + nth_bit(marks, sample->chosen - *number), err))
					return -1;
			*number += count;
		}
	}
}

int mgd_source_sample(struct mgd_source *source, uint64_t wanted, uint64_t *out_examined, uint64_t *out_changed,
		      struct mgd_error *err)
{
	struct sample sample = {.source = source, .random = 0x9e3779b97f4a7c15u ^ mgd_now_ns()};
	uint64_t marked = __atomic_load_n(&source->marked_blocks, __ATOMIC_RELAXED), number = 0;
	bool busy;

	*out_examined = *out_changed = 0;
	if (source_require_precopy(source, "sample", err))
		return -1;
	pthread_mutex_lock(&source->lock);
	busy = source->round_left != 0;
	pthread_mutex_unlock(&source->lock);
	if (busy || !wanted)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "sample: %s",
				busy ? "a round is under way" : "of no blocks at all");
	sample.share = marked > wanted ? marked / wanted : 1;
	next_share(&sample);
	for (uint32_t i = 0; i < source->region_count; i++)
		if (sample_region(&sample, &source->regions[i], &number, err))
			return -1;
	*out_examined = sample.examined;
	*out_changed = sample.changed;
	return 0;
}
