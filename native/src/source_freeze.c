// SPDX-License-Identifier: MIT
/* Which host pages: the freeze, which turns marks into the stale map, and what the target lacks after a reconnect. */
#include "source_state.h"

#include <inttypes.h>
#include <string.h>

static void set_stale(struct mgd_source *source, struct source_region *region, uint64_t page)
{
	uint64_t mask = 1ull << (page % 64);

	if (region->stale[page / 64] & mask)
		return;
	region->stale[page / 64] |= mask;
	region->unclaimed[page / 64] |= mask;
	__atomic_fetch_add(&source->unclaimed_pages, 1, __ATOMIC_RELAXED); /* _stats may be looking */
	__atomic_fetch_add(&source->unclaimed_bytes, region->host_page_blocks * MGD_BLOCK_BYTES, __ATOMIC_RELAXED);
	__atomic_fetch_add(&source->unfinished_pages, 1, __ATOMIC_RELAXED);
}

static void stale_from_marks(struct mgd_source *source, struct source_region *region)
{
	uint64_t block = source_next_marked(region, 0);

	while (block < region->block_count) {
		uint64_t page = block / region->host_page_blocks;

		set_stale(source, region, page);
		block = source_next_marked(region, (page + 1) * region->host_page_blocks);
	}
}

static int make_tables_read_only(struct mgd_source *source, struct mgd_error *err)
{
	for (uint32_t i = 0; i < source->region_count; i++) {
		struct source_region *region = &source->regions[i];

		if (mprotect(region->table, region->block_count * sizeof(*region->table), PROT_READ))
			return mgd_fail_errno(err, errno, "hash table: mprotect: region %" PRIu32, i);
	}
	return 0;
}

static int require_frozen(const struct mgd_source *source, const char *what, struct mgd_error *err)
{
	if (source->phase != SOURCE_FROZEN)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "%s: the source is not frozen", what);
	return 0;
}

/* Nothing may be under way on the streams, and none of them lost: what it had not delivered is in the table already. */
static int require_idle(struct mgd_source *source, const char *what, struct mgd_error *err)
{
	bool busy, lost = false;

	pthread_mutex_lock(&source->lock);
	busy = source->round_left != 0;
	for (uint32_t i = 0; i < source->stream_count; i++)
		lost |= source->streams[i].started && source->streams[i].ended;
	pthread_mutex_unlock(&source->lock);
	if (lost || source->torn)
		return mgd_fail(err, MGD_ERR_ARGUMENT,
				"%s: connections were lost in pre-copy: what the target has is unknown", what);
	if (busy)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "%s: a round is under way", what);
	return 0;
}

int mgd_source_freeze(struct mgd_source *source, uint64_t *out_stale_pages, struct mgd_error *err)
{
	if (source_require_precopy(source, "freeze", err) || require_idle(source, "freeze", err))
		return -1;
	if (make_tables_read_only(source, err))
		return -1;
	for (uint32_t i = 0; i < source->region_count; i++)
		stale_from_marks(source, &source->regions[i]);
	source->phase = SOURCE_FROZEN;
	*out_stale_pages = source->unclaimed_pages;
	return 0;
}

int mgd_source_freeze_whole(struct mgd_source *source, struct mgd_error *err)
{
	if (source_require_precopy(source, "freeze whole", err) || require_idle(source, "freeze whole", err))
		return -1;
	if (source->copied)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "freeze whole: a round was sent already: use freeze");
	if (make_tables_read_only(source, err))
		return -1;
	source->whole = true;
	for (uint32_t i = 0; i < source->region_count; i++)
		for (uint64_t page = 0; page < source->regions[i].host_page_count; page++)
			set_stale(source, &source->regions[i], page);
	source->phase = SOURCE_FROZEN;
	return 0;
}

/* Check a piece of a host page bitmap: bytes [first_page/8, first_page/8 + bytes) of it. */
static int check_piece(const struct mgd_source *source, uint32_t index, uint64_t first_page, size_t bytes,
		       struct mgd_error *err)
{
	uint64_t all;

	if (index >= source->region_count)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "page map: region %" PRIu32 ": there are %" PRIu32, index,
				source->region_count);
	all = (source->regions[index].host_page_count + 7) / 8;
	if (first_page % 8 || first_page / 8 > all || bytes > all - first_page / 8)
		return mgd_fail(err, MGD_ERR_ARGUMENT,
				"page map: %zu bytes from page %" PRIu64 ": outside region %" PRIu32, bytes, first_page,
				index);
	return 0;
}

int mgd_source_marked_map(const struct mgd_source *source, uint32_t index, uint64_t first_page, uint8_t *out,
			  size_t bytes, struct mgd_error *err)
{
	const struct source_region *region;
	uint64_t block, end;

	if (source_require_precopy(source, "marked map", err) || check_piece(source, index, first_page, bytes, err))
		return -1;
	region = &source->regions[index];
	end = first_page + (uint64_t)bytes * 8;
	end = end < region->host_page_count ? end : region->host_page_count;
	if (bytes)
		memset(out, 0, bytes);
	block = source_next_marked(region, first_page * region->host_page_blocks);
	while (block < end * region->host_page_blocks) {
		uint64_t page = block / region->host_page_blocks;

		out[(page - first_page) / 8] |= (uint8_t)(1u << ((page - first_page) % 8));
		block = source_next_marked(region, (page + 1) * region->host_page_blocks);
	}
	return 0;
}

int mgd_source_stale_map(const struct mgd_source *source, uint32_t region, uint64_t first_page, uint8_t *out,
			 size_t bytes, struct mgd_error *err)
{
	if (require_frozen(source, "stale map", err) || check_piece(source, region, first_page, bytes, err))
		return -1;
	if (bytes)
		memcpy(out, (const uint8_t *)source->regions[region].stale + first_page / 8, bytes);
	return 0;
}

int mgd_source_lacking_begin(struct mgd_source *source, struct mgd_error *err)
{
	if (require_frozen(source, "lacking", err))
		return -1;
	for (uint32_t i = 0; i <= MGD_MAX_STREAMS; i++)
		if (source->streams[i].started)
			return mgd_fail(err, MGD_ERR_ARGUMENT, "lacking: drop the streams first");
	for (uint32_t i = 0; i < source->region_count; i++) {
		struct source_region *region = &source->regions[i];
		size_t bytes = mgd_bitmap_words(region->host_page_count) * 8;

		memset(region->stale, 0, bytes);
		memset(region->unclaimed, 0, bytes);
		memset(region->hurried, 0, bytes);
	}
	__atomic_store_n(&source->unclaimed_pages, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&source->unclaimed_bytes, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&source->unfinished_pages, 0, __ATOMIC_RELAXED);
	source->all_sent_told = false;
	return 0;
}

int mgd_source_lacking(struct mgd_source *source, uint32_t index, uint64_t first_page, const uint8_t *bits,
		       size_t bytes, struct mgd_error *err)
{
	struct source_region *region;

	if (require_frozen(source, "lacking", err) || check_piece(source, index, first_page, bytes, err))
		return -1;
	region = &source->regions[index];
	for (size_t byte = 0; byte < bytes; byte++) {
		for (unsigned int left = bits[byte]; left; left &= left - 1) {
			uint64_t page = first_page + byte * 8 + (uint64_t)__builtin_ctz(left);

			if (page >= region->host_page_count)
				return mgd_fail(err, MGD_ERR_PEER,
						"page map: page %" PRIu64 ": region %" PRIu32 " has %" PRIu64, page,
						index, region->host_page_count);
			set_stale(source, region, page);
		}
	}
	return 0;
}
