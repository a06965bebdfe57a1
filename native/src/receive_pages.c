/* SPDX-License-Identifier: MIT */
/*
 * What a frame does to pages.
 *
 * Pre-copy frames are read from the socket straight into the alias.  If one turns out damaged, the session ends, the guest
 * runs on at the source, and what was written here is thrown away with everything else.
 *
 * After the switch-over a page that goes back to stale must be as it was: the source sends again only what changed since
 * pre-copy.  So a damaged frame (or one damaged in its own address) must not have written anything.  Payload of a page
 * that holds pre-copied data therefore goes through a scratch buffer and is copied once the check is right: it is
 * changed blocks only, a few.  A BLANK page, for which nothing came in pre-copy, is read in place, whole pages that they
 * usually are, and on failure zeroed again: all its other blocks are zeros or sent anew.
 *
 * A page claimed by nobody but us is written; for any other the payload is read and dropped.
 */
#include <errno.h>
#include <string.h>

#include "error.h"
#include "guard.h"
#include "receive.h"

static bool bit(const uint64_t *bitmap, uint32_t index)
{
	return bitmap[index / 64] >> (index % 64) & 1;
}

static uint32_t page_of(const struct mgd_receiver *receiver, uint32_t block)
{
	return (uint32_t)((receiver->frame.first_block + block) / receiver->alias->page_blocks - receiver->first_page);
}

static uint8_t *block_address(const struct mgd_receiver *receiver, uint32_t block)
{
	return receiver->alias->memory + (receiver->frame.first_block + block) * MGD_BLOCK_BYTES;
}

static uint64_t ledger_page(const struct mgd_receiver *receiver, uint64_t page)
{
	return receiver->alias->first + receiver->first_page + page;
}

/* ---- which pages a frame may write, and how */

static enum route claim(struct mgd_receiver *receiver, uint64_t page)
{
	uint8_t before;

	if (!mgd_ledger_claim(&receiver->target->ledger, page, &before))
		return ROUTE_DROP;
	return before & MGD_PAGE_BLANK ? ROUTE_IN_PLACE : ROUTE_SCRATCH;
}

static int route_large_page(struct mgd_receiver *receiver, struct mgd_error *err)
{
	uint64_t page = ledger_page(receiver, 0);

	if (receiver->frame.sequence == 0) {
		if (receiver->hold == HOLD_LARGE_PAGE)
			return mgd_fail(err, MGD_ERR_PEER, "page frame: page %llu begins in the middle of another",
					(unsigned long long)receiver->first_page);
		receiver->hold = HOLD_LARGE_PAGE;
		receiver->large.page = page;
		receiver->large.next_sequence = 0;
		receiver->large.route = claim(receiver, page);
	}
	if (receiver->hold != HOLD_LARGE_PAGE || receiver->large.page != page ||
	    receiver->frame.sequence != receiver->large.next_sequence)
		return mgd_fail(err, MGD_ERR_PEER, "page frame: sequence %u of page %llu is out of order",
				receiver->frame.sequence, (unsigned long long)receiver->first_page);
	receiver->route[0] = (uint8_t)receiver->large.route;
	return 0;
}

static int route_frame(struct mgd_receiver *receiver, struct mgd_error *err)
{
	struct mgd_target *target = receiver->target;
	const struct mgd_frame *frame = &receiver->frame;
	uint64_t last = frame->first_block + frame->block_count - 1;
	bool wanted = false;

	receiver->alias = &target->aliases[frame->region];
	receiver->first_page = frame->first_block / receiver->alias->page_blocks;
	receiver->page_count = last / receiver->alias->page_blocks - receiver->first_page + 1;
	if (!(frame->flags & MGD_FRAME_FINAL)) {
		for (uint64_t i = 0; i < receiver->page_count; i++) {
			if (mgd_page_state(mgd_ledger_get(&target->ledger, ledger_page(receiver, i))) == MGD_PAGE_STALE)
				return mgd_fail(err, MGD_ERR_PEER, "page frame: page %llu comes after the stale map",
						(unsigned long long)(receiver->first_page + i));
			receiver->route[i] = ROUTE_IN_PLACE;
		}
		return 0;
	}
	if (receiver->alias->page_blocks > MGD_CHUNK_BLOCKS) {
		if (route_large_page(receiver, err) < 0)
			return -1;
		wanted = receiver->route[0] != ROUTE_DROP;
	} else if (receiver->hold == HOLD_LARGE_PAGE) {
		return mgd_fail(err, MGD_ERR_PEER, "page frame: another page in the middle of a large one");
	} else {
		receiver->hold = HOLD_FRAME;
		for (uint64_t i = 0; i < receiver->page_count; i++) {
			receiver->route[i] = (uint8_t)claim(receiver, ledger_page(receiver, i));
			wanted = wanted || receiver->route[i] != ROUTE_DROP;
		}
	}
	if (!wanted)
		atomic_fetch_add_explicit(&target->discarded_frames, 1, memory_order_relaxed);
	return 0;
}

/* Memory for every page the frame is going to write, before anything is read into it: an empty pool is an error of this
 * stream then, not a signal in the middle of a copy. */
static int back_frame(struct mgd_receiver *receiver, struct mgd_error *err)
{
	const struct mgd_frame *frame = &receiver->frame;
	bool final = frame->flags & MGD_FRAME_FINAL;
	bool written[MGD_CHUNK_BLOCKS] = {false};

	for (uint32_t block = 0; block < frame->block_count; block++) {
		uint32_t page = page_of(receiver, block);
		uint8_t byte;

		if (written[page] || receiver->route[page] == ROUTE_DROP)
			continue;
		byte = mgd_ledger_get(&receiver->target->ledger, ledger_page(receiver, page));
		/* After the switch-over backed pages too: the guest may have punched them out meanwhile. */
		if (bit(frame->present, block))
			written[page] = final || !(byte & MGD_PAGE_BACKED);
		else if (bit(frame->zero, block))
			written[page] = final && (byte & MGD_PAGE_BACKED);
	}
	for (uint64_t page = 0, run; page < receiver->page_count; page += run) {
		for (run = 0; page + run < receiver->page_count && written[page + run]; run++)
			;
		if (run && mgd_alias_back(receiver->target, receiver->alias, receiver->first_page + page, run, err) < 0)
			return -1;
		if (!run)
			run = 1;
	}
	return 0;
}

/* ---- payload */

/* Where each present block is to be read to. */
static void place_payload(struct mgd_receiver *receiver)
{
	const struct mgd_frame *frame = &receiver->frame;
	struct mgd_target *target = receiver->target;
	uint32_t count = 0;

	for (uint32_t block = 0; block < frame->block_count; block++) {
		if (!bit(frame->present, block))
			continue;
		receiver->at[count] = receiver->route[page_of(receiver, block)] == ROUTE_IN_PLACE
					      ? block_address(receiver, block)
					      : receiver->scratch + (size_t)count * MGD_BLOCK_BYTES;
		count++;
		if (!(frame->flags & MGD_FRAME_FINAL)) /* before it holds anything: it is not BLANK, come what may */
			mgd_ledger_received(&target->ledger, ledger_page(receiver, page_of(receiver, block)));
	}
	receiver->present_count = count;
}

static int take_payload(struct mgd_receiver *receiver, struct mgd_error *err)
{
	struct mgd_target *target = receiver->target;
	const struct mgd_frame *frame = &receiver->frame;

	place_payload(receiver);
	if (mgd_receive_payload(receiver, err) < 0)
		return -1;
	atomic_fetch_add_explicit(&target->wire_bytes, frame->payload_bytes, memory_order_relaxed);
	atomic_fetch_add_explicit(&target->payload_bytes, frame->payload_bytes, memory_order_relaxed);
	if (frame->check != mgd_frame_check(frame, receiver->hashes, target->secret))
		return mgd_fail(err, MGD_ERR_PEER, "page frame: region %u, block %llu: check is wrong", frame->region,
				(unsigned long long)frame->first_block);
	return 0;
}

/* The frame is good: what was read aside goes to its place, and zero blocks are zeroed where there is memory. */
static void apply(struct mgd_receiver *receiver)
{
	const struct mgd_frame *frame = &receiver->frame;
	uint32_t count = 0;

	for (uint32_t block = 0; block < frame->block_count; block++) {
		uint32_t page = page_of(receiver, block);

		if (bit(frame->present, block)) {
			if (receiver->route[page] == ROUTE_SCRATCH)
				memcpy(block_address(receiver, block), receiver->at[count], MGD_BLOCK_BYTES);
			count++;
		} else if (bit(frame->zero, block) && receiver->route[page] != ROUTE_DROP) {
			uint8_t byte = mgd_ledger_get(&receiver->target->ledger, ledger_page(receiver, page));

			if (byte & MGD_PAGE_BACKED)
				memset(block_address(receiver, block), 0, MGD_BLOCK_BYTES);
		}
	}
}

struct taking {
	struct mgd_receiver *receiver;
	struct mgd_error *err;
	int result;
};

static void take(void *argument)
{
	struct taking *taking = argument;

	taking->result = take_payload(taking->receiver, taking->err);
	if (taking->result == 0)
		apply(taking->receiver);
}

/* The payload, and what it does to memory.  The guest may punch out a page that is just being written (a balloon does), and
 * back_frame's memory with it: if the pool is empty then, the next touch is SIGBUS. */
static int take_and_apply(struct mgd_receiver *receiver, struct mgd_error *err)
{
	struct taking taking = {.receiver = receiver, .err = err};

	receiver->torn = receiver->frame.flags & MGD_FRAME_FINAL;
	if (mgd_guarded(take, &taking)) {
		receiver->torn = receiver->torn && taking.result < 0;
		return taking.result;
	}
	return mgd_fail(err, MGD_ERR_POOL,
			"memory for page %llu of region %u: given back while it came in, and the pool is empty",
			(unsigned long long)receiver->first_page, receiver->frame.region);
}

/* ---- pages complete, or given up */

/* Put the run of just settled pages into the guest; see to those a guest thread waits for. */
static void map_run(struct mgd_receiver *receiver, uint64_t page, uint64_t count, const bool *requested)
{
	struct mgd_target *target = receiver->target;
	uint64_t end = page + count, done;

	for (uint64_t at = page; at < end;) {
		int code = mgd_resolve(target, receiver->alias, receiver->first_page + at, end - at, &done);

		at += done;
		if (mgd_resolve_leaves(code)) {
			at++;
			continue;
		}
		if (code == ESRCH)
			mgd_resolve_report(target, receiver->alias, receiver->first_page + at, code);
		if (code && code != EEXIST)
			break;
	}
	for (uint64_t at = page; at < end; at++) {
		if (!requested[at])
			continue;
		if (mgd_page_state(mgd_ledger_get(&target->ledger, ledger_page(receiver, at))) == MGD_PAGE_MAPPED) {
			mgd_fault_answered(target, ledger_page(receiver, at));
			continue;
		}
		atomic_store(&target->look_again, true);
		mgd_target_kick(target);
	}
}

static void settle(struct mgd_receiver *receiver)
{
	struct mgd_target *target = receiver->target;
	bool requested[MGD_CHUNK_BLOCKS] = {false};
	bool last = false, any_last = false;
	uint64_t run = 0;

	receiver->hold = HOLD_NOTHING;
	for (uint64_t page = 0; page < receiver->page_count; page++) {
		uint8_t before = 0;

		if (receiver->route[page] != ROUTE_DROP &&
		    mgd_ledger_settle(&target->ledger, ledger_page(receiver, page), &before, &last)) {
			requested[page] = before & MGD_PAGE_REQUESTED;
			atomic_fetch_sub(&receiver->alias->stale_pages, 1);
			any_last = any_last || last;
			run++;
			continue;
		}
		if (run)
			map_run(receiver, page - run, run, requested);
		run = 0;
	}
	if (run)
		map_run(receiver, receiver->page_count - run, run, requested);
	if (any_last)
		mgd_target_all_current(target);
}

static void zero_block(void *block)
{
	memset(block, 0, MGD_BLOCK_BYTES);
}

/* A BLANK page whose blocks are not all right becomes blank again. */
static void blank_torn_blocks(struct mgd_receiver *receiver)
{
	for (uint32_t block = 0; block < receiver->frame.block_count; block++) {
		uint32_t page = page_of(receiver, block);

		if (receiver->route[page] != ROUTE_IN_PLACE || !bit(receiver->frame.present, block))
			continue;
		if (mgd_ledger_get(&receiver->target->ledger, ledger_page(receiver, page)) & MGD_PAGE_BACKED)
			/* Or punched out meanwhile: that is zeros, too. */
			(void)mgd_guarded(zero_block, block_address(receiver, block));
	}
}

void mgd_receive_give_up(struct mgd_receiver *receiver)
{
	struct mgd_ledger *ledger = &receiver->target->ledger;

	if (receiver->torn)
		blank_torn_blocks(receiver);
	receiver->torn = false;
	switch (receiver->hold) {
	case HOLD_NOTHING:
		break;
	case HOLD_FRAME:
		for (uint64_t page = 0; page < receiver->page_count; page++)
			if (receiver->route[page] != ROUTE_DROP)
				mgd_ledger_unclaim(ledger, ledger_page(receiver, page));
		break;
	case HOLD_LARGE_PAGE:
		if (receiver->large.route != ROUTE_DROP)
			mgd_ledger_unclaim(ledger, receiver->large.page);
		break;
	}
	receiver->hold = HOLD_NOTHING;
}

int mgd_receive_frame_pages(struct mgd_receiver *receiver, struct mgd_error *err)
{
	const struct mgd_frame *frame = &receiver->frame;

	if (route_frame(receiver, err) < 0 || back_frame(receiver, err) < 0 || take_and_apply(receiver, err) < 0)
		return -1;
	atomic_fetch_add_explicit(&receiver->target->frames, 1, memory_order_relaxed);
	if (!(frame->flags & MGD_FRAME_FINAL))
		return 0;
	if (receiver->hold == HOLD_LARGE_PAGE) {
		receiver->large.next_sequence++;
		if (!(frame->flags & MGD_FRAME_PAGE_END))
			return 0;
	}
	settle(receiver);
	return 0;
}
