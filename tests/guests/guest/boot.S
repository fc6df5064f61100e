# The guest's kernel half: everything that needs CPL0.
#
# A software-assisted KVM emulates CPL0 one instruction at a time and knows few of them,
# but runs CPL3 natively. So the guest proper is Rust at CPL3, and this file is what it
# stands on: entry by the Linux 64-bit boot protocol (rsi = boot_params), descriptor and
# page tables, a trap for the privileged instructions, and the start of further CPUs.
#
# The trap is `ud2`, the one instruction whose exception every KVM delivers (`int`,
# `syscall` and port I/O at CPL3 are not): rax = call number, arguments in rdi, rsi, rdx,
# result in rax. Numbers: see cpu.rs.

.set CODE0, 0x08
.set DATA0, 0x10
.set DATA3, 0x1b
.set CODE3, 0x23
.set TASK, 0x28
.set TRAMPOLINE, 0x8000

.section .head, "ax"
.code64
head:
    # The 32-bit entry of a bzImage. Nobody may use it: stop visibly.
    cli
    hlt
    jmp head
    .org 0x100
.code32
    # The PVH entry (`spore_guests::pvh`): protected mode without paging, ebx = start info.
    cli
    cld
    lgdtl gdt_pointer
    mov $0x620, %eax
    mov %eax, %cr4
    mov $page_tables, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    ljmpl $CODE0, $pvh_long
.code64
    .org 0x200
.globl _start
_start:
    cli
    cld
    lgdt gdt_pointer
    mov $stack0_top, %rsp
    pushq $CODE0
    pushq $reload
    lretq
reload:
    mov $DATA0, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %rsi, %r15                  # boot_params
    mov $page_tables, %rax
    mov %rax, %cr3
    # SSE for CPL3: no emulation, no task switches, OSFXSR and OSXMMEXCPT.
    mov %cr0, %rax
    and $~0x6000000c, %eax
    or $0x2, %eax
    mov %rax, %cr0
    mov $0x620, %eax
    mov %rax, %cr4
    # The task segment's base is known only to the linker in parts, so it is patched.
    mov $task, %rax
    mov %ax, gdt + TASK + 2
    shr $16, %rax
    mov %al, gdt + TASK + 4
    mov %ah, gdt + TASK + 7
    mov $TASK, %eax
    ltr %ax
    # Vectors 0..47: exceptions, then the interrupts that `wait` can receive.
    mov $idt, %rdi
    mov $stubs, %rax
    mov $48, %ecx
1:  mov %ax, (%rdi)
    movw $CODE0, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    mov %rax, %rdx
    shr $16, %rdx
    mov %dx, 6(%rdi)
    movl $0, 8(%rdi)
    movl $0, 12(%rdi)
    add $16, %rdi
    add $16, %rax
    dec %ecx
    jnz 1b
    lidt idt_pointer
    mov %r15, %rdi
    mov $guest_main, %rax
    mov $stack3_top - 8, %rcx
    # Interrupts stay off at CPL3: only `wait` takes them.
enter3:
    pushq $DATA3
    pushq %rcx
    pushq $0x2
    pushq $CODE3
    pushq %rax
    iretq

.text
# What the start info says, retold as boot_params, so that the rest knows one story.
pvh_long:
    mov %ebx, %ebx
    mov $pvh_boot_params, %esi
    mov 24(%rbx), %rax
    mov %eax, 0x228(%rsi)           # command line
    mov 32(%rbx), %rax
    mov %rax, 0x70(%rsi)            # RSDP
    cmpl $0, 12(%rbx)
    je 1f
    mov 16(%rbx), %rdx              # the first module is the initramfs
    mov (%rdx), %rax
    mov %eax, 0x218(%rsi)
    mov 8(%rdx), %rax
    mov %eax, 0x21c(%rsi)
1:  mov 40(%rbx), %rdx              # memory map: entries of 24 bytes, of 20 there
    mov 48(%rbx), %ecx
    mov %cl, 0x1e8(%rsi)
    lea 0x2d0(%rsi), %rdi
2:  mov (%rdx), %rax
    mov %rax, (%rdi)
    mov 8(%rdx), %rax
    mov %rax, 8(%rdi)
    mov 16(%rdx), %eax
    mov %eax, 16(%rdi)
    add $24, %rdx
    add $20, %rdi
    dec %ecx
    jnz 2b
    jmp _start

.balign 16
stubs:
.set vector, 0
.rept 48
    .balign 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17
    .else
    pushq $0
    .endif
    pushq $vector
    jmp trap
    .set vector, vector + 1
.endr

# Stack: vector, error, rip, cs, rflags, rsp, ss.
trap:
    cmpl $32, (%rsp)
    jae interrupt
    cmpl $6, (%rsp)
    jne fault
    testb $3, 24(%rsp)
    jz fault
    add $16, %rsp
    addq $2, (%rsp)
    cmp $1, %eax
    jb call_out
    je call_in
    cmp $3, %eax
    jb call_rdmsr
    je call_wrmsr
    cmp $5, %eax
    jb call_cpuid
    je call_hang
    cmp $7, %eax
    jb call_wait
    je call_triple
    cmp $9, %eax
    jb call_outs
    je call_jump
    subq $2, (%rsp)
    sub $8, %rsp
    pushq $6
    jmp fault

call_out:
    mov %edi, %edx
    mov %esi, %eax
    out %al, %dx
    iretq
call_in:
    mov %edi, %edx
    xor %eax, %eax
    in %dx, %al
    iretq
call_rdmsr:
    mov %edi, %ecx
    rdmsr
    shl $32, %rdx
    or %rdx, %rax
    iretq
call_wrmsr:
    mov %edi, %ecx
    mov %esi, %eax
    mov %rsi, %rdx
    shr $32, %rdx
    wrmsr
    iretq
call_cpuid:
    mov %rdx, %r8
    mov %rbx, %r9
    mov %edi, %eax
    mov %esi, %ecx
    cpuid
    mov %eax, (%r8)
    mov %ebx, 4(%r8)
    mov %ecx, 8(%r8)
    mov %edx, 12(%r8)
    mov %r9, %rbx
    iretq
call_hang:
    cli
    hlt
    jmp call_hang
call_wait:
    # The interrupt shadow of `sti` covers the `hlt`, so no interrupt is lost between.
    sti
    hlt
    cli
    iretq
call_triple:
    lidt null_pointer
    ud2
call_outs:
    mov %rdx, %rcx
    mov %edi, %edx
    rep outsb
    iretq

call_jump:
    jmp *%rdi

interrupt:
    push %rax
    push %rcx
    mov 16(%rsp), %ecx
    sub $32, %ecx
    mov $1, %eax
    shl %cl, %eax
    or %eax, interrupts
    mov $0xfee000b0, %eax           # end of interrupt
    movl $0, (%rax)
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

# An exception becomes a call of guest_fault(vector, error, rip, cr2) at CPL3; a second
# one, or one at CPL0, ends the guest.
fault:
    cmpl $0, faulted
    jne call_triple
    movl $1, faulted
    pop %rdi
    pop %rsi
    pop %rdx
    mov %cr2, %rcx
    mov $stack0_top, %rsp
    mov $guest_fault, %rax
    mov $stack3_top - 8, %r8
    pushq $DATA3
    pushq %r8
    pushq $0x2
    pushq $CODE3
    pushq %rax
    iretq

# Further CPUs: copied to TRAMPOLINE, entered in real mode by the start-up interrupt.
.globl trampoline, trampoline_end
trampoline:
.code16
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl trampoline_gdt_pointer - trampoline
    mov $0x620, %eax
    mov %eax, %cr4
    mov $page_tables, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    and $~0x6000000c, %eax
    or $0x80000003, %eax
    mov %eax, %cr0
    ljmpl $CODE0, $ap_start
.balign 4
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:
.code64
ap_start:
    mov $DATA0, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    # Each CPU takes the next record of 16 bytes: CPUID.1 EBX, CPUID.1 EDX,
    # CPUID.B.0 EDX, CPUID.B.1 EBX.
    mov $1, %r8d
    lock xadd %r8d, ap_claimed
    mov %r8, %r9
    shl $4, %r9
    add $ap_records, %r9
    mov $1, %eax
    xor %ecx, %ecx
    cpuid
    mov %ebx, (%r9)
    mov %edx, 4(%r9)
    mov $0xb, %eax
    xor %ecx, %ecx
    cpuid
    mov %edx, 8(%r9)
    mov $0xb, %eax
    mov $1, %ecx
    cpuid
    mov %ebx, 12(%r9)
    lock incl ap_online
1:  cli
    hlt
    jmp 1b

# What the compiler takes for granted.
.globl memcpy, memmove, memset, memcmp, bcmp
memmove:
    mov %rdi, %rax
    sub %rsi, %rax
    cmp %rdx, %rax
    jae memcpy
    mov %rdi, %rax
    mov %rdx, %rcx
    lea -1(%rdi, %rdx), %rdi
    lea -1(%rsi, %rdx), %rsi
    std
    rep movsb
    cld
    ret
memcpy:
    mov %rdi, %rax
    mov %rdx, %rcx
    rep movsb
    ret
memset:
    mov %rdi, %r8
    mov %esi, %eax
    mov %rdx, %rcx
    rep stosb
    mov %r8, %rax
    ret
memcmp:
bcmp:
    xor %ecx, %ecx
1:  cmp %rdx, %rcx
    je 2f
    movzbl (%rdi, %rcx), %eax
    movzbl (%rsi, %rcx), %r8d
    inc %rcx
    sub %r8d, %eax
    jz 1b
    ret
2:  xor %eax, %eax
    ret

.section .tables, "aw"
.balign 4096
.globl page_tables
# Identity map of the first 16 GiB in 2 MiB pages, all of it open to CPL3.
page_tables:
    .quad directory_pointers + 7
    .fill 511, 8, 0
directory_pointers:
    .set i, 0
    .rept 16
    .quad directories + 4096 * i + 7
    .set i, i + 1
    .endr
    .fill 496, 8, 0
directories:
    .set i, 0
    .rept 16 * 512
    .quad i * 0x200000 + 0x87
    .set i, i + 1
    .endr
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # CODE0
    .quad 0x00cf93000000ffff        # DATA0
    .quad 0x00cff3000000ffff        # DATA3
    .quad 0x00affb000000ffff        # CODE3
    .quad 0x0000890000000067        # TASK, base patched at entry
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 48 * 16 - 1
    .quad idt
null_pointer:
    .word 0
    .quad 0
.balign 16
task:
    .long 0
    .quad stack0_top
    .fill 86, 1, 0
    .long 0
    .word 104

.bss
.balign 4096
pvh_boot_params:
    .skip 4096
.balign 16
idt:
    .skip 48 * 16
stack0:
    .skip 8192
stack0_top:
stack3:
    .skip 262144
stack3_top:
.globl interrupts, ap_online, ap_records
interrupts:
    .skip 4
faulted:
    .skip 4
ap_claimed:
    .skip 4
ap_online:
    .skip 4
ap_records:
    .skip 64 * 16
