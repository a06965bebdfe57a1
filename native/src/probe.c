/* SPDX-License-Identifier: MIT */
/*
 * What this kernel can do.  Features are tried, versions never compared: distributions carry features back, and
 * configurations leave them out.  Everything happens on throw-away descriptors and on our own memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "error.h"
#include "uapi.h"

static int scan_works(void)
{
	long page_bytes = sysconf(_SC_PAGESIZE);
	struct mgd_page_region region;
	struct mgd_pm_scan_arg arg = {
		.size = sizeof(arg),
		.vec = (uint64_t)(uintptr_t)&region,
		.vec_len = 1,
		.category_anyof_mask = MGD_PAGE_IS_PRESENT | MGD_PAGE_IS_SWAPPED,
		.return_mask = MGD_PAGE_IS_PRESENT,
	};
	char *page;
	int fd, works;

	page = mmap(NULL, (size_t)page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED)
		return 0;
	*page = 1;
	fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	arg.start = (uint64_t)(uintptr_t)page;
	arg.end = arg.start + (uint64_t)page_bytes;
	works = fd >= 0 && ioctl(fd, MGD_PAGEMAP_SCAN, &arg) == 1 && region.start == arg.start;
	if (fd >= 0)
		close(fd);
	munmap(page, (size_t)page_bytes);
	return works;
}

int mgd_probe(struct mgd_features *out, struct mgd_error *err)
{
	struct uffdio_api api = {.api = UFFD_API};
	int fd, limited;

	memset(out, 0, sizeof(*out));
	out->has_userfaultfd = mgd_uffd_open(0, &fd, NULL) == 0;
	out->has_user_mode_only = mgd_uffd_open(1, &limited, NULL) == 0;
	out->pagemap_scan = scan_works();
	if (!out->has_userfaultfd && !out->has_user_mode_only)
		return 0;
	if (out->has_userfaultfd && out->has_user_mode_only)
		close(limited);
	if (!out->has_userfaultfd)
		fd = limited;
	if (ioctl(fd, UFFDIO_API, &api)) {
		int reason = errno;

		close(fd);
		return mgd_fail_errno(err, reason, "UFFDIO_API");
	}
	close(fd);
	out->raw_features = api.features;
	out->minor_hugetlbfs = !!(api.features & UFFD_FEATURE_MINOR_HUGETLBFS);
	out->minor_shmem = !!(api.features & UFFD_FEATURE_MINOR_SHMEM);
	out->missing_hugetlbfs = !!(api.features & UFFD_FEATURE_MISSING_HUGETLBFS);
	out->missing_shmem = !!(api.features & UFFD_FEATURE_MISSING_SHMEM);
	out->wp_hugetlbfs_shmem = !!(api.features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
	out->wp_unpopulated = !!(api.features & UFFD_FEATURE_WP_UNPOPULATED);
	out->wp_async = !!(api.features & UFFD_FEATURE_WP_ASYNC);
	out->poison = !!(api.features & UFFD_FEATURE_POISON);
	out->event_remove = !!(api.features & UFFD_FEATURE_EVENT_REMOVE);
	out->exact_address = !!(api.features & UFFD_FEATURE_EXACT_ADDRESS);
	return 0;
}
