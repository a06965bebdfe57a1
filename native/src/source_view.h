/* SPDX-License-Identifier: MIT */
/*
 * Guest memory on huge pages, mapped for reading: comparing in place is four times as quick as copying through pread.
 *
 * The mapping is the source's own, of the same file; nothing is ever written through it, and nothing ever made: a hole
 * stays a hole, because the mapping is registered with a userfaultfd of our own whose answer to a page that is not there
 * is SIGBUS.  Each look is guarded against that signal, which also stands for a file cut short and for memory gone bad; the
 * caller then falls back on pread, which knows holes as zeros and tells the other two by name.
 *
 * Memory on 4 KiB pages is not mapped: page tables would cost another 0.2 % of it, and there the kernel's report is exact.
 * Private memory cannot be mapped by anybody else.
 */
#ifndef MGD_SOURCE_VIEW_H
#define MGD_SOURCE_VIEW_H

#include "source_state.h"

#define SOURCE_VIEW_BLOCKS 64 /* the most in one look: the bits of a word */

/* Map a region if it is on huge pages.  Not being able to is no failure: everything is read with pread then. */
void source_view_open(struct mgd_source *source, struct source_region *region);
void source_view_close(struct source_region *region);

/* Copy blocks first … first+count-1; false: no view, or not all of them could be looked at. */
bool source_view_copy(const struct source_region *region, uint64_t first, uint32_t count, uint8_t *to);

/* Which of the blocks first … first+count-1 are other than the table says (bit 0: the first); false as above.  The guest
 * may be writing them: what is found unchanged was so after the scan that had it marked, and a later write is reported by
 * the next. */
bool source_view_compare(const struct mgd_source *source, const struct source_region *region, uint64_t first,
			 uint32_t count, uint64_t *out_changed);

#endif
