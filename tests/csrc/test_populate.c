/* SPDX-License-Identifier: MIT */
/*
 * test_populate — which pages an agent may touch beyond the limit, and for whom a successor takes that to be so.
 *
 * Build: this file and the data plane; -Icsrc. A client here is its ring alone.
 */
#include <stdlib.h>

#include "base.h"
#include "check.h"
#include "client.h"

#define FIRST_PAGE 0x7f1234567ULL

static struct client *client;

static void make_client(uint32_t posted, uint32_t done)
{
	client = calloc(1, sizeof *client);
	CHECK(client);
	client->ring = calloc(1, sizeof *client->ring);
	CHECK(client->ring);
	client->posted = posted;
	client->ring->done = done;
}

static void free_client(void)
{
	free(client->ring);
	free(client);
}

static struct vswap_command *command_at(uint32_t number) { return &client->ring->commands[number % VSWAP_RING_COMMANDS]; }

static void post(uint32_t number, uint32_t operation, uint64_t page, uint32_t pages)
{
	struct vswap_command *command = command_at(number);

	command->operation = operation;
	command->run_count = 1;
	command->runs[0] = (struct vswap_run){ .address = address_of(page), .pages = pages };
}

static void test_only_its_pages(void)
{
	make_client(1, 0);
	post(0, VSWAP_POPULATE, FIRST_PAGE, 3);
	CHECK(!client_is_populated(client, FIRST_PAGE));
	client_populates(client, 0, command_at(0));
	CHECK(client_is_populated(client, FIRST_PAGE) && client_is_populated(client, FIRST_PAGE + 2));
	CHECK(!client_is_populated(client, FIRST_PAGE - 1) && !client_is_populated(client, FIRST_PAGE + 3));
	client->populating = false;
	CHECK(!client_is_populated(client, FIRST_PAGE));
	free_client();
}

/* The ring is the client's memory. */
static void test_lies(void)
{
	unsigned pages = 0;

	make_client(1, 0);
	command_at(0)->operation = VSWAP_POPULATE;
	command_at(0)->run_count = UINT32_MAX;
	for (unsigned i = 0; i < VSWAP_RUNS_MAX; i++)
		command_at(0)->runs[i] = (struct vswap_run){ .address = address_of(FIRST_PAGE + i * 1000), .pages = 40 };
	client_populates(client, 0, command_at(0));
	for (uint64_t page = FIRST_PAGE; page < FIRST_PAGE + VSWAP_RUNS_MAX * 1000; page++)
		pages += client_is_populated(client, page);
	CHECK(pages == BATCH_PAGES_MAX);
	free_client();
}

/* `behind`: RELEASEs of other batches that were posted after it. */
static void test_successor(uint32_t first, unsigned behind, bool answered)
{
	uint32_t posted = first + 1 + behind;

	make_client(posted, answered ? posted : first);
	post(first, VSWAP_POPULATE, FIRST_PAGE, 1);
	for (uint32_t number = first + 1; number != posted; number++)
		post(number, VSWAP_RELEASE, FIRST_PAGE + 500, 1);
	client_may_populate(client);
	CHECK(client->populating && client->populate_number == posted - 1);
	CHECK(client_is_populated(client, FIRST_PAGE) == !answered);
	CHECK(!client_is_populated(client, FIRST_PAGE + 500));
	free_client();
}

int main(int argc, char **argv)
{
	(void)test_seed(argc, argv);
	test_only_its_pages();
	test_lies();
	for (unsigned behind = 0; behind < VSWAP_RING_COMMANDS; behind++) {
		test_successor(100, behind, false);
		test_successor(UINT32_MAX - 3, behind, false); /* numbers go around */
		test_successor(100, behind, true);
	}
	return 0;
}
