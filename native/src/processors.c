/* SPDX-License-Identifier: MIT */
/*
 * Count processors from sched_getaffinity(2) and the cgroup v2 cpu.max.  Nothing is cached, since both may change while
 * the process runs.
 */
#include "processors.h"

#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PATH_BYTES 1024

/* Parse "QUOTA PERIOD" in microseconds, or "max PERIOD". */
static uint32_t quota_of(const char *mount, const char *path)
{
	char name[2 * PATH_BYTES];
	uint64_t quota, period;
	FILE *file;
	int found;

	snprintf(name, sizeof(name), "%s%s/cpu.max", mount, path);
	file = fopen(name, "re");
	if (!file)
		return UINT32_MAX; /* the root has no quota, nor has a group without the controller */
	found = fscanf(file, "%" SCNu64 " %" SCNu64, &quota, &period);
	fclose(file);
	if (found != 2 || !period || quota / period >= UINT32_MAX)
		return UINT32_MAX;
	return quota ? (uint32_t)((quota - 1) / period + 1) : 1;
}

uint32_t mgd_processor_quota(const char *mount, const char *path)
{
	uint32_t least = UINT32_MAX;
	char group[PATH_BYTES];
	char *end;

	snprintf(group, sizeof(group), "%s", path);
	for (;;) {
		uint32_t quota = quota_of(mount, group);

		least = quota < least ? quota : least;
		end = strrchr(group, '/');
		if (!end)
			return least;
		*end = '\0';
	}
}

/* Find our cgroup v2 path: the line "0::PATH". */
static uint32_t own_quota(void)
{
	FILE *groups = fopen("/proc/self/cgroup", "re");
	uint32_t quota = UINT32_MAX;
	char line[PATH_BYTES];

	while (groups && fgets(line, sizeof(line), groups)) {
		line[strcspn(line, "\n")] = '\0';
		if (!strncmp(line, "0::/", 4))
			quota = mgd_processor_quota("/sys/fs/cgroup", line + 3);
	}
	if (groups)
		fclose(groups);
	return quota;
}

uint32_t mgd_processor_count(void)
{
	uint32_t quota = own_quota();
	cpu_set_t allowed;
	long count;

	/* This fails if there are more processors than a cpu_set_t has bits. */
	if (sched_getaffinity(0, sizeof(allowed), &allowed))
		count = sysconf(_SC_NPROCESSORS_ONLN);
	else
		count = CPU_COUNT(&allowed);
	return count < 1 ? 1 : (uint32_t)count < quota ? (uint32_t)count : quota;
}
