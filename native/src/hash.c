/* SPDX-License-Identifier: MIT */
/*
 * The keyed hashes and the test for zeros are the only code that reads every byte of the guest.  The hashes are
 * compiled for several processors, and the fastest build that this processor supports is used.
 */
#include "hash.h"

#include <string.h>

_Static_assert(MGD_SECRET_BYTES == MGD_BLOCK_BYTES + 8, "a word of key for each of a block, and one more");

/* high · x^64 + low, modulo x^64 + x^4 + x^3 + x + 1. */
static inline uint64_t reduce(uint64_t low, uint64_t high)
{
	high ^= high >> 63 ^ high >> 61 ^ high >> 60;
	return low ^ high ^ high << 1 ^ high << 3 ^ high << 4;
}

/* ---- any processor */

static bool always(void)
{
	return true;
}

/* Carry-less multiplication, four bits of b at a time.  The table omits the upper bits of a, so that its entries fit
 * a word. */
static void multiply(uint64_t a, uint64_t b, uint64_t *low, uint64_t *high)
{
	const uint64_t short_a = a & ~0ull >> 3;
	uint64_t table[16] = {0}, l = 0, h = 0;

	for (int i = 1; i < 16; i++)
		table[i] = i & 1 ? table[i - 1] ^ short_a : table[i / 2] << 1;
	for (int shift = 60; shift >= 0; shift -= 4) {
		h = h << 4 | l >> 60;
		l = l << 4 ^ table[b >> shift & 15];
	}
	for (int bit = 61; bit < 64; bit++) {
		if (a >> bit & 1) {
			l ^= b << bit;
			h ^= b >> (64 - bit);
		}
	}
	*low ^= l;
	*high ^= h;
}

static uint64_t inner_product_portable(const void *block, const void *key)
{
	uint64_t low = 0, high = 0;

	for (size_t at = 0; at < MGD_BLOCK_BYTES; at += 16) {
		uint64_t m[2], k[2];

		memcpy(m, (const char *)block + at, sizeof(m));
		memcpy(k, (const char *)key + at, sizeof(k));
		multiply(m[0] ^ k[0], m[1] ^ k[1], &low, &high);
	}
	return reduce(low, high);
}

static uint64_t polynomial_portable(uint64_t before, const uint64_t *words, size_t count, uint64_t point)
{
	for (size_t i = 0; i < count; i++) {
		uint64_t low = 0, high = 0;

		multiply(before ^ words[i], point, &low, &high);
		before = reduce(low, high);
	}
	return before;
}

/* ---- x86-64 with carry-less multiplication */

#ifdef __x86_64__

#include <immintrin.h>

/* Each vector holds pairs of words: multiply the lower word of each pair by the upper one. */
#define LOW_BY_HIGH 0x10

static bool has_clmul(void)
{
	return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

static bool has_clmul_256(void)
{
	return __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx2") && has_clmul();
}

static bool has_clmul_512(void)
{
	return __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f") && has_clmul();
}

__attribute__((target("pclmul,sse4.1"))) static uint64_t reduce_vector(__m128i sum)
{
	return reduce((uint64_t)_mm_cvtsi128_si64(sum), (uint64_t)_mm_extract_epi64(sum, 1));
}

__attribute__((target("pclmul,sse4.1"))) static uint64_t inner_product_clmul(const void *block, const void *key)
{
	const __m128i *m = block, *k = key;
	__m128i sum[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};

	for (int i = 0; i < MGD_BLOCK_BYTES / 16; i += 4) {
#pragma GCC unroll 4
		for (int j = 0; j < 4; j++) {
			__m128i x = _mm_xor_si128(_mm_loadu_si128(m + i + j), _mm_loadu_si128(k + i + j));

			sum[j] = _mm_xor_si128(sum[j], _mm_clmulepi64_si128(x, x, LOW_BY_HIGH));
		}
	}
	return reduce_vector(_mm_xor_si128(_mm_xor_si128(sum[0], sum[1]), _mm_xor_si128(sum[2], sum[3])));
}

__attribute__((target("pclmul,vpclmulqdq,avx2"))) static uint64_t inner_product_clmul_256(const void *block,
											  const void *key)
{
	const __m256i *m = block, *k = key;
	__m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
			  _mm256_setzero_si256()};

	for (int i = 0; i < MGD_BLOCK_BYTES / 32; i += 4) {
#pragma GCC unroll 4
		for (int j = 0; j < 4; j++) {
			__m256i x = _mm256_xor_si256(_mm256_loadu_si256(m + i + j), _mm256_loadu_si256(k + i + j));

			sum[j] = _mm256_xor_si256(sum[j], _mm256_clmulepi64_epi128(x, x, LOW_BY_HIGH));
		}
	}
	sum[0] = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
	return reduce_vector(_mm_xor_si128(_mm256_castsi256_si128(sum[0]), _mm256_extracti128_si256(sum[0], 1)));
}

__attribute__((target("pclmul,vpclmulqdq,avx512f"))) static uint64_t inner_product_clmul_512(const void *block,
											     const void *key)
{
	const uint8_t *m = block, *k = key;
	__m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
			  _mm512_setzero_si512()};
	__m256i half;

	for (int i = 0; i < MGD_BLOCK_BYTES; i += 4 * 64) {
#pragma GCC unroll 4
		for (int j = 0; j < 4 * 64; j += 64) {
			__m512i x = _mm512_xor_si512(_mm512_loadu_si512(m + i + j), _mm512_loadu_si512(k + i + j));

			sum[j / 64] = _mm512_xor_si512(sum[j / 64], _mm512_clmulepi64_epi128(x, x, LOW_BY_HIGH));
		}
	}
	sum[0] = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
	half = _mm256_xor_si256(_mm512_castsi512_si256(sum[0]), _mm512_extracti64x4_epi64(sum[0], 1));
	return reduce_vector(_mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

__attribute__((target("pclmul,sse4.1"))) static uint64_t polynomial_clmul(uint64_t before, const uint64_t *words,
									  size_t count, uint64_t point)
{
	const __m128i by = _mm_cvtsi64_si128((long long)point);

	for (size_t i = 0; i < count; i++)
		before = reduce_vector(_mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)(before ^ words[i])), by, 0));
	return before;
}

#endif

/* ---- choosing a build */

const struct mgd_hash_build mgd_hash_builds[] = {
#ifdef __x86_64__
	{"VPCLMULQDQ, 512 bits", has_clmul_512, inner_product_clmul_512, polynomial_clmul},
	{"VPCLMULQDQ, 256 bits", has_clmul_256, inner_product_clmul_256, polynomial_clmul},
	{"PCLMULQDQ", has_clmul, inner_product_clmul, polynomial_clmul},
#endif
	{"portable", always, inner_product_portable, polynomial_portable},
};

static const struct mgd_hash_build *best_build(void)
{
	const struct mgd_hash_build *build = mgd_hash_builds;

	while (!build->usable())
		build++;
	return build;
}

uint64_t mgd_block_hash(const void *block, const uint8_t *secret)
{
	uint64_t hash = best_build()->inner_product(block, secret);

	return hash ? hash : 1; /* 0 is reserved: the target has zeros */
}

uint64_t mgd_words_hash(uint64_t before, const uint64_t *words, size_t count, const uint8_t *secret)
{
	uint64_t point;

	memcpy(&point, secret + MGD_BLOCK_BYTES, sizeof(point));
	return best_build()->polynomial(before, words, count, point);
}

bool mgd_block_is_zero(const void *block)
{
	const uint8_t *bytes = block;
	uint64_t first;

	/* Most blocks differ from zero early: check one word before checking all.  A block that equals itself
	 * shifted by eight bytes and starts with eight zero bytes is all zeros. */
	memcpy(&first, bytes, sizeof(first));
	return first == 0 && memcmp(bytes, bytes + sizeof(first), MGD_BLOCK_BYTES - sizeof(first)) == 0;
}
