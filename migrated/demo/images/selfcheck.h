/* SPDX-License-Identifier: MIT */
/*
 * The self-checking load that every test guest runs: the Linux init, the boot-sector guest and the C example.
 *
 * Memory is an array of 4 KiB blocks.  A block holds its index, a counter, the inverse of the counter and, in all
 * remaining words, a fill that depends on both.  The expected counters are kept elsewhere, in `expected`.  So the load
 * detects a block that was rolled back to an older but consistent state as surely as a torn one.  Every visit checks
 * the whole block before it writes the next counter; a sweep checks all blocks.
 *
 * The load is freestanding: it makes no library call, so it runs where there is no library.
 */
#ifndef MIGRATED_SELFCHECK_H
#define MIGRATED_SELFCHECK_H

#include <stdint.h>

#define SC_BLOCK_BYTES 4096
#define SC_BLOCK_WORDS (SC_BLOCK_BYTES / 8)
#define SC_HOT_SHARE 64 /* the hot set is 1/64 of the blocks … */
#define SC_HOT_PERCENT 90 /* … and takes this share of the writes */

enum sc_pattern {
	SC_SPARSE, /* random blocks */
	SC_HOT, /* mostly a small hot set */
	SC_DENSE, /* one after the other */
	SC_IDLE, /* none */
};

/* The first mismatch. */
struct sc_mismatch {
	uint64_t index; /* the block's index */
	uint64_t word; /* which word of the block */
	uint64_t found, wanted;
	uint64_t counter; /* the block's expected counter */
};

struct sc_load {
	/* Set by the caller. */
	volatile uint64_t *(*block)(void *context, uint64_t index); /* where block `index` is */
	void *context;
	uint64_t *expected; /* a counter for each block */
	uint64_t blocks;
	uint64_t first_index; /* written into block 0 (several loads in one guest) */
	enum sc_pattern pattern;
	uint64_t random; /* seed, not 0 */
	/* Maintained by the load. */
	uint64_t next; /* the dense pattern's next block */
	uint64_t cursor; /* the sweep's next block */
	uint64_t operations, sweeps, errors;
	struct sc_mismatch first;
};

static inline uint64_t sc_random(uint64_t *state)
{
	uint64_t x = *state;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	*state = x;
	return x * 0x2545f4914f6cdd1dull;
}

/* First fill word of a block; word i is this plus i times an odd number. */
static inline uint64_t sc_seed(uint64_t index, uint64_t counter)
{
	uint64_t x = (index + 1) * 0x9e3779b97f4a7c15ull ^ (counter + 1) * 0xd6e8feb86659fd93ull;

	return (x ^ x >> 29) | 1;
}

#define SC_STEP 0xa0761d6478bd642full

static inline void sc_block_write(volatile uint64_t *block, uint64_t index, uint64_t counter)
{
	uint64_t fill = sc_seed(index, counter);

	block[0] = index;
	block[1] = counter;
	block[2] = ~counter;
	for (unsigned int i = 3; i < SC_BLOCK_WORDS; i++) {
		fill += SC_STEP;
		block[i] = fill;
	}
}

/* Return 0, or 1 and store the first differing word in *out. */
static inline int sc_block_check(const volatile uint64_t *block, uint64_t index, uint64_t counter,
				 struct sc_mismatch *out)
{
	uint64_t fill = sc_seed(index, counter);
	uint64_t wanted, found;
	unsigned int i;

	for (i = 0; i < SC_BLOCK_WORDS; i++) {
		if (i == 0) {
			wanted = index;
		} else if (i == 1) {
			wanted = counter;
		} else if (i == 2) {
			wanted = ~counter;
		} else {
			fill += SC_STEP;
			wanted = fill;
		}
		found = block[i];
		if (found != wanted)
			goto differs;
	}
	return 0;

differs:
	out->index = index;
	out->word = i;
	out->found = found;
	out->wanted = wanted;
	out->counter = counter;
	return 1;
}

/* Check one block.  Return 1 on a mismatch; count it, and store the first one. */
static inline int sc_check(struct sc_load *load, uint64_t i)
{
	struct sc_mismatch mismatch;

	if (!sc_block_check(load->block(load->context, i), load->first_index + i, load->expected[i], &mismatch))
		return 0;
	if (load->errors++ == 0)
		load->first = mismatch;
	return 1;
}

static inline void sc_fill(struct sc_load *load)
{
	for (uint64_t i = 0; i < load->blocks; i++) {
		load->expected[i] = 0;
		sc_block_write(load->block(load->context, i), load->first_index + i, 0);
	}
}

/* Check the block that the pattern chooses and write its next counter. */
static inline void sc_operate(struct sc_load *load)
{
	uint64_t hot = load->blocks / SC_HOT_SHARE ? load->blocks / SC_HOT_SHARE : 1;
	uint64_t i;

	switch (load->pattern) {
	case SC_DENSE:
		i = load->next;
		load->next = i + 1 == load->blocks ? 0 : i + 1;
		break;
	case SC_HOT:
		i = (sc_random(&load->random) >> 8) % 100 < SC_HOT_PERCENT ?
			    (sc_random(&load->random) >> 8) % hot :
			    (sc_random(&load->random) >> 8) % load->blocks;
		break;
	case SC_SPARSE:
		i = (sc_random(&load->random) >> 8) % load->blocks;
		break;
	default:
		return;
	}
	sc_check(load, i);
	load->expected[i]++;
	sc_block_write(load->block(load->context, i), load->first_index + i, load->expected[i]);
	load->operations++;
}

/* Check the next `count` blocks of the endless sweep. */
static inline void sc_sweep_some(struct sc_load *load, uint64_t count)
{
	while (count--) {
		sc_check(load, load->cursor);
		if (++load->cursor == load->blocks) {
			load->cursor = 0;
			load->sweeps++;
		}
	}
}

/* Check every block now; return how many were wrong. */
static inline uint64_t sc_sweep_all(struct sc_load *load)
{
	uint64_t wrong = 0;

	for (uint64_t i = 0; i < load->blocks; i++)
		wrong += sc_check(load, i);
	load->sweeps++;
	return wrong;
}

#endif /* MIGRATED_SELFCHECK_H */
