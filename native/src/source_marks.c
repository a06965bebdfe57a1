/* SPDX-License-Identifier: MIT */
/*
 * Marks say what the next round sends.  They come from the contents of the file in the first round and from the
 * tracker's reports in later ones; threads take them chunk by chunk.
 */
#include "source.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#define POPULATED_TRIES 4

void source_mark_blocks(struct mgd_source *source, struct source_region *region, uint64_t first, uint64_t count)
{
	uint64_t fresh = 0;

	if (!count)
		return;
	for (uint64_t word = first / 64; word <= (first + count - 1) / 64; word++)
		fresh += mgd_popcount(mgd_word_set_atomic(&region->marks[word], mgd_word_mask(word, first, count)));
	for (uint64_t chunk = first / MGD_CHUNK_BLOCKS; chunk <= (first + count - 1) / MGD_CHUNK_BLOCKS; chunk++) {
		mgd_bit_set_atomic(region->marked_chunks, chunk);
		if (!mgd_bit_test_atomic(region->seen_chunks, chunk))
			mgd_bit_set_atomic(region->seen_chunks, chunk);
	}
	atomic_fetch_add(&source->marked_blocks, fresh);
}

bool source_take_marks(struct mgd_source *source, struct source_region *region, uint64_t chunk,
		       uint64_t marks[SOURCE_CHUNK_WORDS])
{
	uint64_t taken = 0;

	if (!mgd_bit_clear_atomic(region->marked_chunks, chunk))
		return false;
	for (uint32_t word = 0; word < SOURCE_CHUNK_WORDS; word++) {
		marks[word] = mgd_word_take_atomic(&region->marks[chunk * SOURCE_CHUNK_WORDS + word]);
		taken += mgd_popcount(marks[word]);
	}
	atomic_fetch_sub(&source->marked_blocks, taken);
	return taken != 0;
}

uint64_t source_next_marked(const struct source_region *region, uint64_t block)
{
	while (block < region->block_count) {
		uint64_t chunk =
			mgd_bitmap_next_atomic(region->marked_chunks, block / MGD_CHUNK_BLOCKS, region->chunk_count);
		uint64_t end = (chunk + 1) * MGD_CHUNK_BLOCKS;

		if (chunk >= region->chunk_count)
			break;
		if (block < chunk * MGD_CHUNK_BLOCKS)
			block = chunk * MGD_CHUNK_BLOCKS;
		end = mgd_min(end, region->block_count);
		block = mgd_bitmap_next_atomic(region->marks, block, end);
		if (block < end)
			return block;
	}
	return region->block_count;
}

/* Mark every page of a bitmap and clear it; with `keep`, add the pages to that (which may be the bitmap itself). */
static void mark_bits(struct mgd_source *source, struct source_region *region, uint64_t *bits, uint64_t *keep)
{
	for (size_t word = 0; word < mgd_bitmap_words(region->page_count); word++) {
		uint64_t left = bits[word];

		if (!left)
			continue;
		bits[word] = 0;
		if (keep)
			keep[word] |= left;
		for (; left; left &= left - 1) {
			uint64_t page = word * 64 + mgd_first_bit(left);

			if (page >= region->page_count)
				break;
			if (region->view)
				mgd_bit_clear_atomic(region->unseen, page);
			source_mark_blocks(source, region, page * region->page_blocks, region->page_blocks);
		}
	}
}

int source_require_precopy(const struct mgd_source *source, const char *what, struct mgd_error *err)
{
	if (source->phase != SOURCE_PRECOPY)
		return mgd_misuse(err, "%s: the source is frozen", what);
	return 0;
}

/* ---- first round */

/* SEEK_DATA finds everything that a tmpfs (or any other ordinary) file holds, swapped out or not; the rest reads as
 * zeros.  The next scan reports a page written after the tracker was armed, whether or not it is seen here. */
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
			return mgd_fail_errno(err, errno, "guest memory: SEEK_DATA: region %u", region->index);
		if ((uint64_t)data >= end)
			break;
		hole = lseek(region->fd, data, SEEK_HOLE);
		if (hole < 0 && errno == ENXIO)
			continue; /* punched between the two calls: try again */
		if (hole < 0)
			return mgd_fail_errno(err, errno, "guest memory: SEEK_HOLE: region %u", region->index);
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
		count += mgd_popcount(words[word]);
	return count;
}

/* Query which pages are mapped, into region->scanned of every region. */
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

/* Return how many bytes of the region's file are mapped, over all regions in that file. */
static int mapped_bytes(struct mgd_source *source, const struct source_region *region, uint64_t *out_mapped,
			struct stat *out_stat, struct mgd_error *err)
{
	if (fstat(region->fd, out_stat))
		return mgd_fail_errno(err, errno, "guest memory: fstat: region %u", region->index);
	*out_mapped = 0;
	for (uint32_t i = 0; i < source->region_count; i++) {
		const struct source_region *other = &source->regions[i];
		struct stat other_stat;

		if (other->is_private)
			continue;
		if (fstat(other->fd, &other_stat))
			return mgd_fail_errno(err, errno, "guest memory: fstat: region %u", other->index);
		if (same_file(out_stat, &other_stat))
			*out_mapped += count_bits(other->scanned, other->page_count) * other->page_bytes;
	}
	return 0;
}

/*
 * hugetlbfs reports no extents, only how much the file holds.  If that equals what the guest has mapped, the mapped
 * pages are all there is.  If the file holds more (written by a process that has exited, or read in by the VMM before
 * it mapped it), any page may hold data, so all are marked: reading a hole costs time, but no memory.
 *
 * The guest may fault pages in meanwhile.  So query mappings, file, mappings, and trust the result only if all three
 * agree.
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
		mark_bits(source, region, region->scanned, NULL);
		return 0;
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

/*
 * Private memory: without a file behind it, an absent page holds zeros, so the pages that are present or swapped are
 * all there is.  The next scan reports a page that is populated or zapped later.
 */
static int mark_private(struct mgd_source *source, struct mgd_tracker *tracker, struct mgd_error *err)
{
	bool looked = false;

	for (uint32_t i = 0; i < source->region_count; i++) {
		struct source_region *region = &source->regions[i];

		if (!region->is_private)
			continue;
		if (region->file_behind || !tracker) {
			source_mark_blocks(source, region, 0, region->block_count);
			continue;
		}
		if (!looked && look_present(source, tracker, err))
			return -1;
		looked = true;
		mark_bits(source, region, region->scanned, NULL);
	}
	return 0;
}

int mgd_source_mark_populated(struct mgd_source *source, struct mgd_tracker *tracker, struct mgd_error *err)
{
	int failed = source_require_precopy(source, "mark populated", err);

	if (!failed)
		failed = mark_private(source, tracker, err);
	for (uint32_t i = 0; i < source->region_count && !failed; i++) {
		struct source_region *region = &source->regions[i];
		struct statfs file_system;

		if (region->is_private)
			continue;
		if (fstatfs(region->fd, &file_system))
			failed = mgd_fail_errno(err, errno, "guest memory: fstatfs: region %u", i);
		else if (file_system.f_type == HUGETLBFS_MAGIC)
			failed = mark_mapped(source, region, tracker, err);
		else
			failed = mark_extents(source, region, err);
	}
	for (uint32_t i = 0; i < source->region_count; i++)
		empty_scanned(&source->regions[i]);
	return failed ? -1 : 0;
}

/* ---- later rounds */

/* Return how much the region's file holds; UINT64_MAX if that cannot be told. */
static uint64_t held_bytes(const struct source_region *region)
{
	struct stat file;

	return fstat(region->fd, &file) ? UINT64_MAX : (uint64_t)file.st_blocks * 512;
}

/* Return whether the region's file holds only pages that the tracker has found present.  held: what it held before. */
static bool all_is_known(const struct mgd_source *source, const struct mgd_tracker *tracker,
			 const struct source_region *region, uint64_t held)
{
	uint64_t present = 0;
	struct stat file, other_file;

	if (fstat(region->fd, &file))
		return false;
	for (uint32_t i = 0; i < source->region_count; i++) {
		const struct source_region *other = &source->regions[i];
		uint64_t pages = mgd_tracker_present_pages(tracker, i);

		if (other->is_private || fstat(other->fd, &other_file) || !same_file(&file, &other_file))
			continue;
		if (pages == UINT64_MAX)
			return false;
		/* A page that two regions show is not counted once. */
		if (other != region && other->file_offset < region->file_offset + region->size_bytes &&
		    region->file_offset < other->file_offset + other->size_bytes)
			return false;
		present += pages * other->page_bytes;
	}
	return present == held && held == held_bytes(region);
}

/*
 * A guest on huge pages that uses little of its address space: the scan of the pages known so far is enough if the
 * files hold no others, neither before nor after it.  A page that comes into a file meanwhile and is written is found
 * by the next scan: the file then holds more than what is known, even if another page has gone.
 */
static int scan_known(struct mgd_source *source, struct mgd_tracker *tracker, bool last, uint64_t **bitmaps,
		      uint64_t *out_bytes, bool *out_complete, struct mgd_error *err)
{
	uint64_t held[MGD_MAX_REGIONS];
	int complete;

	for (uint32_t i = 0; i < source->region_count; i++)
		held[i] = held_bytes(&source->regions[i]);
	if (mgd_tracker_scan_known(tracker, last, bitmaps, out_bytes, &complete, err))
		return -1;
	*out_complete = true;
	for (uint32_t i = 0; i < source->region_count && !complete && *out_complete; i++) {
		const struct source_region *region = &source->regions[i];

		/* The scan was complete for small pages, and for private memory without a file. */
		if (region->page_bytes == MGD_BLOCK_BYTES || (region->is_private && !region->file_behind))
			continue;
		*out_complete = !region->is_private && all_is_known(source, tracker, region, held[i]);
	}
	return 0;
}

static int scan(struct mgd_source *source, struct mgd_tracker *tracker, bool last, uint64_t *out_bytes,
		struct mgd_error *err)
{
	uint64_t *bitmaps[MGD_MAX_REGIONS];
	uint64_t known_bytes;
	bool complete;

	*out_bytes = 0;
	for (uint32_t i = 0; i < source->region_count; i++)
		bitmaps[i] = source->regions[i].scanned;
	if (scan_known(source, tracker, last, bitmaps, out_bytes, &complete, err))
		return -1;
	if (complete)
		return 0;
	if (last)
		return mgd_tracker_scan_last(tracker, bitmaps, out_bytes, err);
	known_bytes = *out_bytes;
	if (mgd_tracker_scan(tracker, bitmaps, out_bytes, err))
		return -1;
	*out_bytes += known_bytes;
	return 0;
}

int mgd_source_scan(struct mgd_source *source, struct mgd_tracker *tracker, int kind, uint64_t *out_bytes,
		    struct mgd_error *err)
{
	int failed = source_require_precopy(source, "scan", err);

	if (failed)
		return -1;
	failed = scan(source, tracker, kind == MGD_SCAN_LAST, out_bytes, err);
	/* Do this even after a failure halfway: what the scan reported is armed again and would never be reported
	 * twice. */
	for (uint32_t i = 0; i < source->region_count; i++) {
		struct source_region *region = &source->regions[i];
		uint64_t *reported = region->since_quiesced;

		if (*out_bytes || failed)
			mark_bits(source, region, region->scanned, reported);
		/* A buffer pinned before an earlier scan may have been filled after that round's copy: compare all
		 * of them again, now that no I/O is in flight. */
		if (kind != MGD_SCAN_RUNNING && !failed)
			mark_bits(source, region, reported, kind == MGD_SCAN_LAST ? reported : NULL);
	}
	return failed;
}

/* Count the blocks of a page that the target would not get as they are now.  A page may have been written and be the
 * same, or have been read for the first time. */
static int find_changes(struct mgd_source *source, struct source_region *region, uint64_t page,
			struct mgd_late_writes *late, struct mgd_error *err)
{
	uint64_t first = page * region->page_blocks;

	for (uint64_t block = first; block < first + region->page_blocks; block++) {
		uint8_t copy[MGD_BLOCK_BYTES];

		if (mgd_bit_test_atomic(region->marks, block))
			continue;
		if (source_read(source, region, block, 1, copy, err))
			return -1;
		if (source_hash(source, copy) == region->table[block])
			continue;
		if (!late->bytes) {
			late->region = region->index;
			late->offset = block * MGD_BLOCK_BYTES;
		}
		late->bytes += MGD_BLOCK_BYTES;
	}
	return 0;
}

int mgd_source_late_writes(struct mgd_source *source, struct mgd_tracker *tracker, struct mgd_late_writes *out,
			   struct mgd_error *err)
{
	uint64_t bytes;
	int failed = scan(source, tracker, true, &bytes, err);

	*out = (struct mgd_late_writes){0};
	for (uint32_t i = 0; i < source->region_count; i++) {
		struct source_region *region = &source->regions[i];

		for (size_t word = 0; bytes && word < mgd_bitmap_words(region->page_count); word++) {
			uint64_t late = region->scanned[word] & ~region->since_quiesced[word];

			for (; late && !failed; late &= late - 1)
				failed = find_changes(source, region, word * 64 + mgd_first_bit(late), out, err);
		}
		empty_scanned(region);
	}
	return failed;
}
