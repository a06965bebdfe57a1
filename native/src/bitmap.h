/* SPDX-License-Identifier: MIT */
/*
 * Bitmaps of little-endian 64-bit words, in anonymous memory that costs nothing until a bit is set: one bit per block
 * of a sparse 1 TiB guest takes 32 MiB of address space and no memory.  Python and the network exchange these words as
 * plain memory, so this file, and no other file of the core, uses the compiler's builtins for atomic access.
 *
 * Several threads may call the _atomic functions at once; the others need exclusive use of the bitmap.
 */
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <unistd.h>

#include "error.h"

static inline uint64_t mgd_min(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint32_t mgd_popcount(uint64_t word)
{
	return (uint32_t)__builtin_popcountll(word);
}

static inline uint32_t mgd_first_bit(uint64_t word)
{
	return (uint32_t)__builtin_ctzll(word);
}

static inline size_t mgd_bitmap_words(uint64_t bits)
{
	return (size_t)(bits / 64 + (bits % 64 != 0));
}

/* Return zero-filled memory, or NULL with *err filled in. */
static inline void *mgd_map_zeros(size_t bytes, struct mgd_error *err)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED) {
		mgd_fail_errno(err, errno, "mmap: %zu bytes", bytes);
		return NULL;
	}
	return at;
}

/* Both ignore what was never created. */
static inline void mgd_close(int fd)
{
	if (fd >= 0)
		close(fd);
}

static inline void mgd_unmap(void *at, size_t bytes)
{
	if (at)
		munmap(at, bytes);
}

static inline uint64_t mgd_word_load_atomic(const uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/* Set the bits of mask; return those of them that were clear. */
static inline uint64_t mgd_word_set_atomic(uint64_t *word, uint64_t mask)
{
	return mask & ~__atomic_fetch_or(word, mask, __ATOMIC_ACQ_REL);
}

/* Return the word and clear it. */
static inline uint64_t mgd_word_take_atomic(uint64_t *word)
{
	return __atomic_exchange_n(word, 0, __ATOMIC_ACQ_REL);
}

static inline bool mgd_bit_test(const uint64_t *words, uint64_t bit)
{
	return words[bit / 64] >> (bit % 64) & 1;
}

static inline bool mgd_bit_test_atomic(const uint64_t *words, uint64_t bit)
{
	return mgd_word_load_atomic(&words[bit / 64]) >> (bit % 64) & 1;
}

/* Both return whether the bit was set before. */
static inline bool mgd_bit_set_atomic(uint64_t *words, uint64_t bit)
{
	return !mgd_word_set_atomic(&words[bit / 64], 1ull << (bit % 64));
}

static inline bool mgd_bit_clear_atomic(uint64_t *words, uint64_t bit)
{
	uint64_t mask = 1ull << (bit % 64);

	return __atomic_fetch_and(&words[bit / 64], ~mask, __ATOMIC_ACQ_REL) & mask;
}

/* Return the first set bit at or after `from` and before `bits`, or `bits` if there is none.  It may or may not find
 * bits that other threads clear meanwhile. */
static inline uint64_t mgd_bitmap_next_atomic(const uint64_t *words, uint64_t from, uint64_t bits)
{
	uint64_t mask = ~0ull << (from % 64);

	for (uint64_t index = from / 64; index * 64 < bits; index++, mask = ~0ull) {
		uint64_t word = mgd_word_load_atomic(&words[index]) & mask;

		if (word)
			return mgd_min(index * 64 + mgd_first_bit(word), bits);
	}
	return bits;
}

/* Visit each set bit from `from` on; bits set or cleared meanwhile may or may not be visited. */
#define mgd_bitmap_for_each_atomic(bit, words, from, bits)                                                             \
	for (uint64_t bit = mgd_bitmap_next_atomic(words, from, bits); bit < (bits);                                   \
	     bit = mgd_bitmap_next_atomic(words, bit + 1, bits))

/* Return bits first … first+63; bits at and beyond `bits` read as zero. */
static inline uint64_t mgd_bitmap_get64(const uint64_t *words, uint64_t first, uint64_t bits)
{
	size_t index = (size_t)(first / 64);
	unsigned int shift = first % 64;
	uint64_t value;

	if (first >= bits)
		return 0;
	value = words[index] >> shift;
	if (shift && index + 1 < mgd_bitmap_words(bits))
		value |= words[index + 1] << (64 - shift);
	if (bits - first < 64)
		value &= (1ull << (bits - first)) - 1;
	return value;
}

/* Return the bits of word `index` that lie in first … first+count-1. */
static inline uint64_t mgd_word_mask(uint64_t index, uint64_t first, uint64_t count)
{
	uint64_t mask = ~0ull, end = first + count;

	if (first > index * 64)
		mask &= first - index * 64 < 64 ? ~0ull << (first - index * 64) : 0;
	if (end < index * 64 + 64)
		mask &= end > index * 64 ? ~0ull >> (64 - (end - index * 64)) : 0;
	return mask;
}
