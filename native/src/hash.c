// SPDX-License-Identifier: MIT
/* The keyed hash of a block and the test for zeros: the only places that look at every byte of the guest. */
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "frame.h"
#include "hash.h"

_Static_assert(MGD_SECRET_BYTES >= XXH3_SECRET_SIZE_MIN, "the key is as long as XXH3 asks for");

uint64_t mgd_block_hash_generic(const void *block, const uint8_t *secret)
{
	return XXH3_64bits_withSecret(block, MGD_BLOCK_BYTES, secret, MGD_SECRET_BYTES);
}

static uint64_t best_hash(const void *block, const uint8_t *secret)
{
#ifdef __x86_64__
	if (__builtin_cpu_supports("avx2"))
		return mgd_block_hash_avx2(block, secret);
#endif
	return mgd_block_hash_generic(block, secret);
}

uint64_t mgd_block_hash(const void *block, const uint8_t *secret)
{
	uint64_t hash = best_hash(block, secret);

	return hash ? hash : 1; /* 0 is taken: the target has zeros */
}

bool mgd_block_is_zero(const void *block)
{
	const uint8_t *bytes = block;
	uint64_t first;

	/* Most blocks differ from zero early: look at one word before asking for all of them.  If a block equals itself
	 * shifted by eight bytes and starts with eight zeros, it is zero throughout. */
	memcpy(&first, bytes, sizeof(first));
	return first == 0 && memcmp(bytes, bytes + sizeof(first), MGD_BLOCK_BYTES - sizeof(first)) == 0;
}
