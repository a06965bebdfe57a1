/* SPDX-License-Identifier: MIT */
/* The target engine: the interface.  First form: every function is there and refuses; the engine follows. */
#include "error.h"
#include "migrated.h"

uint64_t mgd_ledger_bytes(const struct mgd_target_region *regions, uint32_t region_count)
{
	uint64_t bytes = MGD_BLOCK_BYTES;

	for (uint32_t i = 0; i < region_count; i++)
		bytes += regions[i].size_bytes / regions[i].host_page_bytes;
	return bytes;
}

#define REFUSE(name, ...)                                                                                              \
	int name(__VA_ARGS__, struct mgd_error *err)                                                                   \
	{                                                                                                              \
		return mgd_fail(err, MGD_ERR_UNSUPPORTED, #name ": not built yet");                                    \
	}
#pragma GCC diagnostic ignored "-Wunused-parameter"
REFUSE(mgd_target_create, const struct mgd_target_region *regions, uint32_t region_count, uint32_t stream_count,
       int ledger_fd, int recover, const uint8_t *secret, struct mgd_target **out)
REFUSE(mgd_target_add_stream, struct mgd_target *target, uint32_t stream, int fd)
REFUSE(mgd_target_arm, struct mgd_target *target, int uffd, const struct mgd_mapping *mappings, uint32_t mapping_count,
       int recovered)
REFUSE(mgd_target_populate, struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
       size_t bytes, uint32_t threads)
REFUSE(mgd_target_stale_map, struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
       size_t bytes)
REFUSE(mgd_target_switchover, struct mgd_target *target)
REFUSE(mgd_target_background, struct mgd_target *target)
REFUSE(mgd_target_lacking, const struct mgd_target *target, uint32_t region, uint64_t first_page, uint8_t *out,
       size_t bytes)
REFUSE(mgd_target_poison_stale, struct mgd_target *target, uint64_t *out_pages)
REFUSE(mgd_target_release, struct mgd_target *target)

void mgd_target_destroy(struct mgd_target *target)
{
}
int mgd_target_event_fd(const struct mgd_target *target)
{
	return -1;
}
int mgd_target_next_event(struct mgd_target *target, struct mgd_event *out)
{
	return 0;
}
void mgd_target_stats(const struct mgd_target *target, struct mgd_target_stats *out)
{
}
void mgd_target_drop_streams(struct mgd_target *target)
{
}
