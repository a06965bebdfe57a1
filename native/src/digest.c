// SPDX-License-Identifier: MIT
/* Digest of a piece of guest memory, for tests and the final sweep: equal digests, equal bytes, whatever is a hole. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "error.h"
#include "frame.h"

#define PIECE_BYTES (256 * 1024)

static void free_buffer(void *buffer)
{
	free(*(void **)buffer);
}

int mgd_digest(int memory_fd, uint64_t offset, uint64_t bytes, const uint8_t *secret, uint64_t *out,
	       struct mgd_error *err)
{
	__attribute__((cleanup(free_buffer))) void *buffer = NULL;
	uint64_t digest = 0;

	if (offset % MGD_BLOCK_BYTES || bytes % MGD_BLOCK_BYTES)
		return mgd_fail(err, MGD_ERR_ARGUMENT, "digest: offset and length must be whole blocks");
	buffer = aligned_alloc(MGD_BLOCK_BYTES, PIECE_BYTES);
	if (!buffer)
		return mgd_fail_errno(err, ENOMEM, "digest: buffer");
	for (uint64_t done = 0; done < bytes;) {
		size_t piece = bytes - done < PIECE_BYTES ? (size_t)(bytes - done) : PIECE_BYTES;

		for (size_t have = 0; have < piece;) {
			ssize_t got =
				pread(memory_fd, (char *)buffer + have, piece - have, (off_t)(offset + done + have));

			if (got < 0 && errno == EINTR)
				continue;
			if (got < 0)
				return mgd_fail_errno(err, errno, "digest: pread at %#llx",
						      (unsigned long long)(offset + done + have));
			if (got == 0)
				return mgd_fail(err, MGD_ERR_ARGUMENT, "digest: the file ends at %#llx",
						(unsigned long long)(offset + done + have));
			have += (size_t)got;
		}
		for (size_t at = 0; at < piece; at += MGD_BLOCK_BYTES) {
			uint64_t hash = mgd_block_hash((char *)buffer + at, secret);

			digest = mgd_words_hash(digest, &hash, 1, secret);
		}
		done += piece;
	}
	*out = digest;
	return 0;
}
