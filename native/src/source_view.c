// SPDX-License-Identifier: MIT
#include "source_view.h"

#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "guard.h"
#include "uapi.h"

/* ---------------------------------------------------------------- the mapping */

static bool forbid_filling(struct mgd_source *source, uint8_t *at, uint64_t bytes)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MISSING_SHMEM,
	};

	if (source->view_uffd < 0) {
		if (mgd_uffd_open(1, &source->view_uffd, NULL)) {
			source->view_uffd = -1;
			return false;
		}
		if (ioctl(source->view_uffd, UFFDIO_API, &api)) {
			close(source->view_uffd);
			source->view_uffd = -1;
			return false;
		}
	}
	return !mgd_uffd_register(source->view_uffd, (uintptr_t)at, bytes, MGD_REGISTER_MISSING, NULL);
}

void source_view_open(struct mgd_source *source, struct source_region *region)
{
	void *at;

	if (region->page_bytes <= MGD_BLOCK_BYTES || region->is_private)
		return;
	if (mgd_guard_install(NULL))
		return;
	/* NORESERVE: or the mapping would set huge pages aside for the holes. */
	at = mmap(NULL, region->size_bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, region->fd,
		  (off_t)region->file_offset);
	if (at == MAP_FAILED)
		return;
	/* Neither a child of ours nor a core file of ours may hold the guest's memory. */
	(void)madvise(at, region->size_bytes, MADV_DONTFORK);
	(void)madvise(at, region->size_bytes, MADV_DONTDUMP);
	if (!forbid_filling(source, at, region->size_bytes)) {
		munmap(at, region->size_bytes);
		return;
	}
	region->view = at;
}

void source_view_close(struct source_region *region)
{
	if (region->view)
		munmap((void *)region->view, region->size_bytes);
	region->view = NULL;
}

/* ---------------------------------------------------------------- looking */

/* A look that fails costs a signal, and the next piece of the same hole would fail as well: the page is remembered. */
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

struct copying {
	const uint8_t *from;
	uint8_t *to;
	size_t bytes;
};

static void copy(void *argument)
{
	const struct copying *copying = argument;

	memcpy(copying->to, copying->from, copying->bytes);
}

bool source_view_copy(const struct source_region *region, uint64_t first, uint32_t count, uint8_t *to)
{
	struct copying copying = {region->view + first * MGD_BLOCK_BYTES, to, (size_t)count * MGD_BLOCK_BYTES};

	return try_look(region, first, copy, &copying);
}

struct comparison {
	const uint8_t *from, *secret;
	const uint64_t *table;
	uint32_t count;
	uint64_t changed;
};

static void compare(void *argument)
{
	struct comparison *comparison = argument;

	for (uint32_t block = 0; block < comparison->count; block++) {
		const uint8_t *at = comparison->from + (size_t)block * MGD_BLOCK_BYTES;
		uint64_t known = comparison->table[block];
		bool same = known ? mgd_block_hash(at, comparison->secret) == known : mgd_block_is_zero(at);

		comparison->changed |= (uint64_t)!same << block;
	}
}

bool source_view_compare(const struct mgd_source *source, const struct source_region *region, uint64_t first,
			 uint32_t count, uint64_t *out_changed)
{
	struct comparison comparison = {
		.from = region->view + first * MGD_BLOCK_BYTES,
		.secret = source->secret,
		.table = region->table + first,
		.count = count,
	};

	if (!try_look(region, first, compare, &comparison))
		return false;
	*out_changed = comparison.changed;
	return true;
}
