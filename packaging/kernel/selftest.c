/* PID 1 of packaging/kernel/selftest: says for each thing that a Spore guest relies on
 * whether this kernel has it, then powers off. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <linux/keyctl.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <mqueue.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int failures;
static char text[1 << 17];

static void check(const char *kind, const char *name, int ok) {
    printf("%s %s %s\n", ok ? "ok" : "FAILED", kind, name);
    failures += !ok;
}

static const char *contents(const char *path) {
    int fd = open(path, O_RDONLY);
    ssize_t size = fd < 0 ? 0 : read(fd, text + 1, sizeof text - 3);
    close(fd);
    /* Words and lines can then be looked for with a separator on both sides. */
    text[0] = '\n';
    text[size > 0 ? size + 1 : 1] = 0;
    for (char *c = text; *c; c++)
        if (*c == ' ' || *c == '\t')
            *c = '\n';
    return text;
}

static void words(const char *kind, const char *path, const char *const *names) {
    const char *all = contents(path);
    char word[64];
    for (; *names; names++) {
        snprintf(word, sizeof word, "\n%s\n", *names);
        check(kind, *names, strstr(all, word) != NULL);
    }
}

static int allows_device_programs(void) {
    struct bpf_insn code[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .imm = 1}, {.code = BPF_JMP | BPF_EXIT}};
    union bpf_attr attr = {0};
    attr.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE;
    attr.insns = (unsigned long)code;
    attr.insn_cnt = 2;
    attr.license = (unsigned long)"Apache-2.0";
    return syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof attr) >= 0;
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    check("mount", "cgroup2", !mount("cgroup", "/sys/fs/cgroup", "cgroup2", 0, NULL));
    mkdir("/dev/pts", 0755);
    check("mount", "devpts", !mount("devpts", "/dev/pts", "devpts", 0, NULL));
    mkdir("/dev/mqueue", 0755);
    check("mount", "mqueue", !mount("mqueue", "/dev/mqueue", "mqueue", 0, NULL));
    check("mount", "tmpfs", !mount("tmpfs", "/tmp", "tmpfs", 0, NULL));

    words("controller", "/sys/fs/cgroup/cgroup.controllers",
          (const char *[]){"cpuset", "cpu", "io", "memory", "hugetlb", "pids", "misc", NULL});
    words("filesystem", "/proc/filesystems",
          (const char *[]){"ext4", "erofs", "overlay", "fuse", "virtiofs", "hugetlbfs", "binfmt_misc", NULL});

    const char *const paths[] = {
        "/proc/self/ns/uts", "/proc/self/ns/ipc", "/proc/self/ns/user", "/proc/self/ns/pid",
        "/proc/self/ns/net", "/proc/self/ns/time", "/proc/self/ns/cgroup", "/proc/self/ns/mnt",
        "/proc/pressure/memory", "/proc/config.gz", "/proc/sysrq-trigger", "/proc/self/io",
        "/dev/console", "/dev/ttyS0", "/dev/fuse", "/dev/vsock", "/dev/net/tun", "/dev/loop-control",
        "/proc/sys/net/ipv6", "/proc/sys/net/bridge", "/proc/sys/net/netfilter", "/proc/net/ip_tables_names",
        "/sys/bus/virtio/drivers/virtio_blk", "/sys/bus/virtio/drivers/virtio_net",
        "/sys/bus/virtio/drivers/virtio_rng", "/sys/bus/virtio/drivers/virtio_balloon",
        "/sys/bus/virtio/drivers/virtiofs", "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport",
        "/sys/bus/platform/drivers/virtio-mmio", "/sys/bus/acpi/drivers/button",
        "/sys/bus/acpi/devices/LNXPWRBN:00", NULL};
    for (const char *const *path = paths; *path; path++)
        check("path", *path, !access(*path, F_OK));

    unsigned action = SECCOMP_RET_USER_NOTIF;
    check("syscall", "seccomp filter", !syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action));
    check("syscall", "bpf cgroup device program", allows_device_programs());
    struct io_uring_params params = {0};
    check("syscall", "io_uring_setup", syscall(SYS_io_uring_setup, 4, &params) >= 0);
    check("syscall", "userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC) >= 0);
    check("syscall", "session keyring", syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, "x") > 0);
    check("syscall", "landlock", syscall(SYS_landlock_create_ruleset, NULL, 0, 1) > 0);
    check("syscall", "memfd_create", memfd_create("x", MFD_CLOEXEC) >= 0);
    check("syscall", "mq_open", mq_open("/x", O_CREAT | O_RDWR, 0600, NULL) != (mqd_t)-1);
    check("socket", "netfilter netlink", socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER) >= 0);
    check("socket", "inet6", socket(AF_INET6, SOCK_STREAM, 0) >= 0);
    check("socket", "packet", socket(AF_PACKET, SOCK_RAW, 0) >= 0);
    /* Before the unshare below: in a user namespace of its own a process may not read the log. */
    int size = klogctl(3, text, sizeof text - 1);
    text[size > 0 ? size : 0] = 0;
    check("log", "no ACPI error", size > 0 && !strstr(text, "ACPI Error") && !strstr(text, "ACPI: Unable"));
    check("log", "no warning of the kernel", !strstr(text, "WARNING:") && !strstr(text, "BUG:"));

    check("syscall", "unshare of every namespace",
          !unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWUSER |
                   CLONE_NEWCGROUP | CLONE_NEWTIME));

    printf("END %d\n", failures);
    reboot(RB_POWER_OFF);
    return 1;
}
