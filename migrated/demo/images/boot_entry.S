/* SPDX-License-Identifier: MIT */
/*
 * Boot sector of the test guest: reads the sectors behind it, asks the firmware for the memory map (E820), maps all
 * memory one to one with 2 MiB pages, enters long mode and runs load_main (boot_load.c) in ring 3, with all ports
 * allowed.  It uses ring 3 because a KVM without hardware support emulates ring 0 one instruction at a time, thousands
 * of times slower.
 *
 * Low memory: 0x0500 memory map (count, then 24-byte entries), stack below 0x7000, 0x7c00 image, 0x10000 page
 * tables: one page for the top, one for the next level, one for each GiB.
 */
#define MAP_COUNT 0x0500
#define MAP 0x0508
#define MAP_MOST 64
#define STACK 0x7000
#define TOP 0x10000
#define POINTERS 0x11000
#define DIRECTORIES 0x12000
#define GIBIBYTES 64

	.section .boot, "ax"
	.code16
	.globl entry
entry:
	ljmp	$0, $1f
1:	cli
	xor	%ax, %ax
	mov	%ax, %ds
	mov	%ax, %es
	mov	%ax, %ss
	mov	$STACK, %sp
	sti
	cld
	mov	%dl, drive

	mov	$0x42, %ah	/* extended read: no geometry to guess */
	mov	$packet, %si
	int	$0x13
	jc	failed

	/* Read the memory map from the firmware, entry by entry. */
	movl	$0, MAP_COUNT
	mov	$MAP, %di
	xor	%ebx, %ebx
2:	mov	$0xe820, %eax
	mov	$0x534d4150, %edx
	mov	$24, %ecx
	int	$0x15
	jc	3f
	cmp	$0x534d4150, %eax
	jne	failed
	incl	MAP_COUNT
	add	$24, %di
	cmpl	$MAP_MOST, MAP_COUNT
	je	3f
	test	%ebx, %ebx
	jnz	2b
3:
	cli
	mov	$0xff, %al	/* no interrupts from here on */
	out	%al, $0x21
	out	%al, $0xa1
	in	$0x92, %al	/* the twenty-first address line */
	or	$2, %al
	and	$0xfe, %al
	out	%al, $0x92
	lgdt	gdt_pointer
	mov	%cr0, %eax
	or	$1, %al
	mov	%eax, %cr0
	ljmpl	$8, $protected

failed:
	mov	$0x0e21, %ax	/* '!' on the firmware's screen; nothing else can be said here */
	int	$0x10
	hlt
	jmp	failed

drive:	.byte 0
	.balign 4
packet:	.byte 16, 0
	.word image_sectors
	.word 0x7e00, 0
	.quad 1

	.balign 8
gdt:	.quad 0
	.quad 0x00cf9a000000ffff	/* 8: 32-bit code */
	.quad 0x00cf92000000ffff	/* 16: data */
	.quad 0x00af9a000000ffff	/* 24: 64-bit code */
	.quad 0x00affa000000ffff	/* 32: 64-bit code, ring 3 */
	.quad 0x00cff2000000ffff	/* 40: data, ring 3 */
gdt_pointer:
	.word . - gdt - 1
	.long gdt

	.org 510
	.word 0xaa55

	.text
	.code32
protected:
	mov	$16, %ax
	mov	%ax, %ds
	mov	%ax, %es
	mov	%ax, %ss

	mov	$TOP, %edi
	mov	$(DIRECTORIES - TOP) / 4, %ecx
	xor	%eax, %eax
	rep stosl
	movl	$POINTERS + 7, TOP

	/* Directory n at DIRECTORIES + 4096 n; entry i of all of them maps 2 MiB number i. */
	mov	$POINTERS, %edi
	mov	$DIRECTORIES + 7, %eax
	mov	$GIBIBYTES, %ecx
4:	mov	%eax, (%edi)
	movl	$0, 4(%edi)
	add	$4096, %eax
	add	$8, %edi
	loop	4b
	mov	$DIRECTORIES, %edi
	mov	$0x87, %eax	/* present, writable, for ring 3, 2 MiB */
	xor	%edx, %edx
	mov	$GIBIBYTES * 512, %ecx
5:	mov	%eax, (%edi)
	mov	%edx, 4(%edi)
	add	$0x200000, %eax
	adc	$0, %edx
	add	$8, %edi
	loop	5b

	mov	$TOP, %eax
	mov	%eax, %cr3
	mov	%cr4, %eax
	or	$0x20, %eax	/* PAE */
	mov	%eax, %cr4
	mov	$0xc0000080, %ecx	/* EFER.LME */
	rdmsr
	or	$0x100, %eax
	wrmsr
	mov	%cr0, %eax
	or	$0x80000000, %eax
	mov	%eax, %cr0
	ljmp	$24, $long_mode

	.code64
long_mode:
	mov	$STACK, %rsp
	mov	$bss_start, %rdi
	mov	$bss_end, %rcx
	sub	%rdi, %rcx
	xor	%eax, %eax
	rep stosb

	/* No interrupt table: interrupts stay disabled, and a fault of our own ends in a reset. */
	lidt	idt_pointer
	push	$40 + 3
	push	$STACK
	push	$0x3002		/* every port, no interrupts */
	push	$32 + 3
	push	$load_main
	iretq

	.balign 8
idt_pointer:
	.word 0
	.quad 0

	.section .note.GNU-stack, "", @progbits
