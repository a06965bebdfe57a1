/* SPDX-License-Identifier: MIT */
/*
 * Boot sector of the test guest: reads the sectors behind it, asks the firmware for the memory map (E820), maps all memory
 * one to one with 2 MiB pages, goes to long mode and calls load_main (boot_load.c).
 *
 * Low memory: 0x0500 memory map (count, then 24-byte entries), 0x7000 stack below, 0x7c00 image, 0xf000 interrupt table,
 * 0x10000 page tables: one page for the top, one for the next level, one for each GiB.
 */
#define MAP_COUNT 0x0500
#define MAP 0x0508
#define MAP_MOST 64
#define STACK 0x7000
#define IDT 0xf000
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

	/* The memory map, as the firmware tells it entry by entry. */
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
	mov	$0xff, %al	/* no interrupt until boot_load.c wants one */
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
	movl	$POINTERS + 3, TOP

	/* Directory n at DIRECTORIES + 4096 n; entry i of all of them maps 2 MiB number i. */
	mov	$POINTERS, %edi
	mov	$DIRECTORIES + 3, %eax
	mov	$GIBIBYTES, %ecx
4:	mov	%eax, (%edi)
	movl	$0, 4(%edi)
	add	$4096, %eax
	add	$8, %edi
	loop	4b
	mov	$DIRECTORIES, %edi
	mov	$0x83, %eax	/* present, writable, 2 MiB */
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

	/* Vector 32 is the timer, which only ends a hlt; all others are fatal: a null gate gives a triple fault and a reset. */
	mov	$IDT, %rdi
	mov	$512, %ecx
	rep stosq
	mov	$timer, %rax
	mov	%ax, IDT + 32 * 16
	movw	$24, IDT + 32 * 16 + 2
	movw	$0x8e00, IDT + 32 * 16 + 4
	lidt	idt_pointer
	call	load_main
6:	hlt
	jmp	6b

timer:
	push	%rax
	mov	$0x20, %al
	out	%al, $0x20
	pop	%rax
	iretq

	.balign 8
idt_pointer:
	.word 33 * 16 - 1
	.quad IDT

	.section .note.GNU-stack, "", @progbits
