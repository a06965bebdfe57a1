/* SPDX-License-Identifier: MIT */
/*
 * What a frame does to pages: claim them, write their memory, and make them current.  When a connection ends, this file
 * also undoes what is incomplete.
 *
 * Pre-copy frames are read from the socket straight into the alias.  If one is damaged, the migration ends, the guest
 * keeps running at the source, and what was written here is discarded with everything else.
 *
 * After the switchover a page that returns to stale must be as it was, because the source resends only what changed
 * since pre-copy.  So a damaged frame (perhaps one whose address is damaged) must not have written anything.  Payload
 * for a page with pre-copied data therefore goes through a scratch buffer and is copied once the check matches: it is
 * only the few changed blocks.  A BLANK page, for which nothing arrived in pre-copy, is usually sent whole; it is read
 * in place and zeroed again on failure, since all its other blocks are zeros or will be sent again.
 *
 * We write only pages that we have claimed; for any other page the payload is read and dropped.
 */
#include "target_receive.h"

#include "guard.h"

static uint32_t page_of(const struct target_receiver *receiver, uint32_t block)
{
	return (uint32_t)((receiver->frame.first_block + block) / receiver->region->page_blocks - receiver->first_page);
}

static uint8_t *block_address(const struct target_receiver *receiver, uint32_t block)
{
	return receiver->region->memory + (receiver->frame.first_block + block) * MGD_BLOCK_BYTES;
}

static uint64_t ledger_page(const struct target_receiver *receiver, uint64_t page)
{
	return receiver->region->first + receiver->first_page + page;
}

/* ---- routes: which pages a frame may write, and how */

static enum route claim(struct target_receiver *receiver, uint64_t page)
{
	uint8_t before;

	if (!mgd_ledger_claim(&receiver->target->ledger, page, &before))
		return ROUTE_DROP;
	return before & MGD_PAGE_BLANK ? ROUTE_IN_PLACE : ROUTE_SCRATCH;
}

static int route_large_page(struct target_receiver *receiver, struct mgd_error *err)
{
	uint64_t page = ledger_page(receiver, 0);

	if (receiver->frame.sequence == 0) {
		if (receiver->hold == HOLD_LARGE_PAGE)
			return mgd_violation(err, "page frame: page %" PRIu64 " begins in the middle of another",
					     receiver->first_page);
		receiver->hold = HOLD_LARGE_PAGE;
		receiver->large.page = page;
		receiver->large.next_sequence = 0;
		receiver->large.route = claim(receiver, page);
	}
	if (receiver->hold != HOLD_LARGE_PAGE || receiver->large.page != page ||
	    receiver->frame.sequence != receiver->large.next_sequence)
		return mgd_violation(err, "page frame: sequence %u of page %" PRIu64 " is out of order",
				     receiver->frame.sequence, receiver->first_page);
	receiver->route[0] = (uint8_t)receiver->large.route;
	return 0;
}

static int route_frame(struct target_receiver *receiver, struct mgd_error *err)
{
	struct mgd_target *target = receiver->target;
	const struct mgd_frame *frame = &receiver->frame;
	uint64_t last = frame->first_block + frame->block_count - 1;
	bool wanted = false;

	receiver->region = &target->regions[frame->region];
	receiver->first_page = frame->first_block / receiver->region->page_blocks;
	receiver->page_count = last / receiver->region->page_blocks - receiver->first_page + 1;
	if (!(frame->flags & MGD_FRAME_FINAL)) {
		for (uint64_t i = 0; i < receiver->page_count; i++) {
			if (mgd_page_state(mgd_ledger_get(&target->ledger, ledger_page(receiver, i))) == MGD_PAGE_STALE)
				return mgd_violation(err, "page frame: page %" PRIu64 " comes after the stale map",
						     (receiver->first_page + i));
			receiver->route[i] = ROUTE_IN_PLACE;
		}
		return 0;
	}
	if (receiver->region->page_blocks > MGD_CHUNK_BLOCKS) {
		if (route_large_page(receiver, err))
			return -1;
		wanted = receiver->route[0] != ROUTE_DROP;
	} else if (receiver->hold == HOLD_LARGE_PAGE) {
		return mgd_violation(err, "page frame: another page in the middle of a large one");
	} else {
		receiver->hold = HOLD_FRAME;
		for (uint64_t i = 0; i < receiver->page_count; i++) {
			receiver->route[i] = (uint8_t)claim(receiver, ledger_page(receiver, i));
			wanted = wanted || receiver->route[i] != ROUTE_DROP;
		}
	}
	if (!wanted)
		target_count(target, discarded_frames, 1);
	return 0;
}

/* Allocate memory for every page that the frame will write, before anything is read into it: an empty pool is then
 * an error of this stream, not a signal in the middle of a copy. */
static int back_frame(struct target_receiver *receiver, struct mgd_error *err)
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
		/* After the switchover do this for backed pages too: the guest may have punched them out meanwhile. */
		if (mgd_bit_test(frame->present, block))
			written[page] = final || !(byte & MGD_PAGE_BACKED);
		else if (mgd_bit_test(frame->zero, block))
			written[page] = final && (byte & MGD_PAGE_BACKED);
	}
	for (uint64_t page = 0, run; page < receiver->page_count; page += run) {
		for (run = 0; page + run < receiver->page_count && written[page + run]; run++)
			;
		if (run && target_back(receiver->target, receiver->region, receiver->first_page + page, run, err))
			return -1;
		if (!run)
			run = 1;
	}
	return 0;
}

/* ---- payload */

/* Set where each present block is read to. */
static void place_payload(struct target_receiver *receiver)
{
	const struct mgd_frame *frame = &receiver->frame;
	struct mgd_target *target = receiver->target;
	uint32_t count = 0;

	for (uint32_t block = 0; block < frame->block_count; block++) {
		if (!mgd_bit_test(frame->present, block))
			continue;
		receiver->at[count] = receiver->route[page_of(receiver, block)] == ROUTE_IN_PLACE
					      ? block_address(receiver, block)
					      : receiver->scratch + (size_t)count * MGD_BLOCK_BYTES;
		count++;
		if (!(frame->flags & MGD_FRAME_FINAL)) /* before it has contents: it is not BLANK from now on */
			mgd_ledger_received(&target->ledger, ledger_page(receiver, page_of(receiver, block)));
	}
	receiver->present_count = count;
}

static int take_payload(struct target_receiver *receiver, struct mgd_error *err)
{
	struct mgd_target *target = receiver->target;
	const struct mgd_frame *frame = &receiver->frame;

	place_payload(receiver);
	if (target_receive_payload(receiver, err))
		return -1;
	target_count(target, wire_bytes, frame->payload_bytes);
	target_count(target, payload_bytes, frame->payload_bytes);
	if (frame->check != mgd_frame_check(frame, receiver->hashes, target->secret))
		return mgd_violation(err, "page frame: region %u, block %" PRIu64 ": check is wrong", frame->region,
				     frame->first_block);
	return 0;
}

/* The check matches: copy scratch blocks into place, and zero the zero blocks that have memory. */
static void apply(struct target_receiver *receiver)
{
	const struct mgd_frame *frame = &receiver->frame;
	uint32_t count = 0;

	for (uint32_t block = 0; block < frame->block_count; block++) {
		uint32_t page = page_of(receiver, block);

		if (mgd_bit_test(frame->present, block)) {
			if (receiver->route[page] == ROUTE_SCRATCH)
				memcpy(block_address(receiver, block), receiver->at[count], MGD_BLOCK_BYTES);
			count++;
		} else if (mgd_bit_test(frame->zero, block) && receiver->route[page] != ROUTE_DROP) {
			uint8_t byte = mgd_ledger_get(&receiver->target->ledger, ledger_page(receiver, page));

			if (byte & MGD_PAGE_BACKED)
				memset(block_address(receiver, block), 0, MGD_BLOCK_BYTES);
		}
	}
}

struct taking {
	struct target_receiver *receiver;
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

/* Receive the payload and apply it to memory.  The guest (a balloon) may punch out a page that is being written, and
 * with it the memory from back_frame: if the pool is empty then, the next access raises SIGBUS. */
static int take_and_apply(struct target_receiver *receiver, struct mgd_error *err)
{
	struct taking taking = {.receiver = receiver, .err = err};

	receiver->torn = receiver->frame.flags & MGD_FRAME_FINAL;
	if (mgd_guarded(take, &taking)) {
		receiver->torn = receiver->torn && taking.result < 0;
		return taking.result;
	}
	return mgd_fail(err, MGD_ERR_POOL,
			"memory for page %" PRIu64
			" of region %u: discarded while it was received, and the pool is empty",
			receiver->first_page, receiver->frame.region);
}

/* ---- completed and abandoned pages */

/* Map the run of pages just settled into the guest, and answer those that a guest thread waits for. */
static void map_run(struct target_receiver *receiver, uint64_t page, uint64_t count, const bool *requested)
{
	struct mgd_target *target = receiver->target;
	uint64_t end = page + count, done;

	for (uint64_t at = page; at < end;) {
		int code = target_map(target, receiver->region, receiver->first_page + at, end - at, &done);

		at += done;
		if (target_map_leaves(code)) {
			at++;
			continue;
		}
		if (code == ESRCH)
			target_report_unmapped(target, receiver->region, receiver->first_page + at, code);
		if (code && code != EEXIST)
			break;
	}
	for (uint64_t at = page; at < end; at++) {
		if (!requested[at])
			continue;
		if (mgd_page_state(mgd_ledger_get(&target->ledger, ledger_page(receiver, at))) == MGD_PAGE_MAPPED) {
			target_fault_answered(target, ledger_page(receiver, at));
			continue;
		}
		target_fault_look_again(target);
	}
}

static void settle(struct target_receiver *receiver)
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
			atomic_fetch_sub(&receiver->region->stale_pages, 1);
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
		target_tell_all_current(target);
}

static void zero_block(void *block)
{
	memset(block, 0, MGD_BLOCK_BYTES);
}

/* Blank a BLANK page again if some of its blocks are damaged. */
static void blank_torn_blocks(struct target_receiver *receiver)
{
	for (uint32_t block = 0; block < receiver->frame.block_count; block++) {
		uint32_t page = page_of(receiver, block);

		if (receiver->route[page] != ROUTE_IN_PLACE || !mgd_bit_test(receiver->frame.present, block))
			continue;
		if (mgd_ledger_get(&receiver->target->ledger, ledger_page(receiver, page)) & MGD_PAGE_BACKED)
			/* It may have been punched out meanwhile: those are zeros, too. */
			(void)mgd_guarded(zero_block, block_address(receiver, block));
	}
}

void target_receive_give_up(struct target_receiver *receiver)
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

int target_receive_frame_pages(struct target_receiver *receiver, struct mgd_error *err)
{
	const struct mgd_frame *frame = &receiver->frame;

	if (route_frame(receiver, err) || back_frame(receiver, err) || take_and_apply(receiver, err))
		return -1;
	target_count(receiver->target, frames, 1);
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
