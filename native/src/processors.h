/* SPDX-License-Identifier: MIT */
/*
 * How many processors this process may keep busy, by its affinity and by the quota of its control group.  It is a file
 * of its own so that a test can link another answer: code that uses several processors is tested on few.
 */
#pragma once

#include <stdint.h>

/* Processors that the calling thread may run on, and has the time for. */
uint32_t mgd_processor_count(void);
/* What the group at `path` below `mount` (cgroup v2) and those above it have by quota, in whole processors, rounded up;
 * UINT32_MAX: no limit.  mount is where the files are, path begins with a slash. */
uint32_t mgd_processor_quota(const char *mount, const char *path);
