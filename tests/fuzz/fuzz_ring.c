/* SPDX-License-Identifier: MIT */
/*
 * fuzz_ring — the daemon's side of the ring that it shares with a client, and of all it asks the client's kernel.
 *
 * evict.c, yield.c and client.c run as they are; sys.c is replaced by what is below. The input is a program: each byte the
 * daemon's next step, or what a call answers; and at every call the client writes to its ring whatever it likes.
 * What must hold whatever it wrote: the slot map is valid, a slot is STAGED exactly when a batch names its page
 * (client.h), and nothing is in the pool that no slot names.
 */
#include "evict.c"
#include "yield.c"

#include <sys/eventfd.h>

#include "checkpoint.h"
#include "fuzz.h"
#include "io.h"
#include "worker.h"

#define REGION 0x10000000UL
#define REGION_PAGES 512UL
#define STAGING 0x40000000UL
#define AGENT_BYTES (VSWAP_WINDOWS * VSWAP_WINDOW_PAGES * PAGE_BYTES)
#define RING_WORDS (sizeof(struct vswap_ring) / 4)

static const uint8_t *input, *input_end;
static struct engine engine;
static struct group group;
static struct client *client;
static struct evictor evictor;
static uint64_t clock_ns = 1000000;

static unsigned take(void) { return input < input_end ? *input++ : 0; }

/* The client's turn: up to three words of the ring, any of them; often those that matter. */
static void client_writes(void)
{
	uint32_t *words = (uint32_t *)client->ring;
	struct vswap_command *command = &client->ring->commands[(client->posted - 1) % VSWAP_RING_COMMANDS];

	for (unsigned n = take() % 4; n > 0; n--) {
		unsigned what = take(), value = take() * 0x01010101u >> (take() & 31);

		switch (what % 6) {
		case 0:
			__atomic_store_n(&client->ring->done, client->posted, __ATOMIC_RELAXED);
			break;
		case 1:
			__atomic_store_n(&client->ring->done, client->posted - value, __ATOMIC_RELAXED);
			break;
		case 2:
			command->runs[what / 6].moved = command->runs[what / 6].pages;
			break;
		case 3:
			command->runs[what / 6].busy = value;
			break;
		case 4:
			command->runs[what / 6].error = value;
			command->error = value;
			break;
		default:
			words[(what * 256 + value) % RING_WORDS] = value;
		}
	}
}

/* ---- the kernel ---- */

uint64_t sys_now_ns(void) { return clock_ns += 1000; }
uint64_t sys_now_coarse_ms(void) { return clock_ns / 1000000; }
void sys_sleep_ms(unsigned milliseconds) { clock_ns += milliseconds * 1000000ULL; }
void sys_eventfd_signal(int fd) { (void)fd; }
void sys_futex_wake(const uint32_t *word) { (void)word; }
bool sys_pidfd_is_dead(int fd) { return (void)fd, take() % 16 == 1; }
bool sys_userfaultfd_is_gone(int fd) { return (void)fd, false; }
int sys_userfaultfd_covers(int fd, uint64_t address) { return (void)fd, (void)address, (int)(take() % 3) ? 1 : 0; }
bool sys_userfaultfd_is_changing(int fd) { return (void)fd, take() % 8 == 1; }
int sys_userfaultfd_poison(int fd, uint64_t address, uint64_t bytes) { return (void)fd, (void)address, (void)bytes, 0; }
int sys_userfaultfd_wake(int fd, uint64_t address, uint64_t bytes) { return (void)fd, (void)address, (void)bytes, 0; }

/* Nothing of the agent's own may ever be let go. */
static void must_be_outside_of_arena(uint64_t address, uint64_t bytes)
{
	MUST(address + bytes <= STAGING || address >= STAGING * 2 + AGENT_BYTES);
}

int sys_userfaultfd_register(int fd, uint64_t address, uint64_t bytes)
{
	(void)fd;
	must_be_outside_of_arena(address, bytes);
	return take() % 8 == 1 ? -EBUSY : 0;
}

int sys_userfaultfd_unregister(int fd, uint64_t address, uint64_t bytes)
{
	(void)fd;
	must_be_outside_of_arena(address, bytes);
	client_writes();
	return take() % 16 == 1 ? -ENOMEM : 0;
}

int sys_mapping_next(int fd, uint64_t address, struct mapping *ret_mapping)
{
	(void)fd;
	client_writes();
	*ret_mapping = (struct mapping){ .start = address, .anonymous = true, .readable = true, .writable = true,
					 .end = address + (1 + take() % 64) * PAGE_BYTES };
	return input < input_end;
}

int sys_pidfd(pid_t pid) { return (void)pid, -1; }
pid_t sys_live_thread(pid_t pid) { return pid; }
uint64_t sys_process_start(pid_t pid) { return (uint64_t)pid; }
int sys_name_address_space(pid_t pid, struct address_space_name *name) { return (void)pid, (void)name, -ESRCH; }
int sys_open_proc(pid_t pid, const char *file) { return (void)pid, (void)file, -1; }
int sys_memfd(const char *name, uint64_t bytes, bool sealed) { return (void)name, (void)bytes, (void)sealed, -1; }

int sys_futex_wait(const uint32_t *word, uint32_t value, unsigned timeout_ms)
{
	(void)word, (void)value;
	client_writes();
	clock_ns += timeout_ms * 1000000ULL;
	return take() % 2 ? 0 : -ETIMEDOUT;
}

/* Pages that are there, by the input; as many and as ordered as the kernel would say. */
static int ranges_of(uint64_t start, uint64_t end, struct page_range *ranges, unsigned max, uint64_t max_pages,
		     uint64_t *walk_end)
{
	uint64_t at = start, pages = 0;
	unsigned count = 0;

	client_writes();
	if (take() == 255)
		return -ESRCH;
	while (at < end && count < max && (max_pages == 0 || pages < max_pages)) {
		uint64_t length = 1 + take() % 32;

		at += take() % 8 * PAGE_BYTES;
		length = min_of(length, max_pages ? max_pages - pages : length);
		if (at >= end || input == input_end)
			break;
		length = min_of(length, (end - at) / PAGE_BYTES);
		ranges[count++] = (struct page_range){ at, at + length * PAGE_BYTES, 0 };
		at += (length + 1) * PAGE_BYTES;
		pages += length;
	}
	*walk_end = count < max && (max_pages == 0 || pages < max_pages) ? end : min_of(at, end);
	return (int)count;
}

int sys_resident_ranges(int fd, uint64_t start, uint64_t end, struct page_range *ranges, unsigned max,
			uint64_t max_pages, uint64_t *walk_end)
{
	(void)fd;
	return ranges_of(start, end, ranges, max, max_pages, walk_end);
}

int sys_mapped_ranges(int fd, uint64_t start, uint64_t end, struct page_range *ranges, unsigned max,
		      uint64_t max_pages, uint64_t *walk_end)
{
	(void)fd;
	return ranges_of(start, end, ranges, max, max_pages, walk_end);
}

bool sys_page_is_present(int fd, uint64_t address) { return (void)fd, (void)address, take() % 2; }

int sys_read_client_pages(int fd, uint64_t address, void *buffer, uint64_t mask)
{
	unsigned content = take();

	(void)fd, (void)address;
	client_writes();
	if (content == 255)
		return -EFAULT;
	for (unsigned i = 0; i < BATCH_PAGES_MAX; i++)
		if (mask >> i & 1)
			((uint64_t *)buffer)[i * PAGE_BYTES / 8] = content % 3 ? content * (i % 4) : 0;
	return 0;
}

/* Memory that is given back reads as zeros; nothing else of it matters here, and the kernel takes its time. */
void sys_discard(int fd, uint64_t offset, void *at, uint64_t bytes) { (void)fd, (void)offset, memset(at, 0, bytes); }
int madvise(void *address, size_t bytes, int advice) { return (void)address, (void)bytes, (void)advice, 0; }

/* ---- the rest of the engine ---- */

void checkpoint_discard(struct state *state, int state_fd, unsigned client_index) { (void)state, (void)state_fd, (void)client_index; }
void engine_event_push(struct engine *e, const struct engine_event *event) { (void)e, (void)event; }
void engine_room_made(struct engine *e, struct group *g) { (void)e, (void)g; }
void checkpoint_write(struct client *c, uint32_t applied) { (void)c, (void)applied; }
bool fill_is_under_way(const struct client *c, uint64_t first, uint64_t end) { return (void)c, (void)first, (void)end, false; }
void work_ask(struct work *work) { (void)work; }
void remap_disarmed(struct client *c, uint64_t start, uint64_t end) { (void)c, (void)start, (void)end; }

void remap_withdraw(struct client *c, uint64_t start, uint64_t end)
{
	(void)range_set_remove(&c->regions, start, end, REGIONS_MAX);
}

/* The fault threads bring a page back, or are late. */
void engine_ask_for_range(struct client *c, uint64_t *cursor, uint64_t first_page, uint64_t end_page)
{
	uint64_t page = first_page + take() % REGION_PAGES;

	(void)cursor;
	if (page < end_page)
		client_forget_slots(c, page, 1 + take());
}

void reclaim_kill_largest(struct engine *e, struct group *g) { (void)e, (void)g; }
void fill_free_reads(struct client *c) { (void)c; }
void cow_let_through(struct client *c, uint64_t page, uint64_t count) { (void)c, (void)page, (void)count; }
void cow_note_end(struct client *c) { (void)c; }
void cow_forget(struct client *c) { (void)c; }
void worker_stop_all(struct client *c) { (void)c; }
void io_queue_destroy(struct io_queue *queue) { (void)queue; }
void spill_free(struct spill *spill, uint64_t extent, unsigned units) { (void)spill, (void)extent, (void)units; }

/* ---- */

static void set_up(void)
{
	size_t bytes = 1UL << 32;
	char *space = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int memfd = memfd_create("fuzz", MFD_CLOEXEC);

	MUST(space != MAP_FAILED && memfd >= 0);
	engine.state = mmap(NULL, sizeof *engine.state, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	MUST(engine.state != MAP_FAILED && slot_space_create(-1, 0, space, bytes, &engine.slots) == 0);
	MUST(pool_space_create(memfd, 64 << 20, &engine.pool_space) == 0);
	MUST(ghosts_create(&group.ghosts, REGION_PAGES * PAGE_BYTES) == 0);
	MUST(pool_create(engine.pool_space, &group.pool) == 0 && evictor_create(&evictor) == 0);
	pthread_mutex_init(&engine.registry, NULL);
	group.limit_bytes = 1 << 30;
	MUST(client_create(&engine, 1, &group, &client) == 0);
	client->ring = calloc(1, VSWAP_RING_BYTES);
	MUST(client->ring);
	client->record->staging[0] = STAGING;
	client->record->staging[1] = STAGING * 2;
	client->record->arena = STAGING;
	client->record->arena_bytes = STAGING + AGENT_BYTES;
}

static void reset(void)
{
	client_free_forgotten(client);
	slot_map_clear(engine.slots, &client->record->map, 0, 2 * ADDRESS_PAGES_MAX, client_staged_gone,
		       client_free_copy, client);
	free(client->parked);
	client->parked = NULL;
	memset(client->batches, 0, sizeof client->batches);
	memset(client->record->batches, 0, sizeof client->record->batches);
	memset(client->ring, 0, offsetof(struct vswap_ring, commands));
	memset(client->recent, 0, sizeof client->recent);
	client->posted = client->evict_error = 0;
	client->populating = client->agent_gone = false;
	client->hand = client->populated_address = 0;
	cold_destroy(&client->cold);
	cold_destroy(&client->cold_raw);
	client->cold = client->cold_raw = (struct cold_list){ 0 };
	client->resident_pages = client->filling_pages = group.resident_pages = 0;
	group.parked = 0;
	probation_clear(&client->probation);
	range_set_clear(&client->regions);
	range_set_clear(&client->quarantine);
	(void)range_set_add(&client->regions, REGION, REGION + REGION_PAGES * PAGE_BYTES, 0, REGIONS_MAX);
}

/* The program frees or unmaps some of its memory, as its events tell. */
static void change_memory(void)
{
	uint64_t first = page_of(REGION) + take() * 2, count = 1 + take();

	if (client->parked) /* the gate is shut: no event is read */
		return;
	if (take() % 2)
		client_forget_slots(client, first, count);
	else
		(void)range_set_add(&client->quarantine, address_of(first), address_of(first + count), clock_ns,
				    QUARANTINE_MAX);
}

/* A range that the client names is given up, some looks later. */
static void give_up(void)
{
	struct yield yield = { .client = client };
	int result = -EAGAIN;

	if (take() % 2) { /* one that means something */
		client->ring->yield_start = REGION + take() * PAGE_BYTES;
		client->ring->yield_bytes = (1 + take()) * PAGE_BYTES;
		client->ring->yield_asked++;
	}
	client_writes();
	if (!yield_holds(client, &yield.start, &yield.end) || !is_sane(client->record, yield.start, yield.end))
		return;
	for (unsigned look = 0; look < 4 && result == -EAGAIN; look++)
		result = client_is_shut(client) ? -EAGAIN : advance(&yield);
	for (uint64_t page = page_of(yield.start); result == 0 && page < page_of(yield.end) && page < page_of(REGION) + 1024;
	     page++) {
		struct slot slot;

		MUST(slot_get(engine.slots, &client->record->map, page, &slot) == 0 && slot.tag == SLOT_NONE);
		MUST(!range_set_has(&client->regions, address_of(page)));
	}
}

static void check(void)
{
	uint64_t staged = 0;

	for (unsigned w = 0; w < VSWAP_WINDOWS; w++) {
		const struct batch_record *record = &client->record->batches[w];

		for (unsigned i = 0; i < record->page_count; i++) {
			struct slot slot;

			if (record->phase == BATCH_FREE || record->phase == BATCH_RELEASING ||
			    record->pages[i] == BATCH_PAGE_GONE)
				continue;
			MUST(slot_get(engine.slots, &client->record->map, record->pages[i], &slot) == 0);
			staged += slot.tag == SLOT_STAGED && slot.location == w * BATCH_PAGES_MAX + i;
		}
	}
	MUST(staged == slot_map_count(&client->record->map, SLOT_STAGED));
	MUST(slot_map_is_valid(engine.slots, &client->record->map));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct evict_result result;
	struct pool_statistics pool;

	if (!client)
		set_up();
	reset();
	input = data;
	input_end = data + size;
	for (unsigned step = 0; input < input_end && step < 12; step++) {
		switch (take() % 9) {
		case 8:
			give_up();
			break;
		case 0:
			(void)evict_resume(client, &evictor);
			break;
		case 1:
			change_memory();
			break;
		case 2:
			(void)evict_drop_kept(client, take() % 2 ? SLOT_KEPT_POOL : SLOT_KEPT_SPILL, 16);
			break;
		case 3:
			probation_push(&client->probation, page_of(REGION) + take() * 2, 1 + take() % 8);
			client_writes();
			client_reap_releases(client);
			break;
		default:
			(void)evict_batch(client, &evictor, take() % 2, &result);
			MUST(result.pages <= BATCH_PAGES_MAX && result.busy <= BATCH_PAGES_MAX);
		}
	}
	check();
	reset();
	pool_statistics(group.pool, &pool);
	MUST(pool.object_bytes == 0);
	return 0;
}

size_t fuzz_seed(unsigned index, uint8_t *data)
{
	uint64_t state = index * 0x9E3779B97F4A7C15ULL + 1;

	if (index >= 16)
		return 0;
	for (unsigned i = 0; i < 200; i++) {
		state = state * 6364136223846793005u + 1442695040888963407u;
		/* Small numbers: most of what the input answers is a choice among a few. */
		data[i] = (uint8_t)(state >> 60 < 10 ? state >> 61 : state >> 40);
	}
	return 200;
}
