/* SPDX-License-Identifier: MIT */
/* This header has everything that a C test needs.  Its checks print what failed, and its runner takes a list of
 * tests. */
#ifndef MGD_TEST_CHECK_H
#define MGD_TEST_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#include "migrated.h"

/* Fill in a key.  It must look random: where the key of the block hash is zero, a zero in the input hides its
 * neighbour. */
static inline void fill_secret(uint8_t secret[MGD_SECRET_BYTES])
{
	uint64_t state = 0x9e3779b97f4a7c15ull;

	for (int i = 0; i < MGD_SECRET_BYTES; i++) {
		state = state * 6364136223846793005ull + 1442695040888963407ull;
		secret[i] = (uint8_t)(state >> 56);
	}
}

/* Make a plain page connection of a socket. */
static inline struct mgd_channel *plain_channel(int fd)
{
	struct mgd_channel *channel;
	struct mgd_error err;

	if (mgd_channel_create(fd, &channel, &err)) {
		fprintf(stderr, "%s\n", err.message);
		abort();
	}
	return channel;
}

/* Exit code of a test that cannot run here; it prints why. */
#define SKIPPED 77

#define CHECK(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: %s: failed: %s\n", __FILE__, __LINE__, __func__, #condition);          \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

#define CHECK_EQUAL(left, right)                                                                                       \
	do {                                                                                                           \
		long long left_ = (long long)(left), right_ = (long long)(right);                                      \
		if (left_ != right_) {                                                                                 \
			fprintf(stderr, "%s:%d: %s: %s is %lld, not %s = %lld\n", __FILE__, __LINE__, __func__, #left, \
				left_, #right, right_);                                                                \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

/* Check that a call of the core succeeds; `err` is the struct mgd_error passed to it. */
#define CHECK_OK(call, err)                                                                                            \
	do {                                                                                                           \
		if ((call) != 0) {                                                                                     \
			fprintf(stderr, "%s:%d: %s: %s: %s\n", __FILE__, __LINE__, __func__, #call, (err).message);    \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

/* Check that the call fails with this kind. */
#define CHECK_FAILS(call, err, expected_kind)                                                                          \
	do {                                                                                                           \
		(err).kind = MGD_ERR_NONE;                                                                             \
		CHECK((call) == -1);                                                                                   \
		CHECK_EQUAL((err).kind, expected_kind);                                                                \
	} while (0)

#define RUN(test)                                                                                                      \
	do {                                                                                                           \
		printf("%s\n", #test);                                                                                 \
		fflush(stdout);                                                                                        \
		test();                                                                                                \
	} while (0)

#endif
