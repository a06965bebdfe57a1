// SPDX-License-Identifier: MIT
/*
 * A page of 1 GiB of which a thousandth has changed, and the kernel's tracking does not say which thousandth: all that is
 * marked has to be read and hashed.  One processor takes 40 ms and more for that, and a guest thread may be waiting; so
 * helpers compare from the end of the page while the thread that sends it begins at the front, until they meet.
 *
 * The memory is frozen and the table read-only: a block found unchanged stays so.  Whatever fails here is left marked, and
 * met again by the thread that sends.
 */
#include "source_state.h"

#include <stdlib.h>

#include "processors.h"

#define HELPERS_MAX 7
/* Less than this, and threads cost more than they bring. */
#define WORTH_BLOCKS (8 * MGD_CHUNK_BLOCKS)

struct source_refinement {
	struct mgd_source *source;
	struct source_region *region;
	/* Atomic. */
	uint64_t front; /* the sender's chunk; those before it are done */
	uint64_t back; /* chunks from this one on are taken by helpers */
	bool over;
	pthread_t helpers[HELPERS_MAX];
	uint32_t helper_count;
};

/* Blocks first … first+count-1, all marked. */
static int refine_run(const struct source_refinement *refinement, uint64_t first, uint32_t count, uint8_t *copy)
{
	struct mgd_source *source = refinement->source;
	struct source_region *region = refinement->region;
	uint64_t differing = 0;
	struct mgd_error err;

	if (!source_differing(source, region, first, count, &differing)) {
		if (source_read(source, region, first, count, copy, &err))
			return -1;
		for (uint32_t i = 0; i < count; i++)
			if (source_hash(source, copy + (size_t)i * MGD_BLOCK_BYTES) != region->table[first + i])
				differing |= 1ull << i;
		source_count(source, unchanged_blocks, count - (uint64_t)__builtin_popcountll(differing));
	}
	for (uint32_t i = 0; i < count; i++)
		if (!(differing >> i & 1))
			mgd_bit_clear_atomic(region->marks, first + i);
	return 0;
}

static int refine_chunk(const struct source_refinement *refinement, uint64_t chunk, uint8_t *copy)
{
	const struct source_region *region = refinement->region;
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

/* The last chunk that nobody has; false when the next one would be the sender's.  It may be looked at by both where they
 * meet: both find the same. */
static bool take_chunk(struct source_refinement *refinement, uint64_t *out_chunk)
{
	uint64_t back = __atomic_load_n(&refinement->back, __ATOMIC_RELAXED);

	do {
		if (back <= __atomic_load_n(&refinement->front, __ATOMIC_RELAXED) + 1)
			return false;
	} while (!__atomic_compare_exchange_n(&refinement->back, &back, back - 1, true, __ATOMIC_RELAXED,
					      __ATOMIC_RELAXED));
	*out_chunk = back - 1;
	return true;
}

static void *help(void *argument)
{
	struct source_refinement *refinement = argument;
	uint8_t *copy = mgd_map_zeros(SOURCE_READ_BLOCKS * MGD_BLOCK_BYTES, NULL);
	uint64_t chunk;

	while (copy && !__atomic_load_n(&refinement->over, __ATOMIC_RELAXED) && take_chunk(refinement, &chunk) &&
	       !refine_chunk(refinement, chunk, copy))
		;
	mgd_unmap(copy, SOURCE_READ_BLOCKS * MGD_BLOCK_BYTES);
	return NULL;
}

static bool worth_it(const struct source_region *region, uint64_t first_chunk, uint64_t end_chunk)
{
	uint64_t count = 0;

	for (uint64_t word = first_chunk * SOURCE_CHUNK_WORDS; word < end_chunk * SOURCE_CHUNK_WORDS; word++)
		count += (uint64_t)__builtin_popcountll(__atomic_load_n(&region->marks[word], __ATOMIC_RELAXED));
	return count >= WORTH_BLOCKS;
}

struct source_refinement *source_refine_begin(struct mgd_source *source, const struct source_claim *claim)
{
	uint64_t page_chunks = claim->region->host_page_blocks / MGD_CHUNK_BLOCKS;
	uint64_t front = claim->page * page_chunks, back = front + claim->count * page_chunks;
	struct source_refinement *refinement;
	uint32_t wanted;

	if (source->whole || !page_chunks || !worth_it(claim->region, front, back))
		return NULL;
	wanted = mgd_processor_count() - 1; /* the sender has one */
	if (!wanted)
		return NULL;
	refinement = calloc(1, sizeof(*refinement));
	if (!refinement)
		return NULL;
	*refinement =
		(struct source_refinement){.source = source, .region = claim->region, .front = front, .back = back};
	/* Signals are blocked in them as they are in this one. */
	while (refinement->helper_count < wanted && refinement->helper_count < HELPERS_MAX &&
	       !pthread_create(&refinement->helpers[refinement->helper_count], NULL, help, refinement))
		refinement->helper_count++;
	return refinement;
}

void source_refine_reached(struct source_refinement *refinement, uint64_t chunk)
{
	if (refinement)
		__atomic_store_n(&refinement->front, chunk, __ATOMIC_RELAXED);
}

void source_refine_end(struct source_refinement *refinement)
{
	if (!refinement)
		return;
	__atomic_store_n(&refinement->over, true, __ATOMIC_RELAXED);
	for (uint32_t i = 0; i < refinement->helper_count; i++)
		pthread_join(refinement->helpers[i], NULL);
	free(refinement);
}
