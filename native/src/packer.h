/* SPDX-License-Identifier: MIT */
/*
 * Compression of what one connection sends, for as long as it pays.
 *
 * Whether it does depends on the data, the processor and the network, and all of them change.  So nothing is modelled:
 * both ways are tried in turn for a stretch of payload, the time each took to pack and write it is compared, and the
 * better one is kept, for longer and longer stretches, until the other gets its next try.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MGD_PAYOFF_STRETCH_BYTES (8ull << 20)

/* No clock in here: the caller says what it measured. */
struct mgd_payoff {
	bool packing; /* what to do now */
	bool trying; /* the other way than the one kept */
	uint32_t stretches, stretches_left; /* to keep it for, and still */
	uint64_t bytes, ns; /* of the stretch under way */
	uint64_t ns_per_mib[2]; /* [packing]; 0: not known yet */
};

void mgd_payoff_init(struct mgd_payoff *payoff);
/* bytes: of payload before packing; ns: spent packing and writing it. */
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
/* Returns the packed size, at most `capacity`; 0: it does not fit there (or there is no memory), send it as it is. */
size_t mgd_packer_pack(struct mgd_packer *packer, const uint8_t *from, size_t bytes, uint8_t *to, size_t capacity);
/* Whether the level is one that zstd knows. */
bool mgd_packer_level_valid(int level);
