/* SPDX-License-Identifier: MIT */
/*
 * userfaultfd, from the holder's side of the descriptor: each function issues one ioctl, and checks and names it.
 * Probes use throw-away descriptors and never compare versions, since distributions backport features and
 * configurations omit them.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "error.h"
#include "pagemap.h"

#define FAULT_FEATURES                                                                                                 \
	(UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS |                  \
	 UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EXACT_ADDRESS)
#define TRACKING_FEATURES                                                                                              \
	(UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED |              \
	 UFFD_FEATURE_WP_ASYNC)

static const struct {
	uint64_t bit;
	const char *text;
} FEATURE_NAMES[] = {
	{UFFD_FEATURE_MISSING_HUGETLBFS, "missing faults on hugetlbfs (Linux 4.11)"},
	{UFFD_FEATURE_MISSING_SHMEM, "missing faults on shmem (Linux 4.11)"},
	{UFFD_FEATURE_MINOR_HUGETLBFS, "minor faults on hugetlbfs (Linux 5.13)"},
	{UFFD_FEATURE_MINOR_SHMEM, "minor faults on shmem (Linux 5.14)"},
	{UFFD_FEATURE_EVENT_REMOVE, "remove events (Linux 4.11)"},
	{UFFD_FEATURE_EXACT_ADDRESS, "exact fault addresses (Linux 5.18)"},
	{UFFD_FEATURE_PAGEFAULT_FLAG_WP, "write-protect faults (Linux 5.7)"},
	{UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "write-protection of hugetlbfs and shmem (Linux 5.19)"},
	{UFFD_FEATURE_WP_UNPOPULATED, "write-protection of pages not there yet (Linux 6.4)"},
	{UFFD_FEATURE_WP_ASYNC, "asynchronous write-protection (Linux 6.7)"},
};

int mgd_uffd_open(int user_mode_only, int *out_fd, struct mgd_error *err)
{
	int flags = O_CLOEXEC | O_NONBLOCK | (user_mode_only ? UFFD_USER_MODE_ONLY : 0);
	int fd = (int)syscall(SYS_userfaultfd, flags);
	int reason = errno, device;

	if (fd < 0 && reason == EPERM && !user_mode_only) {
		/* Access by file permissions instead of a capability, Linux 6.1. */
		device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		if (device >= 0) {
			fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
			close(device);
		}
	}
	if (fd < 0 && reason == ENOSYS)
		return mgd_fail(err, MGD_ERR_UNSUPPORTED,
				"userfaultfd: not supported by this kernel (needs CONFIG_USERFAULTFD)");
	if (fd < 0)
		return mgd_fail_errno(err, reason, "userfaultfd");
	*out_fd = fd;
	return 0;
}

int mgd_probe(struct mgd_features *out, struct mgd_error *err)
{
	struct uffdio_api api = {.api = UFFD_API};
	int fd, limited;

	*out = (struct mgd_features){
		.has_userfaultfd = !mgd_uffd_open(0, &fd, NULL),
		.has_user_mode_only = !mgd_uffd_open(1, &limited, NULL),
		.pagemap_scan = mgd_pagemap_works(),
	};
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

/* Name the features in `wanted` that this kernel lacks.  Queries a throw-away descriptor, since UFFDIO_API works
 * once per descriptor. */
static int fail_unsupported(uint64_t wanted, struct mgd_error *err)
{
	struct mgd_features features;
	char names[160] = "";
	size_t used = 0;

	if (mgd_probe(&features, NULL) || !features.raw_features)
		return mgd_fail(err, MGD_ERR_UNSUPPORTED, "UFFDIO_API: this kernel does not offer features %#" PRIx64,
				wanted);
	for (size_t i = 0; i < sizeof(FEATURE_NAMES) / sizeof(FEATURE_NAMES[0]) && used < sizeof(names); i++)
		if (wanted & ~features.raw_features & FEATURE_NAMES[i].bit)
			used += (size_t)snprintf(names + used, sizeof(names) - used, "%s%s", used ? ", " : "",
						 FEATURE_NAMES[i].text);
	if (!used)
		return mgd_misuse(err, "UFFDIO_API: already done on this descriptor, or not a userfaultfd");
	return mgd_fail(err, MGD_ERR_UNSUPPORTED, "userfaultfd: this kernel lacks %s", names);
}

int mgd_uffd_api(int uffd, int faults, int tracking, struct mgd_error *err)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = (faults ? FAULT_FEATURES : 0) | (tracking ? TRACKING_FEATURES : 0),
	};
	uint64_t wanted = api.features;

	if (ioctl(uffd, UFFDIO_API, &api) == 0)
		return 0;
	if (errno == EINVAL)
		return fail_unsupported(wanted, err);
	return mgd_fail_errno(err, errno, "UFFDIO_API");
}

/*
 * Interpret an errno of (UN)REGISTER.  Both return ENOMEM when the address space is gone, where all other ioctls return
 * ESRCH, so try one of those.  Lifting write-protection errs on the safe side: pages count as written.
 */
static int true_reason(int uffd, uint64_t start, uint64_t length_bytes, int reason)
{
	struct uffdio_writeprotect arg = {.range = {.start = start, .len = length_bytes}};

	if (reason == ENOMEM && ioctl(uffd, UFFDIO_WRITEPROTECT, &arg) && errno == ESRCH)
		return ESRCH;
	return reason;
}

int mgd_uffd_register(int uffd, uint64_t start, uint64_t length_bytes, int mode, struct mgd_error *err)
{
	struct uffdio_register arg = {.range = {start, length_bytes}, .mode = (uint64_t)mode};
	uint64_t needed = (uint64_t)1 << _UFFDIO_WAKE;

	_Static_assert(MGD_REGISTER_MISSING == UFFDIO_REGISTER_MODE_MISSING &&
			       MGD_REGISTER_WP == UFFDIO_REGISTER_MODE_WP &&
			       MGD_REGISTER_MINOR == UFFDIO_REGISTER_MODE_MINOR,
		       "our modes are the kernel's");
	if (mode <= 0 || (mode & ~(MGD_REGISTER_MISSING | MGD_REGISTER_WP | MGD_REGISTER_MINOR)))
		return mgd_misuse(err, "UFFDIO_REGISTER: mode %#x", (unsigned int)mode);
	if (mode & MGD_REGISTER_WP)
		needed |= (uint64_t)1 << _UFFDIO_WRITEPROTECT;
	if (mode & MGD_REGISTER_MINOR)
		needed |= (uint64_t)1 << _UFFDIO_CONTINUE;
	if (ioctl(uffd, UFFDIO_REGISTER, &arg)) {
		int reason = true_reason(uffd, start, length_bytes, errno);

		if (reason == EBUSY)
			return mgd_fail_errno(err, reason,
					      "UFFDIO_REGISTER: %#" PRIx64 "+%#" PRIx64
					      ": another userfaultfd covers this memory",
					      start, length_bytes);
		return mgd_fail_errno(err, reason, "UFFDIO_REGISTER: %#" PRIx64 "+%#" PRIx64, start, length_bytes);
	}
	if ((arg.ioctls & needed) != needed) {
		ioctl(uffd, UFFDIO_UNREGISTER, &arg.range);
		return mgd_fail(err, MGD_ERR_UNSUPPORTED,
				"UFFDIO_REGISTER: %#" PRIx64 "+%#" PRIx64
				": this kind of memory allows only ioctls %#" PRIx64 " of %#" PRIx64,
				start, length_bytes, (uint64_t)arg.ioctls, needed);
	}
	return 0;
}

int mgd_uffd_wake(int uffd, uint64_t start, uint64_t length_bytes, struct mgd_error *err)
{
	struct uffdio_range range = {.start = start, .len = length_bytes};

	if (ioctl(uffd, UFFDIO_WAKE, &range))
		return mgd_fail_errno(err, errno, "UFFDIO_WAKE: %#" PRIx64 "+%#" PRIx64, start, length_bytes);
	return 0;
}

int mgd_uffd_unregister(int uffd, uint64_t start, uint64_t length_bytes, struct mgd_error *err)
{
	struct uffdio_range range = {.start = start, .len = length_bytes};

	if (ioctl(uffd, UFFDIO_UNREGISTER, &range))
		return mgd_fail_errno(err, true_reason(uffd, start, length_bytes, errno),
				      "UFFDIO_UNREGISTER: %#" PRIx64 "+%#" PRIx64, start, length_bytes);
	/* Unregistering wakes threads that wait in missing faults, but not in minor faults. */
	return mgd_uffd_wake(uffd, start, length_bytes, err);
}
