/* SPDX-License-Identifier: MIT */
/*
 * The payload of a frame: from the socket to receiver->at[…], hashed on the way.
 *
 * In pieces: what has just come in is hashed while it is in the cache.  A compressed payload is read whole, since its
 * length is known and bounded (no more than the blocks it stands for), and must unpack to exactly those blocks.
 */
#include <errno.h>
#include <string.h>

#include <zstd.h>

#include "error.h"
#include "receive.h"

#define PIECE_BLOCKS 64

static int receive_iov(struct mgd_receiver *receiver, int count, struct mgd_error *err)
{
	if (mgd_channel_recv(receiver->channel, receiver->iov, count, err) == 0)
		return 0;
	if (err->kind == MGD_ERR_OS && err->os_errno == EFAULT)
		err->kind = MGD_ERR_POOL;
	return -1;
}

static void hash_blocks(struct mgd_receiver *receiver, uint32_t first, uint32_t count)
{
	for (uint32_t i = first; i < first + count; i++)
		receiver->hashes[i] = mgd_block_hash(receiver->at[i], receiver->target->secret);
}

static int receive_plain(struct mgd_receiver *receiver, struct mgd_error *err)
{
	for (uint32_t first = 0, count; first < receiver->present_count; first += count) {
		uint32_t left = receiver->present_count - first;
		int runs = 0;

		count = left < PIECE_BLOCKS ? left : PIECE_BLOCKS;
		for (uint32_t i = first; i < first + count; i++) {
			struct iovec *last = runs ? &receiver->iov[runs - 1] : NULL;

			if (last && (uint8_t *)last->iov_base + last->iov_len == receiver->at[i])
				last->iov_len += MGD_BLOCK_BYTES;
			else
				receiver->iov[runs++] = (struct iovec){receiver->at[i], MGD_BLOCK_BYTES};
		}
		if (receive_iov(receiver, runs, err) < 0)
			return -1;
		hash_blocks(receiver, first, count);
	}
	return 0;
}

static bool contiguous(const struct mgd_receiver *receiver)
{
	for (uint32_t i = 1; i < receiver->present_count; i++)
		if (receiver->at[i] != receiver->at[0] + (size_t)i * MGD_BLOCK_BYTES)
			return false;
	return true;
}

static int unpack(struct mgd_receiver *receiver, uint8_t *to, struct mgd_error *err)
{
	size_t bytes = (size_t)receiver->present_count * MGD_BLOCK_BYTES, unpacked;

	if (!receiver->unpacker)
		receiver->unpacker = ZSTD_createDCtx();
	if (!receiver->unpacker)
		return mgd_fail_errno(err, ENOMEM, "page frame: memory to decompress");
	unpacked = ZSTD_decompressDCtx(receiver->unpacker, to, bytes, receiver->packed, receiver->frame.payload_bytes);
	if (ZSTD_isError(unpacked))
		return mgd_fail(err, MGD_ERR_PEER, "page frame: compressed payload: %s", ZSTD_getErrorName(unpacked));
	if (unpacked != bytes)
		return mgd_fail(err, MGD_ERR_PEER, "page frame: compressed payload: %zu bytes of %zu", unpacked, bytes);
	return 0;
}

static int receive_packed(struct mgd_receiver *receiver, struct mgd_error *err)
{
	bool direct = contiguous(receiver);

	/* Also checked with the bitmaps; here it is the size of a buffer. */
	if (receiver->frame.payload_bytes > MGD_CHUNK_BLOCKS * MGD_BLOCK_BYTES)
		return mgd_fail(err, MGD_ERR_PEER, "page frame: compressed payload: %u bytes",
				receiver->frame.payload_bytes);
	receiver->iov[0] = (struct iovec){receiver->packed, receiver->frame.payload_bytes};
	if (receive_iov(receiver, 1, err) < 0 ||
	    unpack(receiver, direct ? receiver->at[0] : receiver->scratch, err) < 0)
		return -1;
	for (uint32_t i = 0; i < receiver->present_count && !direct; i++) {
		const uint8_t *from = receiver->scratch + (size_t)i * MGD_BLOCK_BYTES;

		if (receiver->at[i] != from)
			memcpy(receiver->at[i], from, MGD_BLOCK_BYTES);
	}
	hash_blocks(receiver, 0, receiver->present_count);
	return 0;
}

int mgd_receive_payload(struct mgd_receiver *receiver, struct mgd_error *err)
{
	return receiver->frame.flags & MGD_FRAME_COMPRESSED ? receive_packed(receiver, err)
							    : receive_plain(receiver, err);
}

void mgd_receive_payload_fini(struct mgd_receiver *receiver)
{
	ZSTD_freeDCtx(receiver->unpacker);
	receiver->unpacker = NULL;
}
