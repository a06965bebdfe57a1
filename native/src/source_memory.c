/* SPDX-License-Identifier: MIT */
/*
 * Reading guest memory: through a mapping of our own if there is one, else with pread.  Comparing in place is four
 * times as fast as copying with pread.
 *
 * Memory on huge pages has such a mapping, the view: the same file, mapped for reading.  Once the memory is frozen, the
 * kernel sends from the view.  Nothing is ever written through it, and nothing is allocated.  A hole stays a hole,
 * because the view is registered with a userfaultfd of our own that answers a missing page with SIGBUS.  Each access is
 * guarded against that signal, which also means that the file was truncated or that the memory is bad.  pread follows:
 * it reads holes as zeros and reports the other two by name.
 *
 * Memory on 4 KiB pages is not mapped: page tables would cost another 0.2 % of it, and the kernel's dirty report is
 * exact there.  Nobody else can map private memory.
 */
#include "source.h"

#include <sys/ioctl.h>

#include "guard.h"
#include "uapi.h"

#define DIGEST_PIECE_BYTES (256 * 1024)

/* ---- the view */

static bool forbid_filling(struct mgd_source *source, uint8_t *at, uint64_t bytes)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MISSING_SHMEM,
	};

	if (source->view_uffd < 0) {
		int uffd;

		if (mgd_uffd_open(1, &uffd, NULL))
			return false;
		if (ioctl(uffd, UFFDIO_API, &api)) {
			close(uffd);
			return false;
		}
		source->view_uffd = uffd;
	}
	return !mgd_uffd_register(source->view_uffd, (uintptr_t)at, bytes, MGD_REGISTER_MISSING, NULL);
}

void source_view_open(struct mgd_source *source, struct source_region *region)
{
	void *at;

	if (region->page_bytes <= MGD_BLOCK_BYTES || region->is_private || mgd_guard_install(NULL))
		return;
	/* NORESERVE: otherwise the mapping would reserve huge pages for the holes. */
	at = mmap(NULL, region->size_bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, region->fd,
		  (off_t)region->file_offset);
	if (at == MAP_FAILED)
		return;
	/* No child and no core file of ours may contain the guest's memory. */
	(void)madvise(at, region->size_bytes, MADV_DONTFORK);
	(void)madvise(at, region->size_bytes, MADV_DONTDUMP);
	if (forbid_filling(source, at, region->size_bytes))
		region->view = at;
	else
		munmap(at, region->size_bytes);
}

void source_view_close(struct source_region *region)
{
	mgd_unmap((void *)region->view, region->size_bytes);
	region->view = NULL;
}

/* A failed access costs a signal, and the next access to the same hole would fail too, so remember the page. */
static bool try_look(const struct source_region *region, uint64_t first, void (*look)(void *), void *argument)
{
	uint64_t page = first / region->page_blocks;

	if (!region->view || mgd_bit_test_atomic(region->unseen, page))
		return false;
	if (mgd_guarded(look, argument))
		return true;
	mgd_bit_set_atomic(region->unseen, page);
	return false;
}

/* ---- copying */

struct copying {
	const struct source_region *region;
	uint64_t first;
	uint8_t *to;
	size_t bytes;
};

static void copy(void *argument)
{
	const struct copying *copying = argument;

	memcpy(copying->to, source_in_view(copying->region, copying->first), copying->bytes);
}

/* On failure *offset is where it failed; *out_reason is an errno, or 0 at the end of the file. */
static bool pread_all(int fd, uint8_t *to, size_t bytes, uint64_t *offset, int *out_reason)
{
	while (bytes) {
		ssize_t got = pread(fd, to, bytes, (off_t)*offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0) {
			*out_reason = got ? errno : 0;
			return false;
		}
		to += got;
		*offset += (uint64_t)got;
		bytes -= (size_t)got;
	}
	return true;
}

static int fail_read(const struct source_region *region, int reason, uint64_t offset, struct mgd_error *err)
{
	uint64_t at = offset - region->file_offset;

	if (region->is_private && !reason)
		return mgd_fail(err, MGD_ERR_GUEST_GONE, "guest memory: region %u: the process has exited",
				region->index);
	if (region->is_private && (reason == EIO || reason == EFAULT))
		return mgd_fail_errno(err, reason,
				      "guest memory: region %u at %#" PRIx64
				      ": no longer mapped by the process (address %#" PRIx64 "), or bad memory",
				      region->index, at, offset);
	if (!reason)
		return mgd_fail(err, MGD_ERR_OS, "guest memory: region %u: the file ends at %#" PRIx64, region->index,
				offset);
	return mgd_fail_errno(err, reason, "guest memory: pread: region %u at %#" PRIx64, region->index, at);
}

int source_read(struct mgd_source *source, const struct source_region *region, uint64_t first, uint32_t count,
		uint8_t *to, struct mgd_error *err)
{
	size_t bytes = (size_t)count * MGD_BLOCK_BYTES;
	uint64_t offset = region->file_offset + first * MGD_BLOCK_BYTES;
	int reason;
	struct copying copying = {region, first, to, bytes};

	source_count(source, read_bytes, bytes);
	if (try_look(region, first, copy, &copying))
		return 0;
	if (!pread_all(region->fd, to, bytes, &offset, &reason))
		return fail_read(region, reason, offset, err);
	return 0;
}

/* ---- comparing */

uint64_t source_hash(const struct mgd_source *source, const uint8_t *block)
{
	return mgd_block_is_zero(block) ? 0 : mgd_block_hash(block, source->secret);
}

struct comparison {
	const struct mgd_source *source;
	const struct source_region *region;
	uint64_t first;
	uint32_t count;
	uint64_t differing;
};

static void compare(void *argument)
{
	struct comparison *comparison = argument;

	for (uint32_t i = 0; i < comparison->count; i++) {
		const uint8_t *block = source_in_view(comparison->region, comparison->first + i);
		uint64_t known = comparison->region->table[comparison->first + i];
		bool same =
			known ? mgd_block_hash(block, comparison->source->secret) == known : mgd_block_is_zero(block);

		comparison->differing |= (uint64_t)!same << i;
	}
}

bool source_compare(const struct mgd_source *source, const struct source_region *region, uint64_t first, uint32_t count,
		    uint64_t *out_differing)
{
	struct comparison comparison = {.source = source, .region = region, .first = first, .count = count};

	if (!try_look(region, first, compare, &comparison))
		return false;
	*out_differing = comparison.differing;
	return true;
}

/* ---- frozen memory */

struct hashing {
	const struct mgd_source *source;
	const struct source_region *region;
	uint64_t first;
	uint32_t count;
	uint64_t *hashes;
};

static void hash(void *argument)
{
	const struct hashing *hashing = argument;

	for (uint32_t i = 0; i < hashing->count; i++)
		hashing->hashes[i] = source_hash(hashing->source, source_in_view(hashing->region, hashing->first + i));
}

bool source_hash_in_place(const struct mgd_source *source, const struct source_region *region, uint64_t first,
			  uint32_t count, uint64_t *hashes)
{
	struct hashing hashing = {source, region, first, count, hashes};

	return try_look(region, first, hash, &hashing);
}

static int explain_fault(struct mgd_source *source, struct source_region *region, uint64_t offset, size_t bytes,
			 struct mgd_error *err)
{
	for (uint64_t block = offset / MGD_BLOCK_BYTES; block * MGD_BLOCK_BYTES < offset + bytes; block++) {
		uint8_t copy[MGD_BLOCK_BYTES];

		mgd_bit_set_atomic(region->unseen, block / region->page_blocks);
		if (source_read(source, region, block, 1, copy, err))
			return -1;
	}
	return 0;
}

int source_explain_fault(struct mgd_source *source, const struct iovec *iov, int count, struct mgd_error *err)
{
	for (uint32_t i = 0; i < source->region_count; i++) {
		struct source_region *region = &source->regions[i];

		for (int j = 0; j < count && region->view; j++) {
			const uint8_t *at = iov[j].iov_base;

			if (at >= region->view && at < region->view + region->size_bytes &&
			    explain_fault(source, region, (uint64_t)(at - region->view), iov[j].iov_len, err))
				return -1;
		}
	}
	return 0;
}

/* ---- digests, for tests and the final sweep: equal digests mean equal bytes, wherever holes are */

static void unmap_piece(void *piece)
{
	mgd_unmap(*(void **)piece, DIGEST_PIECE_BYTES);
}

int mgd_digest(int memory_fd, uint64_t offset, uint64_t bytes, const uint8_t *secret, uint64_t *out,
	       struct mgd_error *err)
{
	__attribute__((cleanup(unmap_piece))) uint8_t *piece = NULL;
	uint64_t digest = 0, end = offset + bytes;
	int reason;

	if (offset % MGD_BLOCK_BYTES || bytes % MGD_BLOCK_BYTES)
		return mgd_misuse(err, "digest: offset and length must be whole blocks");
	piece = mgd_map_zeros(DIGEST_PIECE_BYTES, err);
	if (!piece)
		return -1;
	while (offset < end) {
		size_t count = end - offset < DIGEST_PIECE_BYTES ? (size_t)(end - offset) : DIGEST_PIECE_BYTES;

		if (!pread_all(memory_fd, piece, count, &offset, &reason))
			return reason ? mgd_fail_errno(err, reason, "digest: pread at %#" PRIx64, offset)
				      : mgd_misuse(err, "digest: the file ends at %#" PRIx64, offset);
		for (size_t at = 0; at < count; at += MGD_BLOCK_BYTES) {
			uint64_t hash = mgd_block_hash(piece + at, secret);

			digest = mgd_words_hash(digest, &hash, 1, secret);
		}
	}
	*out = digest;
	return 0;
}
