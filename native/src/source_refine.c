// SPDX-License-Identifier: MIT
/*
 * A guest thread waits for a page of 1 GiB of which a thousandth has changed, and the kernel's tracking does not say which
 * thousandth: all that is marked has to be read and hashed.  One processor takes a tenth of a second for that; so every
 * processor there is takes a share, and what is left of the marks is read again and sent by the urgent thread.
 *
 * The memory is frozen and the table read-only: a block found unchanged stays so.  Whatever fails here is left marked, and
 * met again by the thread that sends.
 */
#include "source_state.h"

#include <string.h>
#include <unistd.h>

#define THREADS_MAX 8
/* Less than this, and threads cost more than they bring. */
#define WORTH_BLOCKS (8 * MGD_CHUNK_BLOCKS)

struct refinement {
	struct mgd_source *source;
	struct source_region *region;
	uint64_t next_chunk, end_chunk; /* next_chunk: atomic */
};

/* Blocks first … first+count-1, all marked. */
static int refine_run(struct refinement *refinement, uint64_t first, uint32_t count, uint8_t *copy)
{
	struct mgd_source *source = refinement->source;
	struct source_region *region = refinement->region;
	uint64_t unchanged = 0;
	struct mgd_error err;

	if (source_read(source, region, first, count, copy, &err))
		return -1;
	for (uint64_t block = first; block < first + count; block++) {
		if (source_hash(source, copy + (block - first) * MGD_BLOCK_BYTES) != region->table[block])
			continue;
		mgd_bit_clear_atomic(region->marks, block);
		unchanged++;
	}
	source_count(source, unchanged_blocks, unchanged);
	return 0;
}

static int refine_chunk(struct refinement *refinement, uint64_t chunk, uint8_t *copy)
{
	struct source_region *region = refinement->region;
	uint64_t end = (chunk + 1) * MGD_CHUNK_BLOCKS, block = chunk * MGD_CHUNK_BLOCKS;

	while (block < end) {
		uint32_t count = 0;

		block = mgd_bitmap_next_atomic(region->marks, block, end);
		while (block + count < end && count < SOURCE_READ_BLOCKS &&
		       mgd_bit_test_atomic(region->marks, block + count))
			count++;
		if (count && refine_run(refinement, block, count, copy))
			return -1;
		block += count;
	}
	return 0;
}

static void *refine(void *argument)
{
	struct refinement *refinement = argument;
	uint8_t *copy = mgd_map_zeros(SOURCE_READ_BLOCKS * MGD_BLOCK_BYTES, NULL);

	while (copy && !source_flag(&refinement->source->stopping)) {
		uint64_t chunk = __atomic_fetch_add(&refinement->next_chunk, 1, __ATOMIC_RELAXED);

		if (chunk >= refinement->end_chunk || refine_chunk(refinement, chunk, copy))
			break;
	}
	mgd_unmap(copy, SOURCE_READ_BLOCKS * MGD_BLOCK_BYTES);
	return NULL;
}

static uint64_t marked_blocks(const struct source_region *region, uint64_t first_chunk, uint64_t end_chunk)
{
	uint64_t count = 0;

	for (uint64_t word = first_chunk * SOURCE_CHUNK_WORDS; word < end_chunk * SOURCE_CHUNK_WORDS; word++)
		count += (uint64_t)__builtin_popcountll(__atomic_load_n(&region->marks[word], __ATOMIC_RELAXED));
	return count;
}

void source_refine(struct mgd_source *source, const struct source_claim *claim)
{
	struct source_region *region = claim->region;
	uint64_t page_chunks = region->host_page_blocks / MGD_CHUNK_BLOCKS;
	struct refinement refinement = {
		.source = source,
		.region = region,
		.next_chunk = claim->page * page_chunks,
		.end_chunk = (claim->page + claim->count) * page_chunks,
	};
	pthread_t threads[THREADS_MAX];
	long wanted = sysconf(_SC_NPROCESSORS_ONLN) - 1; /* this thread is one */
	long started = 0;

	if (source->whole || marked_blocks(region, refinement.next_chunk, refinement.end_chunk) < WORTH_BLOCKS)
		return;
	if (wanted > THREADS_MAX)
		wanted = THREADS_MAX;
	/* Signals are blocked in them as they are in this one. */
	while (started < wanted && !pthread_create(&threads[started], NULL, refine, &refinement))
		started++;
	refine(&refinement);
	for (long i = 0; i < started; i++)
		pthread_join(threads[i], NULL);
}
