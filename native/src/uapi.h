/* SPDX-License-Identifier: MIT */
/*
 * Kernel interfaces newer than the headers of the distributions on which we build (the oldest: Linux 6.1).  mgd_probe
 * finds out at run time whether the kernel has them; numbers and layouts are those of
 * include/uapi/linux/{userfaultfd,fs,tcp,ptrace}.h.
 */
#pragma once

#include <linux/userfaultfd.h>

#ifndef UFFD_FEATURE_WP_UNPOPULATED /* 6.4 */
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_POISON /* 6.6 */
#define UFFD_FEATURE_POISON (1 << 14)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC /* 6.7 */
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

/* UFFDIO_POISON, 6.6: struct uffdio_poison. */
struct mgd_uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define MGD_UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct mgd_uffdio_poison)

/* ioctl(/proc/PID/pagemap, PAGEMAP_SCAN), 6.7: struct page_region, struct pm_scan_arg. */
struct mgd_page_region {
	__u64 start, end;
	__u64 categories;
};

struct mgd_pm_scan_arg {
	__u64 size;
	__u64 flags;
	__u64 start, end;
	__u64 walk_end;
	__u64 vec, vec_len;
	__u64 max_pages;
	__u64 category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define MGD_PAGEMAP_SCAN _IOWR('f', 16, struct mgd_pm_scan_arg)
#define MGD_PAGE_IS_WRITTEN (1 << 1)
#define MGD_PAGE_IS_PRESENT (1 << 3)
#define MGD_PAGE_IS_SWAPPED (1 << 4)
#define MGD_PM_SCAN_WP_MATCHING (1 << 0)
#define MGD_PM_SCAN_CHECK_WPASYNC (1 << 1)

/* getsockopt(TCP_INFO): struct tcp_info up to tcpi_bytes_acked (4.1), which glibc's does not have. */
struct mgd_tcp_info {
	__u8 flags[8];
	__u32 counters[24];
	__u64 pacing_rate, max_pacing_rate, bytes_acked;
};

/* ptrace, 4.3 and 5.13. */
#define MGD_PTRACE_O_SUSPEND_SECCOMP (1 << 21)
#define MGD_PTRACE_GET_RSEQ_CONFIGURATION 0x420f
struct mgd_ptrace_rseq_configuration {
	__u64 rseq_abi_pointer;
	__u32 rseq_abi_size;
	__u32 signature;
	__u32 flags;
	__u32 pad;
};
