/* SPDX-License-Identifier: MIT */
/* The source engine: the interface.  First form: every function is there and refuses; the engine follows. */
#include "error.h"
#include "migrated.h"

#pragma GCC diagnostic ignored "-Wunused-parameter"

int mgd_source_create(const struct mgd_source_region *regions, uint32_t region_count, uint32_t stream_count,
		      const uint8_t *secret, struct mgd_source **out, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_create: not built yet");
}

void mgd_source_destroy(struct mgd_source *source)
{
}

int mgd_source_event_fd(const struct mgd_source *source)
{
	return 0;
}

int mgd_source_next_event(struct mgd_source *source, struct mgd_event *out)
{
	return 0;
}

void mgd_source_stats(const struct mgd_source *source, struct mgd_source_stats *out)
{
}

void mgd_source_set_bandwidth(struct mgd_source *source, uint64_t bytes_per_second, uint64_t drain_bytes_per_second)
{
}

int mgd_source_set_compression(struct mgd_source *source, int level, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_set_compression: not built yet");
}

int mgd_source_add_stream(struct mgd_source *source, uint32_t stream, int fd, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_add_stream: not built yet");
}

void mgd_source_drop_streams(struct mgd_source *source)
{
}

int mgd_source_mark_populated(struct mgd_source *source, struct mgd_tracker *tracker, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_mark_populated: not built yet");
}

int mgd_source_scan(struct mgd_source *source, struct mgd_tracker *tracker, int quiesced, uint64_t *out_bytes,
		    struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_scan: not built yet");
}

int mgd_source_round(struct mgd_source *source, uint64_t round, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_round: not built yet");
}

int mgd_source_barrier(struct mgd_source *source, uint64_t barrier, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_barrier: not built yet");
}

int mgd_source_freeze(struct mgd_source *source, uint64_t *out_stale_pages, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_freeze: not built yet");
}

int mgd_source_stale_map(const struct mgd_source *source, uint32_t region, uint64_t first_page, uint8_t *out, size_t bytes,
			 struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_stale_map: not built yet");
}

int mgd_source_serve(struct mgd_source *source, int drain, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_serve: not built yet");
}

int mgd_source_lacking_begin(struct mgd_source *source, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_lacking_begin: not built yet");
}

int mgd_source_lacking(struct mgd_source *source, uint32_t region, uint64_t first_page, const uint8_t *bits, size_t bytes,
		       struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_lacking: not built yet");
}

int mgd_source_freeze_whole(struct mgd_source *source, struct mgd_error *err)
{
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "mgd_source_freeze_whole: not built yet");
}

