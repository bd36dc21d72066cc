/* SPDX-License-Identifier: MIT */
/*
 * crash_point — kill the daemon at a named place, for tests of its successor.
 *
 * crash_point(CRASH_...) stands where a death would leave something half done. Without
 * -DVSWAP_FAULT_POINTS it is nothing. The process ends itself by SIGKILL: no handler, no flush.
 */
#ifndef VSWAP_CRASH_POINT_H
#define VSWAP_CRASH_POINT_H

#define CRASH_POINTS(POINT)                                                                 \
	POINT(EVENT_READ, "messages were read, none is applied")                            \
	POINT(EVENT_BEGUN, "an event was read, those before it are applied")                \
	POINT(SLOTS_DETACHED, "what was freed is in no map any more, its copies are not given back") \
	POINT(EVENT_APPLIED, "an event is applied, the checkpoint does not say so")         \
	POINT(EVENT_CHECKPOINT, "an event is applied, and the checkpoint says so")          \
	POINT(EVENT_FORGOTTEN, "messages are forgotten, the checkpoint still counts them")  \
	POINT(FORK_CREATED, "a forked child has a record and nothing in it")                \
	POINT(FORK_SHARED, "a forked child has its parent's slots, but is FORMING")         \
	POINT(FORK_COMPLETE, "a forked child is complete, but FORMING")                     \
	POINT(FORK_LIVE, "a forked child is LIVE, its parent's event not applied")          \
	POINT(REMAP_DROPPED, "the target of a remap is cleared")                            \
	POINT(REMAP_MOVED, "the slots of a remap are moved")                                \
	POINT(SLOT_MOVED, "a slot is at both ends of a remap")                              \
	POINT(EVICT_INTENT, "a batch is INTENT, its MOVE is not posted")                    \
	POINT(EVICT_POSTED, "a MOVE is posted")                                             \
	POINT(EVICT_ANSWERED, "a MOVE is answered, its batch is INTENT")                    \
	POINT(EVICT_STAGED, "a batch is STAGED, nothing is read")                           \
	POINT(EVICT_SHARED, "a relative's slot is counted, for a page that does not name it yet") \
	POINT(EVICT_STORED, "the pages of a batch are stored, no slot says so")             \
	POINT(EVICT_SETTLED_ONE, "the slot of one page of a batch is settled")              \
	POINT(EVICT_SETTLED, "all slots of a batch are settled, it is not RELEASING")       \
	POINT(EVICT_RELEASING, "a batch is RELEASING, its RELEASE is not posted")           \
	POINT(EVICT_RELEASED, "a RELEASE is posted")                                        \
	POINT(FILL_OPEN, "the fault of an open run is forgotten, none of its pages is back") \
	POINT(FILL_COPIED, "pages are back, no slot says so")                               \
	POINT(FILL_SETTLED_ONE, "the slot of one page that is back says so")                \
	POINT(WRITEBACK_COLLECTED, "objects are in a segment that is not written")          \
	POINT(SEGMENT_NUMBERED, "a segment has its generation, and is not written")         \
	POINT(WRITEBACK_WRITTEN, "a segment is written, no slot says so")                   \
	POINT(WRITEBACK_SETTLED_ONE, "one slot says that its object is on disk")            \
	POINT(RECOMPRESS_STORED, "objects were compressed again, no slot says so")          \
	POINT(RECOMPRESS_SETTLED_ONE, "one slot names the smaller object, the old one is there") \
	POINT(EVACUATE_STORED, "an object is in another slab, too, no slot says so")        \
	POINT(EVACUATE_SETTLED_ONE, "one slot names the other slab, the old object is there") \
	POINT(DRAIN_STORED, "objects have a new place, no slot says so")                    \
	POINT(DRAIN_SETTLED_ONE, "one slot names the new place, the old extent is there")   \
	POINT(DRAIN_EMPTY, "nothing is on a backend any more, it is in the table")          \
	POINT(DRAIN_REMOVED, "a backend is in no record, and its file is not erased")       \
	POINT(REGION_CREATED, "a region has a record, and is not LIVE")                     \
	POINT(REGION_STORED, "pages of a write to a region are stored, no slot says so")    \
	POINT(REGION_SETTLED_ONE, "the slot of one page of a write to a region is settled") \
	POINT(REGION_WRITTEN, "pages of a region are settled, its size is the old one")     \
	POINT(REGION_RESIZED, "the size of a region is new, pages beyond are not freed")    \
	POINT(REGION_UNLINKED, "a region has no name, and is not freed")                    \
	POINT(REGISTER_CLEARED, "slots of a mapping are cleared, it is not registered")     \
	POINT(REGISTERED, "a mapping is registered, the checkpoint does not say so")        \
	POINT(CLIENT_BEGUN, "a client said hello")                                          \
	POINT(CLIENT_ARMING, "a client's descriptors are here, it is not armed")            \
	POINT(CLIENT_ARMED, "a client is armed, its record does not say so")                \
	POINT(DETACH_LEAVING, "all pages of a client are with it, and its agent knows")     \
	POINT(DETACH_LEFT, "a client's ring is retired, its record says that it lives")     \
	POINT(YIELD_WITHDRAWN, "nothing of a range is evicted any more, what is out of it is out") \
	POINT(YIELD_UNREGISTERED, "a range is not registered any more, the checkpoint says it is") \
	POINT(YIELD_LET_GO, "a range is let go, its client does not know")                  \
	POINT(CLIENT_DEAD, "a client is DEAD and has its slots")

enum crash_point {
#define CRASH_ENUM(name, meaning) CRASH_##name,
	CRASH_POINTS(CRASH_ENUM) CRASH_POINT_COUNT
};

#ifdef VSWAP_FAULT_POINTS

void crash_point(enum crash_point point);

/* Die at the at_call_n-th call from now (1: the next). `name` as in the list; 0, or -1: no such point. */
int crash_point_arm(const char *name, unsigned at_call_n);
const char *crash_point_name(enum crash_point point);

#else

static inline void crash_point(enum crash_point point) { (void)point; }

#endif
#endif
