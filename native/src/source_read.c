// SPDX-License-Identifier: MIT
/* Reading guest memory: through the view where there is one, with pread where not. */
#include "source_view.h"

#include <inttypes.h>
#include <unistd.h>

/* reason: an errno, 0 for an end of file. */
static int fail_read(const struct source_region *region, int reason, uint64_t offset, struct mgd_error *err)
{
	uint64_t at = offset - region->file_offset;

	if (region->is_private && !reason)
		return mgd_fail(err, MGD_ERR_GUEST_GONE, "guest memory: region %" PRIu32 ": the process has ended",
				region->index);
	if (region->is_private && (reason == EIO || reason == EFAULT))
		return mgd_fail_errno(err, reason,
				      "guest memory: region %" PRIu32 " at %#" PRIx64
				      ": no longer mapped by the process (address %#" PRIx64 "), or bad memory",
				      region->index, at, offset);
	if (!reason)
		return mgd_fail(err, MGD_ERR_OS, "guest memory: region %" PRIu32 ": the file ends at %#" PRIx64,
				region->index, offset);
	return mgd_fail_errno(err, reason, "guest memory: pread: region %" PRIu32 " at %#" PRIx64, region->index, at);
}

int source_read(struct mgd_source *source, const struct source_region *region, uint64_t first, uint32_t count,
		uint8_t *to, struct mgd_error *err)
{
	size_t bytes = (size_t)count * MGD_BLOCK_BYTES;
	uint64_t offset = region->file_offset + first * MGD_BLOCK_BYTES;

	source_count(source, read_bytes, bytes);
	if (source_view_copy(region, first, count, to))
		return 0;
	for (size_t have = 0; have < bytes;) {
		ssize_t got = pread(region->fd, to + have, bytes - have, (off_t)(offset + have));

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return fail_read(region, got < 0 ? errno : 0, offset + have, err);
		have += (size_t)got;
	}
	return 0;
}

uint64_t source_hash(const struct mgd_source *source, const uint8_t *block)
{
	return mgd_block_is_zero(block) ? 0 : mgd_block_hash(block, source->secret);
}

bool source_differing(struct mgd_source *source, const struct source_region *region, uint64_t first, uint32_t count,
		      uint64_t *out_differing)
{
	uint32_t unchanged;

	if (source->whole || !source_view_compare(source, region, first, count, out_differing))
		return false;
	unchanged = count - (uint32_t)__builtin_popcountll(*out_differing);
	source_count(source, read_bytes, (uint64_t)unchanged * MGD_BLOCK_BYTES); /* the others: when they are copied */
	source_count(source, unchanged_blocks, unchanged);
	return true;
}
