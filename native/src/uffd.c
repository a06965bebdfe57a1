/* SPDX-License-Identifier: MIT */
/* userfaultfd from our side of the descriptor: each function is one ioctl, checked and named. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "error.h"
#include "uapi.h"

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
		/* Rights given by file permissions instead of a capability, 6.1. */
		device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		if (device >= 0) {
			fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
			close(device);
		}
	}
	if (fd < 0 && reason == ENOSYS)
		return mgd_fail(err, MGD_ERR_UNSUPPORTED, "userfaultfd: this kernel has none (CONFIG_USERFAULTFD)");
	if (fd < 0)
		return mgd_fail_errno(err, reason, "userfaultfd");
	*out_fd = fd;
	return 0;
}

/* Name what this kernel lacks of `wanted`; a throw-away descriptor is asked, since UFFDIO_API works once on each. */
static int fail_unsupported(uint64_t wanted, struct mgd_error *err)
{
	struct mgd_features features;
	char names[160] = "";
	size_t used = 0;

	if (mgd_probe(&features, NULL) || !features.raw_features)
		return mgd_fail(err, MGD_ERR_UNSUPPORTED, "UFFDIO_API: this kernel does not offer features %#llx",
				(unsigned long long)wanted);
	for (size_t i = 0; i < sizeof(FEATURE_NAMES) / sizeof(FEATURE_NAMES[0]); i++) {
		const char *text = FEATURE_NAMES[i].text;

		if (!(wanted & FEATURE_NAMES[i].bit) || (features.raw_features & FEATURE_NAMES[i].bit))
			continue;
		if (used + strlen(text) + 3 > sizeof(names))
			break;
		if (used) {
			memcpy(names + used, ", ", 3);
			used += 2;
		}
		memcpy(names + used, text, strlen(text) + 1);
		used += strlen(text);
	}
	if (!used)
		return mgd_fail(err, MGD_ERR_ARGUMENT,
				"UFFDIO_API: done before on this descriptor, or not a userfaultfd");
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
 * What an errno of (UN)REGISTER means.  Both answer ENOMEM when the address space is gone, where all the others answer
 * ESRCH; so one of the others is asked.  Lifting write-protection errs to the safe side: pages count as written.
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
	struct uffdio_register arg = {.range = {.start = start, .len = length_bytes}};
	uint64_t needed = (uint64_t)1 << _UFFDIO_WAKE;

	if (mode <= 0 || (mode & ~(MGD_REGISTER_MISSING | MGD_REGISTER_WP | MGD_REGISTER_MINOR)))
		return mgd_fail(err, MGD_ERR_ARGUMENT, "UFFDIO_REGISTER: mode %#x", (unsigned int)mode);
	if (mode & MGD_REGISTER_MISSING)
		arg.mode |= UFFDIO_REGISTER_MODE_MISSING;
	if (mode & MGD_REGISTER_WP) {
		arg.mode |= UFFDIO_REGISTER_MODE_WP;
		needed |= (uint64_t)1 << _UFFDIO_WRITEPROTECT;
	}
	if (mode & MGD_REGISTER_MINOR) {
		arg.mode |= UFFDIO_REGISTER_MODE_MINOR;
		needed |= (uint64_t)1 << _UFFDIO_CONTINUE;
	}
	if (ioctl(uffd, UFFDIO_REGISTER, &arg)) {
		int reason = true_reason(uffd, start, length_bytes, errno);

		if (reason == EBUSY)
			return mgd_fail_errno(err, reason,
					      "UFFDIO_REGISTER: %#llx+%#llx: another userfaultfd has this memory",
					      (unsigned long long)start, (unsigned long long)length_bytes);
		return mgd_fail_errno(err, reason, "UFFDIO_REGISTER: %#llx+%#llx", (unsigned long long)start,
				      (unsigned long long)length_bytes);
	}
	if ((arg.ioctls & needed) != needed) {
		ioctl(uffd, UFFDIO_UNREGISTER, &arg.range);
		return mgd_fail(err, MGD_ERR_UNSUPPORTED,
				"UFFDIO_REGISTER: %#llx+%#llx: this kind of memory allows only ioctls %#llx of %#llx",
				(unsigned long long)start, (unsigned long long)length_bytes,
				(unsigned long long)arg.ioctls, (unsigned long long)needed);
	}
	return 0;
}

int mgd_uffd_wake(int uffd, uint64_t start, uint64_t length_bytes, struct mgd_error *err)
{
	struct uffdio_range range = {.start = start, .len = length_bytes};

	if (ioctl(uffd, UFFDIO_WAKE, &range))
		return mgd_fail_errno(err, errno, "UFFDIO_WAKE: %#llx+%#llx", (unsigned long long)start,
				      (unsigned long long)length_bytes);
	return 0;
}

int mgd_uffd_unregister(int uffd, uint64_t start, uint64_t length_bytes, struct mgd_error *err)
{
	struct uffdio_range range = {.start = start, .len = length_bytes};

	if (ioctl(uffd, UFFDIO_UNREGISTER, &range))
		return mgd_fail_errno(err, true_reason(uffd, start, length_bytes, errno),
				      "UFFDIO_UNREGISTER: %#llx+%#llx", (unsigned long long)start,
				      (unsigned long long)length_bytes);
	/* Unregistering wakes threads waiting in missing faults, not those in minor faults. */
	return mgd_uffd_wake(uffd, start, length_bytes, err);
}
