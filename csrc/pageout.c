/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "pageout.h"

#include <errno.h>
#include <time.h>

#include "base.h"
#include "cow.h"
#include "engine_internal.h"
#include "evict.h"
#include "sys.h"

#define BATCHES_A_TURN 16
#define NOTHING_GOES_MS 1
/* A client may say for ever that an event is unread, and the answer is its own. */
#define EVENT_PASSES_MAX 8u  /* from the start, again */
#define EVENT_TRIES_MAX 1000 /* in a row, in which nothing could go */

struct pageout {
	struct pageout *next;
	struct client *client;
	uint64_t start, end;
	uint64_t number; /* in the order in which they were asked for: they share the client's hand, so one goes first */
	unsigned users;  /* evictors that are at it */
	bool is_begun;   /* the hand is where it begins */
	bool is_slow;    /* a batch took a turn's time: not for all evictors */
	bool is_stuck;   /* the last batch could not begin */
	bool is_shared;  /* with forked relatives: what is busy is had again at once, which takes an evictor alone */
	bool was_missed; /* something that was busy, when it was not alone yet, or not tried: once more from the start */
	unsigned passes; /* from the start, again */
	unsigned vain_tries; /* in a row, for an event was unread */
	bool is_ending;  /* the hand has been everywhere: who is at it leaves */
	bool is_over;    /* no batch begins any more */
};

void pageouts_init(struct pageouts *pageouts)
{
	*pageouts = (struct pageouts){ .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };
}

/* ---- the list; its lock is held ---- */

static void append(struct pageouts *pageouts, struct pageout *pageout)
{
	struct pageout **end = &pageouts->first;

	while (*end)
		end = &(*end)->next;
	pageout->next = NULL;
	*end = pageout;
}

static void unlink_from(struct pageouts *pageouts, const struct pageout *pageout)
{
	struct pageout **at = &pageouts->first;

	while (*at != pageout)
		at = &(*at)->next;
	*at = pageout->next;
}

/* ---- for evictors ---- */

static void set_hand(struct client *client, uint64_t address)
{
	SCOPED_LOCK(&client->gate);
	client->hand = address;
}

/* Where the next batch begins; what takes pages in between may have moved it. */
static bool hand_is_within(struct client *client, uint64_t start, uint64_t end)
{
	SCOPED_LOCK(&client->gate);
	return client->hand >= start && client->hand < end;
}

static bool is_for_one(const struct pageout *pageout)
{
	return !pageout->is_begun || pageout->is_stuck || pageout->is_shared || pageout->is_slow || pageout->is_ending;
}

/* Not before what was asked for of the same client earlier is over. The list's lock is held. */
static bool has_its_turn(const struct pageouts *pageouts, const struct pageout *pageout)
{
	for (const struct pageout *other = pageouts->first; other; other = other->next)
		if (other->client == pageout->client && other->number < pageout->number)
			return false;
	return true;
}

/* The next request that this evictor can do something for, as one of its users; the others come before it then. */
static struct pageout *take(struct pageouts *pageouts)
{
	struct pageout *pageout;

	if (!READ_ONCE(pageouts->first))
		return NULL;
	SCOPED_LOCK(&pageouts->lock);
	for (pageout = pageouts->first; pageout; pageout = pageout->next)
		if (!pageout->is_over && !(is_for_one(pageout) && pageout->users > 0) && has_its_turn(pageouts, pageout))
			break;
	if (!pageout)
		return NULL;
	unlink_from(pageouts, pageout);
	append(pageouts, pageout);
	pageout->users++;
	return pageout;
}

/* When the last one leaves, nothing is under way. */
static void give(struct pageouts *pageouts, struct pageout *pageout)
{
	SCOPED_LOCK(&pageouts->lock);
	VS_CHECK(pageout->users > 0);
	if (--pageout->users > 0)
		return;
	pageout->is_over |= pageout->is_ending && !pageout->was_missed;
	pthread_cond_broadcast(&pageouts->changed);
}

/* From the start, or from there again, if that is due. The only one at it then. */
static bool is_to_begin(struct pageouts *pageouts, struct pageout *pageout)
{
	SCOPED_LOCK(&pageouts->lock);
	if (pageout->is_ending && pageout->was_missed) {
		pageout->is_begun = pageout->is_ending = pageout->was_missed = false;
		pageout->passes++;
	}
	return !pageout->is_begun;
}

static void begin(struct engine *engine, struct pageout *pageout)
{
	set_hand(pageout->client, pageout->start);
	SCOPED_LOCK(&engine->pageouts.lock);
	pageout->is_begun = true;
	work_ask(&engine->evicting); /* for the others */
}

static bool is_shared(const struct client *client) { return READ_ONCE(client->pss) && !cow_is_alone(client); }

/* A batch, if it can begin. -EAGAIN: not now; other errors: never. */
static int try_batch(struct client *client, struct evictor *evictor, struct evict_result *ret_result)
{
	/* A page that forked relatives share takes room in the pool, and stays resident with them. */
	bool makes_worse = is_shared(client) && group_room_bytes(client->group) < 0;

	if (READ_ONCE(client->dead) || READ_ONCE(client->agent_gone)) /* though there may be no room for a batch */
		return -ESRCH;
	if (makes_worse || !reclaim_pool_has_room(client->engine, client->group, client))
		return -EAGAIN;
	return evict_batch(client, evictor, true, ret_result);
}

/* What a batch says about the whole. */
static void note_batch(struct engine *engine, struct pageout *pageout, int error, uint64_t took_ns,
		       const struct evict_result *result)
{
	SCOPED_LOCK(&engine->pageouts.lock);
	if (pageout->is_stuck && error != -EAGAIN)
		work_ask(&engine->evicting); /* for the others */
	pageout->is_stuck = error == -EAGAIN;
	pageout->is_slow = took_ns > EVICTOR_TURN_NS;
	pageout->is_over |= error < 0 && error != -EAGAIN;
	pageout->is_ending |= result->wrapped;
	if (result->busy) {
		pageout->is_shared = true;
		pageout->was_missed |= pageout->users > 1;
	}
	pageout->vain_tries = result->event_unread && result->pages == 0 ? pageout->vain_tries + 1 : 0;
	pageout->is_over |= pageout->vain_tries == EVENT_TRIES_MAX;
	/* The hand was put back, maybe after another evictor has been at the end. */
	if (result->event_unread && pageout->passes < EVENT_PASSES_MAX)
		pageout->was_missed |= pageout->users > 1 || result->wrapped;
}

/* May this evictor begin another batch? */
static bool goes_on(struct pageouts *pageouts, struct pageout *pageout)
{
	bool is_within = hand_is_within(pageout->client, pageout->start, pageout->end);

	SCOPED_LOCK(&pageouts->lock);
	pageout->is_ending |= !is_within;
	return !pageout->is_over && !pageout->is_ending && !(is_for_one(pageout) && pageout->users > 1);
}

bool pageout_turn(struct engine *engine, struct evictor *evictor)
{
	struct pageouts *pageouts = &engine->pageouts;
	struct pageout *pageout = take(pageouts);
	uint64_t end_ns;

	if (!pageout)
		return false;
	if (is_to_begin(pageouts, pageout))
		begin(engine, pageout);
	end_ns = sys_now_ns() + EVICTOR_TURN_NS;
	for (unsigned i = 0; i < BATCHES_A_TURN && sys_now_ns() < end_ns && goes_on(pageouts, pageout); i++) {
		struct evict_result result = { 0 };
		uint64_t since_ns = sys_now_ns();
		int error = try_batch(pageout->client, evictor, &result);

		note_batch(engine, pageout, error, sys_now_ns() - since_ns, &result);
		if (error == -EAGAIN) {
			sys_sleep_ms(NOTHING_GOES_MS);
			break;
		}
	}
	give(pageouts, pageout);
	return true;
}

/* ---- for who asks ---- */

/* False: it is later than that. */
static bool wait_until(struct pageouts *pageouts, uint64_t deadline_ns)
{
	struct timespec deadline = { .tv_sec = (time_t)(deadline_ns / 1000000000ULL),
				     .tv_nsec = (long)(deadline_ns % 1000000000ULL) };

	return pthread_cond_clockwait(&pageouts->changed, &pageouts->lock, CLOCK_MONOTONIC, &deadline) == 0;
}

int pageout_range(struct client *client, uint64_t start, uint64_t end, int timeout_ms)
{
	uint64_t deadline_ns = sys_now_ns() + (uint64_t)timeout_ms * 1000000;
	struct pageouts *pageouts = &client->engine->pageouts;
	struct pageout pageout = { .client = client, .start = start, .end = end, .is_shared = is_shared(client) };
	bool is_late = false;

	pthread_mutex_lock(&pageouts->lock);
	pageout.number = pageouts->asked++;
	append(pageouts, &pageout);
	pthread_mutex_unlock(&pageouts->lock);
	work_ask(&client->engine->evicting);
	pthread_mutex_lock(&pageouts->lock);
	while (!(pageout.is_over && pageout.users == 0) && !is_late)
		is_late = !wait_until(pageouts, deadline_ns);
	is_late = !pageout.is_over;
	pageout.is_over = true;
	while (pageout.users > 0)
		pthread_cond_wait(&pageouts->changed, &pageouts->lock);
	unlink_from(pageouts, &pageout);
	pthread_mutex_unlock(&pageouts->lock);
	work_ask(&client->engine->evicting); /* for who comes next */
	return is_late ? -ETIMEDOUT : 0;
}
