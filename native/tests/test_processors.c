/* SPDX-License-Identifier: MIT */
/* Tests of the processor count.  It follows what the process may use: its affinity, and the quota of each control
 * group it is in. */
#include <sched.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "processors.h"

static char mount[] = "/tmp/mgd-cgroup-XXXXXX";

static void set_quota(const char *path, const char *text)
{
	char name[128];
	FILE *file;

	snprintf(name, sizeof(name), "%s%s/cpu.max", mount, path);
	if (!text) {
		CHECK(!remove(name));
		return;
	}
	file = fopen(name, "w");
	CHECK(file && fputs(text, file) >= 0 && !fclose(file));
}

static void make_group(const char *path, const char *quota)
{
	char name[128];

	snprintf(name, sizeof(name), "%s%s", mount, path);
	CHECK(!mkdir(name, 0755));
	set_quota(path, quota);
}

static void test_the_least_quota_up_the_tree_counts(void)
{
	CHECK_EQUAL(mgd_processor_quota(mount, "/"), UINT32_MAX);
	make_group("/system", "max 100000\n");
	make_group("/system/agent", "150000 100000\n");
	make_group("/system/agent/inner", "max 100000\n");
	CHECK_EQUAL(mgd_processor_quota(mount, "/system"), UINT32_MAX);
	CHECK_EQUAL(mgd_processor_quota(mount, "/system/agent"), 2); /* one and a half: rounded up */
	CHECK_EQUAL(mgd_processor_quota(mount, "/system/agent/inner"), 2);
	set_quota("/system/agent/inner", "5000 100000\n");
	CHECK_EQUAL(mgd_processor_quota(mount, "/system/agent/inner"), 1);
	set_quota("/system", "200000 50000\n");
	CHECK_EQUAL(mgd_processor_quota(mount, "/system"), 4);
	CHECK_EQUAL(mgd_processor_quota(mount, "/system/agent"), 2);
	/* In a container the visible root is a group like any other. */
	set_quota("", "100000 100000\n");
	CHECK_EQUAL(mgd_processor_quota(mount, "/"), 1);
	CHECK_EQUAL(mgd_processor_quota(mount, "/system"), 1);
	set_quota("", NULL);
}

static void test_what_cannot_be_read_limits_nothing(void)
{
	CHECK_EQUAL(mgd_processor_quota(mount, "/no/such/group"), UINT32_MAX);
	CHECK_EQUAL(mgd_processor_quota("/no/such/mount", "/system"), UINT32_MAX);
	set_quota("/system", "nonsense\n");
	CHECK_EQUAL(mgd_processor_quota(mount, "/system"), UINT32_MAX);
	set_quota("/system", "100000 0\n");
	CHECK_EQUAL(mgd_processor_quota(mount, "/system"), UINT32_MAX);
	set_quota("/system", "0 100000\n");
	CHECK_EQUAL(mgd_processor_quota(mount, "/system"), 1);
}

static void test_affinity_counts(void)
{
	uint32_t all = mgd_processor_count();
	cpu_set_t before, one;
	int first = 0;

	CHECK(all >= 1);
	CHECK(!sched_getaffinity(0, sizeof(before), &before));
	CHECK(all <= (uint32_t)CPU_COUNT(&before));
	while (!CPU_ISSET(first, &before))
		first++;
	CPU_ZERO(&one);
	CPU_SET(first, &one);
	CHECK(!sched_setaffinity(0, sizeof(one), &one));
	CHECK_EQUAL(mgd_processor_count(), 1);
}

static void remove_group(const char *path)
{
	char name[128];

	snprintf(name, sizeof(name), "%s%s/cpu.max", mount, path);
	unlink(name);
	snprintf(name, sizeof(name), "%s%s", mount, path);
	CHECK(!rmdir(name));
}

int main(void)
{
	CHECK(mkdtemp(mount));
	RUN(test_the_least_quota_up_the_tree_counts);
	RUN(test_what_cannot_be_read_limits_nothing);
	RUN(test_affinity_counts);
	remove_group("/system/agent/inner");
	remove_group("/system/agent");
	remove_group("/system");
	remove_group("");
	return 0;
}
