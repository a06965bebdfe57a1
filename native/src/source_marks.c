// SPDX-License-Identifier: MIT
/*
 * What is to be sent: marking, taking marks, and the freeze that turns marks into the stale map.
 */
#include "source_state.h"

#include <endian.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define POPULATED_TRIES 4

_Static_assert(__BYTE_ORDER == __LITTLE_ENDIAN, "bitmaps travel as they lie in memory");

void source_mark_blocks(struct mgd_source *source, struct source_region *region, uint64_t first, uint64_t count)
{
	uint64_t fresh = 0;

	if (!count)
		return;
	for (uint64_t word = first / 64; word <= (first + count - 1) / 64; word++) {
		uint64_t mask = mgd_word_mask(word, first, count);

		fresh += (uint64_t)__builtin_popcountll(
			mask & ~__atomic_fetch_or(&region->marks[word], mask, __ATOMIC_RELAXED));
	}
	for (uint64_t chunk = first / MGD_CHUNK_BLOCKS; chunk <= (first + count - 1) / MGD_CHUNK_BLOCKS; chunk++)
		mgd_bit_set_atomic(region->marked_chunks, chunk);
	__atomic_fetch_add(&source->marked_blocks, fresh, __ATOMIC_RELAXED);
}

bool source_take_marks(struct mgd_source *source, struct source_region *region, uint64_t chunk,
		       uint64_t marks[SOURCE_CHUNK_WORDS])
{
	uint64_t taken = 0;

	if (!mgd_bit_clear_atomic(region->marked_chunks, chunk))
		return false;
	for (uint32_t word = 0; word < SOURCE_CHUNK_WORDS; word++) {
		marks[word] =
			__atomic_exchange_n(&region->marks[chunk * SOURCE_CHUNK_WORDS + word], 0, __ATOMIC_ACQ_REL);
		taken += (uint64_t)__builtin_popcountll(marks[word]);
	}
	__atomic_fetch_sub(&source->marked_blocks, taken, __ATOMIC_RELAXED);
	return taken != 0;
}

static void mark_page(struct mgd_source *source, struct source_region *region, uint64_t page)
{
	source_mark_blocks(source, region, page * region->page_blocks, region->page_blocks);
}

static int require_precopy(const struct mgd_source *source, const char *what, struct mgd_error *err)
{
	if (source->phase != SOURCE_PRECOPY)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "%s: the source is frozen", what);
	return 0;
}

/* ---------------------------------------------------------------- first round */

/* SEEK_DATA tells all that a tmpfs (or any other ordinary) file holds, swapped out or not; the rest reads as zeros.  A
 * page written after the tracker was armed is reported by the next scan, whether or not it is seen here. */
static int mark_extents(struct mgd_source *source, struct source_region *region, struct mgd_error *err)
{
	uint64_t start = region->file_offset, end = start + region->size_bytes;

	for (uint64_t at = start; at < end;) {
		off_t data = lseek(region->fd, (off_t)at, SEEK_DATA);
		off_t hole;
		uint64_t first, last;

		if (data < 0 && errno == ENXIO)
			break;
		if (data < 0)
			return mgd_fail_errno(err, errno, "guest memory: SEEK_DATA: region %" PRIu32, region->index);
		if ((uint64_t)data >= end)
			break;
		hole = lseek(region->fd, data, SEEK_HOLE);
		if (hole < 0 && errno == ENXIO)
			continue; /* punched between the two calls: look again */
		if (hole < 0)
			return mgd_fail_errno(err, errno, "guest memory: SEEK_HOLE: region %" PRIu32, region->index);
		first = ((uint64_t)data - start) / MGD_BLOCK_BYTES;
		at = (uint64_t)hole < end ? (uint64_t)hole : end;
		last = (at - start + MGD_BLOCK_BYTES - 1) / MGD_BLOCK_BYTES;
		source_mark_blocks(source, region, first, last - first);
	}
	return 0;
}

static uint64_t count_bits(const uint64_t *words, uint64_t bits)
{
	uint64_t count = 0;

	for (size_t word = 0; word < mgd_bitmap_words(bits); word++)
		count += (uint64_t)__builtin_popcountll(words[word]);
	return count;
}

/* Ask which pages are mapped, into region->scanned of every region. */
static int look_present(struct mgd_source *source, struct mgd_tracker *tracker, struct mgd_error *err)
{
	uint64_t *bitmaps[MGD_MAX_REGIONS];
	uint64_t bytes;

	for (uint32_t i = 0; i < source->region_count; i++)
		bitmaps[i] = source->regions[i].scanned;
	return mgd_tracker_present(tracker, bitmaps, &bytes, err);
}

static bool same_file(const struct stat *a, const struct stat *b)
{
	return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* Bytes of the region's file that are mapped, over all regions in that file. */
static int mapped_bytes(struct mgd_source *source, const struct source_region *region, uint64_t *out_mapped,
			struct stat *out_stat, struct mgd_error *err)
{
	if (fstat(region->fd, out_stat))
		return mgd_fail_errno(err, errno, "guest memory: fstat: region %" PRIu32, region->index);
	*out_mapped = 0;
	for (uint32_t i = 0; i < source->region_count; i++) {
		const struct source_region *other = &source->regions[i];
		struct stat other_stat;

		if (fstat(other->fd, &other_stat))
			return mgd_fail_errno(err, errno, "guest memory: fstat: region %" PRIu32, other->index);
		if (same_file(out_stat, &other_stat))
			*out_mapped += count_bits(other->scanned, other->page_count) * other->page_bytes;
	}
	return 0;
}

/*
 * hugetlbfs tells no extents, only how much the file holds.  If that is as much as the guest has mapped, the mapped pages
 * are all there is.  If the file holds more (written by a process that has gone, or read in by the VMM before it mapped
 * it), any page may hold data and all are marked: reading a hole costs time, no memory.
 *
 * The guest may fault pages in while we look.  So: present, file, present; believed only if all three say the same.
 */
static int mark_mapped(struct mgd_source *source, struct source_region *region, struct mgd_tracker *tracker,
		       struct mgd_error *err)
{
	for (int try = 0; tracker && try < POPULATED_TRIES; try++) {
		uint64_t before, after, held;
		struct stat file;

		if (look_present(source, tracker, err) || mapped_bytes(source, region, &before, &file, err))
			return -1;
		held = (uint64_t)file.st_blocks * 512;
		if (look_present(source, tracker, err) || mapped_bytes(source, region, &after, &file, err))
			return -1;
		if (before != held || after != held)
			continue;
		for (uint64_t page = 0;; page++) {
			page = mgd_bitmap_next_atomic(region->scanned, page, region->page_count);
			if (page >= region->page_count)
				return 0;
			mark_page(source, region, page);
		}
	}
	source_mark_blocks(source, region, 0, region->block_count);
	return 0;
}

static void empty_scanned(struct source_region *region)
{
	for (size_t word = 0; word < mgd_bitmap_words(region->page_count); word++)
		if (region->scanned[word])
			region->scanned[word] = 0;
}

int mgd_source_mark_populated(struct mgd_source *source, struct mgd_tracker *tracker, struct mgd_error *err)
{
	int failed = require_precopy(source, "mark populated", err);

	for (uint32_t i = 0; i < source->region_count && !failed; i++) {
		struct source_region *region = &source->regions[i];
		struct statfs file_system;

		if (fstatfs(region->fd, &file_system))
			failed = mgd_fail_errno(err, errno, "guest memory: fstatfs: region %" PRIu32, i);
		else if (file_system.f_type == HUGETLBFS_MAGIC)
			failed = mark_mapped(source, region, tracker, err);
		else
			failed = mark_extents(source, region, err);
	}
	for (uint32_t i = 0; i < source->region_count; i++)
		empty_scanned(&source->regions[i]);
	return failed ? -1 : 0;
}

/* ---------------------------------------------------------------- later rounds */

/* Mark every page of a bitmap and empty it; with `keep`, note them there. */
static void mark_bits(struct mgd_source *source, struct source_region *region, uint64_t *bits, uint64_t *keep)
{
	for (size_t word = 0; word < mgd_bitmap_words(region->page_count); word++) {
		uint64_t left = bits[word];

		if (!left)
			continue;
		if (keep)
			keep[word] |= left;
		bits[word] = 0;
		for (; left; left &= left - 1) {
			uint64_t page = word * 64 + (uint64_t)__builtin_ctzll(left);

			if (page < region->page_count)
				mark_page(source, region, page);
		}
	}
}

int mgd_source_scan(struct mgd_source *source, struct mgd_tracker *tracker, int quiesced, uint64_t *out_bytes,
		    struct mgd_error *err)
{
	uint64_t *bitmaps[MGD_MAX_REGIONS];
	uint64_t bytes = 0;
	int failed = require_precopy(source, "scan", err);

	if (failed)
		return -1;
	for (uint32_t i = 0; i < source->region_count; i++)
		bitmaps[i] = source->regions[i].scanned;
	failed = mgd_tracker_scan(tracker, bitmaps, &bytes, err);
	/* Also after a failure half-way: what it has reported is armed again and would never be reported twice. */
	for (uint32_t i = 0; i < source->region_count; i++) {
		struct source_region *region = &source->regions[i];

		if (bytes || failed)
			mark_bits(source, region, region->scanned, region->unsettled);
		/* A buffer pinned before an earlier scan may have been filled after the copy of that round: look again
		 * at all of them now that nothing is in flight. */
		if (quiesced && !failed)
			mark_bits(source, region, region->unsettled, NULL);
	}
	*out_bytes = bytes;
	return failed ? -1 : 0;
}

/* ---------------------------------------------------------------- the freeze */

static void set_stale(struct mgd_source *source, struct source_region *region, uint64_t page)
{
	uint64_t mask = 1ull << (page % 64);

	if (region->stale[page / 64] & mask)
		return;
	region->stale[page / 64] |= mask;
	region->unclaimed[page / 64] |= mask;
	__atomic_fetch_add(&source->unclaimed_pages, 1, __ATOMIC_RELAXED); /* _stats may be looking */
	__atomic_fetch_add(&source->unfinished_pages, 1, __ATOMIC_RELAXED);
}

static void stale_from_marks(struct mgd_source *source, struct source_region *region)
{
	uint64_t chunk = 0;

	for (;; chunk++) {
		uint64_t first, page = UINT64_MAX;

		chunk = mgd_bitmap_next_atomic(region->marked_chunks, chunk, region->chunk_count);
		if (chunk >= region->chunk_count)
			return;
		first = chunk * MGD_CHUNK_BLOCKS;
		for (uint64_t block = first;; block++) {
			uint64_t end = first + MGD_CHUNK_BLOCKS;

			block = mgd_bitmap_next_atomic(region->marks, block,
						       end < region->block_count ? end : region->block_count);
			if (block >= end || block >= region->block_count)
				break;
			if (block / region->host_page_blocks != page) {
				page = block / region->host_page_blocks;
				set_stale(source, region, page);
			}
			/* On to the last block of the page (or chunk). */
			block = (page + 1) * region->host_page_blocks - 1;
			if (block >= end - 1)
				break;
		}
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
	if (require_precopy(source, "freeze", err) || require_idle(source, "freeze", err))
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
	if (require_precopy(source, "freeze whole", err) || require_idle(source, "freeze whole", err))
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

	if (source->phase != SOURCE_FROZEN)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "page map: the source is not frozen");
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

int mgd_source_stale_map(const struct mgd_source *source, uint32_t region, uint64_t first_page, uint8_t *out,
			 size_t bytes, struct mgd_error *err)
{
	if (check_piece(source, region, first_page, bytes, err))
		return -1;
	if (bytes)
		memcpy(out, (const uint8_t *)source->regions[region].stale + first_page / 8, bytes);
	return 0;
}

int mgd_source_lacking_begin(struct mgd_source *source, struct mgd_error *err)
{
	if (source->phase != SOURCE_FROZEN)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "lacking: the source is not frozen");
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
	__atomic_store_n(&source->unfinished_pages, 0, __ATOMIC_RELAXED);
	source->all_sent_told = false;
	return 0;
}

int mgd_source_lacking(struct mgd_source *source, uint32_t index, uint64_t first_page, const uint8_t *bits,
		       size_t bytes, struct mgd_error *err)
{
	struct source_region *region;

	if (check_piece(source, index, first_page, bytes, err))
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
