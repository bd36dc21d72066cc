/* SPDX-License-Identifier: MIT */
/*
 * counters — every counter of the data plane, one meaning each.
 *
 * COUNTER(name, meaning): monotonic since the engine started. The list is expanded into struct
 * engine_counters (engine.h), its updating code (counter_add) and the Python side (build_ffi.py).
 */
#define ENGINE_COUNTERS(COUNTER)                                                                   \
	COUNTER(faults, "page faults answered")                                                    \
	COUNTER(faults_zero, "faults on pages that were never swapped or are all zero")            \
	COUNTER(faults_same, "faults on same-filled pages")                                        \
	COUNTER(faults_pool, "faults answered from the pool")                                      \
	COUNTER(faults_spill, "faults answered from a spill backend")                              \
	COUNTER(faults_staged, "faults on pages that were just being evicted")                     \
	COUNTER(faults_spurious, "faults on pages that were there already")                        \
	COUNTER(faults_deferred, "faults that had to wait for room")                               \
	COUNTER(fill_pages, "pages given back to clients, prefetch included")                      \
	COUNTER(fill_calls, "UFFDIO_COPY and ZEROPAGE calls that made progress")                   \
	COUNTER(fill_open_runs, "runs of streams that were expanded with the gate open")           \
	COUNTER(fill_open_left, "pages of these left out: their slots had changed meanwhile")      \
	COUNTER(fill_retries, "fills repeated because an event was unread (EAGAIN)")               \
	COUNTER(zeropage_pages, "pages answered with the shared zero page")                        \
	COUNTER(evicted_pages, "pages moved out of clients")                                       \
	COUNTER(evicted_zero, "of these: all zero")                                                \
	COUNTER(evicted_same, "of these: same-filled")                                             \
	COUNTER(evicted_unchanged, "of these: equal to their kept copy, nothing stored")           \
	COUNTER(evicted_shared, "of these: equal to what a forked relative has out, nothing stored") \
	COUNTER(evicted_stored, "of these: compressed and stored")                                 \
	COUNTER(evicted_raw, "of these: stored raw because incompressible")                        \
	COUNTER(evict_busy, "pages that MOVE refused: pinned or shared after fork")                \
	COUNTER(evict_again, "MOVE commands given up because an event was unread")                 \
	COUNTER(evict_refaulted, "pages faulted again before their eviction was complete")         \
	COUNTER(evict_failed, "pages put back because they could not be stored")                   \
	COUNTER(populated_pages, "pages made exclusive after fork by MADV_POPULATE_WRITE")         \
	COUNTER(kept_dropped, "kept copies freed to make room")                                    \
	COUNTER(events_fork, "fork events")                                                        \
	COUNTER(events_remap, "mremap events")                                                     \
	COUNTER(events_remove, "madvise DONTNEED, FREE and REMOVE events")                         \
	COUNTER(events_unmap, "munmap events")                                                     \
	COUNTER(spill_written_pages, "pages written to a spill backend")                           \
	COUNTER(spill_written_recompressed, "of these: compressed a second time before")          \
	COUNTER(writeback_relisted, "clusters found by a walk over slots, as no list of cold ones had them") \
	COUNTER(spill_read_pages, "pages read from a spill backend")                               \
	COUNTER(spill_read_ranges, "ranges read from spill backends for page faults")              \
	COUNTER(fill_mixed, "fills whose pages came from several ranges, or from a backend and from memory") \
	COUNTER(recompress_examined, "old objects of pools looked at for a second compression")    \
	COUNTER(recompressed_pages, "of these: compressed again with zstd, and smaller by an eighth or more") \
	COUNTER(recompress_saved_bytes, "what they were larger before")                            \
	COUNTER(recompress_cpu_us, "CPU time of second compressions, microseconds")                \
	COUNTER(drained_pages, "pages moved off a backend by swapoff")                             \
	COUNTER(demoted_pages, "pages moved to a backend of a lower priority")                     \
	COUNTER(promoted_pages, "pages that left a backend for one of a higher priority, by way of the pool") \
	COUNTER(compacted_pages, "pages moved by compaction of a backend")                         \
	COUNTER(check_failures, "objects whose check did not match after expansion")               \
	COUNTER(poisoned_pages, "pages poisoned because their bytes could not be given back")      \
	COUNTER(children_refused, "forked children killed because they could not be served")       \
	COUNTER(out_of_memory_kills, "processes killed because a group had no room left")          \
	COUNTER(clients_added, "clients that came under management")                               \
	COUNTER(clients_gone, "clients that ended")
