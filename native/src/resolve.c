/* SPDX-License-Identifier: MIT */
/* UFFDIO_CONTINUE: putting a current page into the guest, whatever the kernel answers. */
#include <errno.h>
#include <sys/ioctl.h>

#include "error.h"
#include "target.h"
#include "uapi.h"

uint64_t mgd_resolve_address(const struct mgd_target *target, const struct mgd_alias *alias, uint64_t page,
			     uint64_t *out_count)
{
	uint32_t region = (uint32_t)(alias - target->aliases);
	uint64_t offset = page * alias->page_bytes;

	for (uint32_t i = 0; i < target->mapping_count; i++) {
		const struct mgd_mapping *mapping = &target->mappings[i];

		if (mapping->region != region || offset < mapping->offset ||
		    offset - mapping->offset >= mapping->length_bytes)
			continue;
		*out_count = (mapping->length_bytes - (offset - mapping->offset)) / alias->page_bytes;
		return mapping->address + (offset - mapping->offset);
	}
	*out_count = 0;
	return 0;
}

void mgd_resolve_wake(struct mgd_target *target, uint64_t address, uint64_t bytes)
{
	struct uffdio_range range = {.start = address, .len = bytes};

	/* Fails only where nobody can wait: the range is gone, or the guest. */
	(void)ioctl(atomic_load(&target->uffd), UFFDIO_WAKE, &range);
}

static void note_mapped(struct mgd_target *target, struct mgd_alias *alias, uint64_t page, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		mgd_ledger_mapped(&target->ledger, alias->first + page + i);
}

int mgd_resolve(struct mgd_target *target, struct mgd_alias *alias, uint64_t page, uint64_t count, uint64_t *out_done)
{
	int uffd = atomic_load(&target->uffd);
	uint64_t done = 0, most = count;
	bool existed = false;

	*out_done = 0;
	if (uffd < 0)
		return ENXIO;
	while (done < count) {
		struct uffdio_continue arg = {.mode = 0};
		uint64_t fits, mapped;
		int code;

		arg.range.start = mgd_resolve_address(target, alias, page + done, &fits);
		if (!fits)
			return ENXIO;
		fits = fits < count - done ? fits : count - done;
		arg.range.len = (fits < most ? fits : most) * alias->page_bytes;
		code = ioctl(uffd, UFFDIO_CONTINUE, &arg) ? errno : 0;
		mapped = !code ? arg.range.len : arg.mapped > 0 ? (uint64_t)arg.mapped : 0;
		if (mapped > arg.range.len)
			mapped = 0; /* never written by the kernel: an early failure */
		mapped /= alias->page_bytes;
		note_mapped(target, alias, page + done, mapped);
		done += mapped;
		*out_done = done;
		if (!code || (code == EAGAIN && mapped))
			continue; /* partly done: the next try tells why */
		if (code == EINTR)
			continue;
		if (code == ENOENT && arg.range.len > alias->page_bytes) {
			most = 1; /* the guest has split its mapping, and one call fills one piece of it */
			continue;
		}
		if (code != EEXIST)
			return code;
		/* Mapped by someone else just before; CONTINUE has woken nobody then. */
		mgd_resolve_wake(target, arg.range.start, alias->page_bytes);
		note_mapped(target, alias, page + done, 1);
		existed = true;
		*out_done = ++done;
	}
	return existed ? EEXIST : 0;
}

int mgd_resolve_poison(struct mgd_target *target, const struct mgd_alias *alias, uint64_t page)
{
	struct mgd_uffdio_poison arg = {.range = {.len = alias->page_bytes}};
	uint64_t fits;

	arg.range.start = mgd_resolve_address(target, alias, page, &fits);
	if (!fits || !ioctl(atomic_load(&target->uffd), MGD_UFFDIO_POISON, &arg) || errno == EEXIST)
		return 0;
	return errno;
}

void mgd_resolve_report(struct mgd_target *target, struct mgd_alias *alias, uint64_t page, int code)
{
	struct mgd_error error = {0};
	uint32_t region = (uint32_t)(alias - target->aliases);
	uint64_t fits, address = mgd_resolve_address(target, alias, page, &fits);

	if (atomic_load(&target->releasing))
		return; /* unregistered meanwhile, as it should be */
	if (code == ESRCH) {
		if (atomic_exchange(&target->guest_gone, true))
			return;
		mgd_fail_errno(&error, ESRCH, "UFFDIO_CONTINUE: the guest process has ended");
		error.kind = MGD_ERR_GUEST_GONE;
	} else {
		if (atomic_exchange(&target->mapping_changed, true))
			return;
		mgd_fail_errno(&error, code, "UFFDIO_CONTINUE: region %u, page %llu at %#llx", region,
			       (unsigned long long)page, (unsigned long long)address);
	}
	mgd_event_post(&target->events, MGD_EVENT_FAILED, 0, 0, &error);
}
