/* SPDX-License-Identifier: MIT */
/*
 * This file compresses what a connection sends, for as long as that pays.
 * Whether it pays depends on the data, the processor and the network, all of which change.  So nothing is modelled.
 * The sender tries both modes in turn for a stretch of payload and compares the time to compress and write it.  It
 * keeps the faster mode for longer and longer stretches, until the other mode gets its next trial.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MGD_PAYOFF_STRETCH_BYTES (8ull << 20)

/* This code reads no clock: the caller passes its measurements. */
struct mgd_payoff {
	bool packing; /* what to do now */
	bool trying; /* a trial of the other mode */
	uint32_t stretches, stretches_left; /* length of the kept period, and what is left of it */
	uint64_t bytes, ns; /* of the current stretch */
	uint64_t ns_per_mib[2]; /* indexed by packing; 0: not known yet */
};

void mgd_payoff_init(struct mgd_payoff *payoff);
/* bytes: payload before compression.  ns: time to compress and write it. */
void mgd_payoff_note(struct mgd_payoff *payoff, uint64_t bytes, uint64_t ns);

struct mgd_packer {
	int level; /* 0: off */
	void *context;
	struct mgd_payoff payoff;
};

void mgd_packer_init(struct mgd_packer *packer);
void mgd_packer_fini(struct mgd_packer *packer);
/* Change the level (0: off). */
void mgd_packer_set_level(struct mgd_packer *packer, int level);
bool mgd_packer_wanted(const struct mgd_packer *packer);
/* Return the compressed size, at most `capacity`; 0: it does not fit (or memory ran out), so send it uncompressed. */
size_t mgd_packer_pack(struct mgd_packer *packer, const uint8_t *from, size_t bytes, uint8_t *to, size_t capacity);
/* Return whether zstd has this level. */
bool mgd_packer_level_valid(int level);
