# A disk of one sector that proves an accelerator: it goes from real mode
# through protected mode to long mode with paging, takes a timer interrupt
# there, and ends QEMU through isa-debug-exit at port 0xf4.
#
# An accelerator that opens but cannot run a guest fails at one of these.
#
#   as --32 probe.s -o probe.o
#   ld -m elf_i386 -Ttext 0x7c00 --oformat binary -e start probe.o -o probe.bin
#
# accelerator.rs holds a test that the two files belong together.

        .equ PML4, 0x1000
        .equ PDPT, 0x2000
        .equ PD,   0x3000
        .equ IDT,  0x4000

        .code16
        .globl start
start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp
        cld
        # Tables: zero 0x1000..0x5000, then map the first 2 MiB to itself.
        movw    $PML4, %di
        movw    $0x2000, %cx
        rep stosw
        movw    $(PDPT | 3), PML4
        movw    $(PD | 3), PDPT
        movw    $0x83, PD
        # The gate of vector 0x20: code segment 8, present, interrupt gate.
        movw    $timer, IDT + 0x20 * 16
        movw    $8, IDT + 0x20 * 16 + 2
        movw    $0x8e00, IDT + 0x20 * 16 + 4
        # Interrupt controllers: IRQ 0 becomes vector 0x20, everything else is masked.
        movb    $0x11, %al
        outb    %al, $0x20
        outb    %al, $0xa0
        movb    $0x20, %al
        outb    %al, $0x21
        movb    $0x28, %al
        outb    %al, $0xa1
        movb    $4, %al
        outb    %al, $0x21
        movb    $2, %al
        outb    %al, $0xa1
        movb    $1, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        movb    $0xfe, %al
        outb    %al, $0x21
        movb    $0xff, %al
        outb    %al, $0xa1
        # A tick each millisecond or so.
        movb    $0x34, %al
        outb    %al, $0x43
        movb    $0xa9, %al
        outb    %al, $0x40
        movb    $0x04, %al
        outb    %al, $0x40

        lgdt    gdt_pointer
        lidt    idt_pointer
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $24, $protected

        .code32
protected:
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movl    %cr4, %eax
        orl     $0x20, %eax             # PAE
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       # EFER: long mode
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000000, %eax       # paging
        movl    %eax, %cr0
        ljmpl   $8, $long_mode

        # From here the bytes are 64-bit code; each of these instructions has
        # the same encoding in both modes, so that a 32-bit assembler will do.
long_mode:
        sti
wait:
        hlt
        jmp     wait

timer:
        movb    $0x31, %al              # QEMU exits with 0x31 << 1 | 1 = 99
        outb    %al, $0xf4
        hlt
        jmp     timer

        .balign 8
gdt:
        .quad   0
        .quad   0x00af9a000000ffff      #  8: 64-bit code
        .quad   0x00cf92000000ffff      # 16: data
        .quad   0x00cf9a000000ffff      # 24: 32-bit code
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt
idt_pointer:
        .word   0x0fff
        .long   IDT

        .org    510
        .word   0xaa55
