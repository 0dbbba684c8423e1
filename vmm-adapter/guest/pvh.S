/* Entry of the PVH guest. The VMM starts us in 32-bit protected mode, flat, paging off, interrupts off, with the address of
   the start info in ebx; all we need is a stack. The note tells the VMM that this is what we want. */
    .section .note, "a", @note
    .align 4
    .long 4                 /* bytes of the name */
    .long 4                 /* bytes of the value */
    .long 18                /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long entry

    .section .text.entry, "ax"
    .code32
    .globl entry
entry:
    cli
    cld
    movl $stack_end, %esp
    pushl %ebx
    call guest_main
1:  hlt
    jmp 1b

    .section .bss
    .align 16
    .skip 4096
stack_end:

    .section .note.GNU-stack, "", @progbits
