/* SPDX-License-Identifier: MIT */
/*
 * Stale host pages: the freeze derives them from the marks, a reconnect from what the target lacks, and the thread that
 * clears a page's bit in `unclaimed` sends it.  The page maps for the target are made here, too.
 */
#include "source.h"

/* ---- claims */

/* Take the longest run of claimable pages around `page` within one window.  It must be contiguous, since one FINAL
 * frame makes every page it covers current. */
bool source_claim(struct mgd_source *source, struct source_region *region, uint64_t page, uint64_t window_blocks,
		  struct source_claim *out)
{
	uint64_t window_pages = window_blocks / region->host_page_blocks;
	uint64_t low = page, high = page + 1, first = page, end = page + 1;

	if (!mgd_bit_clear_atomic(region->unclaimed, page))
		return false;
	if (window_pages > 1) {
		low = page / window_pages * window_pages;
		high = low + window_pages < region->host_page_count ? low + window_pages : region->host_page_count;
	}
	while (end < high && mgd_bit_clear_atomic(region->unclaimed, end))
		end++;
	while (first > low && mgd_bit_clear_atomic(region->unclaimed, first - 1))
		first--;
	atomic_fetch_sub(&source->unclaimed_bytes, (end - first) * region->host_page_blocks * MGD_BLOCK_BYTES);
	atomic_fetch_sub(&source->unclaimed_pages, end - first);
	*out = (struct source_claim){.region = region, .page = first, .count = end - first};
	return true;
}

static uint32_t region_of(const struct mgd_source *source, uint64_t numbered_page)
{
	uint32_t index = source->region_count - 1;

	while (index && source->regions[index].first_host_page > numbered_page)
		index--;
	return index;
}

bool source_claim_next(struct mgd_source *source, struct source_claim *out)
{
	uint64_t cursor = source->cursor;
	uint32_t start = region_of(source, cursor);

	/* Once around all regions, ending with the beginning of the first one. */
	for (uint32_t turn = 0; turn <= source->region_count; turn++) {
		struct source_region *region = &source->regions[(start + turn) % source->region_count];
		uint64_t first = turn == 0 ? cursor - region->first_host_page : 0, next;

		if (!source->unclaimed_pages)
			return false;
		mgd_bitmap_for_each_atomic (page, region->unclaimed, first, region->host_page_count) {
			if (!source_claim(source, region, page, MGD_CHUNK_BLOCKS, out))
				continue;
			/* Unless a demand has moved it meanwhile: a demand takes precedence. */
			next = region->first_host_page + out->page + out->count;
			atomic_compare_exchange_strong(&source->cursor, &cursor, next % source->host_page_count);
			return true;
		}
	}
	return false;
}

void source_tell_all_sent(struct mgd_source *source)
{
	MGD_HOLD(&source->lock);

	if (!source->serving || source->stopping || source->all_sent_told || source->unfinished_pages)
		return;
	source->all_sent_told = true;
	mgd_event_post(&source->events, MGD_EVENT_ALL_SENT, 0, 0, NULL);
}

void source_claim_done(struct mgd_source *source, uint64_t count)
{
	if (atomic_fetch_sub(&source->unfinished_pages, count) == count)
		source_tell_all_sent(source);
}

/* ---- stale pages */

static void set_stale(struct mgd_source *source, struct source_region *region, uint64_t page)
{
	uint64_t mask = 1ull << (page % 64);

	if (region->stale[page / 64] & mask)
		return;
	region->stale[page / 64] |= mask;
	mgd_bit_set_atomic(region->unclaimed, page); /* _page_map may read it at any time */
	atomic_fetch_add(&source->unclaimed_pages, 1);
	atomic_fetch_add(&source->unclaimed_bytes, region->host_page_blocks * MGD_BLOCK_BYTES);
	atomic_fetch_add(&source->unfinished_pages, 1);
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
			return mgd_fail_errno(err, errno, "hash table: mprotect: region %u", i);
	}
	return 0;
}

static int require_frozen(const struct mgd_source *source, const char *what, struct mgd_error *err)
{
	if (source->phase != SOURCE_FROZEN)
		return mgd_misuse(err, "%s: the source is not frozen", what);
	return 0;
}

/* Require that the streams are idle and that none was lost: what a lost one had not delivered is already in the
 * table. */
static int require_idle(struct mgd_source *source, const char *what, struct mgd_error *err)
{
	bool lost = source->torn;

	MGD_HOLD(&source->lock);
	for (uint32_t i = 0; i < source->stream_count; i++)
		lost |= source->streams[i].started && source->streams[i].ended;
	if (lost)
		return mgd_misuse(err, "%s: connections were lost in pre-copy: what the target has is unknown", what);
	if (source->round_left)
		return mgd_misuse(err, "%s: a round is running", what);
	return 0;
}

/* The checks common to both kinds of freeze. */
static int begin_freeze(struct mgd_source *source, const char *what, struct mgd_error *err)
{
	if (source_require_precopy(source, what, err) || require_idle(source, what, err) ||
	    make_tables_read_only(source, err))
		return -1;
	source->phase = SOURCE_FROZEN;
	return 0;
}

int mgd_source_freeze(struct mgd_source *source, uint64_t *out_stale_pages, struct mgd_error *err)
{
	if (begin_freeze(source, "freeze", err))
		return -1;
	for (uint32_t i = 0; i < source->region_count; i++)
		stale_from_marks(source, &source->regions[i]);
	*out_stale_pages = source->unclaimed_pages;
	return 0;
}

int mgd_source_freeze_whole(struct mgd_source *source, struct mgd_error *err)
{
	if (source->copied)
		return mgd_misuse(err, "freeze whole: a round was already sent: use freeze");
	if (begin_freeze(source, "freeze whole", err))
		return -1;
	source->whole = true;
	for (uint32_t i = 0; i < source->region_count; i++)
		for (uint64_t page = 0; page < source->regions[i].host_page_count; page++)
			set_stale(source, &source->regions[i], page);
	return 0;
}

/* Check a piece of a host page bitmap: bytes [first_page/8, first_page/8 + bytes). */
static int check_piece(const struct mgd_source *source, uint32_t index, uint64_t first_page, size_t bytes,
		       struct mgd_error *err)
{
	uint64_t all;

	if (index >= source->region_count)
		return mgd_misuse(err, "page map: region %u: only %u exist", index, source->region_count);
	all = (source->regions[index].host_page_count + 7) / 8;
	if (first_page % 8 || first_page / 8 > all || bytes > all - first_page / 8)
		return mgd_misuse(err, "page map: %zu bytes from page %" PRIu64 ": outside region %u", bytes,
				  first_page, index);
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
	end = mgd_min(end, region->host_page_count);
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
			return mgd_misuse(err, "lacking: drop the streams first");
	for (uint32_t i = 0; i < source->region_count; i++) {
		struct source_region *region = &source->regions[i];
		size_t bytes = mgd_bitmap_words(region->host_page_count) * 8;

		memset(region->stale, 0, bytes);
		for (size_t word = 0; word < bytes / 8; word++)
			if (region->unclaimed[word])
				mgd_word_take_atomic(&region->unclaimed[word]);
		memset(region->urgent, 0, bytes);
	}
	source->unclaimed_pages = source->unclaimed_bytes = source->unfinished_pages = source->urgent_pages = 0;
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
				return mgd_violation(err, "page map: page %" PRIu64 ": region %u has %" PRIu64, page,
						     index, region->host_page_count);
			set_stale(source, region, page);
		}
	}
	return 0;
}
