/* SPDX-License-Identifier: MIT */
/*
 * zstd for one connection, and the decision whether to use it.  packer.h explains how it is made.
 */
#include "packer.h"

#include <string.h>

#include <zstd.h>

#define STRETCHES_MIN 4
#define STRETCHES_MAX 64
#define MIB (1ull << 20)

void mgd_payoff_init(struct mgd_payoff *payoff)
{
	*payoff = (struct mgd_payoff){.packing = true, .stretches = STRETCHES_MIN};
}

/* Compression uses a processor that the guest may want, so it must be at least 5 % faster. */
static bool packing_pays(const struct mgd_payoff *payoff)
{
	return payoff->ns_per_mib[true] + payoff->ns_per_mib[true] / 20 < payoff->ns_per_mib[false];
}

static void next_stretch(struct mgd_payoff *payoff)
{
	bool kept = payoff->packing != payoff->trying;
	bool best;

	payoff->ns_per_mib[payoff->packing] = payoff->ns / (payoff->bytes / MIB) + 1;
	payoff->bytes = payoff->ns = 0;
	if (!payoff->ns_per_mib[!payoff->packing]) {
		payoff->packing = !payoff->packing; /* the first trial of the other mode */
		return;
	}
	if (!payoff->trying && payoff->stretches_left) {
		if (--payoff->stretches_left)
			return;
		payoff->trying = true;
		payoff->packing = !payoff->packing;
		return;
	}
	best = packing_pays(payoff);
	if (!payoff->trying || best != kept)
		payoff->stretches = STRETCHES_MIN;
	else if (payoff->stretches < STRETCHES_MAX)
		payoff->stretches *= 2;
	payoff->packing = best;
	payoff->trying = false;
	payoff->stretches_left = payoff->stretches;
}

void mgd_payoff_note(struct mgd_payoff *payoff, uint64_t bytes, uint64_t ns)
{
	payoff->bytes += bytes;
	payoff->ns += ns;
	if (payoff->bytes >= MGD_PAYOFF_STRETCH_BYTES)
		next_stretch(payoff);
}

void mgd_packer_init(struct mgd_packer *packer)
{
	memset(packer, 0, sizeof(*packer));
	mgd_payoff_init(&packer->payoff);
}

void mgd_packer_fini(struct mgd_packer *packer)
{
	ZSTD_freeCCtx(packer->context);
	packer->context = NULL;
}

void mgd_packer_set_level(struct mgd_packer *packer, int level)
{
	if (level == packer->level)
		return;
	packer->level = level;
	mgd_payoff_init(&packer->payoff);
	if (level && !packer->context)
		packer->context = ZSTD_createCCtx();
}

bool mgd_packer_wanted(const struct mgd_packer *packer)
{
	return packer->level && packer->context && packer->payoff.packing;
}

size_t mgd_packer_pack(struct mgd_packer *packer, const uint8_t *from, size_t bytes, uint8_t *to, size_t capacity)
{
	size_t packed = ZSTD_compressCCtx(packer->context, to, capacity, from, bytes, packer->level);

	return ZSTD_isError(packed) ? 0 : packed;
}

bool mgd_packer_level_valid(int level)
{
	return level >= ZSTD_minCLevel() && level <= ZSTD_maxCLevel();
}
