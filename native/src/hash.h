/* SPDX-License-Identifier: MIT */
/* XXH3 of a block, as compiled for different processors: one value, whoever computes it. */
#ifndef MGD_HASH_H
#define MGD_HASH_H

#include "migrated.h"

uint64_t mgd_block_hash_generic(const void *block, const uint8_t *secret);
#ifdef __x86_64__
/* Only where __builtin_cpu_supports("avx2"). */
uint64_t mgd_block_hash_avx2(const void *block, const uint8_t *secret);
#endif

#endif
