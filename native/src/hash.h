/* SPDX-License-Identifier: MIT */
/*
 * Keyed hashes with a provable bound.  All arithmetic is in GF(2^64) modulo x^64 + x^4 + x^3 + x + 1; + is xor.
 * docs/architecture.md states the properties and proves them.
 *
 * The key is MGD_SECRET_BYTES random bytes: as many words as a block has, and one more.
 */
#pragma once

#include <stdbool.h>

#include "migrated.h"

#define MGD_BLOCK_WORDS (MGD_BLOCK_BYTES / 8)

/* Hash a block: the inner product Σ (m[2i] + k[2i]) · (m[2i+1] + k[2i+1]).  Never returns 0, which means "the target
 * has zeros" in the source's table. */
uint64_t mgd_block_hash(const void *block, const uint8_t *secret);
/* Hash words, continuing from the hash `before`: they are the coefficients of a polynomial, evaluated at the key's
 * last word. */
uint64_t mgd_words_hash(uint64_t before, const uint64_t *words, size_t count, const uint8_t *secret);
bool mgd_block_is_zero(const void *block);

/* The same functions compiled for different processors.  All builds return the same values. */
struct mgd_hash_build {
	const char *name;
	bool (*usable)(void);
	uint64_t (*inner_product)(const void *block, const void *key);
	uint64_t (*polynomial)(uint64_t before, const uint64_t *words, size_t count, uint64_t point);
};
extern const struct mgd_hash_build mgd_hash_builds[]; /* the fastest first; the last one runs everywhere */
