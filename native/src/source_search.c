/* SPDX-License-Identifier: MIT */
/*
 * Helper threads search a large page for changes, together with the thread that sends it.  Perhaps a thousandth of a 1
 * GiB page has changed, and the kernel's tracking does not say which: everything marked has to be read and hashed.
 *
 * One processor takes 40 ms or more for that, and a guest thread may be waiting.  So helpers compare from the end of
 * the page while the sender starts at the front, until they meet.
 *
 * The memory is frozen and the table read-only: a block found unchanged stays unchanged.  If a helper fails, the marks
 * stay, and the sender hits the same failure.
 */
#include "source.h"

#include "processors.h"

#define HELPERS_MAX 7
/* With less than this, threads cost more than they gain. */
#define WORTH_BLOCKS (8 * MGD_CHUNK_BLOCKS)

struct source_search {
	struct mgd_source *source;
	struct source_region *region;
	_Atomic uint64_t front; /* the sender's chunk; earlier ones are done */
	_Atomic uint64_t back; /* helpers have taken the chunks from here on */
	_Atomic bool finished;
	pthread_t helpers[HELPERS_MAX];
	uint32_t helper_count;
};

/* Search blocks first … first+count-1, all of them marked. */
static int search_run(const struct source_search *search, uint64_t first, uint32_t count, uint8_t *copy)
{
	struct mgd_source *source = search->source;
	struct source_region *region = search->region;
	uint64_t differing = 0;
	struct mgd_error err;

	if (source_compare(source, region, first, count, &differing)) {
		source_count_unchanged(source, count - mgd_popcount(differing));
	} else {
		if (source_read(source, region, first, count, copy, &err))
			return -1;
		for (uint32_t i = 0; i < count; i++)
			if (source_hash(source, copy + (size_t)i * MGD_BLOCK_BYTES) != region->table[first + i])
				differing |= 1ull << i;
		source_count(source, unchanged_blocks, count - mgd_popcount(differing));
	}
	for (uint32_t i = 0; i < count; i++)
		if (!(differing >> i & 1))
			mgd_bit_clear_atomic(region->marks, first + i);
	return 0;
}

static int search_chunk(const struct source_search *search, uint64_t chunk, uint8_t *copy)
{
	const struct source_region *region = search->region;
	uint64_t end = (chunk + 1) * MGD_CHUNK_BLOCKS, block = chunk * MGD_CHUNK_BLOCKS;

	while (block < end) {
		uint32_t count = 0;

		block = mgd_bitmap_next_atomic(region->marks, block, end);
		while (block + count < end && count < SOURCE_READ_BLOCKS &&
		       mgd_bit_test_atomic(region->marks, block + count))
			count++;
		if (count && search_run(search, block, count, copy))
			return -1;
		block += count;
	}
	return 0;
}

/* Take the last free chunk; return false if that would be the sender's.  Where they meet, both may search a chunk,
 * with the same result. */
static bool take_chunk(struct source_search *search, uint64_t *out_chunk)
{
	uint64_t back = search->back;

	do {
		if (back <= search->front + 1)
			return false;
	} while (!atomic_compare_exchange_weak(&search->back, &back, back - 1));
	*out_chunk = back - 1;
	return true;
}

static void *help(void *argument)
{
	struct source_search *search = argument;
	uint8_t *copy = mgd_map_zeros(SOURCE_READ_BLOCKS * MGD_BLOCK_BYTES, NULL);
	uint64_t chunk;

	while (copy && !search->finished && take_chunk(search, &chunk) && !search_chunk(search, chunk, copy))
		;
	mgd_unmap(copy, SOURCE_READ_BLOCKS * MGD_BLOCK_BYTES);
	return NULL;
}

static bool worth_it(const struct source_region *region, uint64_t first_chunk, uint64_t end_chunk)
{
	uint64_t count = 0;

	for (uint64_t word = first_chunk * SOURCE_CHUNK_WORDS; word < end_chunk * SOURCE_CHUNK_WORDS; word++)
		count += mgd_popcount(mgd_word_load_atomic(&region->marks[word]));
	return count >= WORTH_BLOCKS;
}

struct source_search *source_search_begin(struct mgd_source *source, const struct source_claim *claim)
{
	uint64_t page_chunks = claim->region->host_page_blocks / MGD_CHUNK_BLOCKS;
	uint64_t front = claim->page * page_chunks, back = front + claim->count * page_chunks;
	struct source_search *search;
	uint32_t wanted;

	if (source->whole || !page_chunks || !worth_it(claim->region, front, back))
		return NULL;
	wanted = mgd_processor_count() - 1; /* the sender uses one */
	if (!wanted)
		return NULL;
	search = calloc(1, sizeof(*search));
	if (!search)
		return NULL;
	*search = (struct source_search){.source = source, .region = claim->region, .front = front, .back = back};
	while (search->helper_count < wanted && search->helper_count < HELPERS_MAX &&
	       !mgd_thread_start(&search->helpers[search->helper_count], "mgd-src-search", help, search, NULL))
		search->helper_count++;
	return search;
}

void source_search_reached(struct source_search *search, uint64_t chunk)
{
	if (search)
		search->front = chunk;
}

void source_search_end(struct source_search *search)
{
	if (!search)
		return;
	search->finished = true;
	for (uint32_t i = 0; i < search->helper_count; i++)
		pthread_join(search->helpers[i], NULL);
	free(search);
}
