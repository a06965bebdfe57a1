/* SPDX-License-Identifier: MIT */
/*
 * Everything at once, from a seed.  A guest reads, writes and discards pages while pages are demanded, drained, sent
 * twice, damaged or cut short, and while connections or the whole engine are replaced.  The test knows what every block
 * must hold, and asks the guest.
 */
#include "target_guest.h"

#define ROUNDS 6
#define STEPS 400
#define IN_FLIGHT 6

struct world {
	struct host host;
	uint64_t random;
	uint64_t pages, blocks;
	uint16_t *expected; /* version of each block, once its page has arrived */
	uint8_t *changed; /* blocks sent after the switchover */
	bool *stale, *busy; /* per page: not yet sent; the guest is executing an order */
	struct rig_frame *frame;
	struct {
		uint32_t id;
		uint64_t page;
		int expected;
	} orders[IN_FLIGHT];
	uint32_t in_flight;
	int next_version;
};

static uint64_t draw(struct world *world, uint64_t below)
{
	world->random ^= world->random << 13;
	world->random ^= world->random >> 7;
	world->random ^= world->random << 17;
	return world->random % below;
}

static void hear_answer(struct world *world)
{
	struct answer answer = hear(&world->host.guest);

	for (uint32_t i = 0; i < world->in_flight; i++) {
		if (world->orders[i].id != answer.id)
			continue;
		CHECK_EQUAL(answer.value, world->orders[i].expected);
		world->busy[world->orders[i].page] = false;
		world->orders[i] = world->orders[--world->in_flight];
		return;
	}
	CHECK(!"an answer nobody asked for");
}

static bool heard(struct world *world, int socket)
{
	struct pollfd poll_fd = {.fd = socket, .events = POLLIN};

	(void)world;
	return poll(&poll_fd, 1, 0) == 1;
}

static void send_order(struct world *world)
{
	uint64_t page = draw(world, world->pages), block = page * world->blocks + draw(world, world->blocks);
	int expected = world->expected[block];
	uint32_t kind = READ_BLOCK;
	uint64_t argument = 0;

	if (world->busy[page] || world->in_flight == IN_FLIGHT)
		return;
	switch (draw(world, 4)) {
	case 0:
		kind = WRITE_BLOCK;
		argument = world->expected[block] = (uint16_t)world->next_version++;
		expected = 0;
		/* The guest owns the whole block now. */
		break;
	case 1:
		kind = GIVE_BACK;
		block = page * world->blocks;
		argument = MADV_DONTNEED;
		expected = 0;
		break;
	default:
		break;
	}
	world->busy[page] = true;
	world->orders[world->in_flight].page = page;
	world->orders[world->in_flight].expected = expected;
	world->orders[world->in_flight++].id = tell(&world->host.guest, kind, block, argument);
}

static void build_page(struct world *world, uint64_t page, int version)
{
	int versions[MGD_CHUNK_BLOCKS];

	for (uint64_t i = 0; i < world->blocks; i++) {
		uint8_t changed = world->changed[page * world->blocks + i];

		versions[i] = !changed ? UNCHANGED : changed == 1 ? version : 0;
	}
	rig_build(world->frame, 0, page * world->blocks, (uint32_t)world->blocks, MGD_FRAME_FINAL, versions);
}

static void reconnect(struct world *world)
{
	struct host *host = &world->host;
	struct mgd_error err = {0};
	struct mgd_event event;
	uint8_t bits[128] = {0};

	close(host->bulk);
	close(host->urgent);
	if (draw(world, 4) == 0) {
		mgd_target_destroy(host->target);
		make_target(host, 1);
	} else {
		mgd_target_drop_streams(host->target);
		host->bulk = rig_stream(host->target, 0);
		host->urgent = rig_stream(host->target, MGD_STREAM_URGENT);
	}
	while (mgd_target_next_event(host->target, &event))
		CHECK(event.kind != MGD_EVENT_FAILED);
	CHECK_OK(mgd_target_lacking(host->target, 0, 0, bits, (world->pages + 7) / 8, &err), err);
	for (uint64_t page = 0; page < world->pages; page++)
		world->stale[page] = bits[page / 8] >> page % 8 & 1;
}

/* Send a page on one of the connections: intact, twice, damaged or cut short. */
static void send_stale(struct world *world, uint64_t page)
{
	int fd = draw(world, 2) ? world->host.bulk : world->host.urgent;
	int other = fd == world->host.bulk ? world->host.urgent : world->host.bulk;

	build_page(world, page, 2);
	switch (draw(world, 12)) {
	case 0: /* damaged */
		if (!world->frame->frame.payload_bytes)
			break;
		world->frame->payload[draw(world, world->frame->frame.payload_bytes / 8)] ^= 1ull << draw(world, 64);
		rig_send_built(fd, world->frame);
		while (rig_event(world->host.target, MGD_EVENT_STREAM_LOST).error.kind != MGD_ERR_PEER)
			;
		reconnect(world);
		return;
	case 1: /* cut short */
		rig_write(fd, world->frame->head, world->frame->head_bytes);
		rig_write(fd, world->frame->payload, draw(world, world->frame->frame.payload_bytes + 1));
		reconnect(world);
		return;
	case 2: /* on both connections at once */
		rig_send_built(other, world->frame);
		break;
	case 3: /* a page that has already arrived, with contents that must never be visible */
		for (uint64_t i = 0, done = draw(world, world->pages); i < 4; i++, done = (done + 1) % world->pages) {
			uint8_t byte;

			CHECK_EQUAL(pread(world->host.ledger, &byte, 1, (off_t)(4096 + done)), 1);
			if ((byte & 7) == 2)
				continue; /* still stale */
			build_page(world, done, 0x7777);
			rig_send_built(other, world->frame);
		}
		build_page(world, page, 2);
		break;
	default:
		break;
	}
	rig_send_built(fd, world->frame);
	world->stale[page] = false;
}

static void answer_demand(struct world *world)
{
	uint64_t page;

	if (!heard(world, world->host.urgent))
		return;
	page = rig_demand(world->host.urgent, &world->host.bounds, 1).first_block / world->blocks;
	if (world->stale[page])
		send_stale(world, page);
}

static void precopy(struct world *world)
{
	struct host *host = &world->host;
	struct mgd_error err = {0};
	uint8_t bits[128] = {0};

	for (uint64_t page = 0; page < world->pages; page++) {
		bool blank = draw(world, 4) == 0;

		world->stale[page] = draw(world, 2);
		for (uint64_t i = page * world->blocks; i < (page + 1) * world->blocks; i++) {
			world->expected[i] = !blank;
			world->changed[i] = world->stale[page] ? (draw(world, 3) == 0) + (draw(world, 9) == 0) : 0;
			if (world->changed[i])
				world->expected[i] = world->changed[i] == 1 ? 2 : 0;
		}
		if (!blank)
			send_page(host, host->bulk, page, 0, 1);
		bits[page / 8] |= (uint8_t)(world->stale[page] << page % 8);
	}
	rig_send_barrier(host->bulk, 1);
	rig_event(host->target, MGD_EVENT_BARRIER);
	CHECK_OK(mgd_target_stale_map(host->target, 0, 0, bits, (world->pages + 7) / 8, &err), err);
}

static void finish(struct world *world)
{
	struct mgd_target_stats stats;
	struct mgd_error err = {0};

	for (;;) {
		bool any = false;

		for (uint64_t page = 0; page < world->pages; page++) {
			any = any || world->stale[page];
			if (world->stale[page])
				send_stale(world, page);
		}
		if (!any)
			break;
	}
	RIG_UNTIL(world->host.target, stats, stats.stale_pages == 0);
	while (world->in_flight)
		hear_answer(world);
	if (draw(world, 2))
		CHECK_OK(mgd_target_release(world->host.target, &err), err);
	for (uint64_t page = 0; page < world->pages; page++) {
		int sum = 0;

		for (uint64_t i = page * world->blocks; i < (page + 1) * world->blocks; i++)
			sum += world->expected[i];
		CHECK_EQUAL(ask(&world->host.guest, READ_ALL, page * world->blocks, world->blocks), sum);
	}
}

static void round_of(uint64_t seed)
{
	struct world world = {.random = seed * 0x9e3779b97f4a7c15ull + 1, .next_version = 100};
	struct mgd_error err = {0};

	world.blocks = page_bytes_under_test / MGD_BLOCK_BYTES;
	world.pages = world.blocks == 1 ? 256 : 24;
	world.expected = calloc(world.pages * world.blocks, sizeof(*world.expected));
	world.changed = calloc(world.pages * world.blocks, 1);
	world.stale = calloc(world.pages, 1);
	world.busy = calloc(world.pages, 1);
	world.frame = malloc(sizeof(*world.frame));
	open_host_of(&world.host, world.pages, 2);
	precopy(&world);
	for (int i = 0; i < 3; i++)
		send_order(&world); /* held */
	CHECK_OK(mgd_target_switchover(world.host.target, &err), err);
	CHECK_OK(mgd_target_background(world.host.target, &err), err);
	for (int step = 0; step < STEPS; step++) {
		uint64_t page = draw(&world, world.pages);

		switch (draw(&world, 8)) {
		case 0:
			if (world.stale[page])
				send_stale(&world, page);
			break;
		case 1:
		case 2:
			answer_demand(&world);
			break;
		default:
			send_order(&world);
		}
		while (world.in_flight && heard(&world, world.host.guest.socket))
			hear_answer(&world);
	}
	finish(&world);
	close_host(&world.host);
	free(world.expected);
	free(world.changed);
	free(world.stale);
	free(world.busy);
	free(world.frame);
}

static void everything_at_once(void)
{
	const char *seed = getenv("MGD_SEED");

	for (uint64_t i = 1; i <= ROUNDS; i++) {
		uint64_t number = seed ? strtoull(seed, NULL, 10) : i;

		printf("  seed %llu\n", (unsigned long long)number);
		fflush(stdout);
		round_of(number);
		if (seed)
			break;
	}
}

int main(void)
{
	return run_on_page_sizes(everything_at_once, 24 + 2);
}
