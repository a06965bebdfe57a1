/* SPDX-License-Identifier: MIT */
/*
 * Declarations only, in the subset of C that cffi's cdef parser reads.  migrated.h includes this file and cffi parses
 * it, so the Python binding can never differ from the header.  No #include, no macro with arguments.
 */

/* ---------------------------------------------------------------- constants */

#define MGD_BLOCK_BYTES 4096
#define MGD_CHUNK_BLOCKS 512 /* the most blocks that one frame covers: 2 MiB */
#define MGD_SECRET_BYTES 4104 /* hash key: random bytes, a block's worth and 8 more */
#define MGD_MAX_REGIONS 128 /* each RAM block of QEMU is one region */
#define MGD_MAX_STREAMS 16 /* bulk streams; the urgent connection comes on top */
#define MGD_HISTOGRAM_BUCKETS 32 /* bucket i counts latencies in [2^i, 2^(i+1)) us; bucket 0 starts at 0 */

/* Kinds of failure that an mgd_error reports. */
#define MGD_ERR_NONE 0
#define MGD_ERR_OS 1 /* a system call failed: see os_errno */
#define MGD_ERR_PEER 2 /* the peer violated the protocol (bad magic, length, index, checksum, order) */
#define MGD_ERR_ARGUMENT 3 /* the caller violated the rules of this interface */
#define MGD_ERR_UNSUPPORTED 4 /* this kernel or architecture does not support it */
#define MGD_ERR_CLOSED 5 /* the peer closed the connection */
#define MGD_ERR_POOL 6 /* no (huge) page was available */
#define MGD_ERR_GUEST_GONE 7 /* the guest process has exited (ESRCH) */
#define MGD_ERR_TLS 8 /* TLS: a file is unusable, a side refuses the other's certificate, or the peer violates TLS */

struct mgd_error {
	int kind; /* MGD_ERR_* */
	int os_errno; /* 0 if no errno is known */
	char message[240]; /* "what: object: reason", NUL-terminated */
};

/* Events.  The queue reports each of them once. */
#define MGD_EVENT_ROUND_DONE 1 /* source: every bulk stream has sent its part of the round; value is the round */
#define MGD_EVENT_BARRIER 2 /* target: barrier `value` has arrived on every bulk stream */
#define MGD_EVENT_STREAM_LOST 3 /* both: stream `stream` failed; see error.  Its thread has exited. */
#define MGD_EVENT_ALL_SENT 4 /* source: no stale page is unclaimed, and every claimed page has been written out */
#define MGD_EVENT_ALL_CURRENT 5 /* target: no stale page is left */
#define MGD_EVENT_FAILED 6 /* both: a thread hit a fatal error; see error */
#define MGD_EVENT_POPULATED 7 /* target: the populate threads have finished */

#define MGD_STREAM_URGENT 0xffffffff /* `stream` of the urgent connection */

struct mgd_event {
	uint32_t kind; /* MGD_EVENT_* */
	uint32_t stream; /* bulk index, or MGD_STREAM_URGENT */
	uint64_t value;
	struct mgd_error error; /* kind is NONE if nothing failed */
};

/* ---------------------------------------------------------------- kernel features */

struct mgd_features {
	int has_userfaultfd; /* we can use the system call or /dev/userfaultfd, kernel faults included */
	int has_user_mode_only; /* we can at least create UFFD_USER_MODE_ONLY descriptors */
	int minor_hugetlbfs, minor_shmem;
	int missing_hugetlbfs, missing_shmem;
	int wp_hugetlbfs_shmem, wp_unpopulated, wp_async;
	int pagemap_scan; /* ioctl(pagemap, PAGEMAP_SCAN), Linux 6.7 */
	int poison; /* UFFDIO_POISON, Linux 6.6 */
	int event_remove, exact_address;
	uint64_t raw_features; /* as returned by UFFDIO_API */
};
int mgd_probe(struct mgd_features *out, struct mgd_error *err);

/* ---------------------------------------------------------------- userfaultfd, from the holder's side */

#define MGD_REGISTER_MISSING 1
#define MGD_REGISTER_WP 2
#define MGD_REGISTER_MINOR 4

/* Call userfaultfd(2) for the calling process (tests, benchmarks).  user_mode_only: UFFD_USER_MODE_ONLY. */
int mgd_uffd_open(int user_mode_only, int *out_fd, struct mgd_error *err);
/* Issue UFFDIO_API, once per descriptor.  faults: request everything the target needs (minor, missing, EVENT_REMOVE,
 * exact address).  tracking: request async write-protection.  *err names every requested feature that is absent
 * (MGD_ERR_UNSUPPORTED). */
int mgd_uffd_api(int uffd, int faults, int tracking, struct mgd_error *err);
int mgd_uffd_register(int uffd, uint64_t start, uint64_t length_bytes, int mode, struct mgd_error *err);
int mgd_uffd_unregister(int uffd, uint64_t start, uint64_t length_bytes,
			struct mgd_error *err); /* also wakes the range */
int mgd_uffd_wake(int uffd, uint64_t start, uint64_t length_bytes, struct mgd_error *err);

/* ---------------------------------------------------------------- system calls in an unmodified process (x86-64) */

/* Make one system call in thread `pid` of another process: seize it, interrupt it, run the call at a syscall
 * instruction found in the process's own vDSO or libc, restore every register, and detach.  *out_result is the raw
 * return value (-errno on failure); *out_stopped_ns is how long the thread was stopped.  The thread is never left
 * stopped. */
int mgd_inject_syscall(int pid, long number, const uint64_t arguments[6], int64_t *out_result, uint64_t *out_stopped_ns,
		       struct mgd_error *err);

/* ---------------------------------------------------------------- dirty tracking of another process */

/* For the tracker: an absent page holds zeros (private memory with no file behind it).  The tracker protects only
 * pages that are present or swapped, so memory that the guest never used gets no page tables and is not read in. */
#define MGD_MAPPING_SPARSE 1

/* The location of a piece of a region in the guest process's address space. */
struct mgd_mapping {
	uint32_t region;
	uint32_t flags; /* MGD_MAPPING_* */
	uint64_t address; /* in the guest process */
	uint64_t offset; /* bytes from the start of the region */
	uint64_t length_bytes;
};

struct mgd_tracker;
/* pagemap_fd: /proc/PID/pagemap.  uffd: a descriptor of that process, after UFFDIO_API with tracking.  The tracker
 * takes ownership of neither and keeps duplicates.  page_bytes[region]: page size of that memory (4096 if the kernel
 * may use transparent huge pages).  This registers nothing: see mgd_tracker_arm. */
int mgd_tracker_create(int pagemap_fd, int uffd, const struct mgd_mapping *mappings, uint32_t mapping_count,
		       const uint64_t *page_bytes, uint32_t region_count, struct mgd_tracker **out,
		       struct mgd_error *err);
/* Register the mappings with WP and write-protect them: all of a mapping, absent pages included, but only what is
 * present or swapped in a SPARSE one.  The guest must be quiesced.  A failure leaves nothing behind. */
int mgd_tracker_arm(struct mgd_tracker *tracker, struct mgd_error *err);
/* Lift the write-protection and unregister.  The tracker does not affect the guest afterwards.  May be called twice,
 * and on a guest that has exited. */
int mgd_tracker_disarm(struct mgd_tracker *tracker, struct mgd_error *err);
/* Find the pages written, or written and zapped, since arming or the last scan, and those populated since then in a
 * SPARSE mapping.  Re-arm them, then set their bits in bitmaps[region] (one bit per page of page_bytes[region]).
 * bitmaps hold little-endian 64-bit words; bits are only ever set, even if the call fails.  *out_bytes: how much
 * memory was reported.  No tracker call holds the guest's mmap_lock for more than about a millisecond at a time,
 * this one least of all. */
int mgd_tracker_scan(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err);
/* The same, but re-arm nothing, so that another scan reports the same pages again: for a guest that is paused and will
 * not run with this tracking any more. */
int mgd_tracker_scan_last(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err);
/* Scan, as above (last: re-arm nothing), but of shared memory on huge pages only the pages that an earlier scan or
 * mgd_tracker_present has found.  That is everything if the file holds no more pages than this scan has found present:
 * compare mgd_tracker_present_pages, and make a complete scan otherwise.  *out_complete: this was one already. */
int mgd_tracker_scan_known(struct mgd_tracker *tracker, int last, uint64_t **bitmaps, uint64_t *out_bytes,
			   int *out_complete, struct mgd_error *err);
/* The pages of a region that the last scan has found present; UINT64_MAX if that is not known (other memory than huge
 * pages, private memory, or pages that the process has mapped at two addresses). */
uint64_t mgd_tracker_present_pages(const struct mgd_tracker *tracker, uint32_t region);
/* Find the pages that the guest process has mapped right now; in a SPARSE mapping, those that are protected, present
 * or swapped.  Sets bits in the same way; re-arms nothing. */
int mgd_tracker_present(struct mgd_tracker *tracker, uint64_t **bitmaps, uint64_t *out_bytes, struct mgd_error *err);
void mgd_tracker_destroy(struct mgd_tracker *tracker);

/* ---------------------------------------------------------------- page connections */

/* The certificate, key and CA of one side.  Connections keep what they need of it, so a reload creates a new one and
 * destroys the old one, whatever connections still use. */
struct mgd_tls;
/* Read PEM files: CA certificates, the certificate (followed by its intermediate CAs, if any) and its key.  server: for
 * accepted connections.  Errors name the file (TLS). */
int mgd_tls_create(int server, const char *ca_file, const char *certificate_file, const char *key_file,
		   struct mgd_tls **out, struct mgd_error *err);
void mgd_tls_destroy(struct mgd_tls *tls);
/* The certificate's validity, in seconds since 1970. */
void mgd_tls_validity(const struct mgd_tls *tls, int64_t *out_not_before, int64_t *out_not_after);

/* A page connection, plain or TLS 1.3.  Until an engine takes it, an event loop drives it with _handshake, _try_send
 * and _try_recv, none of which block. */
struct mgd_channel;

/* Bits of *out_wants: call again once the descriptor is readable, or writable.  0: nothing is left to do. */
#define MGD_WANTS_READ 1
#define MGD_WANTS_WRITE 2

/* Take the connected descriptor and make a plain connection of it. */
int mgd_channel_create(int fd, struct mgd_channel **out, struct mgd_error *err);
/* Take the connected descriptor; mgd_channel_handshake must follow.  server_name: host name or IP address that the
 * peer's certificate must be for, NULL on the server's side. */
int mgd_channel_create_tls(int fd, const struct mgd_tls *tls, const char *server_name, struct mgd_channel **out,
			   struct mgd_error *err);
void mgd_channel_destroy(struct mgd_channel *channel);
int mgd_channel_fd(const struct mgd_channel *channel); /* owned by the channel; only for polling */
/* Continue the TLS handshake; *out_wants is 0 once it is complete (at once on a plain connection).  The first call
 * reads nothing, so that a client can look at what a peer without TLS has answered.  The client's side
 * completes before the server has looked at its certificate: the server's refusal is the error of a later call.
 * Errors: TLS, and as for a plain connection CLOSED and OS. */
int mgd_channel_handshake(struct mgd_channel *channel, int *out_wants, struct mgd_error *err);
/* After the handshake: the names in the peer's certificate, one a line: every DNS name and IP address, or if there is
 * none the common name.  Empty on a plain connection.  Fails (ARGUMENT) if they do not fit. */
int mgd_channel_peer_names(const struct mgd_channel *channel, char *out, size_t bytes, struct mgd_error *err);
/* Send without blocking: *out_bytes of buf were taken.  *out_wants: WRITE while something waits for the socket, which
 * may be bytes already taken: then call again once it is writable, with what is left or with 0 bytes. */
int mgd_channel_try_send(struct mgd_channel *channel, const void *buf, size_t bytes, size_t *out_bytes, int *out_wants,
			 struct mgd_error *err);
/* Receive without blocking, at most `bytes`: *out_bytes have arrived.  0: try again as *out_wants says.  Bytes beyond
 * them stay in the channel, for the next call and for the engine.  CLOSED at the end of the stream. */
int mgd_channel_try_recv(struct mgd_channel *channel, void *buf, size_t bytes, size_t *out_bytes, int *out_wants,
			 struct mgd_error *err);
/* ---------------------------------------------------------------- page maps */

/* States of memory in a page map. */
#define MGD_MAP_ABSENT 0 /* target: nothing has arrived; source: never populated, as far as is known */
#define MGD_MAP_RECEIVED 1 /* target, pre-copy: arrived, and may have changed since */
#define MGD_MAP_STALE 2 /* to be sent after the switchover */
#define MGD_MAP_REQUESTED 3 /* target: stale, and a guest thread waits for it */
#define MGD_MAP_CURRENT 4 /* target: as on the source, but not mapped */
#define MGD_MAP_MAPPED 5 /* target: mapped into the guest */
#define MGD_MAP_POISONED 6 /* target: lost with the source */
#define MGD_MAP_SENT 7 /* source: sent as it was at the last scan */
#define MGD_MAP_DIRTY 8 /* source, pre-copy: to be compared and sent in this round or the next */
#define MGD_MAP_STATES 9

/* The memory of all regions, one after the other, in cells of equal size (the last one may be smaller). */
struct mgd_page_map {
	uint64_t cell_bytes;
	uint32_t cell_count; /* cells in use */
	uint64_t bytes[9]; /* MGD_MAP_STATES: memory in each state */
};

/* ---------------------------------------------------------------- source engine */

/* The region is private memory of the guest process: memory_fd is its /proc/PID/mem, and file_offset is the address
 * at which the region begins. */
#define MGD_SOURCE_PRIVATE 1
/* The private region maps a file, which its absent pages show: the first round sends all of it. */
#define MGD_SOURCE_FILE_BEHIND 2

struct mgd_source_region {
	int memory_fd; /* the guest's memory, opened for reading (pread does not populate holes).  Duplicated. */
	uint32_t flags; /* MGD_SOURCE_* */
	uint64_t file_offset; /* offset of the region in the file */
	uint64_t size_bytes;
	uint64_t page_bytes; /* the source's page size: granularity of the dirty bitmaps */
	uint64_t host_page_bytes; /* the target's page size: granularity of stale map, demands and claims */
};

struct mgd_source_stats {
	uint64_t wire_bytes; /* everything written to page connections */
	uint64_t payload_bytes; /* of which block contents, as sent (after compression) */
	uint64_t header_bytes; /* of which headers and bitmaps */
	uint64_t zero_blocks; /* zero blocks, sent as a bit each */
	uint64_t unchanged_blocks; /* read, hashed and found equal to what was sent last */
	uint64_t sent_blocks;
	uint64_t read_bytes; /* read from guest memory */
	uint64_t compression_saved_bytes;
	uint64_t dirty_bytes; /* marked, not yet picked up by the current round */
	uint64_t stale_pages_left; /* post-copy: not yet claimed */
	uint64_t stale_bytes_left; /* the same in bytes: page sizes may differ between regions */
	uint64_t demanded_pages; /* sent over the urgent connection */
	uint64_t demand_bytes; /* wire bytes of those pages */
	uint64_t drain_bytes; /* wire bytes of the drain after the switchover */
	uint64_t throttled_ns; /* time that senders waited for the token bucket */
	uint64_t lent_bytes; /* sent by the kernel without a copy (MSG_ZEROCOPY) */
	uint64_t table_bytes; /* virtual size of hash tables and bitmaps */
};

struct mgd_source;
int mgd_source_create(const struct mgd_source_region *regions, uint32_t region_count, uint32_t stream_count,
		      const uint8_t *secret, struct mgd_source **out, struct mgd_error *err);
void mgd_source_destroy(struct mgd_source *source);
int mgd_source_event_fd(const struct mgd_source *source); /* owned by the source */
int mgd_source_next_event(struct mgd_source *source, struct mgd_event *out); /* 1: *out is filled in; 0: no event */
void mgd_source_stats(const struct mgd_source *source, struct mgd_source_stats *out);
/* Fill in a page map of at most cell_count cells.  shares: cell_count * MGD_MAP_STATES bytes; for each cell and state
 * the share of the cell, 0 to 255, and never 0 for a state that occurs.  May be called at any time, by any thread, and
 * takes milliseconds: 0.1 s and more for 1 TiB in 4 KiB pages.  Threads change pages meanwhile. */
int mgd_source_page_map(const struct mgd_source *source, uint32_t cell_count, uint8_t *shares, struct mgd_page_map *out,
			struct mgd_error *err);
/* Limit all bulk streams with a token bucket; 0 means no limit.  drain: an additional limit for the drain (0: only
 * the common limit).  Demanded pages are exempt from both. */
void mgd_source_set_bandwidth(struct mgd_source *source, uint64_t bytes_per_second, uint64_t drain_bytes_per_second);
/* level 0: no compression.  Otherwise each stream uses zstd, and stops while it does not pay. */
int mgd_source_set_compression(struct mgd_source *source, int level, struct mgd_error *err);

/* Take the channel, even if this fails, and start the stream's thread.  Its handshake must be complete.  stream:
 * 0 … stream_count-1, or MGD_STREAM_URGENT. */
int mgd_source_add_stream(struct mgd_source *source, uint32_t stream, struct mgd_channel *channel,
			  struct mgd_error *err);
/* Shut down and join every stream, so that new ones can be added (reconnect, abort). */
void mgd_source_drop_streams(struct mgd_source *source);

/* First round: mark everything that may be non-zero.  Uses mgd_tracker_present and what the file itself reports
 * (SEEK_DATA on shmem, st_blocks on hugetlbfs), so that memory that exists nowhere is never read.  The tracker must
 * be armed. */
int mgd_source_mark_populated(struct mgd_source *source, struct mgd_tracker *tracker, struct mgd_error *err);
/* Copy the map of host pages that contain a mark (those that the next round may send), piecewise like the stale map
 * below, so that the target can allocate memory for them.  For use before a round, in pre-copy. */
int mgd_source_marked_map(const struct mgd_source *source, uint32_t region, uint64_t first_page, uint8_t *out,
			  size_t bytes, struct mgd_error *err);
#define MGD_SCAN_RUNNING 0 /* the guest runs, and I/O may be in flight */
#define MGD_SCAN_QUIESCED 1 /* no I/O of the guest is in flight */
#define MGD_SCAN_LAST 2 /* likewise, and the guest is paused and will not run here with this tracking any more */
/* Scan.  Mark what the scan reports for the next round, and add it to the set "since the last quiesced scan".  If no
 * I/O is in flight, mark that whole set for another comparison and clear it.  The last scan re-arms nothing.
 * *out_bytes: memory reported by this scan. */
int mgd_source_scan(struct mgd_source *source, struct mgd_tracker *tracker, int kind, uint64_t *out_bytes,
		    struct mgd_error *err);
/* Blocks that changed while the guest was paused: there should be none. */
struct mgd_late_writes {
	uint64_t bytes; /* of all of them */
	uint64_t offset; /* of the first one in its region */
	uint32_t region;
};
/* After the last scan, while the guest is still paused: scan once more, and find what has changed since in pages that
 * the last scan did not report, and that the target will not get as it is now.  (Another write to a page that it did
 * report does not show.)  Marks nothing. */
int mgd_source_late_writes(struct mgd_source *source, struct mgd_tracker *tracker, struct mgd_late_writes *out,
			   struct mgd_error *err);
/* Between rounds: examine `wanted` marked blocks, evenly spread, or all if there are fewer, and report how many of
 * those *out_examined have changed since they were sent.  Sends and marks nothing.  An estimate that takes a few ms
 * per 1 000 blocks. */
int mgd_source_sample(struct mgd_source *source, uint64_t wanted, uint64_t *out_examined, uint64_t *out_changed,
		      struct mgd_error *err);
/* Let every bulk stream send what is marked (each 2 MiB chunk always on the same stream) and clear the marks, then
 * post MGD_EVENT_ROUND_DONE.  Returns at once. */
int mgd_source_round(struct mgd_source *source, uint64_t round, struct mgd_error *err);
/* After a round: write barrier `barrier` on every bulk stream.  Returns at once. */
int mgd_source_barrier(struct mgd_source *source, uint64_t barrier, struct mgd_error *err);
/* Turn the marks into the stale set.  The guest must be paused, after mgd_source_scan(quiesced).  The hash table is
 * read-only from here on.  *out_stale_pages counts host pages. */
int mgd_source_freeze(struct mgd_source *source, uint64_t *out_stale_pages, struct mgd_error *err);
/* There is no way back to pre-copy after an abort: destroy the source instead. */

/* Copy the stale map of a region: one bit per host page, little-endian, starting at first_page (a multiple of 8).
 * bytes: size of out. */
int mgd_source_stale_map(const struct mgd_source *source, uint32_t region, uint64_t first_page, uint8_t *out,
			 size_t bytes, struct mgd_error *err);
/* Start serving: the urgent thread answers demands on its own connection at once, and the bulk streams drain the
 * rest, starting near the last demand.  drain = 0: serve only demands until called again with drain = 1.  Ends with
 * MGD_EVENT_ALL_SENT. */
int mgd_source_serve(struct mgd_source *source, int drain, struct mgd_error *err);
/* Reconnect: drop all claims.  Exactly the pages set in `lacking` (passed piecewise like the stale map) are stale. */
int mgd_source_lacking_begin(struct mgd_source *source, struct mgd_error *err);
int mgd_source_lacking(struct mgd_source *source, uint32_t region, uint64_t first_page, const uint8_t *bits,
		       size_t bytes, struct mgd_error *err);
/* After a crash of the source agent no hashes survive: send every non-zero block of a stale page, and name the zero
 * blocks.  Call after mgd_source_create, instead of freeze. */
int mgd_source_freeze_whole(struct mgd_source *source, struct mgd_error *err);

/* ---------------------------------------------------------------- target engine */

/* Do not reserve the region's memory: the pool is smaller than the region, or the memory is already reserved. */
#define MGD_TARGET_UNRESERVED 1

struct mgd_target_region {
	int memory_fd; /* the memfd.  Duplicated; the engine maps the alias. */
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
	uint64_t stale_pages; /* stale pages that have not arrived */
	uint64_t stale_bytes; /* the same in bytes: page sizes may differ between regions */
	uint64_t current_pages; /* current, but not mapped */
	uint64_t mapped_pages; /* mapped into the guest, even if the guest has discarded them since */
	uint64_t discarded_frames; /* frames for pages already current (sent twice): read and dropped */
	uint64_t remove_events;
	uint64_t faults_current, faults_stale, faults_missing; /* one per page and fault, without duplicates */
	uint64_t faults_duplicate;
	uint64_t faults_held; /* now waiting for a stale page */
	uint64_t
		fault_thread_heartbeat_ns; /* CLOCK_MONOTONIC of the fault thread's last turn (at least one a second) */
	struct mgd_fault_histogram latency_current, latency_stale, latency_missing;
};

struct mgd_target;
/* Return the size of the ledger for these regions (one byte per host page, plus a header). */
uint64_t mgd_ledger_bytes(const struct mgd_target_region *regions, uint32_t region_count);
/* ledger_fd: a memfd of at least mgd_ledger_bytes.  Duplicated.  recover = 0: write a new ledger.  recover = 1: the
 * memfd must hold a ledger of the same regions (checked); half-received pages become stale again. */
int mgd_target_create(const struct mgd_target_region *regions, uint32_t region_count, uint32_t stream_count,
		      int ledger_fd, int recover, const uint8_t *secret, struct mgd_target **out,
		      struct mgd_error *err);
void mgd_target_destroy(struct mgd_target *target);
int mgd_target_event_fd(const struct mgd_target *target);
int mgd_target_next_event(struct mgd_target *target, struct mgd_event *out);
void mgd_target_stats(const struct mgd_target *target, struct mgd_target_stats *out);
/* As mgd_source_page_map. */
int mgd_target_page_map(const struct mgd_target *target, uint32_t cell_count, uint8_t *shares, struct mgd_page_map *out,
			struct mgd_error *err);

/* Take the channel, even if this fails, and start the receiving thread.  Its handshake must be complete.  During
 * pre-copy the thread writes frames straight into the alias. */
int mgd_target_add_stream(struct mgd_target *target, uint32_t stream, struct mgd_channel *channel,
			  struct mgd_error *err);
/* Shut down and join every receiver.  Half-received pages become stale again, and the next urgent connection repeats
 * the open demands. */
void mgd_target_drop_streams(struct mgd_target *target);

/* Start the fault server.  uffd (duplicated): UFFDIO_API done, mappings registered MISSING|MINOR.  A fault before
 * the switchover is held until then.  recovered: first wake the whole range, so that waiting threads fault again. */
int mgd_target_arm(struct mgd_target *target, int uffd, const struct mgd_mapping *mappings, uint32_t mapping_count,
		   int recovered, struct mgd_error *err);
/* Populate the pages whose bit is set (piecewise as above) before their data arrives, in `threads` low-priority
 * threads.  After the switchover, populate only those that are stale: holes stay holes. */
int mgd_target_populate(struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
			size_t bytes, uint32_t threads, struct mgd_error *err);

/* Pass the stale map piecewise, then call _switchover: every page that is not stale is current, held faults are
 * answered and demands are sent. */
int mgd_target_stale_map(struct mgd_target *target, uint32_t region, uint64_t first_page, const uint8_t *bits,
			 size_t bytes, struct mgd_error *err);
int mgd_target_switchover(struct mgd_target *target, struct mgd_error *err);
/* Start CONTINUE in the background (after _switchover; also while the guest state is still being loaded). */
int mgd_target_background(struct mgd_target *target, struct mgd_error *err);
/* Copy the map of pages that are still missing, one bit per host page, piecewise as above. */
int mgd_target_lacking(const struct mgd_target *target, uint32_t region, uint64_t first_page, uint8_t *out,
		       size_t bytes, struct mgd_error *err);
/* Poison every page that is still stale, so that the guest gets a memory error instead of waiting forever.
 * *out_pages: how many.  Another thread may call _drop_streams at the same time. */
int mgd_target_poison_stale(struct mgd_target *target, uint64_t *out_pages, struct mgd_error *err);
/* Stop the fault server, unregister and wake: the guest no longer depends on this process.  Refused (ARGUMENT)
 * unless every page is current. */
int mgd_target_release(struct mgd_target *target, struct mgd_error *err);

/* ---------------------------------------------------------------- for tests and the final sweep */

/* Compute the digest of a region: keyed hash of `bytes` of memory at `offset` of a file, block by block, without
 * populating holes. */
int mgd_digest(int memory_fd, uint64_t offset, uint64_t bytes, const uint8_t *secret, uint64_t *out,
	       struct mgd_error *err);
