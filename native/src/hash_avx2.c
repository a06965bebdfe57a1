// SPDX-License-Identifier: MIT
/* The block hash for processors with AVX2: the same function, three times as fast.  Nothing else may be in this file: it is
 * compiled for them alone, and hash.c asks the processor before it calls. */
#include "hash.h"

#ifdef __AVX2__

#define XXH_INLINE_ALL
#include <xxhash.h>

_Static_assert(XXH_VECTOR == XXH_AVX2, "compiled for what it is named after");

uint64_t mgd_block_hash_avx2(const void *block, const uint8_t *secret)
{
	return XXH3_64bits_withSecret(block, MGD_BLOCK_BYTES, secret, MGD_SECRET_BYTES);
}

#endif
