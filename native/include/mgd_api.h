/* SPDX-License-Identifier: MIT */
/*
 * Declarations only, in the subset of C that cffi's cdef parser reads: this file is both included by migrated.h and
 * given to cffi, so that the Python binding can never differ from the header.  No #include, no macro with arguments.
 */

/* ---------------------------------------------------------------- constants */

#define MGD_BLOCK_BYTES 4096
#define MGD_CHUNK_BLOCKS 512 /* the most blocks one frame covers: 2 MiB */
#define MGD_SECRET_BYTES 4104 /* key of the hashes: random bytes, as many as a block and 8 more */
#define MGD_MAX_REGIONS 128 /* every RAM block of QEMU is one */
#define MGD_MAX_STREAMS 16 /* bulk; the urgent connection comes on top */
#define MGD_HISTOGRAM_BUCKETS 32 /* bucket i counts latencies in [2^i, 2^(i+1)) us; bucket 0 from 0 */

/* What kind of failure an mgd_error is. */
#define MGD_ERR_NONE 0
#define MGD_ERR_OS 1 /* a system call failed: os_errno */
#define MGD_ERR_PEER 2 /* the peer broke the protocol (bad magic, length, index, checksum, order) */
#define MGD_ERR_ARGUMENT 3 /* the caller broke this interface's rules */
#define MGD_ERR_UNSUPPORTED 4 /* this kernel or architecture cannot do it */
#define MGD_ERR_CLOSED 5 /* the peer closed the connection */
#define MGD_ERR_POOL 6 /* no (huge) page could be had */
#define MGD_ERR_GUEST_GONE 7 /* the guest process has ended (ESRCH) */

struct mgd_error {
	int kind; /* MGD_ERR_* */
	int os_errno; /* 0 unless an errno is known */
	char message[240]; /* "what: object: reason", NUL-terminated */
};

/* Events, told once each through the queue. */
#define MGD_EVENT_ROUND_DONE 1 /* source: every bulk stream has sent its part of the round; value = round */
#define MGD_EVENT_BARRIER 2 /* target: barrier `value` has arrived on every bulk stream */
#define MGD_EVENT_STREAM_LOST 3 /* both: stream `stream` failed: error, message.  Its thread has ended. */
#define MGD_EVENT_ALL_SENT 4 /* source: nothing stale is left unclaimed and every claimed page was written out */
#define MGD_EVENT_ALL_CURRENT 5 /* target: no stale page is left */
#define MGD_EVENT_FAILED 6 /* both: a thread met an error it cannot live with: error, message */
#define MGD_EVENT_POPULATED 7 /* target: the populate threads are through */

#define MGD_STREAM_URGENT 0xffffffff /* `stream` of the urgent connection */

struct mgd_event {
	uint32_t kind; /* MGD_EVENT_* */
	uint32_t stream; /* bulk index, or MGD_STREAM_URGENT */
	uint64_t value;
	struct mgd_error error; /* kind NONE where nothing failed */
};

/* ---------------------------------------------------------------- what this kernel can do */

struct mgd_features {
	int has_userfaultfd; /* the system call or /dev/userfaultfd can be used by us, kernel faults included */
	int has_user_mode_only; /* at least UFFD_USER_MODE_ONLY descriptors can be made */
	int minor_hugetlbfs, minor_shmem;
	int missing_hugetlbfs, missing_shmem;
	int wp_hugetlbfs_shmem, wp_unpopulated, wp_async;
	int pagemap_scan; /* ioctl(pagemap, PAGEMAP_SCAN), 6.7 */
	int poison; /* UFFDIO_POISON, 6.6 */
	int event_remove, exact_address;
	uint64_t raw_features; /* as UFFDIO_API answers */
};
int mgd_probe(struct mgd_features *out, struct mgd_error *err);

/* ---------------------------------------------------------------- userfaultfd, from our side of the descriptor */

#define MGD_REGISTER_MISSING 1
#define MGD_REGISTER_WP 2
#define MGD_REGISTER_MINOR 4

/* userfaultfd(2) of the calling process (tests, benchmarks).  user_mode_only: UFFD_USER_MODE_ONLY. */
int mgd_uffd_open(int user_mode_only, int *out_fd, struct mgd_error *err);
/* UFFDIO_API, once per descriptor.  faults: everything the target needs (minor, missing, EVENT_REMOVE, exact address);
 * tracking: async write-protect.  Whatever is asked for and absent is named in *err (MGD_ERR_UNSUPPORTED). */
int mgd_uffd_api(int uffd, int faults, int tracking, struct mgd_error *err);
int mgd_uffd_register(int uffd, uint64_t start, uint64_t length_bytes, int mode, struct mgd_error *err);
int mgd_uffd_unregister(int uffd, uint64_t start, uint64_t length_bytes,
			struct mgd_error *err); /* and wakes the range */
int mgd_uffd_wake(int uffd, uint64_t start, uint64_t length_bytes, struct mgd_error *err);

/* ---------------------------------------------------------------- reaching into an unmodified process (x86-64) */

/* Make one system call in thread `pid` of another process: seize, interrupt, run it at a syscall instruction found in the
 * process's own vDSO or libc, restore every register, detach.  *out_result is the raw return value (-errno on failure).
 * *out_stopped_ns is how long the thread stood still.  Never leaves the thread stopped. */
int mgd_inject_syscall(int pid, long number, const uint64_t arguments[6], int64_t *out_result, uint64_t *out_stopped_ns,
		       struct mgd_error *err);

/* ---------------------------------------------------------------- dirty tracking of another process */

/* For the tracker: an absent page holds zeros (private memory with no file behind it).  Only what is present or swapped is
 * protected: memory that the guest never used gets no page tables, and is not read in. */
#define MGD_MAPPING_SPARSE 1

/* Where a piece of a region lies in the guest process's address space. */
struct mgd_mapping {
	uint32_t region;
	uint32_t flags; /* MGD_MAPPING_* */
	uint64_t address; /* in the guest process */
	uint64_t offset; /* bytes from the start of the region */
	uint64_t length_bytes;
};

struct mgd_tracker;
/* pagemap_fd: /proc/PID/pagemap; uffd: a descriptor of that process, UFFDIO_API done with tracking.  Takes neither; keeps
 * duplicates.  page_bytes[region]: page size of the memory there (4096 where the kernel may use transparent huge pages).
 * Registers nothing: see mgd_tracker_arm. */
int mgd_tracker_create(int pagemap_fd, int uffd, const struct mgd_mapping *mappings, uint32_t mapping_count,
		       const uint64_t *page_bytes, uint32_t region_count, struct mgd_tracker **out,
		       struct mgd_error *err);
/* Register the mappings with WP and write-protect them: whole, pages not there yet included, or what is there of a SPARSE
 * one.  The guest must be quiesced.  On failure nothing stays behind. */
int mgd_tracker_arm(struct mgd_tracker *tracker, struct mgd_error *err);
/* Lift the write-protection and unregister.  Nothing of ours acts on the guest after it.  May be called twice, and on a
 * guest that has ended. */
int mgd_tracker_disarm(struct mgd_tracker *tracker, struct mgd_error *err);
/* Pages written, or written and zapped, since arming or the last scan, and those populated since in a SPARSE mapping: sets
 * their bits (bit = page of page_bytes[region]) in bitmaps[region], after having armed them again.  bitmaps hold 64-bit
 * words, little end first; bits are only ever set, also when it fails.  *out_bytes: how much memory was reported.  No call
 * holds the guest's mmap_lock for more than about a millisecond at a time; this one least of all. */
int mgd_tracker_scan(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err);
/* Pages the guest process has mapped right now; of a SPARSE mapping, those that are protected, present or on swap.  Sets
 * bits likewise; re-arms nothing. */
int mgd_tracker_present(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err);
void mgd_tracker_destroy(struct mgd_tracker *tracker);

/* ---------------------------------------------------------------- source engine */

/* The region is private memory of the guest process: memory_fd is its /proc/PID/mem, file_offset the address at which the
 * region begins there. */
#define MGD_SOURCE_PRIVATE 1
/* … and a private mapping of a file, which its absent pages show: all of it is sent in the first round. */
#define MGD_SOURCE_FILE_BEHIND 2

struct mgd_source_region {
	int memory_fd; /* the guest's memory, opened for reading (pread: holes are not populated).  Duplicated. */
	uint32_t flags; /* MGD_SOURCE_* */
	uint64_t file_offset; /* of the region in the file */
	uint64_t size_bytes;
	uint64_t page_bytes; /* of the source's own pages: grain of the dirty bitmaps */
	uint64_t host_page_bytes; /* of the target's pages: grain of stale map, demands and claims */
};

struct mgd_source_stats {
	uint64_t wire_bytes; /* everything written to page connections */
	uint64_t payload_bytes; /* block contents among it, as sent (after compression) */
	uint64_t header_bytes; /* headers and bitmaps among it */
	uint64_t zero_blocks; /* blocks told by a bit */
	uint64_t unchanged_blocks; /* read and hashed, found as last sent: saved by the hash */
	uint64_t sent_blocks;
	uint64_t read_bytes; /* read from guest memory */
	uint64_t compression_saved_bytes;
	uint64_t dirty_bytes; /* marked and not yet picked up by the round under way */
	uint64_t stale_pages_left; /* post-copy: not yet claimed */
	uint64_t stale_bytes_left; /* the same in bytes: regions may have pages of different sizes */
	uint64_t demanded_pages; /* served over the urgent connection */
	uint64_t demand_bytes; /* wire bytes of them */
	uint64_t drain_bytes; /* wire bytes of the drain after the switch-over */
	uint64_t throttled_ns; /* time senders waited for the token bucket */
	uint64_t table_bytes; /* virtual size of hash table and bitmaps */
};

struct mgd_source;
int mgd_source_create(const struct mgd_source_region *regions, uint32_t region_count, uint32_t stream_count,
		      const uint8_t *secret, struct mgd_source **out, struct mgd_error *err);
void mgd_source_destroy(struct mgd_source *source);
int mgd_source_event_fd(const struct mgd_source *source); /* stays owned by the source */
int mgd_source_next_event(struct mgd_source *source, struct mgd_event *out); /* 1: *out filled; 0: none */
void mgd_source_stats(const struct mgd_source *source, struct mgd_source_stats *out);
/* Token bucket over all bulk streams, 0 = no limit.  drain: limit of the drain alone (0 = only the common limit).
 * Demanded pages are exempt from both. */
void mgd_source_set_bandwidth(struct mgd_source *source, uint64_t bytes_per_second, uint64_t drain_bytes_per_second);
/* level 0: off.  Otherwise zstd, per stream, switching itself off where it does not pay. */
int mgd_source_set_compression(struct mgd_source *source, int level, struct mgd_error *err);

/* Takes the (connected, blocking or not) descriptor and starts the stream's thread.  stream: 0 … stream_count-1, or
 * MGD_STREAM_URGENT. */
int mgd_source_add_stream(struct mgd_source *source, uint32_t stream, int fd, struct mgd_error *err);
/* Shut down and join every stream, so that new ones may be added (reconnect, abort). */
void mgd_source_drop_streams(struct mgd_source *source);

/* First round: mark everything that may be other than zero.  Uses mgd_tracker_present, and the file's own account of what
 * it holds (SEEK_DATA on shmem, st_blocks on hugetlbfs): memory that exists nowhere is never read.  The tracker is armed. */
int mgd_source_mark_populated(struct mgd_source *source, struct mgd_tracker *tracker, struct mgd_error *err);
/* Copy the map of host pages with anything marked (what the next round may send), piecewise like the stale map below: so
 * that the target can have memory ready for them.  Before a round, in pre-copy. */
int mgd_source_marked_map(const struct mgd_source *source, uint32_t region, uint64_t first_page, uint8_t *out,
			  size_t bytes, struct mgd_error *err);
/* Scan; mark what was reported for the next round and in the set "since the last quiesced scan".  quiesced: no I/O of the
 * guest is in flight: everything of that set is marked to be compared again, and the set starts anew, empty.
 * *out_bytes: memory reported by this scan. */
int mgd_source_scan(struct mgd_source *source, struct mgd_tracker *tracker, int quiesced, uint64_t *out_bytes,
		    struct mgd_error *err);
/* Between rounds: look at `wanted` marked blocks, or all if there are fewer, spread evenly, and say how many of those
 * *out_examined have changed since they were sent.  Sends nothing, marks nothing.  An estimate, a few ms for 1 000 blocks. */
int mgd_source_sample(struct mgd_source *source, uint64_t wanted, uint64_t *out_examined, uint64_t *out_changed,
		      struct mgd_error *err);
/* Let every bulk stream send what is marked (each chunk of 2 MiB by a fixed stream), picking up the marks as it goes; then
 * MGD_EVENT_ROUND_DONE.  Returns at once. */
int mgd_source_round(struct mgd_source *source, uint64_t round, struct mgd_error *err);
/* After a round: write barrier `barrier` on every bulk stream.  Returns at once. */
int mgd_source_barrier(struct mgd_source *source, uint64_t barrier, struct mgd_error *err);
/* The guest is paused and mgd_source_scan(quiesced) has been done: what is marked now is the stale set.  The hash table is
 * read-only from here on.  *out_stale_pages: host pages. */
int mgd_source_freeze(struct mgd_source *source, uint64_t *out_stale_pages, struct mgd_error *err);
/* Back to pre-copy after an abort is not possible: destroy the source instead. */

/* Copy the stale map of a region: one bit a host page, little end first, from page first_page (a multiple of 8) on;
 * bytes: size of out. */
int mgd_source_stale_map(const struct mgd_source *source, uint32_t region, uint64_t first_page, uint8_t *out,
			 size_t bytes, struct mgd_error *err);
/* Start serving: demands read from the urgent connection are answered on it at once, the bulk streams drain the rest,
 * nearest to the last demand first.  drain = 0: only demands, until called again with drain = 1.  MGD_EVENT_ALL_SENT. */
int mgd_source_serve(struct mgd_source *source, int drain, struct mgd_error *err);
/* Reconnect: forget all claims; exactly the pages set in `lacking` (given piecewise like the stale map) are stale. */
int mgd_source_lacking_begin(struct mgd_source *source, struct mgd_error *err);
int mgd_source_lacking(struct mgd_source *source, uint32_t region, uint64_t first_page, const uint8_t *bits,
		       size_t bytes, struct mgd_error *err);
/* Crash of the source agent: no hashes survive, every block of a stale page that is not zero is sent, and zero blocks are
 * told.  Call after mgd_source_create, instead of freeze. */
int mgd_source_freeze_whole(struct mgd_source *source, struct mgd_error *err);

/* ---------------------------------------------------------------- target engine */

/* The region's memory is not to be reserved: the pool holds less than all of it, or somebody has reserved it already. */
#define MGD_TARGET_UNRESERVED 1

struct mgd_target_region {
	int memory_fd; /* the memfd.  Duplicated; the alias is mapped by the engine. */
	uint32_t flags; /* MGD_TARGET_* */
	uint64_t size_bytes;
	uint64_t host_page_bytes;
};

struct mgd_fault_histogram {
	uint64_t count;
	uint64_t total_ns;
	uint64_t max_ns;
	uint64_t buckets[32]; /* MGD_HISTOGRAM_BUCKETS */
};

struct mgd_target_stats {
	uint64_t wire_bytes;
	uint64_t payload_bytes;
	uint64_t frames;
	uint64_t pages; /* host pages in all regions */
	uint64_t stale_pages; /* stale and not yet in */
	uint64_t stale_bytes; /* the same in bytes: regions may have pages of different sizes */
	uint64_t current_pages; /* current, not mapped */
	uint64_t mapped_pages; /* put into the guest, whether or not it has given them back since */
	uint64_t discarded_frames; /* came for a page already current (sent twice): read and dropped */
	uint64_t remove_events;
	uint64_t faults_current, faults_stale, faults_missing; /* one a page and fault, duplicates not counted */
	uint64_t faults_duplicate;
	uint64_t faults_held; /* waiting for a stale page right now */
	uint64_t
		fault_thread_heartbeat_ns; /* CLOCK_MONOTONIC of the fault thread's last turn (it turns at least every second) */
	struct mgd_fault_histogram latency_current, latency_stale, latency_missing;
};

struct mgd_target;
/* Bytes the ledger of these regions needs (one byte a host page, plus a header). */
uint64_t mgd_ledger_bytes(const struct mgd_target_region *regions, uint32_t region_count);
/* ledger_fd: a memfd of at least mgd_ledger_bytes.  Duplicated.  recover = 0: a fresh ledger is laid out in it.
 * recover = 1: it must hold the ledger of the same regions (checked); half-received pages go back to stale. */
int mgd_target_create(const struct mgd_target_region *regions, uint32_t region_count, uint32_t stream_count,
		      int ledger_fd, int recover, const uint8_t *secret, struct mgd_target **out,
		      struct mgd_error *err);
void mgd_target_destroy(struct mgd_target *target);
int mgd_target_event_fd(const struct mgd_target *target);
int mgd_target_next_event(struct mgd_target *target, struct mgd_event *out);
void mgd_target_stats(const struct mgd_target *target, struct mgd_target_stats *out);

/* Takes the descriptor, starts the receiving thread.  While pre-copy lasts frames write straight into the alias. */
int mgd_target_add_stream(struct mgd_target *target, uint32_t stream, int fd, struct mgd_error *err);
/* Shut down and join every receiver; half-received pages go back to stale; open demands are asked again on the next
 * urgent connection. */
void mgd_target_drop_streams(struct mgd_target *target);

/* Start the fault server.  uffd (duplicated): API done, mappings registered MISSING|MINOR.  A fault before the
 * switch-over is held until it.  recovered: wake the whole range first, so that waiting threads fault again. */
int mgd_target_arm(struct mgd_target *target, int uffd, const struct mgd_mapping *mappings, uint32_t mapping_count,
		   int recovered, struct mgd_error *err);
/* Populate pages ahead of the data, in `threads` threads of low priority: pages whose bit is set (piecewise as above).
 * From the switch-over on, only those among them that are stale: holes stay holes. */
int mgd_target_populate(struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
			size_t bytes, uint32_t threads, struct mgd_error *err);

/* Stale map, piecewise; then _switchover: every page not stale is current, held faults are served, demands go out. */
int mgd_target_stale_map(struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
			 size_t bytes, struct mgd_error *err);
int mgd_target_switchover(struct mgd_target *target, struct mgd_error *err);
/* Start background CONTINUE (after the guest runs). */
int mgd_target_background(struct mgd_target *target, struct mgd_error *err);
/* What is still lacking, one bit a host page, piecewise as above. */
int mgd_target_lacking(const struct mgd_target *target, uint32_t region, uint64_t first_page, uint8_t *out,
		       size_t bytes, struct mgd_error *err);
/* Poison what is still stale, so that the guest gets a memory error instead of waiting for ever. *out_pages: how many. */
int mgd_target_poison_stale(struct mgd_target *target, uint64_t *out_pages, struct mgd_error *err);
/* Every page is current: stop the fault server, unregister, wake.  The guest is free of us.  Refused (ARGUMENT) earlier. */
int mgd_target_release(struct mgd_target *target, struct mgd_error *err);

/* ---------------------------------------------------------------- for tests and the final sweep */

/* Keyed hash of `bytes` of memory at offset of a file, block by block, holes not populated: digest of a region. */
int mgd_digest(int memory_fd, uint64_t offset, uint64_t bytes, const uint8_t *secret, uint64_t *out,
	       struct mgd_error *err);
