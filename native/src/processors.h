/* SPDX-License-Identifier: MIT */
/*
 * How many processors this process may keep busy, by its affinity and its cgroup quota.  It is a separate file so that
 * a test can link another answer: code for several processors is tested on few.
 */
#pragma once

#include <stdint.h>

/* Return the number of processors that the calling thread may use, and has the quota for. */
uint32_t mgd_processor_count(void);
/* Return the quota of the group at `path` below `mount` (cgroup v2) and of its ancestors, in whole processors,
 * rounded up; UINT32_MAX: no limit.  mount is where the files are; path begins with a slash. */
uint32_t mgd_processor_quota(const char *mount, const char *path);
